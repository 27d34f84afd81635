"""A run that was stopped and continued equals an uninterrupted one, bit for bit: student, teacher, optimizer, order.

200 images in steps of 40: an epoch is 5 steps, so most of these stops fall in the middle of one.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runs import REPOSITORY, assert_same_state, command, environment, launch, overrides, small, state, wait_for_steps
from selfvil import checkpoint
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe
from selfvil.records import read_metrics
from selfvil.stop import STOPPED

STEPS = 120
# What would differ if any randomness or schedule depended on where a run began.
UNSTEADY = {
    "mae": ["model.drop_path_rate=0.2"],
    "simmim": ["model.drop_path_rate=0.2"],
    "autoregressive": ["model.drop_path_rate=0.2"],
    "dino": ["model.drop_path_rate=0.2", "optim.accumulate=2", "objective.freeze_last_layer_epochs=0.4"],
    "ibot": ["model.drop_path_rate=0.2", "optim.accumulate=2", "objective.centring=sinkhorn"],
    "dinov2": ["model.drop_path_rate=0.2", "optim.accumulate=2", "objective.gram_weight=1", "objective.gram_start=0.3"],
    "distill": ["model.drop_path_rate=0.2", "optim.accumulate=2", "objective.mask_ratio=0.4"],
    "lejepa": ["model.drop_path_rate=0.2", "optim.accumulate=2"],
    "ijepa": ["model.drop_path_rate=0.2", "optim.accumulate=2", "objective.target_layers=2"],
    "visreg": ["model.drop_path_rate=0.2", "optim.accumulate=2"],
}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", list(UNSTEADY))
def test_a_paused_run_continues_bit_for_bit(digit_shards, tmp_path, objective, workers):
    """Stopped after steps 1, 2 and 3, then after step 5, at which a checkpoint is due."""
    more = [f"data.workers={workers}", "budget.steps=7", "monitor.log_every=7", *UNSTEADY[objective]]
    pretrain(small(objective, digit_shards, tmp_path / "straight", *more))
    for _ in range(3):
        pretrain(small(objective, digit_shards, tmp_path / "paused", *more, "budget.pause_minutes=1e-6"))
    paused = checkpoint.newest(tmp_path / "paused" / "checkpoints")
    assert paused is not None
    assert paused.step == 3
    pretrain(small(objective, digit_shards, tmp_path / "paused", *more))
    assert_same_state(tmp_path / "straight", tmp_path / "paused")
    assert paused.meta["export"] == ("teacher" if objective in ("dino", "ibot", "dinov2", "ijepa") else "student")


def test_a_run_of_a_version_without_the_newer_keys_continues(digit_shards, tmp_path, monkeypatch, caplog):
    """Keys of a recipe that a checkpoint lacks have their default, which is what the earlier version did."""
    whole = Recipe.as_record

    def as_before(recipe):
        record = whole(recipe)
        for key in ("order", "window", "cache", "cache_gb", "stats", "channel_drop", "decode"):
            del record["data"][key]
        del record["monitor"]["picture_channels"]
        return record

    more = "budget.steps=3", "monitor.log_every=3"
    pretrain(small("mae", digit_shards, tmp_path / "straight", *more))
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "as_record", as_before)
        pretrain(small("mae", digit_shards, tmp_path / "run", *more, "budget.pause_minutes=1e-6"))
    pretrain(small("mae", digit_shards, tmp_path / "run", *more, "data.decode=exact", "budget.pause_minutes=1e-6"))
    assert "data.decode" not in caplog.text
    pretrain(small("mae", digit_shards, tmp_path / "run", *more))
    assert "data.decode is scaled, and was exact" in caplog.text
    assert_same_state(tmp_path / "straight", tmp_path / "run")


def test_a_finished_run_is_not_changed(digit_shards, tmp_path):
    recipe = small("mae", digit_shards, tmp_path / "run", "budget.steps=2")
    first = pretrain(recipe)
    before, record = state(tmp_path / "run"), (tmp_path / "run" / "run.json").read_text()
    again = pretrain(recipe)
    assert again.finished
    assert again.loss == first.loss
    assert (tmp_path / "run" / "run.json").read_text() == record
    assert all((tensor == before[key]).all() for key, tensor in state(tmp_path / "run").items())


@pytest.fixture(scope="module", params=["mae", pytest.param("dino", marks=pytest.mark.slow)])
def straight(request, digit_shards, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """An objective, an uninterrupted run of it in another process, and its settings."""
    out = tmp_path_factory.mktemp("straight") / "run"
    more = [f"budget.steps={STEPS}", "run.checkpoint_every=40", *UNSTEADY[request.param]]
    launched = launch(request.param, *overrides(request.param, digit_shards, out, *more))
    assert launched.returncode == 0, launched.stderr
    return request.param, out, more


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_finishes(digit_shards, straight, tmp_path, number):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the data workers as well."""
    objective, untouched, more = straight
    arguments = overrides(objective, digit_shards, tmp_path / "run", *more, "data.workers=1")
    process = subprocess.Popen(
        command(objective, *arguments), cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(process)
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == STOPPED, rest
    stopped = re.search(rf"stopped after step (\d+) \({number.name}\): the state is saved", rest)
    assert stopped, rest
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == int(stopped[1]) < STEPS
    assert launch(objective, *arguments).returncode == 0
    assert_same_state(untouched, tmp_path / "run")
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_a_killed_run_continues_from_its_last_checkpoint(digit_shards, straight, tmp_path):
    objective, untouched, more = straight
    arguments = overrides(objective, digit_shards, tmp_path / "run", *more)
    process = subprocess.Popen(
        command(objective, *arguments), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while checkpoint.newest(tmp_path / "run" / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    killed = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert killed is not None
    assert killed.step < STEPS
    assert launch(objective, *arguments).returncode == 0
    assert_same_state(untouched, tmp_path / "run")


def test_ctrl_c_to_two_processes_and_their_launcher_saves_once(digit_shards, tmp_path):
    """torchrun forwards the signal to processes that already received it: this must not interrupt the save."""
    arguments = overrides("mae", digit_shards, tmp_path / "run", f"budget.steps={STEPS}", "data.workers=1")
    process = subprocess.Popen(
        command("mae", *arguments, processes=2), cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(process)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    stopped = re.search(r"stopped after step (\d+) \(SIGINT\): the state is saved", rest)
    assert stopped, rest
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == int(stopped[1])
