"""Two processes under each strategy, killed without warning: the same command continues, bit for bit, and exports."""

import os
import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
import torch

from runs import REPOSITORY, assert_same_state, command, environment, launch, overrides, state
from selfvil import checkpoint
from selfvil.export import export
from selfvil.weights import load_export

ENVIRONMENTS = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        } for stage in (1, 2, 3)
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ENVIRONMENTS)
def test_two_killed_processes_continue_bit_for_bit(digit_shards, tmp_path, strategy):
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    environ = ENVIRONMENTS[strategy]
    more = ["budget.steps=60", "run.checkpoint_every=20", "model.drop_path_rate=0.2", "monitor.doctor_every=10"]
    arguments = overrides("mae", digit_shards, tmp_path / "run", *more)
    process = subprocess.Popen(
        command("mae", *arguments, processes=2), cwd=REPOSITORY, env=environment(**environ),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while checkpoint.newest(tmp_path / "run" / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert killed is not None
    assert killed.step < 60
    for out in ("run", "straight"):
        done = launch("mae", *overrides("mae", digit_shards, tmp_path / out, *more), processes=2, **environ)
        assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "straight", tmp_path / "run")
    exported = load_export(export(tmp_path / "run", tmp_path / "exported")).backbone.state_dict()
    trained = state(tmp_path / "run")
    assert all(torch.equal(value, trained[f"objective/backbone.{name}"]) for name, value in exported.items())
