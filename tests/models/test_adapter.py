"""One adapter for each family of backbones: readouts, dropped and masked patches, image sizes, and clear refusals."""

import pytest
import timm
import torch
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.adapter import BackboneAdapter, PatchlessAdapter, ViLAdapter, ViTAdapter, adapt
from selfvil.models.masking import keep_from_noise, sample_mask

VIL, VIT = "vil_nano_patch4_32", "vit_tiny_patch16_224"


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


# --- which adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (VIL, ViLAdapter),
        ("vil_mlp_nano_patch4_32", ViLAdapter),
        ("test_vit", ViTAdapter),
        ("test_convnext", PatchlessAdapter),
        ("test_resnet", PatchlessAdapter),
        ("swin_tiny_patch4_window7_224", BackboneAdapter),
    ],
)
def test_each_architecture_has_its_adapter(name, expected):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    adapter = adapt(backbone)
    assert type(adapter) is expected
    assert adapter.supports_any_img_size == (expected is not BackboneAdapter)
    assert adapter.has_patches == (expected is not PatchlessAdapter)


IDS, MASKED = torch.tensor([[0]]), torch.zeros(1, 4, dtype=torch.bool)
UNSUPPORTED = {
    "token_grid": (((32, 32),), r"ResNet cannot leave tokens out: a masked objective needs a vil_\* model"),
    "encode_kept": ((torch.zeros(1, 3, 32, 32), IDS), "ResNet cannot leave tokens out"),
    "encode_masked": ((torch.zeros(1, 3, 32, 32), MASKED, torch.zeros(3)), "ResNet cannot leave tokens out"),
    "masked_features": ((torch.zeros(1, 3, 32, 32), MASKED, torch.zeros(3)), "ResNet cannot leave tokens out"),
    "require_causal": ((), "ResNet does not read patches in order"),
    "latest_cluster": ((IDS[0],), "ResNet does not read patches in order"),
    "encode_causal": ((torch.zeros(1, 3, 32, 32), IDS[0]), "ResNet does not read patches in order"),
    "enable_gap_aware": ((), "ResNet does not forget"),
    "enable_compact_conv": ((), "this ResNet has no convolution among its tokens"),
}


@pytest.mark.parametrize("operation", UNSUPPORTED)
def test_unsupported_operations_are_refused_by_name(operation):
    arguments, message = UNSUPPORTED[operation]
    with pytest.raises(UserError, match=message):
        getattr(adapt(timm.create_model("test_resnet", num_classes=0)), operation)(*arguments)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"])
def test_networks_of_a_fixed_image_size_are_refused_for_crops(name):
    with torch.device("meta"):
        adapter = adapt(timm.create_model(name, num_classes=0))
    assert not adapter.supports_any_img_size
    with pytest.raises(UserError, match=f"{adapter.name} cannot take crops of several sizes"):
        adapter.enable_dynamic_img_size()


# --- readouts --------------------------------------------------------------------------------------------------------


def network(name: str = VIL, **kwargs) -> nn.Module:
    kwargs = {"embed_dim": 32, "depth": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 0} | kwargs
    return timm.create_model(name, **kwargs | ({"num_heads": 2} if name == VIT else {}))


def default(backbone: nn.Module) -> tuple[str, int]:
    """Name and width of the default readout."""
    readout = adapt(backbone).resolve_readout(None)
    return readout, adapt(backbone).readout_dim(readout)


def test_readouts_select_the_named_tokens():
    vil, vit = network(), network(VIT)
    adapt(vit).enable_dynamic_img_size()
    images = torch.randn(2, 3, 8, 16)
    patches, tokens = vil.forward_features(images).flatten(1, 2), vit.forward_features(images)
    assert tokens.shape == (2, 1 + 8, 32)
    expected = {
        "first": patches[:, 0], "last": patches[:, 7], "mean": patches.mean(dim=1),
        "bilateral_concat": torch.cat([patches[:, 0], patches[:, 7]], dim=1),
    }  # fmt: skip
    expected["first_last_mean"] = torch.cat([expected["bilateral_concat"], expected["mean"]], dim=1)
    for name, rows in expected.items():
        assert torch.equal(adapt(vil).read_out(images, name), rows)
        assert adapt(vil).resolve_readout(name) == name
        assert adapt(vil).readout_dim(name) == rows.shape[1]
    assert torch.equal(adapt(vit).read_out(images, "cls"), tokens[:, 0])
    torch.testing.assert_close(adapt(vit).read_out(images, "mean"), tokens[:, 1:].mean(dim=1))
    assert default(vil) == ("bilateral_concat", 64)
    assert default(vit) == ("cls", 32)


def test_readouts_of_extra_tokens():
    images = torch.randn(2, 3, 8, 16)
    for settings, readout, width in (
        ({"global_pool": "registers", "num_registers": 3}, "registers", 96),
        ({"global_pool": "middle_cls"}, "cls", 32),
    ):
        backbone = network(**settings)
        assert default(backbone) == (readout, width)
        pooled = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        assert torch.equal(adapt(backbone).read_out(images, readout), pooled)
        tokens = adapt(backbone).read_out(images, f"{readout}_mean")
        assert tokens.shape == (2, adapt(backbone).readout_dim(f"{readout}_mean"))
        assert adapt(backbone).frozen_readout == f"{readout}_mean"
    assert default(network(num_registers=2)) == ("bilateral_concat", 64)


def test_dynamic_img_size_equals_that_of_timm():
    """The same function as with `dynamic_img_size=True`, at every size, with the same parameters."""
    plain, dynamic = network(VIT), network(VIT, dynamic_img_size=True)
    dynamic.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 24)
    expected = plain.forward_features(images)
    adapt(plain).enable_dynamic_img_size()
    torch.testing.assert_close(plain.forward_features(images), expected)
    for size in ((16, 24), (8, 8), (24, 12)):
        images = torch.randn(2, 3, *size)
        assert torch.equal(plain.forward_features(images), dynamic.forward_features(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "readout", "usable"),
    [
        (VIL, {}, "cls", "bilateral_concat, mean, first, last, middle_patch, first_last_mean$"),
        (
            VIT,
            {"class_token": False, "global_pool": "avg"},
            "cls",
            "bilateral_concat, mean, first, last, middle_patch, first_last_mean$",
        ),
        (VIT, {}, "middle", "bilateral_concat, mean, first, last, middle_patch, first_last_mean, cls, cls_mean$"),
    ],
)
def test_a_readout_without_its_token_is_refused(name, kwargs, readout, usable):
    with pytest.raises(UserError, match=rf"objective.readout = '{readout}' is not possible with \w+; .*: {usable}"):
        adapt(network(name, **kwargs)).resolve_readout(readout)


def test_a_vit_without_class_token_has_the_mean_as_default():
    assert default(network(VIT, class_token=False, global_pool="avg")) == ("mean", 32)


# --- dropped and masked patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_keeping_all_patches_equals_the_dense_pass(make):
    backbone, images = make(), torch.randn(IMAGES, dtype=torch.float64)
    tokens = adapt(backbone).encode_kept(images, random_keep(NUM_TOKENS))
    dense = backbone.forward_features(images)
    dense = dense.flatten(1, 2) if dense.ndim == 4 else dense[:, 1:]
    torch.testing.assert_close(tokens, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_dropped_patches_have_no_effect(make):
    backbone, images, keep = make(), torch.randn(IMAGES, dtype=torch.float64), random_keep(6)
    images.requires_grad_()
    adapt(backbone).encode_kept(images, keep).square().sum().backward()
    patches = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    kept = torch.zeros(3, NUM_TOKENS, dtype=torch.bool).scatter_(1, keep, True)
    assert (patches[kept] > 0).all()
    assert (patches[~kept] == 0).all()


def test_kept_patches_keep_their_positions_on_the_grid():
    """The same patches at other positions give another result by the convolution alone; learned positions are zero."""
    backbone = small_vil()
    torch.nn.init.zeros_(backbone.pos_embed)
    x = torch.randn(1, NUM_TOKENS, 16, dtype=torch.float64)
    close, apart = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 10, 21]])
    x[:, apart[0]] = x[:, close[0]]
    assert not torch.allclose(
        backbone.forward_tokens(x, (6, 4), close), backbone.forward_tokens(x, (6, 4), apart), atol=1e-3
    )
    # Without neighbours, the distance has no effect.
    isolated, other = torch.tensor([[0, 10, 21]]), torch.tensor([[2, 8, 23]])
    x[:, other[0]] = x[:, isolated[0]]
    torch.testing.assert_close(
        backbone.forward_tokens(x, (6, 4), isolated), backbone.forward_tokens(x, (6, 4), other), rtol=1e-12, atol=1e-12
    )


def test_registers_of_a_vit_are_removed_after_the_blocks():
    backbone = small_vit(reg_tokens=2, dynamic_img_size=True)
    assert adapt(backbone).encode_kept(torch.randn(IMAGES, dtype=torch.float64), random_keep(5)).shape == (3, 5, 16)


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_gradient_checkpointing_gives_the_same_gradient(make):
    backbone, images, keep = make(), torch.randn(IMAGES, dtype=torch.float64), random_keep(5)

    def gradient() -> Tensor:
        loss = adapt(backbone).encode_kept(images, keep).square().sum()
        return torch.autograd.grad(loss, backbone.patch_embed.proj.weight)[0]

    expected = gradient()
    backbone.set_grad_checkpointing()
    torch.testing.assert_close(gradient(), expected)


def test_token_grid_of_sizes_and_shapes():
    assert adapt(small_vil()).token_grid((24, 16)) == (6, 4)
    assert adapt(small_vil()).token_grid((2, 3, 32, 8)) == (8, 2)
    assert adapt(small_vit()).token_grid((24, 16)) == (6, 4)


@pytest.mark.parametrize("make", [small_vil, small_vit], ids=["vil", "vit"])
def test_masked_patches_are_replaced_and_the_others_are_not(make):
    backbone, images = make(), torch.randn(IMAGES, dtype=torch.float64, requires_grad=True)
    token = torch.randn(16, dtype=torch.float64, requires_grad=True)
    masked = sample_mask("random", torch.rand(3, NUM_TOKENS), (6, 4), 10)
    tokens = adapt(backbone).encode_masked(images, masked, token)
    assert tokens.shape == (3, NUM_TOKENS, 16)
    grads = torch.autograd.grad(tokens.square().sum(), (images, token))
    patches = grads[0].unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    assert (patches[masked] == 0).all()
    assert (patches[~masked] > 0).all()
    assert grads[1].any()

    # Masking a patch by its own embedding changes nothing, and the hook is removed afterwards.
    embedded = backbone.patch_embed(images).flatten(1, -2)
    one = torch.zeros_like(masked[:1])
    one[0, 5] = True
    dense = backbone.forward_features(images[:1])
    torch.testing.assert_close(adapt(backbone).masked_features(images[:1], one, embedded[0, 5]), dense)


def test_masked_features_include_prefix_tokens():
    backbone = small_vit(reg_tokens=2)
    nothing = torch.zeros(3, NUM_TOKENS).bool()
    features = adapt(backbone).masked_features(torch.randn(IMAGES).double(), nothing, torch.zeros(16))
    assert features.shape == (3, 3 + NUM_TOKENS, 16)
    assert backbone.forward_head(features).shape == (3, 16)
