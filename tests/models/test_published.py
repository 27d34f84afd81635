"""The outputs and gradients of the backbone equal those of the published network (NX-AI/vision-lstm)."""

import os
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from published_files import as_in_published_file
from selfvil.models.positions import resample_positions
from selfvil.models.published import checkpoint_filter_fn
from selfvil.models.vision_lstm import VisionLSTM

FOLDER = Path(__file__).parent
VERSION_1 = {
    "conv": "causal1d", "bias": False, "global_pool": "bilateral_avg", "norm_eps": 1e-5, "fc_norm_eps": 1e-6
}  # fmt: skip
PARAMETERS = {
    "vil_tiny_patch16_224": 6_390_760,
    "vil_small_patch16_224": 23_397_160,
    "vil_base_patch16_224": 89_260_456,
    "vil_v1_tiny_patch16_224": 6_088_360,
    "vil_v1_tiny_plus_patch16_224": 7_277_840,
    "vil_v1_tiny_plus_patch16_stride8_224": 7_277_840,
    "vil_v1_small_patch16_224": 22_792_360,
    "vil_v1_small_plus_patch16_224": 24_628_664,
    "vil_v1_small_plus_patch16_stride8_224": 24_628_664,
    "vil_v1_base_patch16_224": 88_050_856,
    "vil_v1_base_patch16_stride8_224": 88_050_856,
}


CONSTRUCTORS = {
    "vil-tiny": "vil_v1_tiny_patch16_224",
    "vil-tiny-e400": "vil_v1_tiny_patch16_224",
    "vil-tinyplus": "vil_v1_tiny_plus_patch16_224",
    "vil-tinyplus-e400": "vil_v1_tiny_plus_patch16_224",
    "vil-tinyplus-stride8": "vil_v1_tiny_plus_patch16_stride8_224",
    "vil-small": "vil_v1_small_patch16_224",
    "vil-smallplus": "vil_v1_small_plus_patch16_224",
    "vil-smallplus-stride8": "vil_v1_small_plus_patch16_stride8_224",
    "vil-base": "vil_v1_base_patch16_224",
    "vil-base-stride8": "vil_v1_base_patch16_stride8_224",
    "vil2-tiny": "vil_tiny_patch16_224",
    "vil2-tiny-e400": "vil_tiny_patch16_224",
    "vil2-small": "vil_small_patch16_224",
    "vil2-base": "vil_base_patch16_224",
}
"""The constructors of the published hubconf.py, and our names for them."""


@pytest.fixture(scope="module")
def published():
    """The published package, from the checkout in SELFVIL_PUBLISHED_VIL."""
    folder = os.environ.get("SELFVIL_PUBLISHED_VIL")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_VIL does not name a checkout of NX-AI/vision-lstm")
    sys.path.insert(0, folder)
    try:
        return pytest.importorskip("hubconf")
    finally:
        sys.path.remove(folder)


def randomise(model):
    """Leave no parameter at zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter.std() / 5 if parameter.std() > 0 else 0.1))


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model, images, weight):
    images = images.clone().requires_grad_()
    output = model(images)
    (output * weight).sum().backward()
    return output.detach(), images.grad, {name: p.grad for name, p in model.named_parameters()}


def worst_gradient(ours, published, model):
    """Gradients under our names. The filter for parameters applies to gradients as well, since it is linear."""
    published = checkpoint_filter_fn(published, model)
    assert set(ours) == set(published)
    return max(relative_error(ours[name], published[name]) for name in ours)


@pytest.mark.parametrize(
    ("version", "settings"), [("v1", {"depth": 1.5, "stride": 2, **VERSION_1}), ("v2", {"depth": 1})]
)
def test_stored_outputs_and_gradients(version, settings):
    values = load_file(FOLDER / f"published_{version}.safetensors")
    parameters = {name.removeprefix("parameter/"): v for name, v in values.items() if name.startswith("parameter/")}
    expected = {name.removeprefix("gradient/"): v for name, v in values.items() if name.startswith("gradient/")}

    model = VisionLSTM(img_size=(16, 12), patch_size=4, num_classes=5, embed_dim=8, fc_norm=True, **settings)
    model.load_state_dict(checkpoint_filter_fn(parameters, model))
    output, d_images, grads = gradients(model.double(), values["images"].double(), values["weight"].double())
    assert relative_error(output, values["output"]) < 1e-10
    assert relative_error(d_images, values["d_images"]) < 1e-10
    assert worst_gradient(grads, expected, model) < 1e-10


@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize(
    ("dim", "depth", "image", "patch_size", "global_pool"),
    [
        (32, 2, (3, 32, 32), 8, "bilateral_concat"),
        (64, 3, (1, 24, 40), 4, "bilateral_concat"),
        (192, 1, (3, 112, 160), 16, "bilateral_avg"),
    ],
)
def test_outputs_and_gradients(published, dim, depth, image, patch_size, global_pool, fc_norm):
    theirs = published.VisionLSTM2(
        dim=dim,
        depth=depth,
        input_shape=image,
        patch_size=patch_size,
        output_shape=(7,),
        legacy_norm=fc_norm,
        pooling={"bilateral_concat": "bilateral_flatten"}.get(global_pool, global_pool),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    ours = VisionLSTM(
        img_size=image[1:],
        patch_size=patch_size,
        in_chans=image[0],
        num_classes=7,
        embed_dim=dim,
        depth=depth,
        global_pool=global_pool,
        fc_norm=fc_norm,
    )
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))

    images, weight = torch.randn(2, *image), torch.randn(2, 7)
    exact = gradients(theirs.double(), images.double(), weight.double())
    for dtype, output_tolerance, gradient_tolerance in ((torch.float32, 1e-5, 5e-5), (torch.float64, 1e-10, 1e-10)):
        ours.to(dtype).zero_grad()
        output, d_images, grads = gradients(ours, images.to(dtype), weight.to(dtype))
        assert relative_error(output, exact[0]) < output_tolerance
        assert relative_error(d_images, exact[1]) < gradient_tolerance
        assert worst_gradient(grads, exact[2], ours) < gradient_tolerance


def test_every_constructor_has_a_name(published):
    configs = published.CONFIGS_V1 | published.CONFIGS_V2
    assert set(configs) == set(CONSTRUCTORS)
    urls = {config.url for name in timm.list_pretrained("vil_*") if (config := timm.get_pretrained_cfg(name)).url}
    assert urls == {config["url"] for config in configs.values()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["classifier", "features"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_every_constructor(published, constructor, mode):
    """At full width and depth, on images of 64 × 48 px to save time (set SELFVIL_FULL_SIZE for 224 px)."""
    sizes = (224, 224) if os.environ.get("SELFVIL_FULL_SIZE") else (64, 48)
    first_version = constructor in published.CONFIGS_V1
    config = (published.CONFIGS_V1 | published.CONFIGS_V2)[constructor]
    settings, changes = config["ctor_kwargs"] | {"input_shape": (3, *sizes)}, {}
    if mode == "features":
        settings |= {"output_shape": None, "mode": None if first_version else "features", "pooling": None}
        changes = {"num_classes": 0, "global_pool": ""}
    theirs = config["ctor"](**settings)
    randomise(theirs)
    ours = timm.create_model(CONSTRUCTORS[constructor], img_size=sizes, fc_norm=True, **changes)
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    images = torch.randn(1, 3, *sizes)

    def run(model, dtype):
        model.to(dtype).zero_grad()
        inputs = images.to(dtype, copy=True).requires_grad_()
        output = model(inputs)
        output = output.flatten(1, -2) if output.ndim == 4 else output
        (output * weight.to(dtype)).sum().backward()
        return output.detach(), inputs.grad, {name: p.grad for name, p in model.named_parameters()}

    weight = torch.randn(ours(images).flatten(1, -2).shape if mode == "features" else (1, 1000))
    exact = run(theirs, torch.float64)
    exact_gradients = checkpoint_filter_fn(exact[2], ours)
    for dtype, output_tolerance, gradient_tolerance in ((torch.float32, 1e-5, 5e-5), (torch.float64, 1e-10, 1e-10)):
        output, d_images, grads = run(ours, dtype)
        assert relative_error(output, exact[0]) < output_tolerance
        assert relative_error(d_images, exact[1]) < gradient_tolerance
        assert set(grads) == set(exact_gradients)
        assert relative_error(together(grads), together(exact_gradients)) < gradient_tolerance


def together(grads):
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_sizes_equal_those_of_the_checkout(published, constructor):
    config = (published.CONFIGS_V1 | published.CONFIGS_V2)[constructor]
    with torch.device("meta"):
        ours = timm.create_model(CONSTRUCTORS[constructor], fc_norm=True)
        theirs = config["ctor"](**config["ctor_kwargs"])
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_finer_positions_are_interpolated_as_published(published):
    old = published.VisionLSTM2(dim=16, depth=1, input_shape=(3, 32, 32), patch_size=8)
    new = published.VisionLSTM2(dim=16, depth=1, input_shape=(3, 64, 48), patch_size=8)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(resample_positions(old.pos_embed.embed, (8, 6)), new.pos_embed.embed)


def test_the_published_files_load():
    """Published files use other names than the published modules, number single blocks, and have an outer key."""
    model = VisionLSTM(img_size=16, patch_size=4, num_classes=3, embed_dim=8, depth=2, fc_norm=True)
    in_file = as_in_published_file(model.state_dict())
    assert "xlstm.blocks.3.xlstm.mlstm_cell.igate.weight" in in_file

    model.load_state_dict(checkpoint_filter_fn({"state_dict": in_file}, model))
    loaded = model.state_dict()
    for ours, theirs in {
        "blocks.1.second.layer.q_proj.weight": "xlstm.blocks.3.xlstm.q_proj.weight",
        "blocks.1.first.norm.weight": "xlstm.blocks.2.xlstm_norm.weight",
        "blocks.0.first.layer.conv.weight": "xlstm.blocks.0.xlstm.conv1d.weight",
        "norm.bias": "xlstm.post_blocks_norm.bias",
        "fc_norm.weight": "head.0.weight",
        "head.bias": "head.1.bias",
        "pos_embed": "pos_embed.embed",
    }.items():
        assert torch.equal(loaded[ours], in_file[theirs])

    finer = VisionLSTM(img_size=32, patch_size=4, num_classes=3, embed_dim=8, depth=2)  # no fc_norm, another grid
    finer.load_state_dict(checkpoint_filter_fn({"state_dict": in_file}, finer))
    assert torch.equal(finer.pos_embed, resample_positions(in_file["pos_embed.embed"], (8, 8)))


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_files_load_as_the_published_code_loads_them(published, version, features, tmp_path):
    """Compared with the renaming in hubconf.py itself, for random weights in a file of the published form."""
    ctor = published.VisionLSTM if version == "v1" else published.VisionLSTM2
    depth = 3 if version == "v1" else 2
    settings = {"dim": 16, "depth": depth, "input_shape": (3, 32, 24), "patch_size": 8, "legacy_norm": True}
    donor = ctor(**settings, output_shape=(5,))
    randomise(donor)
    in_file = {}
    for name, value in donor.state_dict().items():
        name = re.sub(
            r"^blocks\.(\d+)\.rowwise_from_(top_left|bot_right)\.",
            lambda m: f"blocks.{2 * int(m[1]) + (m[2] == 'bot_right')}.",
            name,
        )
        after_blocks, after_pooling = ("legacy_norm", "norm") if version == "v1" else ("norm", "legacy_norm")
        names = {after_blocks: "xlstm.post_blocks_norm", after_pooling: "head.0", "head": "head.1"}
        module, _, rest = name.partition(".")
        name = f"{names.get(module, module)}.{rest}"
        if version == "v2":
            name = name.replace(".conv.", ".conv1d.")
        name = re.sub(r"^(blocks\.\d+)\.norm\.", r"\1.xlstm_norm.", name)
        in_file[re.sub(r"^(blocks\.\d+)\.", r"xlstm.\1.", name.replace(".layer.", ".xlstm."))] = value
    torch.save({"state_dict": in_file}, tmp_path / "file.th")

    finer = settings | {"input_shape": (3, 48, 48)}  # a larger grid: positions are interpolated
    mode = {"output_shape": (5,)}
    if version == "v2" and features:
        mode = {"mode": "features", "pooling": None, "output_shape": None}
    theirs = published.load_model(ctor, finer | mode, str(tmp_path / "file.th"), preprocess=version)
    if version == "v1" and features:  # its loader returns only the classifier
        theirs.head, theirs.pooling = None, None

    ours = {"num_classes": 0, "global_pool": ""} if features else {"num_classes": 5}
    ours = VisionLSTM(
        img_size=48, patch_size=8, embed_dim=16, depth=depth / 2 if version == "v1" else depth, fc_norm=True,
        **({**VERSION_1, **ours} if version == "v1" else ours),
    )  # fmt: skip
    ours.load_state_dict(checkpoint_filter_fn({"state_dict": in_file}, ours))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    output = ours.double()(images)
    output = output.flatten(1, 2) if features else output
    assert relative_error(output, theirs.double()(images)) < 1e-10
