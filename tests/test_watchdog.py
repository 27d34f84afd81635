"""Runs without progress end within a time limit, print where they hang, and save their state if possible."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from runs import REPOSITORY, command, environment, overrides, small, wait_for_steps
from selfvil import checkpoint
from selfvil.monitor import observers
from selfvil.pretrain import pretrain
from selfvil.watchdog import STALLED

SHORT = ["budget.steps=100000", "run.stall_minutes=0.2", "run.checkpoint_every=100000", "monitor.log_every=1"]


def start(arguments, processes=1) -> subprocess.Popen:
    return subprocess.Popen(
        command("mae", *arguments, processes=processes), cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def descendants(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until_gone(processes, seconds=90) -> None:
    _gone, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive


def test_a_stopped_data_worker_ends_the_run_with_its_state_saved(digit_shards, tmp_path):
    arguments = overrides("mae", digit_shards, tmp_path / "run", *SHORT, "data.workers=1")
    process = start(arguments)
    wait_for_steps(process)
    workers = descendants(process)
    assert workers
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    rest = process.communicate(timeout=180)[0]
    assert process.returncode == STALLED, rest
    assert re.search(r"process 0 of 1 on \S+ has made no progress for \S+ minutes .* stage: waiting for a batch", rest)
    assert "most recent call first" in rest
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None, rest
    assert f"the state after the last complete step is saved in {saved.folder}" in rest
    wait_until_gone(workers)
    assert continues(digit_shards, tmp_path / "run", saved.step)


def continues(digit_shards, run, step) -> bool:
    """Whether a run continues from the saved state."""
    recipe = small("mae", digit_shards, run, *SHORT, "budget.pause_minutes=1e-6")
    return pretrain(recipe).step == step + 1


@pytest.mark.slow
def test_a_stopped_process_ends_the_others(digit_shards, tmp_path):
    arguments = overrides("mae", digit_shards, tmp_path / "run", *SHORT)
    process = start(arguments, processes=2)
    wait_for_steps(process)
    ranks = descendants(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGSTOP)
    rest = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert "process 0 of 2" in rest
    assert "stage: computing a step" in rest
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None, rest
    wait_until_gone(ranks)


@pytest.mark.parametrize("workers", [1])
def test_no_process_remains_after_the_launcher_is_killed(digit_shards, tmp_path, workers):
    arguments = overrides("mae", digit_shards, tmp_path / "run", *SHORT, f"data.workers={workers}")
    process = start(arguments, processes=2)
    wait_for_steps(process)
    ranks = descendants(process)
    assert len(ranks) >= 2 + 2 * workers
    os.kill(process.pid, signal.SIGKILL)
    rest = process.communicate(timeout=180)[0]
    wait_until_gone(ranks)
    assert "(the launcher ended" in rest
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_a_run_that_makes_progress_is_not_ended(digit_shards, tmp_path, monkeypatch):
    """All stages together take longer than the limit, and scoring may take six times the limit of a step."""
    monkeypatch.setattr(observers, "run_evaluations", lambda *_, **__: time.sleep(3) or {"knn_20": 1.0})
    more = [f"eval.knn.train={digit_shards}/digits-000000.tar", f"eval.knn.test={digit_shards}/digits-000001.tar"]
    recipe = small("mae", digit_shards, tmp_path / "run", "budget.steps=2", "run.stall_minutes=0.035", *more)
    assert pretrain(recipe).finished
