"""VISReg: the paper's terms, the published code's values, a gradient at collapse, and several processes."""

import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from lightly.loss.lejepa_loss import SIGReg
from safetensors.torch import load_file
from torch import nn

import runs
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.visreg import VISReg, VISRegSettings, normal_quantiles, regulariser
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics
from small import MODELS, Views, network, random_views

PROGRESS = Progress(step=5, total_steps=10, steps_per_epoch=5, seed=3)
SCRIPT = Path(__file__).with_name("make_published_visreg.py")
STORED = Path(__file__).with_name("published_visreg.safetensors")


def visreg(name: str = MODELS[0], **settings) -> VISReg:
    torch.manual_seed(0)
    settings = {"out_dim": 6, "hidden_dim": 16, "directions": 20, "local_crop_size": 8, "global_crops": 3} | settings
    spec = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return VISReg(network(name), VISRegSettings(**{"local_crops": 2} | settings), spec)


def batch(count: int = 4, seed: int = 1) -> Views:
    return random_views([(16, 24)] * 3 + [(8, 8)] * 2, count, seed=seed)


def random_directions() -> torch.Tensor:
    directions = torch.randn(6, 30, dtype=torch.float64)
    return directions / directions.norm(dim=0)


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_that_of_the_paper(name):
    """All terms written out for each crop, dimension, direction and image, in float64."""
    objective, views = visreg(name).double(), batch()
    views.views = [view.double() for view in views.views]
    z = objective.project(views.views).detach()
    directions = objective.random_directions(PROGRESS, z)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(20, dtype=torch.float64))
    anchor = (z[0] + z[1] + z[2]) / 3
    distance = torch.stack([(z[v, b] - anchor[b]).square().mean() for v in range(5) for b in range(4)]).mean()
    scale, shape, centre = [], [], []
    for crop in z:
        deviations = []
        for dimension in crop.mT:
            mean = dimension.sum() / 4
            deviations.append(((dimension - mean).square().sum() / 4).sqrt())
            scale.append((deviations[-1] - 1) ** 2)
            centre.append(mean**2)
        standard = (crop - crop.mean(dim=0)) / torch.stack(deviations)
        for direction in directions.mT:
            for rank, point in enumerate(sorted(float(row @ direction) for row in standard), start=1):
                shape.append((point - NormalDist().inv_cdf(rank / 5)) ** 2)
    terms = {"scale": sum(scale) / len(scale), "shape": sum(shape) / len(shape), "centre": sum(centre) / len(centre)}
    output = objective(views, PROGRESS)
    expected = 0.9 * sum(terms.values()) + 0.1 * distance
    torch.testing.assert_close(output.loss, torch.as_tensor(expected), rtol=1e-4, atol=0)
    for term, value in terms.items():
        assert float(output.logs[term]) == pytest.approx(float(value), rel=1e-4), term
    torch.testing.assert_close(output.logs["distance"], distance)


def test_values_and_gradients_equal_the_published_code():
    values = load_file(STORED)
    for case in ("wide", "narrow", "collapsed"):
        z = values[f"{case}/z"].clone().requires_grad_()
        found = regulariser(z, nn.functional.normalize(values["directions"], dim=0))
        loss = found.scale + found.shape + found.centre
        loss.backward()
        # The published quantiles are float32.
        torch.testing.assert_close(loss.detach(), values[f"{case}/loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(z.grad, values[f"{case}/gradient"], rtol=1e-5, atol=float(1e-6 * z.grad.abs().max()))


def test_stored_values_equal_those_of_the_published_code(tmp_path):
    folder = os.environ.get("SELFVIL_PUBLISHED_VISREG")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_VISREG does not name a checkout of HaiyuWu/visreg")
    subprocess.run([sys.executable, str(SCRIPT), folder, str(tmp_path / "values")], check=True, timeout=120)
    torch.testing.assert_close(load_file(tmp_path / "values"), load_file(STORED), rtol=1e-9, atol=1e-12)


def test_the_gradient_stays_at_collapse_where_that_of_sigreg_vanishes():
    """The reason for VISReg: a hundredfold smaller cloud of points is pushed apart as strongly."""
    torch.manual_seed(0)
    points = torch.randn(2, 64, 6, dtype=torch.float64)

    def push(loss_of, size: float) -> float:
        z = (size * points).requires_grad_()
        loss_of(z).backward()
        return float(z.grad.norm())

    directions = random_directions()
    ours = [push(lambda z: regulariser(z, directions).scale, size) for size in (1e-2, 1e-4)]
    sigreg = SIGReg(num_vectors=30).double()
    theirs = [push(sigreg, size) for size in (1e-2, 1e-4)]
    assert ours[1] > 0.9 * ours[0]
    assert theirs[1] < 0.05 * theirs[0]


def test_small_batches_pull_a_small_cloud_together():
    """A limit of the published formula: the quantiles of few points have less than unit variance, and the pull of the
    shape on the scale grows as the cloud shrinks."""
    torch.manual_seed(0)

    def pull(count: int, size: float) -> float:
        """Positive if a gradient step makes the cloud smaller."""
        z = (size * torch.randn(2, count, 6, dtype=torch.float64)).requires_grad_()
        found = regulariser(z, random_directions())
        (found.scale + found.shape).backward()
        return float((z.grad * (z - z.mean(dim=1, keepdim=True))).sum())

    assert pull(16, 0.05) > 0
    assert pull(256, 0.05) < 0
    assert pull(16, 0.5) < 0


def test_equal_projections_have_a_finite_gradient():
    z = torch.ones(2, 5, 6, dtype=torch.float64, requires_grad=True)
    found = regulariser(z, random_directions())
    (found.scale + found.shape + found.centre).backward()
    assert z.grad.isfinite().all()
    assert float(found.scale.detach()) == pytest.approx(1, abs=1e-5)


def test_terms_are_small_for_a_normal_cloud_and_each_finds_its_own_fault():
    torch.manual_seed(0)
    z, directions = torch.randn(1, 2000, 6, dtype=torch.float64), random_directions()
    clouds = {"normal": z, "scale": 2 * z, "centre": z + 1, "shape": z.sign() * math.sqrt(1) + 1e-3 * z}
    found = {name: regulariser(cloud, directions) for name, cloud in clouds.items()}
    for term in ("scale", "shape", "centre"):
        values = {name: float(getattr(terms, term)) for name, terms in found.items()}
        assert values["normal"] < 0.01
        assert values[term] > 10 * max(value for name, value in values.items() if name != term), term


def test_the_trivial_loss_is_that_of_projections_at_zero():
    objective, views = visreg(), batch()
    trivial = float(objective.trivial_loss(views))
    for constant in (0.0, 0.5):
        objective.project = lambda crops, constant=constant: torch.full((5, 4, 6), constant)
        loss = float(objective(views, PROGRESS).loss)
        assert loss == pytest.approx(trivial, rel=1e-5) if not constant else loss > trivial
    expected = [NormalDist().inv_cdf(rank / 5) for rank in range(1, 5)]
    assert normal_quantiles(4, torch.zeros((), dtype=torch.float64)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns_and_bf16_is_close(name):
    objective = visreg(name)
    expected = objective(batch(), PROGRESS).loss
    expected.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch(), PROGRESS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0)


def test_directions_depend_on_the_step_only_and_crops_are_those_of_the_settings():
    objective, views = visreg(), batch()
    one = objective(views, PROGRESS).loss
    torch.rand(7)
    assert torch.equal(objective(views, PROGRESS).loss, one)
    assert not torch.equal(objective(views, Progress(6, 10, 5, seed=3)).loss, one)
    assert [(v.blur, v.solarise, v.scale) for v in objective.views()] == [
        (1.0, 0.0, (0.3, 1.0)), (0.1, 0.2, (0.3, 1.0)), (1.0, 0.0, (0.3, 1.0)), *[(0.5, 0.0, (0.05, 0.3))] * 2,
    ]  # fmt: skip
    assert objective.picture(batch(3), PROGRESS).shape == (3, 3 * 18, 5 * 26)


# --- real runs -------------------------------------------------------------------------------------------------------


def test_a_run_learns_without_collapse(digit_shards, tmp_path):
    more = ("budget.steps=40", "monitor.log_every=5", "monitor.pictures_every=40")
    assert pretrain(runs.small("visreg", digit_shards, tmp_path / "run", *more)).finished
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert records[-1]["loss"] < 0.92 * records[0]["loss"]
    assert records[-1]["scale"] < 0.95 * records[0]["scale"]
    assert records[-1]["projection_std"] > 0.3
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


def test_two_processes_train_like_one(digit_shards, tmp_path):
    """Two gloo processes have the losses, gradients and weights of one process with the whole batch."""
    more = ("monitor.log_every=1", "budget.steps=4")
    pretrain(runs.small("visreg", digit_shards, tmp_path / "alone", *more))
    launched = runs.launch("visreg", *runs.overrides("visreg", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    for value in ("loss", "scale", "shape", "distance", "grad_norm"):
        assert [record[value] for record in both] == pytest.approx([record[value] for record in alone], rel=1e-4)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    # Batch norm cancels the bias before it, so its gradient is rounding noise, and AdamW's step has the sign of it.
    for tensors in (ours, theirs):
        tensors.pop("backbone.norm.bias")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.global_crops=1", "objective.global_crops = 1: input should be greater than or equal to 2"),
        ("objective.regulariser_weight=1", "objective.regulariser_weight = 1: input should be less than 1"),
        ("objective.local_crop_size=10", r"local_crop_size = [10, 10] is not divisible by model.patch_size = 4"),
        ("optim.batch_size=1", "visreg compares the images of a micro-batch"),
        ("objective.sigreg_weight=0.1", "unknown key objective.sigreg_weight"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, override, expected):
    with pytest.raises(UserError) as caught:
        pretrain(runs.small("visreg", digit_shards, tmp_path / "run", override))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()
