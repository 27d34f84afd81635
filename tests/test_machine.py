"""Free memory under the limits of containers and clusters, and the limit of a process."""

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from selfvil import machine

CPU = torch.device("cpu")
GIB = 2**30
MEMORY = {
    "0::": ("", "memory.max", "memory.current", "inactive_file {}\nactive_file {}\nanon 7"),
    "4:cpu,memory:": (
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        "inactive_file 5\ntotal_inactive_file {}\ntotal_active_file {}",
    ),
}  # fmt: skip
"""For each version of control groups, as a line of /proc/self/cgroup begins: the files of a group."""


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function that makes this process a member of the groups of some lines, below tmp_path."""
    found = partial(machine._groups, membership=tmp_path / "membership", root=tmp_path)
    monkeypatch.setattr(machine, "_groups", found)
    return lambda *lines: (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def memory_group(root: Path, kind: str, path: str, limit: object, used: int, cached: tuple[int, int] = (0, 0)) -> None:
    top, of_limit, of_use, stat = MEMORY[kind]
    write(root / top / path, **{of_limit: limit, of_use: used, "memory.stat": stat.format(*cached)})


@pytest.mark.parametrize("kind", MEMORY)
def test_every_limit_above_a_job_counts(tmp_path, groups, kind):
    """As of Slurm: the limit of the job is two groups above the process."""
    unlimited = "max" if kind == "0::" else 2**63 - 4096
    memory_group(tmp_path, kind, "job_7", 8 * GIB, 6 * GIB, cached=(GIB, GIB))
    memory_group(tmp_path, kind, "job_7/step_0", 20 * GIB, 6 * GIB)
    memory_group(tmp_path, kind, "job_7/step_0/task_0", unlimited, 6 * GIB)
    groups("9:name=systemd:/", "3:cpuset:/job_7", f"{kind}/job_7/step_0/task_0")
    found = list(machine._free_in_groups())
    assert min(found) == 4 * GIB, "8 less 6, of which 2 are cached files"
    assert 14 * GIB in found


@pytest.mark.parametrize("kind", MEMORY)
def test_a_container_sees_its_own_group_as_the_top(tmp_path, groups, kind):
    memory_group(tmp_path, kind, "", 3 * GIB, GIB)
    groups(f"{kind}/")
    assert list(machine._free_in_groups()) == [2 * GIB]
    groups(f"{kind}/a/group/of/the/host")
    assert list(machine._free_in_groups()) == [2 * GIB], "its folder is not in the container"


def test_without_groups_the_machine_is_the_limit(groups):
    assert list(machine._free_in_groups()) == [], "no file at all"
    groups("0::/", "4:memory:/none")
    assert list(machine._free_in_groups()) == list(machine._cores_of_groups()) == []


def test_a_quota_is_a_number_of_cores(tmp_path, groups):
    write(tmp_path / "pod", cpu__max="350000 100000")
    write(tmp_path / "pod" / "box", cpu__max="max 100000")
    write(tmp_path / "cpu" / "pod", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    write(tmp_path / "cpu" / "free", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    for line, expected in (("0::/pod/box", [3]), ("2:cpu,cpuacct:/pod", [0]), ("2:cpu,cpuacct:/free", [])):
        groups(line)
        assert list(machine._cores_of_groups()) == expected
    groups("2:cpu,cpuacct:/pod")
    assert machine.usable_cores() == 1, "half a core"


def test_only_cores_of_the_job_count(monkeypatch):
    """As `taskset` and Slurm set them."""
    command = "from selfvil.machine import usable_cores; print(usable_cores())"
    one = str(min(os.sched_getaffinity(0)))
    found = subprocess.run(
        ["taskset", "-c", one, sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert found.stdout == "1\n"
    assert machine.usable_cores() <= len(os.sched_getaffinity(0))


def test_the_least_limit_holds(monkeypatch):
    available = psutil.virtual_memory().available
    assert 0 < machine.free_host_bytes() < 1.2 * available
    monkeypatch.setattr(machine, "_free_in_groups", lambda: iter([GIB, 2 * GIB]))
    assert machine.free_host_bytes() == min(GIB, psutil.virtual_memory().available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_bytes(CPU) == machine.free_host_bytes() // 4


def test_more_memory_than_is_free_is_an_error_instead_of_the_end_of_the_process(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2**28)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    for take in (lambda: torch.empty(2**29, dtype=torch.uint8), lambda: bytearray(2**29)):
        with pytest.raises(MemoryError), machine.memory_limit(CPU):
            take()
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        take()
    with pytest.raises(RuntimeError, match="size"), machine.memory_limit(CPU):
        torch.zeros(2) @ torch.zeros(3)
    with machine.memory_limit(torch.device("meta")):
        torch.empty(2**29, dtype=torch.uint8)
    with pytest.raises(MemoryError), machine.memory_limit(torch.device("meta")):
        raise torch.OutOfMemoryError("CUDA out of memory")
