"""Memory that a run frees: kept for its next step, and returned at its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from selfvil import allocator

FAULTS = """
import resource

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes([i]) * 2**22 for i in range(40)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

def steps():
    return [step() for _ in range(6)][3:]
"""


def outcome(code: str, **variables: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", Path(allocator.__file__).read_text() + FAULTS + code],  # a small process, without torch
        capture_output=True, text=True, timeout=120, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


pytestmark = pytest.mark.skipif("linux" not in sys.platform, reason="only glibc has these settings")


def test_steps_find_the_memory_of_the_step_before():
    returned, kept = outcome("plain = steps()\nwith kept_memory():\n  print([plain, steps()])")
    assert max(kept) < 100
    assert min(returned) > 10_000, "otherwise this machine does not need it"


def test_memory_is_returned_at_the_end_and_a_context_within_changes_nothing():
    inside, faults, after = outcome(
        "with kept_memory():\n  with kept_memory(): steps()\n  inside = resident()\n  faults = step()\n"
        "print([inside, faults, resident()])"
    )
    assert faults < 100
    assert after < inside - 100


@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_a_setting_of_the_user_rules(variable):
    value = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}.get(variable, "1000000")
    assert min(outcome("with kept_memory(): print(steps())", **{variable: value})) > 10_000


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    with allocator.kept_memory():
        assert not allocator._keeping
