"""Requests to stop: by signals, between micro-batches, during an evaluation, during start-up and in a thread."""

import os
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch

import runs
from selfvil import checkpoint, pretrain, stop
from selfvil.evaluate import features
from selfvil.objectives.mae import MAE
from selfvil.stop import SIGNALS, Interrupted, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop_and_a_later_one_interrupts(monkeypatch, capfd, number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.agreed()
        assert request.reason == number.name
        assert f"{number.name}: stopping after this micro-batch; again to stop now" in capfd.readouterr().err
        os.kill(os.getpid(), number)  # passed on by a launcher: the same request
        monkeypatch.setattr(request, "SAME_SIGNAL", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_interrupts_work_that_may_be_discarded():
    with StopRequest() as request:
        began = time.monotonic()
        with pytest.raises(Interrupted), request.interrupts():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        assert time.monotonic() - began < 15
        with pytest.raises(Interrupted), request.interrupts():
            raise AssertionError("asked before it began")
    assert request.reason == "SIGTERM"


def test_a_stop_takes_effect_between_micro_batches(digit_shards, tmp_path, monkeypatch):
    """The stop takes effect after the third of eight micro-batches of step 4; the state after step 3 is saved."""
    more = ["optim.accumulate=8", "budget.steps=5", "model.drop_path_rate=0.2", "monitor.log_every=1"]
    pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "straight", *more))
    calls = 0
    original = MAE.forward

    def forward(self, batch, progress):
        nonlocal calls
        calls += self.training
        if self.training and calls == 3 * 8 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, progress)

    monkeypatch.setattr(MAE, "forward", forward)
    summary = pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "stopped", *more))
    assert calls == 3 * 8 + 3
    assert (summary.step, summary.finished) == (3, False)
    assert checkpoint.newest(tmp_path / "stopped" / "checkpoints").step == 3
    assert pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "stopped", *more)).finished
    runs.assert_same_state(tmp_path / "straight", tmp_path / "stopped")


def test_running_statistics_of_a_discarded_step_are_not_saved(digit_shards, tmp_path, monkeypatch):
    from selfvil.objectives.lejepa import LeJEPA
    from test_unused import overrides

    more = ["optim.accumulate=2", "budget.steps=3"]
    arguments = [overrides("lejepa", "test_resnet", digit_shards, tmp_path / name, *more) for name in ("a", "b")]
    pretrain.pretrain(pretrain_recipe(arguments[0]))
    calls = 0
    original = LeJEPA.forward

    def forward(self, batch, progress):
        nonlocal calls
        calls += self.training
        if self.training and calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, progress)

    monkeypatch.setattr(LeJEPA, "forward", forward)
    assert pretrain.pretrain(pretrain_recipe(arguments[1])).step == 1
    assert pretrain.pretrain(pretrain_recipe(arguments[1])).finished
    runs.assert_same_state(tmp_path / "a", tmp_path / "b")


def pretrain_recipe(arguments):
    from selfvil.recipe import load

    return load(runs.PACKAGED["lejepa"], arguments)


def test_a_signal_ends_an_evaluation(digit_shards, tmp_path, monkeypatch, capsys):
    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(features, "ordered_batches", slow)
    more = ["eval.knn.every=2", "budget.steps=6", f"eval.knn.train={digit_shards}/digits-000000.tar"]
    more += [f"eval.knn.test={digit_shards}/digits-000001.tar"]
    began = time.monotonic()
    summary = pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "run", *more))
    assert time.monotonic() - began < 50
    assert summary.step == 2
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2
    printed = capsys.readouterr().out
    assert "the evaluation knn was abandoned" in printed
    assert "stopped after step 2 (SIGTERM)" in printed


def test_a_notebook_trains_again_with_another_precision_and_in_a_thread(digit_shards, tmp_path, caplog):
    torch.manual_seed(3)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    for name, precision in (("first", "fp32"), ("second", "bf16"), ("third", "fp32")):
        more = ["budget.steps=2", f"run.precision={precision}", "run.threads=2"]
        recipe = runs.small("mae", digit_shards, tmp_path / name, *more)
        assert pretrain.pretrain(recipe).finished
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    found = []
    recipe = runs.small("mae", digit_shards, tmp_path / "thread", "budget.steps=2", "run.threads=2", "data.workers=1")
    thread = threading.Thread(target=lambda: found.append(pretrain.pretrain(recipe)))
    thread.start()
    thread.join(120)
    assert found
    assert found[0].finished
    assert [record.message for record in caplog.records if "signals" in record.message]
    runs.assert_same_state(tmp_path / "first", tmp_path / "third")
    runs.assert_same_state(tmp_path / "first", tmp_path / "thread")


def test_the_users_own_accelerator_still_works_after_a_run(digit_shards, tmp_path):
    from accelerate import Accelerator

    mine = Accelerator(cpu=True)
    pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=1", "run.precision=bf16"))
    assert mine.mixed_precision == "no"
    assert mine.is_main_process


@pytest.mark.slow
def test_processes_started_by_a_scheduler_end_with_the_status_for_a_requeue(digit_shards, tmp_path):
    """Started as by launch/slurm/pretrain.sh, without a launcher; all processes get SIGUSR1, workers too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = runs.overrides("mae", digit_shards, tmp_path / "run", "budget.steps=100000", "data.workers=1")
    processes = [
        subprocess.Popen(
            runs.command("mae", *arguments), cwd=runs.REPOSITORY, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=runs.environment(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in "01"
    ]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    for process in processes:
        os.killpg(process.pid, signal.SIGUSR1)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [stop.STOPPED] * 2, printed
    assert "(SIGUSR1): the state is saved" in printed[0]
    assert "Traceback" not in printed[0] + printed[1]


@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_ctrl_c_during_start_up_is_quiet(digit_shards, tmp_path, seconds):
    arguments = runs.overrides("mae", digit_shards, tmp_path / "run", "budget.steps=100000")
    process = subprocess.Popen(
        runs.command("mae", *arguments), cwd=runs.REPOSITORY, env=runs.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    assert process.returncode in ((130, -signal.SIGINT) if "images," not in printed else (stop.STOPPED, 130))
