"""A store that fails during a run of two processes: none hangs, and the same command continues exactly."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from http_store import serve
from runs import PACKAGED, REPOSITORY, environment, overrides
from selfvil import checkpoint
from selfvil.data.index import open_shards
from selfvil.data.pack import pack

EPOCH = ["budget.steps=5", "run.checkpoint_every=2", "data.window=1", "optim.accumulate=1"]


@pytest.fixture(scope="module")
def small_shards(digit_shards, tmp_path_factory):
    """The 200 digits in ten shards. A step of 40 images is two of them."""
    folder = tmp_path_factory.mktemp("ten") / "shards"
    pack(str(digit_shards / "digits-*.tar"), folder, name="s", samples_per_shard=20, workers=1)
    open_shards(folder)
    return folder


@pytest.fixture
def served(small_shards):
    with serve(small_shards) as server:
        yield server


def run(server, out: Path, *more: str, **environ: str) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = overrides("mae", server.folder, out, *EPOCH, f"data.train={server.url}/s-{{000000..000009}}.tar", *more)
    return subprocess.run(
        [sys.executable, *torchrun, "tests/impatient.py", PACKAGED["mae"], *arguments],
        cwd=REPOSITORY, env=environment(XDG_CACHE_HOME=str(out.parent / "user"), **environ),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def taken(out: Path) -> list[tuple[int, list[int]]]:
    """Take the records of the launch: (step, ids of its images on one process)."""
    records = []
    for file in out.glob("seen-*"):
        records += [(line["step"], line["ids"]) for line in map(json.loads, file.read_text().splitlines())]
        file.unlink()
    return records


def assert_failed(failed: subprocess.CompletedProcess, server) -> None:
    """torchrun reports the status of the process that failed first, and ends the others. That it returned within its
    time means that none is left: each has the pipe of its output."""
    assert failed.returncode == 1
    assert re.search(r"Root Cause.*exitcode\s*: 2 ", failed.stderr, re.DOTALL), failed.stderr
    assert f"selfvil: {server.url}/s-" in failed.stderr
    assert "Run the same command again when the store answers" in failed.stderr


@pytest.mark.parametrize(
    ("who", "workers"),
    [("all", 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in [("one", 0), ("all", 1)])],
)
def test_no_process_hangs_and_the_same_command_continues(served, tmp_path, who, workers):
    out, more = tmp_path / "run", [f"data.workers={workers}"]
    if who == "all":
        served.fail_after = 7
        failed = run(served, out, *more, PATIENCE="1")
    else:  # the other one is in a collective when this process ends
        more += ["data.cache_gb=0.000001"]
        failed = run(served, out, *more, PATIENCE="1", LOSES_NETWORK="1:70")
    saved = checkpoint.newest(out / "checkpoints")
    assert_failed(failed, served)
    assert saved.step in (2, 4)
    seen = [record for record in taken(out) if record[0] < saved.step]

    served.fail_after = None
    continued = run(served, out, *more, PATIENCE="1")
    assert continued.returncode == 0, continued.stderr
    assert f"continuing after step {saved.step}" in continued.stdout
    seen += taken(out)
    assert sorted(step for step, _ in seen) == [step for step in range(5) for _ in range(2)]
    assert sorted(image for _, ids in seen for image in ids) == list(range(200))


@pytest.mark.slow
def test_no_process_hangs_where_the_store_fails_from_the_start(served, tmp_path):
    served.fail_after = 0
    assert_failed(run(served, tmp_path / "run", PATIENCE="1"), served)
    served.fail_after = None
    continued = run(served, tmp_path / "run", PATIENCE="1")
    assert continued.returncode == 0, continued.stderr
