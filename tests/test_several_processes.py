"""Real runs on one, two and four processes: the same images in the same order, for any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import run_many
from runs import PACKAGED, REPOSITORY, overrides, small, state
from selfvil import checkpoint
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics

STEPS, STEPS_PER_EPOCH = 10, 5
RUN = [f"budget.steps={STEPS}", "monitor.log_every=5"]


def torchrun(shards: Path, out: Path, processes: int, *more: str) -> None:
    case = {"recipe": PACKAGED["mae"], "arguments": overrides("mae", shards, out, *RUN, *more)}
    run_many.torchrun([case], processes, out.parent)


def seen(run: Path, processes: int) -> dict[int, list[int]]:
    """Step -> ids of its images, in the order of the processes."""
    steps: dict[int, list[int]] = {}
    for rank in range(processes):
        for line in (run / f"seen-{rank}-of-{processes}.jsonl").read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["ids"])
    return steps


@pytest.fixture(scope="module")
def alone(digit_shards, tmp_path_factory) -> Path:
    """The whole run on one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    recipe = small("mae", digit_shards, out, *RUN)
    with run_many.recorded(recipe):
        pretrain(recipe)
    return out


@pytest.fixture(scope="module")
def half(digit_shards, tmp_path_factory) -> Path:
    """The first epoch of that run, on two processes."""
    out = tmp_path_factory.mktemp("half") / "run"
    torchrun(digit_shards, out, 2)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")  # as if it had been killed after the first epoch
    for file in out.glob("seen-*"):
        lines = [line for line in file.read_text().splitlines(True) if json.loads(line)["step"] < STEPS_PER_EPOCH]
        file.write_text("".join(lines))
    saved = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert saved.step == STEPS_PER_EPOCH
    return out


def test_two_processes_together_use_every_image_of_an_epoch_once(half):
    steps = seen(half, 2)
    assert sorted(steps) == list(range(STEPS_PER_EPOCH))
    assert sorted(image for ids in steps.values() for image in ids) == list(range(200))


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes_continues_in_the_same_order(digit_shards, alone, half, tmp_path, processes):
    """The run starts on two. Its weights equal those of a run on one process, to rounding."""
    run = Path(shutil.copytree(half, tmp_path / "run"))
    for file in run.glob("seen-*"):
        file.unlink()
    if processes == 1:
        recipe = small("mae", digit_shards, run, *RUN)
        with run_many.recorded(recipe):
            pretrain(recipe)
    else:
        torchrun(digit_shards, run, processes)
    expected = seen(alone, 1)
    assert seen(half, 2) == {step: expected[step] for step in range(STEPS_PER_EPOCH)}
    assert seen(run, processes) == {step: expected[step] for step in range(STEPS_PER_EPOCH, STEPS)}
    launches = json.loads((run / "run.json").read_text())["launches"]
    assert [launch["processes"] for launch in launches] == [2, processes]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [5, 10]
    ours, theirs = state(run), state(alone)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_the_configuration_file_for_gpus_is_valid():
    config = load_config_from_file(str(REPOSITORY / "launch" / "configs" / "gpu.yaml"))
    assert config.distributed_type == "MULTI_GPU"
    assert config.num_machines == 1
    assert not config.use_cpu
