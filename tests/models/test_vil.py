"""The backbone as a timm model."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch._dynamo.testing import CompileCounter

from selfvil.models import VisionLSTM
from selfvil.models.positions import resample_positions
from selfvil.models.published import checkpoint_filter_fn

NAMES = timm.list_models("vil_*")
PUBLISHED = [name for name in NAMES if timm.get_pretrained_cfg(name).url]


def small(**settings):
    settings = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 32, "depth": 3, **settings}
    return VisionLSTM(**settings).eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_name_creates_a_model(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        images = torch.empty(2, *model.default_cfg["input_size"])
        features = model.forward_features(images)
        assert features.shape == (2, *model.default_cfg["pool_size"], model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(images).shape == (2, model.num_classes)
    assert model.head_hidden_size == (1 if "_v1_" in name else 2) * model.num_features


@pytest.mark.parametrize("name", PUBLISHED)
def test_pretrained_names_have_the_urls_of_the_published_files(name):
    config = timm.get_pretrained_cfg(name)
    version = "vil_" if "_v1_" in name else "vil2_"
    assert config.url.startswith(f"https://ml.jku.at/research/vision_lstm/download/{version}")
    assert config.num_classes == 1000


@pytest.mark.parametrize("image", [(32, 32), (16, 48), (8, 4), (40, 36)])
def test_any_grid_works(image):
    assert small()(torch.randn(2, 3, *image)).shape == (2, 10)
    features = small().forward_features(torch.randn(2, 3, *image))
    assert features.shape == (2, image[0] // 4, image[1] // 4, 32)


def test_an_image_whose_sides_are_no_multiples_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="cannot be divided into patches of 4x4: both sides must be multiples"):
        small()(torch.randn(1, 3, 30, 32))


@pytest.mark.parametrize("in_chans", [1, 4, 13])
def test_any_number_of_channels_works(in_chans):
    assert small(in_chans=in_chans)(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)


def test_rectangular_patches():
    model = small(img_size=(24, 32), patch_size=(4, 8))
    assert model.grid_size == (6, 4)
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("global_pool", "expected"),
    [
        ("bilateral_concat", lambda x: torch.cat([x[:, 0, 0], x[:, -1, -1]], dim=1)),
        ("bilateral_avg", lambda x: (x[:, 0, 0] + x[:, -1, -1]) / 2),
        ("bilateral_patch", lambda x: (x[:, 0, 0] + x[:, -1, -1]) / 2),
        ("middle_patch", lambda x: x[:, 2, 0]),
        ("avg", lambda x: x.mean((1, 2))),
        ("", lambda x: x),
    ],
)
def test_poolings(global_pool, expected):
    model = small(global_pool=global_pool)
    x = model.forward_features(torch.randn(2, 3, 16, 24))
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), expected(x))
    assert model.forward_head(x, pre_logits=True).shape[-1] == model.head_hidden_size
    assert model.forward_head(x).shape[-1] == 10


@pytest.mark.parametrize("traversal", ["alternating", "quad"])
@pytest.mark.parametrize(
    ("settings", "num_extra", "width"),
    [
        ({"global_pool": "middle_cls"}, 1, 32),
        ({"global_pool": "middle_cls", "conv": "causal1d"}, 1, 32),
        ({"global_pool": "registers", "num_registers": 3}, 3, 96),
        ({"global_pool": "bilateral_concat", "num_registers": 3}, 3, 64),
    ],
)
def test_extra_tokens(settings, num_extra, width, traversal):
    model = small(traversal=traversal, **settings)
    images = torch.randn(2, 3, 16, 24)
    features = model.forward_features(images)
    assert features.shape == (2, num_extra + 24, 32)
    assert model.num_prefix_tokens == num_extra
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, width) == (2, model.head_hidden_size)
    if width != 64:
        assert torch.equal(pooled, features[:, :num_extra].flatten(1))
    assert model(images).shape == (2, 10)
    final, maps = model.forward_intermediates(images, norm=True)
    assert torch.equal(final, features)
    torch.testing.assert_close(maps[-1].flatten(2).mT, features[:, num_extra:])
    # The extra tokens are in the sequence and receive gradients from the patches.
    name = "cls_token" if num_extra == 1 else "reg_token"
    token = getattr(model, name)
    assert torch.autograd.grad(features[:, num_extra:].square().sum(), token)[0].flatten(2).any(2).all()
    assert name in model.no_weight_decay()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers[name] == 0


def test_extra_tokens_must_fit_the_pooling():
    with pytest.raises(ValueError, match="set num_registers"):
        small(global_pool="registers")
    with pytest.raises(ValueError, match="uses a class token, which excludes registers"):
        small(global_pool="middle_cls", num_registers=2)
    with pytest.raises(ValueError, match="needs a class token"):
        small().reset_classifier(3, "middle_cls")
    model = small(num_registers=2)
    model.reset_classifier(3, "registers")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"traversal": "spiral"}, "choose one of: alternating, unidirectional"),
        ({"conv": "3d"}, "choose one of: '2d', 'causal1d', 'none', None"),
        ({"depth": 1.25}, "multiple of 0.5, got 1.25"),
        ({"pos_embed": "rope"}, "choose one of: learn, sincos"),
    ],
)
def test_unknown_designs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_stochastic_depth_is_uniform_or_linear():
    def rates(**settings):
        model = small(drop_path_rate=0.2, depth=2.5, **settings)
        blocks = [block for pair in model.blocks for block in (pair.first, pair.second) if block is not None]
        return [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]

    assert rates() == 5 * [0.2]
    assert rates(drop_path_uniform=False) == pytest.approx([0, 0, 0.1, 0.1, 0.2])


def test_overlapping_patches():
    model = small(stride=2)
    assert model.grid_size == (8, 8)
    assert model.patch_embed.dynamic_feat_size((32, 24)) == (15, 11)
    assert model.forward_features(torch.randn(1, 3, 32, 24)).shape == (1, 15, 11, 32)
    assert model.feature_info[0]["reduction"] == 2
    model.set_input_size(48, patch_size=8)
    assert model.forward_features(torch.randn(1, 3, 48, 48)).shape == (1, 21, 21, 32)


def test_fixed_positions():
    model = small(pos_embed="sincos")
    assert "pos_embed" not in dict(model.named_parameters()) | model.state_dict()
    positions = model.pos_embed
    torch.testing.assert_close(positions.square().sum(-1), torch.full((1, 8, 8), 16.0))  # sin² + cos² of 16 angles
    assert len(positions.flatten(0, 2).round(decimals=3).unique(dim=0)) == 64
    model.set_input_size(48)
    assert model.pos_embed.shape == (1, 12, 12, 32)
    assert model(torch.randn(1, 3, 40, 32)).shape == (1, 10)
    twin = small(pos_embed="sincos", img_size=48)
    twin.load_state_dict(checkpoint_filter_fn(model.state_dict(), twin))


def test_an_unknown_pooling_names_the_choices():
    with pytest.raises(ValueError, match=r"'bilateral_avg', 'bilateral_patch', 'avg', .*'registers', ''"):
        small(global_pool="spiral")


def test_reset_classifier():
    model = small(fc_norm=True)
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)
    model.reset_classifier(4, "avg")
    assert model.get_classifier().weight.shape == (4, 32)
    assert isinstance(model.fc_norm, torch.nn.Identity)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    assert model.num_classes == 0


def test_positions_on_another_grid():
    positions = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    assert resample_positions(positions, (4, 6)) is positions
    grown = resample_positions(positions, (8, 6))
    expected = F.interpolate(positions.permute(0, 3, 1, 2), (8, 6), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(grown, expected)
    assert grown.dtype == torch.float64
    torch.testing.assert_close(resample_positions(positions, (8, 6), "bicubic"), expected)
    smooth = F.interpolate(positions.permute(0, 3, 1, 2), (8, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(resample_positions(positions, (8, 6), "bicubic_antialias"), smooth)
    with pytest.raises(ValueError, match="choose one of auto, bicubic"):
        resample_positions(positions, (8, 6), "linear")
    constant = torch.full((1, 8, 8, 2), 3.0)
    torch.testing.assert_close(resample_positions(constant, (3, 5)), torch.full((1, 3, 5, 2), 3.0))
    # A smaller grid is antialiased: a checkerboard becomes uniform at half the size.
    board = (torch.arange(16).view(16, 1) + torch.arange(16)).remainder(2).float().view(1, 16, 16, 1)
    assert (resample_positions(board, (8, 8)) - 0.5)[:, 2:-2, 2:-2].abs().max() < 0.05


def test_set_input_size_keeps_the_function():
    model, images = small(), torch.randn(1, 3, 48, 16)
    before = model(images)
    model.set_input_size((48, 16))
    assert model.grid_size == (12, 4)
    assert model.pos_embed.shape == (1, 12, 4, 32)
    torch.testing.assert_close(model(images), before)
    model.set_input_size(64, patch_size=8)
    assert model.grid_size == (8, 8)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_state_dict_from_a_file_and_on_another_grid(tmp_path):
    model, images = small(fc_norm=True, init_values=0.1), torch.randn(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    twin = small(fc_norm=True, init_values=0.1)
    twin.load_state_dict(checkpoint_filter_fn(state, twin))
    torch.testing.assert_close(twin(images), model(images), rtol=0, atol=0)

    finer = small(fc_norm=True, init_values=0.1, img_size=(48, 32))
    finer.load_state_dict(checkpoint_filter_fn(state, finer))
    images = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(finer(images), model(images))


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vil_tiny_patch16_224"])
def test_timm_loads_a_model_from_a_folder(name, tmp_path):
    settings = {"img_size": 32, "embed_dim": 32, "depth": 2, "in_chans": 1, "init_values": 1e-4, "num_classes": 0}
    model = timm.create_model(name, **settings).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 0,
        "model_args": settings,
        "pretrained_cfg": {"num_classes": 0, "input_size": [1, 32, 32], "first_conv": "patch_embed.proj"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_published_weights_add_their_norm_and_fit_new_classes_and_channels(tmp_path):
    name, settings = "vil_tiny_patch16_224", {"embed_dim": 32, "depth": 2}
    model = timm.create_model(name, fc_norm=True, **settings)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings["pretrained_cfg_overlay"] = {"file": str(tmp_path / "model.safetensors")}

    loaded = timm.create_model(name, pretrained=True, **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    changed = timm.create_model(name, pretrained=True, num_classes=5, in_chans=1, img_size=64, **settings)
    assert torch.equal(changed.fc_norm.weight, model.fc_norm.weight)
    assert changed(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    averaged = timm.create_model(name, pretrained=True, num_classes=0, global_pool="avg", **settings)
    assert isinstance(averaged.fc_norm, torch.nn.Identity)


def test_a_pair_is_one_layer_for_layer_wise_learning_rates():
    model = small()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["pos_embed"] == layers["patch_embed.proj.weight"] == 0
    assert layers["blocks.0.first.norm.weight"] == layers["blocks.0.second.layer.skip"] == 1
    assert layers["blocks.2.second.layer.proj_down.weight"] == layers["norm.weight"] == 3
    assert layers["head.weight"] > 3
    assert set(layers) == {name for name, _ in model.named_parameters()}


def test_weight_decay_applies_only_to_matrices_and_kernels():
    model = small(fc_norm=True, init_values=0.1)
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    assert decayed == {n for n, _ in model.named_parameters() if n.endswith("weight") and "norm" not in n}


def test_intermediates():
    model, images = small(), torch.randn(2, 3, 32, 16)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [m.shape for m in maps] == 3 * [(2, 32, 8, 4)]
    last = model.forward_intermediates(
        images, indices=1, norm=True, stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    torch.testing.assert_close(last[0], final)
    first = model.forward_intermediates(images, indices=[0], stop_early=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(first[0].transpose(1, 2).unflatten(2, (8, 4)), maps[0])
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(images, output_fmt="CHW")

    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    torch.testing.assert_close(model(images).permute(0, 3, 1, 2), maps[0])


def test_features_only():
    model = timm.create_model("vil_nano_patch4_32", features_only=True, out_indices=[0, 5])
    assert [m.shape for m in model(torch.randn(1, 3, 32, 48))] == 2 * [(1, 96, 8, 12)]
    assert model.feature_info.reduction() == [4, 4]


def test_grad_checkpointing_changes_nothing():
    model, images = small(), torch.randn(2, 3, 32, 32)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    got = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected)


def test_depth_scaled_init_is_smaller():
    plain, scaled = small(), small(depth_scaled_init=True)
    ratio = plain.blocks[0].first.layer.proj_down.weight.std() / scaled.blocks[0].first.layer.proj_down.weight.std()
    assert ratio.item() == pytest.approx(6, rel=0.1)


def test_bfloat16_autocast_stays_near_float32():
    model, images = timm.create_model("vil_nano_patch4_32", num_classes=0), torch.randn(4, 3, 32, 32)
    weight = torch.randn(4, 192)

    def run(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(images)
        (output.float() * weight).sum().backward()
        return output.detach().float(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (exact, exact_grads), (output, grads) = run(False), run(True)
    assert (output - exact).norm() / exact.norm() < 0.02
    for name, gradient in grads.items():
        assert torch.isfinite(gradient).all(), name
    together = [torch.cat([g.flatten() for g in group.values()]) for group in (grads, exact_grads)]
    assert (together[0] - together[1]).norm() / together[1].norm() < 0.05


def test_torch_export():
    model, images = small(depth=1), torch.randn(2, 3, 32, 32)
    graph = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model(images))


@pytest.mark.slow
def test_a_new_image_size_does_not_recompile():
    """One graph for the first size and one for all others, up to the size at which the mLSTM backend changes."""
    counter = CompileCounter()
    model = VisionLSTM(img_size=64, patch_size=16, embed_dim=32, depth=1, num_classes=5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in [(64, 64), (96, 96), (128, 128), (96, 192), (224, 160), (64, 64)]:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_compiles_to_one_graph():
    model, images = small(depth=1), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    inputs = list(model.parameters())
    expected = torch.autograd.grad(model(images).square().sum(), inputs)
    got = torch.autograd.grad(compiled(images).square().sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
