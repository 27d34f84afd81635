"""Tokens dropped, grid kept."""

import pytest
import timm
import torch

from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.masking import (
    MASKS,
    encode_kept,
    encode_masked,
    gather_tokens,
    keep_from_noise,
    kept_ids,
    masked_features,
    sample_mask,
    scatter_tokens,
    token_grid,
)
from selfvil.models.order import compact_grid


def small_vil(**settings):
    settings = {"img_size": (24, 16), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 0, **settings}
    return VisionLSTM(**settings).double().eval()


def small_vit(**settings):
    settings = {"img_size": (24, 16), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **settings}
    return timm.models.VisionTransformer(num_classes=0, **settings).double().eval()


IMAGES = (3, 3, 24, 16)
NUM_TOKENS = 24


def random_keep(num_keep, batch=IMAGES[0]):
    return keep_from_noise(torch.rand(batch, NUM_TOKENS), num_keep)


def test_the_least_noise_is_kept_in_order():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5]])
    assert keep_from_noise(noise, 2).tolist() == [[1, 3], [0, 1]]
    assert keep_from_noise(noise, 4).tolist() == [[0, 1, 2, 3]] * 2
    keep = random_keep(7)
    assert keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize("fill_shape", [(), (5,), (1, 1, 5), (1, 24, 5), (3, 24, 5)])
def test_scatter_puts_tokens_back_and_gradients_go_to_both(fill_shape):
    keep = random_keep(6)
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(fill_shape, dtype=torch.float64, requires_grad=True)
    full = scatter_tokens(x, keep, fill, NUM_TOKENS)
    assert torch.equal(gather_tokens(full, keep), x)

    expected = fill.expand(3, NUM_TOKENS, 5).clone()
    for image, ids in enumerate(keep.tolist()):
        for row, token in enumerate(ids):
            expected[image, token] = x[image, row]
    assert torch.equal(full, expected)
    weight = torch.randn_like(full)
    for a, b in zip(torch.autograd.grad(full, (x, fill), weight), torch.autograd.grad(expected, (x, fill), weight)):
        torch.testing.assert_close(a, b)


def test_scatter_follows_the_dtype_of_the_tokens():
    assert (
        scatter_tokens(torch.ones(1, 1, 2).bfloat16(), torch.tensor([[0]]), torch.zeros(2), 3).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_all_kept_is_the_dense_pass(make):
    backbone, images = make(), torch.randn(IMAGES, dtype=torch.float64)
    tokens = encode_kept(backbone, images, random_keep(NUM_TOKENS))
    dense = backbone.forward_features(images)
    dense = dense.flatten(1, 2) if dense.ndim == 4 else dense[:, 1:]
    torch.testing.assert_close(tokens, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_dropped_patches_have_no_say(make):
    backbone, images, keep = make(), torch.randn(IMAGES, dtype=torch.float64), random_keep(6)
    images.requires_grad_()
    encode_kept(backbone, images, keep).square().sum().backward()
    patches = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    kept = torch.zeros(3, NUM_TOKENS, dtype=torch.bool).scatter_(1, keep, True)
    assert (patches[kept] > 0).all()
    assert (patches[~kept] == 0).all()


def test_the_grid_is_kept():
    """The same six patches, further apart on the grid, are not the same to the convolution or to the positions."""
    backbone = small_vil()
    torch.nn.init.zeros_(backbone.pos_embed)
    x = torch.randn(1, NUM_TOKENS, 16, dtype=torch.float64)
    close, apart = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 10, 21]])
    x[:, apart[0]] = x[:, close[0]]
    assert not torch.allclose(
        backbone.forward_tokens(x, (6, 4), close), backbone.forward_tokens(x, (6, 4), apart), atol=1e-3
    )
    # Where none has a neighbour, distance makes no difference.
    lonely, lonelier = torch.tensor([[0, 10, 21]]), torch.tensor([[2, 8, 23]])
    x[:, lonelier[0]] = x[:, lonely[0]]
    torch.testing.assert_close(
        backbone.forward_tokens(x, (6, 4), lonely), backbone.forward_tokens(x, (6, 4), lonelier), rtol=1e-12, atol=1e-12
    )


def test_registers_of_a_vit_go_through_and_come_off():
    backbone = small_vit(reg_tokens=2, dynamic_img_size=True)
    assert encode_kept(backbone, torch.randn(IMAGES, dtype=torch.float64), random_keep(5)).shape == (3, 5, 16)


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_checkpointed_blocks_give_the_same(make):
    backbone, images, keep = make(), torch.randn(IMAGES, dtype=torch.float64), random_keep(5)
    expected = torch.autograd.grad(encode_kept(backbone, images, keep).square().sum(), backbone.patch_embed.proj.weight)
    backbone.set_grad_checkpointing()
    got = torch.autograd.grad(encode_kept(backbone, images, keep).square().sum(), backbone.patch_embed.proj.weight)
    torch.testing.assert_close(got, expected)


def test_token_grid_of_sizes_and_shapes():
    assert token_grid(small_vil(), (24, 16)) == (6, 4)
    assert token_grid(small_vil(), (2, 3, 32, 8)) == (8, 2)
    assert token_grid(small_vit(), (24, 16)) == (6, 4)


def test_other_architectures_are_refused():
    resnet = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(UserError, match=r"ResNet cannot leave tokens out.*vil_\*"):
        encode_kept(resnet, torch.randn(1, 3, 32, 32), torch.tensor([[0]]))
    with pytest.raises(UserError, match="ResNet cannot leave tokens out"):
        token_grid(resnet, (32, 32))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [(6, 4), (1, 24), (14, 14), (1, 2)])
def test_masks_hide_exactly_as_many_as_asked(kind, grid):
    num = grid[0] * grid[1]
    noise = torch.rand(40, num)
    for hidden in {1, num // 2, num - 1}:
        masked = sample_mask(kind, noise, grid, hidden)
        assert masked.dtype == torch.bool
        assert (masked.sum(dim=1) == hidden).all()
        keep = kept_ids(masked, num - hidden)
        assert torch.equal(torch.ones_like(masked).scatter(1, keep, False), masked)
        assert (keep.diff(dim=1) > 0).all()
    each = torch.arange(40) % num
    assert torch.equal(sample_mask(kind, noise, grid, each).sum(dim=1), each)


def test_the_random_mask_keeps_the_least_noise():
    noise = torch.rand(9, 24).round(decimals=1)  # with ties
    assert torch.equal(kept_ids(sample_mask("random", noise, (6, 4), 17), 7), keep_from_noise(noise, 7))


def test_rows_are_hidden_whole():
    rows = sample_mask("row", torch.rand(50, 24), (6, 4), 12).view(50, 6, 4)
    assert (rows.all(dim=2) | ~rows.any(dim=2)).all()
    assert rows.any(dim=2).sum(dim=1).unique().tolist() == [3]


def test_blocks_hang_together_and_fall_everywhere():
    """A hidden patch has more hidden neighbours than in a random mask, and no place is left out."""
    grid, noise = (14, 14), torch.rand(500, 196)
    shares = {}
    for kind in ("random", "block"):
        masked = sample_mask(kind, noise, grid, 98).view(-1, *grid).float()
        shares[kind] = float((masked[:, 1:] * masked[:, :-1]).sum() / masked[:, 1:].sum())
        assert masked.mean(dim=0).min() > 0.02
        assert masked.mean(dim=0).max() < 0.95
    assert shares["random"] == pytest.approx(0.5, abs=0.02)
    assert shares["block"] > 0.75


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_masked_patches_are_replaced_and_the_others_stay(make):
    backbone, images = make(), torch.randn(IMAGES, dtype=torch.float64, requires_grad=True)
    token = torch.randn(16, dtype=torch.float64, requires_grad=True)
    masked = sample_mask("random", torch.rand(3, NUM_TOKENS), (6, 4), 10)
    tokens = encode_masked(backbone, images, masked, token)
    assert tokens.shape == (3, NUM_TOKENS, 16)
    grads = torch.autograd.grad(tokens.square().sum(), (images, token))
    patches = grads[0].unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    assert (patches[masked] == 0).all()
    assert (patches[~masked] > 0).all()
    assert grads[1].any()

    # Masking with the very embedding of the patch changes nothing; and nothing stays behind in the backbone.
    embedded = backbone.patch_embed(images).flatten(1, -2)
    one = torch.zeros_like(masked[:1])
    one[0, 5] = True
    dense = backbone.forward_features(images[:1])
    torch.testing.assert_close(masked_features(backbone, images[:1], one, embedded[0, 5]), dense)


def test_masked_features_carry_the_class_token():
    backbone = small_vit(reg_tokens=2)
    features = masked_features(
        backbone, torch.randn(IMAGES).double(), torch.zeros(3, NUM_TOKENS).bool(), torch.zeros(16)
    )
    assert features.shape == (3, 3 + NUM_TOKENS, 16)
    assert backbone.forward_head(features).shape == (3, 16)


def test_masking_needs_a_backbone_that_takes_tokens():
    with pytest.raises(UserError, match="ConvNeXt cannot leave tokens out"):
        encode_masked(
            timm.create_model("convnext_atto", num_classes=0),
            torch.randn(1, 3, 32, 32),
            torch.zeros(1, 4),
            torch.zeros(3),
        )


# --- convolution of kept tokens side by side --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "grid", "expected"),
    [(16, (8, 8), (4, 4)), (6, (4, 6), (2, 3)), (6, (6, 4), (3, 2)), (49, (14, 14), (7, 7)), (7, (4, 7), (1, 7)),
     (5, (9, 3), (5, 1)), (1, (4, 4), (1, 1)), (24, (4, 6), (4, 6))],
)  # fmt: skip
def test_a_compact_grid_has_nearly_the_shape_of_the_whole_one(count, grid, expected):
    assert compact_grid(count, grid) == expected


@pytest.mark.parametrize("settings", [{}, {"conv": "causal1d"}, {"num_registers": 2}, {"traversal": "quad"}])
def test_a_compact_convolution_sees_the_kept_tokens_as_an_image_of_their_own(settings):
    """Positions are added before: so kept tokens with theirs are the image of a network whose positions are zero."""
    model = VisionLSTM((16, 24), 4, embed_dim=32, depth=2, num_classes=0, **settings).double().eval()
    x, keep = torch.randn(2, 24, 32, dtype=torch.double), torch.tensor([[0, 2, 3, 9, 17, 22], [1, 4, 5, 6, 20, 23]])
    if settings.get("traversal") == "quad":  # kept in two whole rows: then columns are columns of the small grid too
        keep = torch.tensor([[0, 1, 2, 12, 13, 14], [7, 9, 11, 19, 21, 23]])
    spread = model.forward_tokens(x, (4, 6), keep)
    model.set_compact_conv()
    compact = model.forward_tokens(x, (4, 6), keep)
    assert not torch.allclose(compact, spread, atol=1e-6)
    placed = gather_tokens(x + model.pos_embed.flatten(1, 2), keep)
    everything = torch.arange(24).expand(2, -1)
    whole = model.forward_tokens(x, (4, 6), everything)
    torch.testing.assert_close(whole, model.forward_tokens(x, (4, 6)), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.pos_embed.zero_()
    if not settings.get("num_registers"):  # whose places among the kept tokens follow the whole image
        torch.testing.assert_close(model.forward_tokens(placed, (2, 3)), compact, rtol=1e-9, atol=1e-9)
