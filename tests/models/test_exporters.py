"""Export of every design by torch.export and ONNX, to programs that do not have this package."""

import subprocess
import sys

import pytest
import timm
import torch

from selfvil.models import VisionLSTM

DESIGNS = {
    "published": {"fc_norm": True, "init_values": 0.1},
    "quad_alternating": {"traversal": "quad_alternating", "depth": 2},
    "quad": {"traversal": "quad"},
    "bidirectional_shared": {"traversal": "bidirectional_shared", "global_pool": "avg"},
    "registers": {"num_registers": 2, "global_pool": "registers", "traversal": "quad_alternating", "depth": 2},
    "class token": {"global_pool": "middle_cls"},
    "version 1": {"conv": "causal1d", "bias": False, "global_pool": "bilateral_avg", "stride": 2, "depth": 1.5},
    "MLP": {"block": "mlp", "init_values": 0.1},
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


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    images = torch.randn(2, 3, 16, 12)
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


@pytest.mark.parametrize("design", DESIGNS)
def test_a_graph_needs_no_custom_operator(design):
    model = network(design)
    program = exported(model)
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in used if "selfvil" in name or "mkldnn" in name}
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 12)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "design", [name if name == "published" else pytest.param(name, marks=pytest.mark.slow) for name in DESIGNS]
)
def test_onnx_returns_the_same_values(tmp_path, design):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = network(design), tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 16, 12),), file, dynamo=True, verbose=False, external_data=False,
        input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip
    session = runtime.InferenceSession(file)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 12)
        with torch.no_grad():
            expected = model(images)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_saved_graph_loads_where_the_package_is_not_installed(tmp_path):
    model, images = network("registers"), torch.randn(3, 3, 16, 12)
    torch.export.save(exported(model), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save({"images": images, "expected": model(images)}, tmp_path / "values.pt")
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
