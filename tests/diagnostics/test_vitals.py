"""Vital signs: each measure on constructed features, and measurements that do not change a run."""

import math

import pytest
import torch

import runs
from selfvil.diagnostics.vitals import alpha_req, feature_std, lidar, rankme
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics


def spectrum(singular: torch.Tensor, rows: int = 400) -> torch.Tensor:
    """Features (rows, D), centred, with these singular values (D,)."""
    dims = len(singular)
    x = torch.randn(rows, dims, dtype=torch.float64)
    left, _, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    right, _ = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64))
    return left * singular @ right


def test_rankme_is_the_number_of_equal_dimensions():
    sizes = torch.zeros(20, dtype=torch.float64)
    sizes[:7] = 3.0
    assert rankme(spectrum(sizes)) == pytest.approx(7)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1)


def test_rankme_is_the_papers_formula():
    x = torch.randn(60, 12, dtype=torch.float64)
    share = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    assert rankme(x) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist())))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_req_finds_the_power_law(alpha):
    x = spectrum(torch.arange(1, 31, dtype=torch.float64) ** (-alpha / 2))
    assert alpha_req(x) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_of_a_point_is_none():
    assert alpha_req(torch.ones(20, 5)) is None


def test_feature_std_is_one_for_all_directions_and_zero_for_one():
    assert feature_std(torch.randn(4000, 32)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.randn(1, 32).expand(100, -1)) == pytest.approx(0, abs=1e-6)


def test_lidar_equals_the_papers_matrices():
    """Against Σw^-½ Σb Σw^-½ written out, with fewer and with more dimensions than rows."""
    for dims in (5, 60):
        x = torch.randn(12, 3, dims, dtype=torch.float64) + 4 * torch.randn(12, 1, dims, dtype=torch.float64)
        means = x.mean(dim=1)
        within = torch.einsum("nvd,nve->de", x - means[:, None], x - means[:, None]) / (12 * 3)
        between = torch.cov(means.T, correction=0)
        values, axes = torch.linalg.eigh(within + 1e-4 * torch.eye(dims, dtype=torch.float64))
        whitener = axes @ torch.diag(values.rsqrt()) @ axes.T
        sizes = torch.linalg.eigvalsh(whitener @ between @ whitener).clamp_min(0)
        share = sizes / sizes.sum()
        assert lidar(x) == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-5)


def test_lidar_is_the_number_of_dimensions_that_distinguish_images():
    """Two dimensions distinguish images, the other ten only their views; RankMe would count them all."""
    views = 1e-3 * torch.randn(200, 4, 12, dtype=torch.float64)
    views[:, :, 2:] = torch.randn(200, 4, 10, dtype=torch.float64)
    views[:, :, :2] += torch.randn(200, 1, 2, dtype=torch.float64)
    assert lidar(views) == pytest.approx(2, abs=0.1)
    assert rankme(views[:, 0]) > 8


@pytest.mark.parametrize("objective", runs.PACKAGED)
def test_measurements_do_not_change_a_run(digit_shards, tmp_path, objective):
    """With measurements at every step and with none, a run has the same final weights, bit for bit."""
    for name, every in (("with", 1), ("without", "null")):
        pretrain(runs.small(objective, digit_shards, tmp_path / name, f"monitor.doctor_every={every}"))
    runs.assert_same_state(tmp_path / "with", tmp_path / "without")
    measured = [r for r in read_metrics(tmp_path / "with" / "metrics.jsonl") if r["kind"] == "doctor"]
    assert [record["step"] for record in measured] == list(range(1, 13))
    common = {"relative_lr", "speed", "feature_std", "rankme", "alpha_req", "horizon/00_forward", "saturated"}
    common |= {"grad_norm/patch_embed", "grad_norm/blocks", "grad_norm/heads", "grad_reach", "seconds"}
    assert all(record.get("teacher_lag", 0) <= record["step"] for record in measured)
    if objective in ("dino", "ibot", "dinov2", "ijepa"):
        common |= {"teacher_lag", "teacher_follows"}
    if objective in ("dino", "ibot", "dinov2", "lejepa", "visreg"):
        common |= {"lidar"}
    if objective not in ("dino", "ibot", "dinov2"):
        common |= {"explained"}
    assert common <= measured[-2].keys()
    assert not any(r["kind"] == "doctor" for r in read_metrics(tmp_path / "without" / "metrics.jsonl"))


def test_the_trivial_loss_is_that_of_the_mean_image(digit_shards, tmp_path):
    """At the end of a run that has learned nothing, the explained share of MAE is about 0."""
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", "optim.base_lr=1e-12", "monitor.doctor_every=12"))
    (measured,) = (r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "doctor")
    assert measured["explained"] < 0
