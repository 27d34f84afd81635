"""MAE: the loss equals the paper's, hidden patches have no effect, and masks depend on samples, not on batches."""

import pytest
import timm
import torch
from torch import Tensor

from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress, keyed_noise
from selfvil.objectives.mae import MAE, MAESettings, patchify, unpatchify
from selfvil.ops import mlstm
from small import Views, network, random_views

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)


def mae(name: str = "vil_nano_patch4_32", size: tuple[int, int] = (16, 24), **settings) -> MAE:
    torch.manual_seed(0)
    spec = ImageSpec(size, 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return MAE(network(name, img_size=size), MAESettings(decoder_dim=32, decoder_depth=1, **settings), spec)


def batch() -> Views:
    return random_views([(16, 24)], 3, first=7)


def test_patches_are_in_row_major_order():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row in range(2):
        for column in range(3):
            cut = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, 3 * row + column], cut.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, (2, 3), 4), images)


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_equals_that_of_the_paper(normalise):
    """Written out for each hidden patch, in float64."""
    objective = mae(normalise_targets=normalise).double()
    views = batch()
    views.views[0] = views.views[0].double()
    found = objective(views, PROGRESS).loss
    keep, _ = objective.mask(views.positions, PROGRESS, torch.device("cpu"))
    predicted = objective.decode(objective_latent(objective, views.views[0], keep), keep)
    errors = []
    for image in range(3):
        for patch in range(objective.num_patches):
            if patch not in keep[image].tolist():
                target = patchify(views.views[0], 4)[image, patch]
                if normalise:
                    target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
                errors.append((predicted[image, patch] - target).square().mean())
    assert len(errors) == 3 * 18
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-6, atol=0)


def objective_latent(objective: MAE, images: Tensor, keep: Tensor) -> Tensor:
    return adapt(objective.backbone).encode_kept(images, keep)


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
def test_hidden_patches_have_no_effect(name):
    """Neither by the convolution nor by the recurrence."""
    objective = mae(name)
    images = batch().views[0]
    keep, hidden = objective.mask(torch.arange(3), PROGRESS, images.device)
    noise = unpatchify(torch.randn(3, objective.num_patches, 48) * hidden.unsqueeze(-1), objective.grid, 4)
    latent = objective_latent(objective, images, keep)
    assert torch.equal(latent, objective_latent(objective, images + noise, keep))
    assert not torch.equal(latent, objective_latent(objective, images + 0.1, keep))


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
def test_every_parameter_learns(name):
    objective = mae(name)
    objective(batch(), PROGRESS).loss.backward()
    still = [
        name for name, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not still


def test_masks_depend_on_samples():
    """A sample has the same mask in any batch, and another one at each position of the run."""
    objective = mae()
    together, _ = objective.mask(torch.tensor([5, 6, 7, 8]), PROGRESS, torch.device("cpu"))
    alone = torch.cat([objective.mask(torch.tensor([p]), PROGRESS, torch.device("cpu"))[0] for p in (5, 6, 7, 8)])
    assert torch.equal(together, alone)
    assert (together.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in keyed_noise(3, torch.arange(50), 24).tolist()}) == 50


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("decoder", ["vil", "vit"])
def test_either_decoder_predicts_every_patch(name, decoder):
    objective = mae(name, decoder=decoder, decoder_heads=2)
    images = batch().views[0]
    keep, _ = objective.mask(torch.arange(3), PROGRESS, images.device)
    predicted = objective.decode(objective.encode(images, keep), keep)
    assert predicted.shape == (3, 24, 48)
    # Every patch may depend on the first kept token.
    latent = objective.encode(images, keep).detach().requires_grad_()
    gradient = torch.autograd.grad(objective.decode(latent, keep)[:, -1].sum(), latent)[0]
    assert gradient[:, 0].any()


@pytest.mark.parametrize("kind", ["block", "row"])
def test_other_masks_keep_the_ratio(kind):
    objective = mae(mask=kind)
    keep, hidden = objective.mask(torch.arange(20), PROGRESS, torch.device("cpu"))
    assert keep.shape == (20, 6)
    assert hidden.sum(dim=1).unique().tolist() == [18]
    assert not torch.equal(keep, mae().mask(torch.arange(20), PROGRESS, torch.device("cpu"))[0])


@pytest.mark.parametrize("settings", [{}, {"num_registers": 2}, {"traversal": "quad", "conv": "causal1d"}])
def test_gap_aware_forgetting_equals_that_of_the_whole_image(settings):
    """Kept tokens equal those of a scan of the whole image in which hidden tokens write nothing to the memory."""
    torch.manual_seed(0)
    model = VisionLSTM((16, 24), 4, embed_dim=32, depth=1, num_classes=0, **settings).double().eval()
    x = torch.randn(2, 24, 32, dtype=torch.double)
    keep = torch.stack([torch.arange(0, 24, 3), torch.tensor([1, 2, 3, 11, 12, 20, 21, 23])])
    plain = model.forward_tokens(x, (4, 6), keep)
    model.gap_aware = True
    aware = model.forward_tokens(x, (4, 6), keep)
    assert not torch.allclose(aware, plain, atol=1e-6)

    calls = []

    def whole(q, k, v, i, f, *, reverse, positions):
        """The operator on all steps, with closed input gates at the hidden ones."""
        calls.append(positions)
        length = int(positions.max()) + 1
        at = positions[:, None, :].expand(f.shape)
        f, i = (z.new_full((*z.shape[:2], length), rest).scatter(2, at, z) for z, rest in ((f, 0.0), (i, -1e4)))
        # A hidden step has the forget gate of the next kept one in scan order.
        order = range(length) if reverse else range(length - 1, -1, -1)
        for image, row in enumerate(positions.tolist()):
            gate = None
            for step in order:
                gate = f[image, :, step].clone() if step in row else gate
                if gate is not None:
                    f[image, :, step] = gate
        q, k, v = (z.new_zeros(*z.shape[:2], length, z.shape[-1]).scatter(2, at[..., None].expand(z.shape), z)
                   for z in (q, k, v))  # fmt: skip
        return mlstm(q, k, v, i, f, reverse=reverse).gather(2, at[..., None].expand(*at.shape, q.shape[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfvil.models.layers.mlstm", whole)
        torch.testing.assert_close(model.forward_tokens(x, (4, 6), keep), aware, rtol=1e-9, atol=1e-9)
    assert all(positions is not None for positions in calls)
    everything = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(model.forward_tokens(x, (4, 6), everything), model.forward_tokens(x, (4, 6)))


def test_gap_aware_needs_forget_gates():
    assert mae(gap_aware=True).backbone.gap_aware
    with pytest.raises(UserError, match="VisionTransformer does not forget: set it to false"):
        mae("vit_tiny_patch16_224", gap_aware=True)


def test_compact_conv_needs_a_convolution():
    assert mae(compact_conv=True).backbone.compact_conv
    with pytest.raises(UserError, match="this VisionTransformer has no convolution among its tokens: set it to false"):
        mae("vit_tiny_patch16_224", compact_conv=True)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match=r"objective\.decoder_heads = 5 does not divide objective\.decoder_dim = 32"):
        mae(decoder="vit", decoder_heads=5)


def test_masks_are_uniform():
    objective = mae()
    keep, hidden = objective.mask(torch.arange(4000), PROGRESS, torch.device("cpu"))
    assert keep.shape == (4000, 6)
    assert hidden.sum(dim=1).unique().tolist() == [18]
    share = 1 - hidden.mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_a_mask_must_keep_and_hide_at_least_one_patch(ratio):
    with pytest.raises(UserError, match=r"objective\.mask_ratio = 0\.\d+ keeps \d+ of the 24 patches"):
        mae(mask_ratio=ratio)


def test_a_patch_of_one_value_cannot_be_normalised():
    backbone = timm.create_model("vil_nano_patch4_32", embed_dim=32, depth=1, patch_size=1, img_size=8, in_chans=1)
    with pytest.raises(UserError, match=r"objective\.normalise_targets = true"):
        MAE(backbone, MAESettings(), ImageSpec((8, 8), 1, 1, (0.5,), (0.5,)))


def test_a_backbone_that_cannot_drop_tokens_is_refused():
    spec = ImageSpec((32, 32), 4, 3, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(UserError, match=r"ResNet cannot leave tokens out"):
        MAE(timm.create_model("resnet10t", num_classes=0), MAESettings(), spec)


def test_the_picture_shows_image_mask_and_reconstruction():
    objective = mae()
    views = batch()
    picture = objective.picture(views, PROGRESS)
    assert picture.shape == (3, 3 * 16, 3 * 24)
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(picture[:, :16, :24], (views.views[0][0] * 0.2 + mean).clamp(0, 1))
    hidden = objective.mask(views.positions, PROGRESS, torch.device("cpu"))[1][0].bool()
    masked = patchify(picture[None, :, :16, 24:48], 4)[0]
    torch.testing.assert_close(masked[hidden], mean.flatten().repeat(16).expand(int(hidden.sum()), -1))


def test_bf16_loss_is_close_to_fp32():
    objective = mae()
    expected = objective(batch(), PROGRESS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(batch(), PROGRESS).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
