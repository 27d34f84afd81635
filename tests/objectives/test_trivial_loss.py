"""The trivial loss of an objective is that of the best prediction that is the same for every image."""

import pytest
import torch
from torch import nn

from selfvil.objectives.autoregressive import Autoregressive, AutoregressiveSettings
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.distill import constant_feature_loss, feature_loss
from selfvil.objectives.lejepa import LeJEPA, LeJEPASettings
from selfvil.objectives.mae import MAE, MAESettings
from selfvil.objectives.simmim import SimMIM, SimMIMSettings
from small import SIZE, Views, network

IMAGE = ImageSpec(SIZE, 4, 3, (0.5,) * 3, (0.25,) * 3)
COUNT = 400


def images_around_a_mean() -> Views:
    """Random images with a common mean image and a skewed distribution, so that mean and median differ."""
    images = torch.randn(1, 3, *SIZE) + torch.empty(COUNT, 3, *SIZE).exponential_()
    return Views([images], torch.arange(COUNT))


def best_constant(loss, target: torch.Tensor) -> float:
    """The smallest loss of a constant and `target` that gradient descent finds."""
    constant = nn.Parameter(target.mean(dim=0, keepdim=True).clone())
    optimizer = torch.optim.Adam([constant], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(constant.expand_as(target), target)
        value.backward()
        optimizer.step()
    return float(value.detach())


@pytest.mark.parametrize("normalise", [False, True])
def test_trivial_loss_of_predicted_pixels(normalise):
    batch = images_around_a_mean()
    mae = MAE(network(), MAESettings(decoder_dim=16, decoder_depth=1, normalise_targets=normalise), IMAGE)
    targets = mae.targets(batch.views[0])
    squares = best_constant(nn.functional.mse_loss, targets)
    assert float(mae.trivial_loss(batch)) == pytest.approx(squares, rel=0.01)

    simmim = SimMIM(network(), SimMIMSettings(normalise_targets=normalise), IMAGE)
    absolute = best_constant(nn.functional.l1_loss, targets)
    assert float(simmim.trivial_loss(batch)) == pytest.approx(absolute, rel=0.01)

    settings = AutoregressiveSettings(decoder_dim=16, decoder_depth=1, decoder_heads=2, normalise_targets=normalise)
    causal = Autoregressive(network(traversal="unidirectional", conv="causal1d"), settings, IMAGE)
    later = best_constant(nn.functional.mse_loss, targets[:, 1:])
    assert float(causal.trivial_loss(batch)) == pytest.approx(later, rel=0.01)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_trivial_loss_of_predicted_features(kind):
    target = torch.randn(1, 3, 8) + torch.empty(COUNT, 3, 8).exponential_()
    best = best_constant(lambda predicted, target: feature_loss(predicted, target, kind), target)
    assert float(constant_feature_loss(target, kind)) == pytest.approx(best, rel=0.02)
    few = torch.stack([constant_feature_loss(part, kind) for part in target.split(4)]).mean()
    assert float(few) == pytest.approx(best, rel=0.08), "the estimate from small batches has no bias"


def test_trivial_loss_of_lejepa_is_its_loss_at_zero():
    """No other constant has a lower loss."""
    settings = LeJEPASettings(local_crops=1, local_crop_size=8, out_dim=8, hidden_dim=16, sigreg_directions=32)
    objective = LeJEPA(network(), settings, IMAGE)
    batch = Views([torch.randn(20, 3, *SIZE), torch.randn(20, 3, *SIZE), torch.randn(20, 3, 8, 8)], torch.arange(20))
    trivial = float(objective.trivial_loss(batch))
    for constant in (0.0, 0.1, 1.0):
        objective.project = lambda crops, constant=constant: torch.full((3, 20, 8), constant)
        loss = float(objective(batch, Progress(0, 10, 5.0, 0)).loss)
        assert loss == pytest.approx(trivial, rel=1e-5) if constant == 0 else loss > trivial


def test_one_image_has_no_trivial_loss():
    batch = Views([torch.randn(1, 3, *SIZE)], torch.arange(1))
    assert MAE(network(), MAESettings(decoder_dim=16, decoder_depth=1), IMAGE).trivial_loss(batch) is None
    assert SimMIM(network(), SimMIMSettings(), IMAGE).trivial_loss(batch) is None
