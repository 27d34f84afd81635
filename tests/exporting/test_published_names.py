"""The file of `--published` is loaded by the published code (NX-AI/vision-lstm), which returns the same features."""

import os
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

from selfvil.errors import UserError
from selfvil.export import export
from selfvil.exporting import published
from selfvil.models.published import checkpoint_filter_fn, our_names
from small_exports import make_run

NETWORKS = {
    "version 2": {},
    "bilateral_avg": {"global_pool": "bilateral_avg", "depth": 2},
    "norm after pooling and a classifier": {"fc_norm": True, "num_classes": 7},
    "rectangle of three channels": {"in_chans": 3, "img_size": [8, 12]},
    "fixed positions": {"pos_embed": "sincos"},
    "no biases": {"bias": False},
    "version 1": {"name": "vil_v1_tiny_patch16_224", "depth": 1.5},
    "version 1, overlap": {"name": "vil_v1_tiny_patch16_224", "patch_size": 4, "stride": 2, "num_classes": 3},
}


def network(**arguments):
    settings = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 1}
    name = arguments.pop("name", "vil_nano_patch4_32")
    model = timm.create_model(name, **settings | arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


@pytest.mark.parametrize("case", NETWORKS)
def test_our_own_reader_of_published_names_gets_the_same_network(tmp_path, case):
    model = network(**NETWORKS[case])
    published.write(model, tmp_path / "published" / "file")
    weights = load_file(tmp_path / "published" / "file")
    copy = network(**NETWORKS[case])
    for parameter in copy.parameters():
        parameter.data.zero_()
    if case == "fixed positions":  # our network computes them and does not store them
        assert torch.equal(weights["pos_embed.embed"], copy.pos_embed)
        copy.load_state_dict({name: value for name, value in our_names(weights).items() if name != "pos_embed"})
    else:
        copy.load_state_dict(checkpoint_filter_fn(weights, copy))
    images = torch.randn(2, model.in_chans, *(g * p for g, p in zip(model.grid_size, model.patch_embed.patch_size)))
    with torch.no_grad():
        assert torch.equal(copy(images), model(images))
    assert our_names(weights).keys() == model.state_dict().keys() | {"pos_embed"}


@pytest.fixture(scope="module")
def checkout():
    folder = os.environ.get("SELFVIL_PUBLISHED_VIL")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_VIL does not name a checkout of NX-AI/vision-lstm")
    pytest.importorskip("einops")
    sys.path.insert(0, folder)
    yield folder
    sys.path.remove(folder)


@pytest.mark.parametrize("case", NETWORKS)
def test_the_published_code_returns_the_same(tmp_path, checkout, case):
    model = network(**NETWORKS[case])
    published.write(model, tmp_path / published.FILE)
    code = "\n".join(published.code(published.describe(model), str(tmp_path)))
    found: dict = {}
    exec(code, found)
    theirs = found["model"].eval()
    images = torch.randn(2, model.in_chans, *(g * p for g, p in zip(model.grid_size, model.patch_embed.patch_size)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"block": "mlp"}, 'it has no block = "mlp", only the gated one'),
        ({"traversal": "quad"}, 'it has the traversal "alternating" only'),
        ({"traversal": "quad_alternating", "depth": 2}, 'it has the traversal "alternating" only'),
        ({"traversal": "bidirectional"}, 'it has the traversal "alternating" only'),
        ({"traversal": "unidirectional"}, 'it has the traversal "alternating" only'),
        ({"num_registers": 2, "global_pool": "registers"}, "neither registers nor a class token"),
        ({"global_pool": "middle_cls"}, "neither registers nor a class token"),
        ({"global_pool": "avg"}, "no global_pool = 'avg', only bilateral_concat"),
        ({"global_pool": ""}, "no global_pool = ''"),
        ({"init_values": 0.1}, "no LayerScale"),
        ({"conv": "none"}, "each of its blocks has a convolution"),
        ({"stride": 1}, "cannot run a convolution on the grid of overlapping patches"),
        ({"conv": "causal1d"}, "neither has these norms"),  # the published version 2 ignores the kernel's size
        ({"depth": 1.5}, "neither has these norms .* and depth together"),
        ({"norm_eps": 1e-3}, "neither has these norms"),
        ({"name": "test_vit", "img_size": 32, "depth": None, "patch_size": 16, "embed_dim": None},
         "it holds Vision-LSTM only, not VisionTransformer"),
    ],
)  # fmt: skip
def test_networks_that_the_published_code_lacks_are_refused(tmp_path, arguments, reason):
    with pytest.raises(UserError, match=f"--published: the published code .* cannot load this network: .*{reason}"):
        published.describe(network(**{key: value for key, value in arguments.items()}))
    if arguments == {"block": "mlp"}:
        make_run(tmp_path / "run", **arguments)
        with pytest.raises(UserError, match="only the gated one"):
            export(tmp_path / "run", tmp_path / "out", formats=["published"])
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
