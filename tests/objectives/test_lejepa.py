"""LeJEPA: the two terms of the paper, random directions that depend on the step only, and several processes."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import runs
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.lejepa import LeJEPA, LeJEPASettings
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe
from selfvil.records import read_metrics
from small import MODELS, Views, network, random_views

PROGRESS = Progress(step=5, total_steps=10, steps_per_epoch=5, seed=3)


def lejepa(name: str = MODELS[0], backbone: nn.Module | None = None, **settings) -> LeJEPA:
    torch.manual_seed(0)
    settings = {"out_dim": 6, "hidden_dim": 16, "sigreg_directions": 20, "local_crop_size": 8} | settings
    spec = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    settings = LeJEPASettings(**{"local_crops": 3} | settings)
    return LeJEPA(network(name) if backbone is None else backbone, settings, spec)


def batch(count: int = 4, seed: int = 1) -> Views:
    return random_views([(16, 24)] * 2 + [(8, 8)] * 3, count, seed=seed)


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_that_of_the_paper(name):
    """Both terms written out for each crop, direction and frequency, with the integral by torch.trapezoid."""
    objective, views = lejepa(name), batch()
    z = objective.project(views.views).detach()
    distance = torch.stack([(z[v, b] - (z[0, b] + z[1, b]) / 2).square().mean() for v in range(5) for b in range(4)])
    torch.manual_seed(3 * 1_000_003 + 5)
    directions = torch.randn(6, 20)
    frequencies = torch.linspace(0, 3, 17)
    normal = torch.exp(-frequencies.square() / 2)
    statistics = []
    for crop in z:
        for direction in directions.mT:
            points = crop @ (direction / direction.norm())
            found = torch.exp(1j * frequencies * points.unsqueeze(1)).mean(dim=0)
            error = (found - normal).abs().square() * normal
            statistics.append(4 * 2 * torch.trapezoid(error, frequencies))
    expected = 0.05 * torch.stack(statistics).mean() + 0.95 * distance.mean()
    output = objective(views, PROGRESS)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logs["distance"], distance.mean())
    torch.testing.assert_close(output.logs["sigreg"], torch.stack(statistics).mean(), rtol=1e-4, atol=0)


def test_sigreg_is_small_for_a_gaussian_and_large_for_a_collapse():
    objective = lejepa(out_dim=8)
    z = {"one point": torch.zeros(5, 512, 8), "normal": torch.randn(5, 512, 8), "wide": 3 * torch.randn(5, 512, 8)}
    sigreg = {name: objective.loss.sigreg(points).item() for name, points in z.items()}
    assert sigreg["normal"] < 2
    assert sigreg["one point"] > 50 * sigreg["normal"]
    assert sigreg["wide"] > 50 * sigreg["normal"]


def test_directions_depend_on_the_step_only():
    """They do not depend on the global generator, and do not change it."""
    objective, views = lejepa(), batch()
    one = objective(views, PROGRESS).loss
    torch.rand(7)
    assert torch.equal(objective(views, PROGRESS).loss, one)
    assert not torch.equal(objective(views, Progress(6, 10, 5, seed=3)).loss, one)
    assert not torch.equal(objective(views, Progress(5, 10, 5, seed=4)).loss, one)
    torch.manual_seed(1)
    objective(views, PROGRESS)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("readout", [None, "mean"])
def test_every_parameter_learns(name, readout):
    objective = lejepa(name, readout=readout)
    objective(batch(), PROGRESS).loss.backward()
    untrained = {n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()}
    assert untrained <= ({"backbone.cls_token"} if readout == "mean" else set())
    assert objective.networks == {"student": "backbone."}


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_close_to_fp32_and_its_loss_float32(name):
    objective = lejepa(name)
    expected = objective(batch(), PROGRESS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch(), PROGRESS)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)


def test_views_and_picture_equal_those_of_dino():
    assert [(v.blur, v.solarise, v.scale) for v in lejepa().views()] == [
        (1.0, 0.0, (0.3, 1.0)), (0.1, 0.2, (0.3, 1.0)), *[(0.5, 0.0, (0.05, 0.3))] * 3,
    ]  # fmt: skip
    assert lejepa().picture(batch(3), PROGRESS).shape == (3, 3 * 18, 5 * 26)


# --- real runs -------------------------------------------------------------------------------------------------------


def small(shards: Path, out: Path, *more: str) -> Recipe:
    return runs.small("lejepa", shards, out, *more)


def test_a_run_learns_without_collapse(digit_shards, tmp_path):
    """The loss falls without collapse."""
    more = ("budget.steps=40", "monitor.log_every=5", "monitor.pictures_every=40")
    assert pretrain(small(digit_shards, tmp_path / "run", *more)).finished
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["sigreg"] < 15, "a collapse has 40 times 0.5"
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


def test_two_processes_train_like_one(digit_shards, tmp_path):
    """Two gloo processes have the losses, gradients and weights of one process with the whole batch."""
    more = ("monitor.log_every=1", "budget.steps=4")
    pretrain(small(digit_shards, tmp_path / "alone", *more))
    launched = runs.launch("lejepa", *runs.overrides("lejepa", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    for value in ("loss", "sigreg", "distance", "grad_norm"):
        assert [record[value] for record in both] == pytest.approx([record[value] for record in alone], rel=1e-4)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    # Batch norm cancels the bias before it, so its gradient is rounding noise, and AdamW's step has the sign of it.
    for tensors in (ours, theirs):
        tensors.pop("backbone.norm.bias")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.local_crops=0", "objective.local_crops = 0: input should be greater than or equal to 1"),
        ("objective.sigreg_weight=1", "objective.sigreg_weight = 1: input should be less than 1"),
        ("objective.local_crop_size=10", r"local_crop_size = [10, 10] is not divisible by model.patch_size = 4"),
        ("objective.readout=cls", "'cls' is not possible with VisionLSTM; choose one of: bilateral_concat, mean"),
        ("objective.teacher_temp=0.1", "unknown key objective.teacher_temp"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, override, expected):
    with pytest.raises(UserError) as caught:
        pretrain(small(digit_shards, tmp_path / "run", override))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_cannot_take_crops_is_refused():
    with pytest.raises(UserError, match="SwinTransformer cannot take crops of several sizes"):
        lejepa(backbone=timm.create_model("swin_tiny_patch4_window7_224", num_classes=0))
