"""Autoregressive: a prediction depends on all earlier clusters and on no other."""

import pytest
import timm
import torch

from selfvil.errors import UserError
from selfvil.objectives.autoregressive import Autoregressive, AutoregressiveSettings
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.mae import patchify
from small import Views, network, random_views

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)
CAUSAL = {"traversal": "unidirectional", "conv": "causal1d"}
BACKBONES = {
    "causal1d": ("vil_nano_patch4_32", CAUSAL),
    "no convolution": ("vil_nano_patch4_32", CAUSAL | {"conv": "none"}),
    "registers": ("vil_nano_patch4_32", CAUSAL | {"num_registers": 3}),
    "vit": ("vit_tiny_patch16_224", {"num_heads": 2, "reg_tokens": 2}),
}
CLUSTERS = [(1, 1), (1, 3), (2, 2), (2, 6), (4, 2)]


def build(backbone: str = "causal1d", cluster: tuple[int, int] = (2, 2), more: dict | None = None, **settings):
    torch.manual_seed(0)
    name, kwargs = BACKBONES[backbone]
    small = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
    spec = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return Autoregressive(
        network(name, **(kwargs | (more or {}))), AutoregressiveSettings(cluster=cluster, **(small | settings)), spec
    )


def batch(count: int = 2) -> Views:
    return random_views([(16, 24)], count)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_prediction_does_not_depend_on_its_own_or_later_clusters(backbone, cluster):
    objective = build(backbone, cluster).double()
    images = batch().views[0].double().requires_grad_()
    predicted = objective.predict(images)
    later = objective.cluster_of[objective.cluster_of > 0]
    assert predicted.shape == (2, len(later), 48)
    for number in later.unique().tolist():
        loss = predicted[:, later == number].square().sum()
        gradient = patchify(torch.autograd.grad(loss, images, retain_graph=True)[0], 4).abs().sum(-1)  # (B, N)
        assert (gradient[:, objective.cluster_of >= number] == 0).all()
        assert (gradient[:, 0] > 0).all()
        if backbone == "vit" or cluster in [(1, 1), (1, 3), (2, 6)]:  # all before it, if the scan order allows
            assert (gradient[:, objective.cluster_of < number] > 0).all()


def test_clusters_are_numbered_row_by_row():
    assert build().cluster_of.view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_is_the_mean_over_all_clusters_but_the_first(normalise):
    objective, views = build(normalise_targets=normalise), batch()
    targets = patchify(views.views[0], 4)
    if normalise:
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    later = [n for n, cluster in enumerate(objective.cluster_of.tolist()) if cluster]
    expected = (objective.predict(views.views[0]) - targets[:, later]).square().mean()
    torch.testing.assert_close(objective(views, PROGRESS).loss, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns(backbone):
    objective = build(backbone, (1, 1))
    objective(batch(), PROGRESS).loss.backward()
    without = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without


def test_the_picture_has_rows_of_three():
    assert build().picture(batch(), PROGRESS).shape == (3, 2 * 16, 3 * 24)


def test_bf16_loss_is_close_to_fp32():
    for backbone in BACKBONES:
        objective = build(backbone)
        expected = objective(batch(), PROGRESS).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = objective(batch(), PROGRESS).loss
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"traversal": "alternating"}, r"reads forwards only.*model\.traversal = unidirectional"),
        ({"traversal": "bidirectional"}, r"reads forwards only"),
        ({"traversal": "quad_alternating"}, r"reads forwards only"),
        ({"conv": "2d"}, r"convolution on the grid.*model\.conv = causal1d, or none"),
        ({"stride": 2}, r"overlapping patches"),
    ],
)
def test_backbones_that_are_not_causal_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        build(more=more)


def test_a_backbone_without_patches_is_refused():
    spec = ImageSpec((32, 32), 4, 3, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(UserError, match="ConvNeXt does not read patches in order"):
        Autoregressive(timm.create_model("convnext_atto", num_classes=0), AutoregressiveSettings(), spec)


@pytest.mark.parametrize("cluster", [(3, 2), (2, 4), (4, 6), (0, 1)])
def test_clusters_must_tile_the_grid(cluster):
    with pytest.raises(UserError, match=r"objective\.cluster = \[\d, \d\] must divide the grid of 4x6 patches"):
        build(cluster=cluster)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match=r"objective\.decoder_heads = 5 does not divide"):
        build(decoder_heads=5)
