"""Export of every design by torch.export and ONNX, with dynamic batch and image size, to programs that do not have this
package."""

import subprocess
import sys
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F

from selfvil.errors import UserError
from selfvil.exporting import exported_program, onnx
from selfvil.exporting.graph import Graph, require_equal, trace
from selfvil.models import VisionLSTM
from selfvil.models.positions import INTERPOLATIONS, _resample_in_graph, resample_positions

DESIGNS = {
    "published": {"fc_norm": True, "init_values": 0.1},
    "quad_alternating": {"traversal": "quad_alternating", "depth": 2},
    "quad": {"traversal": "quad"},
    "bidirectional_shared": {"traversal": "bidirectional_shared", "global_pool": "avg"},
    "registers": {"num_registers": 2, "global_pool": "registers", "traversal": "quad_alternating", "depth": 2},
    "class token": {"global_pool": "middle_cls"},
    "version 1": {"conv": "causal1d", "bias": False, "global_pool": "bilateral_avg", "stride": 2, "depth": 1.5},
    "MLP": {"block": "mlp", "init_values": 0.1},
    "bilateral_avg, unidirectional": {"global_pool": "bilateral_avg", "traversal": "unidirectional"},
    "bidirectional, causal": {"traversal": "bidirectional", "conv": "causal1d"},
    "no pooling": {"global_pool": "", "num_classes": 0, "pos_interpolation": "bicubic"},
    "token, antialias": {"global_pool": "token", "pos_interpolation": "bicubic_antialias"},
    "MLP, quad_shared, class token": {"block": "mlp", "traversal": "quad_shared", "global_pool": "middle_cls"},
    "MLP, quad": {"block": "mlp", "traversal": "quad", "num_registers": 2, "global_pool": "registers"},
    "no convolution": {"conv": "none", "pos_embed": "sincos", "global_pool": "middle_patch"},
}


def network(design: str) -> VisionLSTM:
    settings = {"img_size": (16, 12), "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 1}
    model = VisionLSTM(**settings | DESIGNS[design]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model


FAST = "registers"


def designs(fast: str = "") -> list:
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in DESIGNS]


@pytest.mark.parametrize("design", designs(FAST))
def test_a_graph_needs_no_custom_operator_and_returns_the_same_at_other_sizes(tmp_path, design, monkeypatch):
    monkeypatch.setenv("SELFVIL_MLSTM", "chunkwise")  # which has a custom operator, and is ignored
    graph = Graph(network(design), (16, 12)).eval()
    traced = trace(graph)
    assert traced.dynamic
    used = {str(node.target) for node in traced.program.graph.nodes if node.op == "call_function"}
    assert not {name for name in used if "selfvil" in name or "mkldnn" in name}
    exported_program.write(traced, tmp_path / "model.pt2")
    outputs = exported_program.outputs(tmp_path / "model.pt2")
    assert require_equal(graph, True, "model.pt2", outputs) < 1e-4
    with torch.no_grad():  # and at a size that no check of the package has
        for got, expected in zip(outputs(torch.ones(5, 3, 8, 60)), graph(torch.ones(5, 3, 8, 60))):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=r"18|images|Guard"):  # no multiple of the patch
        outputs(torch.ones(1, 3, 18, 16))


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_onnx_returns_the_same_values(tmp_path, design):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    graph = Graph(network(design), (16, 12)).eval()
    file = tmp_path / "model.onnx"
    onnx.write(graph, trace(graph), file, {"key": "value"})
    assert require_equal(graph, True, "model.onnx", onnx.outputs(file)) < 1e-4
    with torch.no_grad():
        for got, expected in zip(onnx.outputs(file)(torch.ones(5, 3, 8, 60)), graph(torch.ones(5, 3, 8, 60))):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert b"/selfvil/" not in file.read_bytes(), "a path of this machine is in the file"


@pytest.mark.slow
@pytest.mark.parametrize("block", ["vil", "vil_mlp"])
@pytest.mark.parametrize("size", ["nano_patch4_32", "tiny_patch16_224", "small_patch16_224", "base_patch16_224"])
def test_every_size_returns_the_same_by_both_formats(tmp_path, block, size):
    pytest.importorskip("onnxscript")
    backbone = timm.create_model(f"{block}_{size}", num_classes=0).eval().requires_grad_(False)
    side = int(size.rpartition("_")[2])
    graph = Graph(backbone, (side, side)).eval()
    traced = trace(graph)
    exported_program.write(traced, tmp_path / "model.pt2")
    onnx.write(graph, traced, tmp_path / "model.onnx", {})
    assert require_equal(graph, True, "model.pt2", exported_program.outputs(tmp_path / "model.pt2")) < 1e-4
    assert require_equal(graph, True, "model.onnx", onnx.outputs(tmp_path / "model.onnx")) < 1e-4


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("old", [(4, 3), (7, 7), (1, 2)])
def test_positions_in_a_graph_equal_torchs_interpolation(interpolation, old):
    positions = torch.randn(1, *old, 5)
    for new in [old, (7, 9), (3, 20), (20, 3), (14, 14), (1, 1), (2, 5), (1, 30)]:
        if interpolation == "bicubic_antialias" and new != old:
            expected = F.interpolate(positions.permute(0, 3, 1, 2), size=new, mode="bicubic", antialias=True)
            expected = expected.permute(0, 2, 3, 1)
        else:
            expected = resample_positions(positions, new, interpolation)
        got = _resample_in_graph(positions, new, interpolation)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_other_families_have_a_dynamic_size_or_a_reason_why_not():
    vit = timm.create_model("test_vit", num_classes=0).eval()
    graph = Graph(vit, (160, 160)).eval()
    traced = trace(graph)
    assert not traced.dynamic
    assert (
        traced.note == "its image size is fixed at 160 x 160 pixels: VisionTransformer has positions for one grid only"
    )
    assert graph.names == ["pooled", "patches"]
    traced.program._guards_code = []
    assert require_equal(graph, False, "program", traced.program.module()) < 1e-4
    convnet = Graph(timm.create_model("test_convnext", num_classes=3).eval(), (64, 64)).eval()
    assert convnet.names == ["pooled", "patches", "logits"]
    pooled, patches, logits = convnet(torch.randn(2, 3, 96, 64))
    assert pooled.shape == (2, patches.shape[1])
    assert patches.shape[2:] == (3, 2)
    assert logits.shape == (2, 3)


def test_a_difference_is_named():
    graph = Graph(network("published"), (16, 12)).eval()

    def wrong(images):
        pooled, patches, logits = graph(images)
        return pooled, patches + (2e-3 if len(images) == 3 else 0), logits

    with pytest.raises(
        UserError, match=r"model.x does not return .*: patches differs by 0.002 at 16 x 12 .* batch of 3"
    ):
        require_equal(graph, False, "model.x", wrong)
    with pytest.raises(UserError, match="patches differs by nan"):
        require_equal(graph, False, "model.x", lambda x: [y * float("nan") if y.ndim == 4 else y for y in graph(x)])
    with pytest.raises(UserError, match=r"pooled has shape \[1, 63\]"):
        require_equal(graph, False, "model.x", lambda x: [y[:, 1:] for y in graph(x)])

    def broken(images):
        raise RuntimeError("no kernel")

    with pytest.raises(UserError, match="does not run at 16 x 12 pixels and a batch of 1: no kernel"):
        require_equal(graph, False, "model.x", broken)


def test_a_saved_graph_loads_where_the_package_is_not_installed(tmp_path):
    graph, images = Graph(network("registers"), (16, 12)).eval(), torch.randn(3, 3, 24, 8)
    exported_program.write(trace(graph), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:  # torch unpickles some entries, as the model card warns
        assert any(archive.read(name)[:2] == b"PK" for name in archive.namelist())
    with torch.no_grad():
        torch.save({"images": images, "expected": graph(images)}, tmp_path / "values.pt")
    code = (
        "import sys; sys.modules['selfvil'] = None\n"
        "import torch\n"
        "values = torch.load('values.pt', weights_only=True)\n"
        "found = torch.export.load('model.pt2').module()(values['images'])\n"
        "torch.testing.assert_close(found, values['expected'], rtol=1e-4, atol=1e-4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("arguments", [{}, {"n": 2, "reshape": True}, {"n": [0], "norm": True}, {"n": (0, 1)}])
@pytest.mark.parametrize("prefix", [False, True])
def test_intermediate_layers_have_the_same_shapes_as_those_of_a_vit(arguments, prefix):
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 0}
    vil = VisionLSTM(num_registers=3, **settings).eval()
    vit = timm.models.VisionTransformer(
        reg_tokens=3, class_token=False, global_pool="avg", num_heads=2, **settings
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    ours, theirs = (m.get_intermediate_layers(images, return_prefix_tokens=prefix, **arguments) for m in (vil, vit))
    assert torch.utils._pytree.tree_map(lambda x: x.shape, list(ours)) == torch.utils._pytree.tree_map(
        lambda x: x.shape, list(theirs)
    )
    last = vil.get_intermediate_layers(images, n=1, norm=True, return_prefix_tokens=True)[0]
    features = vil.forward_features(images)
    torch.testing.assert_close(torch.cat([last[1], last[0]], dim=1), features)
    _, pairs = vil.forward_intermediates(images, return_prefix_tokens=True)
    assert [(patches.shape, extra.shape) for patches, extra in pairs] == 2 * [((2, 32, 4, 4), (2, 3, 32))]
