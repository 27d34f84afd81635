"""Non-finite losses, gradients and weights: steps that are skipped, what is saved, and messages."""

import json

import pytest
import torch

import run_many
import runs
from selfvil import checkpoint, pretrain
from selfvil.divergence import LossSpikes, non_finite
from selfvil.errors import UserError
from selfvil.objectives.dino import DINO
from selfvil.objectives.ibot import IBOT
from selfvil.objectives.lejepa import LeJEPA
from selfvil.objectives.mae import MAE
from selfvil.recipe import load
from selfvil.records import read_metrics
from selfvil.reporting.report import report

OBJECTIVES = {"mae": MAE, "dino": DINO, "ibot": IBOT, "lejepa": LeJEPA}


def make_loss_non_finite(monkeypatch, objective, steps, value=float("nan")):
    """Multiply the loss of an objective at these steps, counted from 0, by a non-finite value."""
    kind, original = OBJECTIVES[objective], OBJECTIVES[objective].forward

    def forward(self, batch, progress):
        output = original(self, batch, progress)
        if self.training and progress.step in steps:
            return output._replace(loss=output.loss * value)
        return output

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", ["mae", "dino", "ibot"])
def test_a_skipped_step_changes_nothing(digit_shards, tmp_path, monkeypatch, objective, value):
    """A skipped step does not change weights, moments, teacher and centre, bit for bit."""
    more = ["optim.accumulate=2", "optim.warmup=0", "run.checkpoint_every=1", "run.keep_checkpoints=9"]
    make_loss_non_finite(monkeypatch, objective, {2}, value)
    recipe = runs.small(objective, digit_shards, tmp_path / "run", "budget.steps=4", "monitor.log_every=1", *more)
    assert pretrain.pretrain(recipe).finished
    assert not (tmp_path / "run" / "checkpoints" / "step-00000003").exists()
    monkeypatch.undo()
    make_loss_non_finite(monkeypatch, objective, {2}, value)
    stopped = runs.small(
        objective, digit_shards, tmp_path / "short", "budget.steps=4", "budget.pause_minutes=1e-6", *more
    )
    for _ in range(3):
        summary = pretrain.pretrain(stopped)
    assert summary.step == 3
    before, after = (checkpoint.load(tmp_path / "short" / "checkpoints" / f"step-0000000{step}") for step in (2, 3))
    for part in ("objective", "optimizer"):
        ours, theirs = before.tensors(part), after.tensors(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert pretrain.pretrain(stopped).step == 4
    runs.assert_same_state(tmp_path / "run", tmp_path / "short")
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert line["step"] == 3
    assert "loss" in line["not_finite"]
    assert len(line["ids"]) == 40
    logged = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert ["loss" in record for record in logged] == [True, True, False, True]
    assert report(tmp_path / "run", tmp_path / "report.html").stat().st_size > 10_000


def test_running_statistics_of_a_skipped_step_are_restored(digit_shards, tmp_path, monkeypatch):
    from test_unused import overrides

    make_loss_non_finite(monkeypatch, "lejepa", {1})
    arguments = overrides("lejepa", "test_resnet", digit_shards, tmp_path / "run", "run.checkpoint_every=1")
    pretrain.pretrain(load(runs.PACKAGED["lejepa"], arguments))
    first, second = (
        checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-0000000{step}").tensors("objective")
        for step in (1, 2)
    )
    assert any("running_mean" in name for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_too_many_skipped_steps_in_a_row_end_the_run(digit_shards, tmp_path, monkeypatch):
    make_loss_non_finite(monkeypatch, "mae", set(range(4, 100)))
    recipe = runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=60", "run.checkpoint_every=2")
    with pytest.raises(UserError, match=r"loss and grad_norm became NaN or infinite by step 5 and stayed so for 11 "):
        pretrain.pretrain(recipe)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 4


def test_on_nonfinite_stop_ends_the_run(digit_shards, tmp_path, monkeypatch):
    make_loss_non_finite(monkeypatch, "mae", {3})
    recipe = runs.small("mae", digit_shards, tmp_path / "run", "optim.on_nonfinite=stop", "run.checkpoint_every=2")
    with pytest.raises(UserError, match=r"became NaN or infinite by step 4 \(optim\.on_nonfinite = stop\)"):
        pretrain.pretrain(recipe)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2
    assert pretrain.pretrain(runs.small("mae", digit_shards, tmp_path / "run", "run.checkpoint_every=2")).finished


def test_weights_made_infinite_by_a_finite_gradient_are_not_saved(digit_shards, tmp_path):
    """The weights become infinite at a step after which a checkpoint is due, and are checked in the background."""
    more = ["optim.base_lr=1e38", "optim.lr_scaling=none", "optim.warmup=0", "optim.weight_decay=10"]
    recipe = runs.small("mae", digit_shards, tmp_path / "run", *more, "run.checkpoint_every=1", "monitor.log_every=1")
    with pytest.raises(UserError, match=r"became NaN or infinite by step 1: the run has diverged"):
        pretrain.pretrain(recipe)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


def test_non_finite_finds_each_kind_and_does_not_overflow():
    tensors = {
        "nan": torch.tensor([1.0, float("nan")]), "inf": torch.tensor(float("-inf")), "large": torch.full((9,), 3e38),
        "empty": torch.empty(0), "integer": torch.tensor(3), "half": torch.tensor([float("inf")]).bfloat16(),
    }  # fmt: skip
    assert non_finite(tensors) == ["nan", "inf", "half"]
    assert non_finite({}) == []


def test_spikes_are_distinguished_from_noise_and_a_falling_loss():
    generator = torch.Generator().manual_seed(0)
    spikes, found = LossSpikes(), []
    for step in range(300):
        noise = 0.02 * torch.randn((), generator=generator).item()
        loss = 5 * 0.99**step + noise + (3.0 if step in (120, 200) else 0.0)
        if spikes.add(loss) is not None:
            found.append(step)
    assert found == [120, 200]


def test_a_spike_is_recorded(digit_shards, tmp_path, monkeypatch, capsys):
    make_loss_non_finite(monkeypatch, "mae", {15}, value=50.0)
    recipe = runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=18", "monitor.log_every=1")
    pretrain.pretrain(recipe)
    records = {record["step"]: record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert [step for step, record in records.items() if "loss_spike" in record] == [16]
    assert "step 16: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1")), "zero2"]
)
def test_a_step_with_a_nan_on_one_process_is_skipped_on_all(digit_shards, tmp_path, strategy):
    """Weights, moments, teacher and centre after the third step, whose loss is NaN on process 1, are the second's."""
    more = ["optim.accumulate=2", "optim.warmup=0", "budget.steps=3", "run.checkpoint_every=2", "monitor.log_every=1"]
    arguments = runs.overrides("dino", digit_shards, tmp_path / "run", *more)
    environ = {}
    if strategy != "ddp":
        pytest.importorskip("deepspeed")
        environ = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
    stage = None if strategy == "ddp" else int(strategy[-1])
    case = {"recipe": runs.PACKAGED["dino"], "arguments": arguments, "zero": stage, "spoil": {"step": 2, "rank": 1}}
    run_many.torchrun([case], 2, tmp_path, **environ)
    second, third = (checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-0000000{step}") for step in (2, 3))
    for part in ("objective", "optimizer"):
        ours, theirs = second.tensors(part), third.tensors(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert line["step"] == 3
    assert len(line["ids"]) == 20  # of the process whose loss it was
