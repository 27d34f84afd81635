"""The loop from end to end: it learns, stops and continues without a difference, and refuses impossible settings."""

import json
from pathlib import Path

import pytest
import torch

import runs
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.objectives.mae import MAE
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe, load
from selfvil.records import read_metrics


def overrides(shards: Path, out: Path, *more: str) -> list[str]:
    return runs.overrides("mae", shards, out, *more)


def small(shards: Path, out: Path, *more: str) -> Recipe:
    return runs.small("mae", shards, out, *more)


def test_a_run_learns_and_writes_all_records(digit_shards, tmp_path, capsys):
    recipe = small(
        digit_shards, tmp_path / "run", "budget.steps=60", "optim.base_lr=0.01", "monitor.tensorboard=true",
        "monitor.pictures_every=60",
        f"eval.knn.train={digit_shards}/digits-000000.tar", f"eval.knn.test={digit_shards}/digits-000001.tar",
    )  # fmt: skip
    summary = pretrain(recipe)
    assert summary.finished
    assert summary.samples == 60 * 40
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    assert {"lr", "weight_decay", "grad_norm", "samples", "epoch", "images_per_second"} <= records[0].keys()
    assert 10 < records[-1]["knn_10"] <= 100
    assert records[-1]["kind"] == "eval"
    assert load(tmp_path / "run" / "recipe.yaml") == recipe
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["launches"][0]["versions"]["torch"] == torch.__version__
    assert record["summary"]["checkpoint"].endswith("step-00000060")
    assert (tmp_path / "run" / "pictures" / "step-00000060.png").stat().st_size > 0
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert "finished" in capsys.readouterr().out


def test_accumulated_micro_batches_give_the_same_step(digit_shards, tmp_path):
    whole = small(digit_shards, tmp_path / "whole", "budget.steps=3", "optim.clip_norm=null")
    split = small(digit_shards, tmp_path / "split", "budget.steps=3", "optim.clip_norm=null", "optim.accumulate=4")
    pretrain(whole)
    pretrain(split)
    ours, theirs = runs.state(tmp_path / "whole"), runs.state(tmp_path / "split")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_augmentation_can_run_on_the_device(digit_shards, tmp_path, objective):
    """The run equals one with augmentation in workers, to rounding, and continues bit for bit after a stop."""
    more = ["data.augment=device", "data.workers=1", "budget.steps=8", "optim.warmup=0"]
    whole = pretrain(runs.small(objective, digit_shards, tmp_path / "whole", *more))
    pretrain(runs.small(objective, digit_shards, tmp_path / "paused", *more, "budget.pause_minutes=1e-6"))
    pretrain(runs.small(objective, digit_shards, tmp_path / "paused", *more))
    runs.assert_same_state(tmp_path / "whole", tmp_path / "paused")
    by_workers = pretrain(
        runs.small(objective, digit_shards, tmp_path / "workers", *more, "data.augment=workers")
    )  # fmt: skip
    first, later = (r["loss"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "train")
    assert whole.loss == later < first
    assert whole.loss == pytest.approx(by_workers.loss, rel=0.01)
    with pytest.raises(UserError, match=r"data\.augment: device -> workers"):
        pretrain(runs.small(objective, digit_shards, tmp_path / "whole", *more, "data.augment=workers"))


def test_a_view_that_needs_workers_is_refused_on_the_device(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(MAE, "views", lambda self: [CenterCrop(16, self.image.mean, self.image.std)])
    with pytest.raises(UserError, match=r"data\.augment = device: CenterCrop"):
        pretrain(small(digit_shards, tmp_path / "run", "data.augment=device"))
    assert not (tmp_path / "run").exists()


def test_heads_first_freezes_the_backbone_for_a_fraction_of_the_run(digit_shards, tmp_path):
    """In the first part of the budget, the backbone keeps its weights and the rest of the objective is trained."""
    steps = [f"budget.steps={count}" for count in (1, 4)]
    rates = ["optim.warmup=0", "optim.schedule=constant", "optim.heads_first=0.5", "run.checkpoint_every=1"]
    pretrain(small(digit_shards, tmp_path / "start", steps[0], *rates))
    pretrain(small(digit_shards, tmp_path / "run", steps[1], "run.keep_checkpoints=4", *rates))
    start = checkpoint.load(tmp_path / "start" / "checkpoints" / "step-00000001").tensors("objective")
    half, end = (
        checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").tensors("objective") for step in (2, 4)
    )
    backbone = {name for name in half if name.startswith("backbone.") and half[name].is_floating_point()}
    assert backbone
    assert all(torch.equal(start[name], half[name]) for name in backbone)
    assert any(not torch.equal(start[name], half[name]) for name in half.keys() - backbone)
    assert any(not torch.equal(half[name], end[name]) for name in backbone)


def test_the_rate_is_stable_and_then_decays(digit_shards, tmp_path):
    pretrain(
        small(
            digit_shards, tmp_path / "run", "optim.schedule=wsd", "optim.warmup=0", "optim.cooldown=0.5",
            "optim.base_lr=1e-3", "optim.lr_scaling=none", "monitor.log_every=3", "budget.steps=12",
        )
    )  # fmt: skip
    rates = [r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * (1 - (2 / 6) ** 0.5), 1e-3 * (1 - (5 / 6) ** 0.5)])


def test_a_constant_rate_of_the_square_root_rule(digit_shards, tmp_path):
    rates = ["optim.schedule=constant", "optim.warmup=0.5", "optim.base_lr=1e-3", "optim.lr_scaling=sqrt"]
    pretrain(small(digit_shards, tmp_path / "run", *rates, "monitor.log_every=1", "budget.steps=6"))
    found = [r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    peak = 1e-3 * (40 / 256) ** 0.5
    assert found == pytest.approx([0, peak / 2, peak, peak, peak, peak])


def test_layers_and_the_patch_embedding_have_their_learning_rates(digit_shards, tmp_path):
    """AdamW's first step has the size of the learning rate: a factor of 0.5 per layer, and twice that for patches."""
    more = ["model.depth=2", "optim.warmup=0", "optim.weight_decay=0", "optim.base_lr=1e-3", "optim.lr_scaling=none"]
    more += ["optim.layer_decay=0.5", "optim.patch_embed_lr=2", "budget.steps=1"]
    recipe = small(digit_shards, tmp_path / "run", *more)
    start = build_objective(recipe).state_dict()
    pretrain(recipe)
    end = runs.state(tmp_path / "run")
    expected = {
        "backbone.patch_embed.proj.weight": 0.5,
        "backbone.blocks.0.first.layer.proj_up.weight": 0.5,
        "backbone.blocks.1.first.layer.proj_up.weight": 1,
        "decoder_embed.weight": 1,
    }
    for name, share in expected.items():
        moved = (end[f"objective/{name}"] - start[name]).abs().median().item()
        assert moved == pytest.approx(1e-3 * share, rel=0.01), name


def test_two_processes_compute_what_one_computes(digit_shards, tmp_path):
    """Two gloo processes: the same samples and masks, so the same loss at every step, to rounding."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    pretrain(small(digit_shards, alone, "monitor.log_every=1"))
    launched = runs.launch("mae", *overrides(digit_shards, both, "monitor.log_every=1"), processes=2)
    assert launched.returncode == 0, launched.stderr
    record = json.loads((both / "run.json").read_text())
    assert record["launches"][0]["processes"] == 2
    assert record["launches"][0]["strategy"] == "ddp"
    ours, theirs = (
        [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record] for run in (alone, both)
    )
    assert len(ours) == 12
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


def test_unconnected_processes_of_torchrun_are_refused(digit_shards, tmp_path):
    arguments = overrides(digit_shards, tmp_path / "run")
    launched = runs.launch("mae", *arguments, processes=2, ACCELERATE_USE_CPU="false")
    assert launched.returncode != 0
    assert "each would train alone" in launched.stderr
    assert not (tmp_path / "run").exists()


def refusal(arguments: list[str], capsys) -> str:
    from selfvil.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "demo", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=nowhere/x-*.tar", "nowhere/x-*.tar"),
        ("model.name=vil_tinny_patch16_224", "did you mean vil_tiny_patch16_224"),
        ("objective.mask_ratio=0.99", "objective.mask_ratio = 0.99 keeps 0 of the 16 patches"),
        ("objective.mask_ratio=1", "objective.mask_ratio = 1"),
    ],
)
def test_an_error_of_the_user_is_one_message(digit_shards, tmp_path, capsys, override, expected):
    assert expected in refusal(overrides(digit_shards, tmp_path / "run", override), capsys)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_is_not_changed(digit_shards, tmp_path, capsys):
    pretrain(small(digit_shards, tmp_path / "run", "budget.steps=2"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = overrides(digit_shards, tmp_path / "run", "budget.steps=3", "optim.base_lr=0.5")
    error = refusal(other, capsys)
    assert "optim.base_lr: 0.004 -> 0.5" in error or "optim.base_lr" in error
    assert "holds a run" in refusal([*overrides(digit_shards, tmp_path / "run"), "run.resume=never"], capsys)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert "holds no run" in refusal(overrides(digit_shards, tmp_path / "foreign"), capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(digit_shards, tmp_path):
    recipe = small(digit_shards, tmp_path / "run", "budget.steps=2")
    pretrain(recipe)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/objective.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="all damaged"):
        pretrain(recipe)


def test_a_run_cannot_continue_on_other_images(digit_shards, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in digit_shards.glob("*.tar"):
        (shards / path.name).write_bytes(path.read_bytes())
    pretrain(small(shards, tmp_path / "run", "budget.steps=4", "budget.pause_minutes=1e-6"))
    (shards / "digits-000001.tar").unlink()
    with pytest.raises(UserError, match="sample order cannot be continued"):
        pretrain(small(shards, tmp_path / "run", "budget.steps=4"))


def test_a_divergence_is_reported_and_not_saved(digit_shards, tmp_path):
    recipe = small(digit_shards, tmp_path / "run", "optim.base_lr=1e30", "optim.warmup=0", "optim.clip_norm=null")
    with pytest.raises(UserError, match="became NaN or infinite by step"):
        pretrain(recipe)
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        tensors = checkpoint.load(folder).tensors("objective")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
