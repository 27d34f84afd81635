"""SimMIM: masks of whole units, the loss of the paper, and no effect of masked pixels."""

import pytest
import timm
import torch

from selfvil.errors import UserError
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.mae import patchify
from selfvil.objectives.simmim import SimMIM, SimMIMSettings
from small import MODELS, Views, network, random_views

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)


def simmim(name: str = MODELS[0], size: tuple[int, int] = (16, 24), **settings) -> SimMIM:
    torch.manual_seed(0)
    spec = ImageSpec(size, 4, 3, (0.5, 0.4, 0.3), (0.2,) * 3)
    return SimMIM(network(name, img_size=size), SimMIMSettings(**settings), spec)


def batch(count: int = 3) -> Views:
    return random_views([(16, 24)], count, first=7)


def test_masks_hide_whole_units_and_depend_on_samples():
    objective = simmim()
    masked = objective.mask(torch.arange(50), PROGRESS, torch.device("cpu"))
    units = masked.view(50, 2, 2, 3, 2).transpose(2, 3).flatten(3)  # 2 x 3 units of 4 patches
    assert (units.all(dim=3) | ~units.any(dim=3)).all()
    assert (units.all(dim=3).flatten(1).sum(dim=1) == 4).all()
    assert torch.equal(masked[7:8], objective.mask(torch.tensor([7]), PROGRESS, torch.device("cpu")))
    assert simmim(mask_unit=1).mask(torch.arange(2), PROGRESS, torch.device("cpu")).sum(dim=1).tolist() == [14, 14]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalise", [True, False])
def test_loss_equals_that_of_the_paper(name, normalise):
    objective, views = simmim(name, normalise_targets=normalise).double(), batch()
    views.views[0] = views.views[0].double()
    masked = objective.mask(views.positions, PROGRESS, torch.device("cpu"))
    targets = patchify(views.views[0], 4)
    if normalise:
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (objective.predict(views.views[0], masked) - targets).abs() * masked.unsqueeze(-1)
    expected = error.sum() / masked.sum() / 48  # as in the paper: the mean over masked pixels and channels
    torch.testing.assert_close(objective(views, PROGRESS).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_masked_pixels_have_no_gradient(name):
    objective, images = simmim(name), batch().views[0].requires_grad_()
    masked = objective.mask(torch.arange(3), PROGRESS, torch.device("cpu"))
    gradient = patchify(torch.autograd.grad(objective.predict(images, masked).square().sum(), images)[0], 4)
    assert not gradient[masked].any()
    assert gradient[~masked].any(dim=-1).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    objective = simmim(name)
    objective(batch(), PROGRESS).loss.backward()
    assert not [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_the_picture_shows_image_mask_and_reconstruction():
    assert simmim().picture(batch(), PROGRESS).shape == (3, 3 * 16, 3 * 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_unit": 3}, r"objective\.mask_unit = 3 does not divide the grid of 4x6 patches"),
        ({"mask_ratio": 0.01}, r"objective\.mask_ratio = 0\.01 hides 0 of the 6 mask units"),
        ({"mask_ratio": 0.99}, r"objective\.mask_ratio = 0\.99 hides 6 of the 6 mask units"),
    ],
)
def test_impossible_masks_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        simmim(**settings)


def test_a_backbone_without_a_plain_grid_is_refused():
    spec = ImageSpec((32, 32), 4, 3, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(UserError, match=r"ConvNeXt cannot leave tokens out"):
        SimMIM(timm.create_model("convnext_atto", num_classes=0), SimMIMSettings(), spec)
