"""Forget gates are recorded once for each forward pass, for every design and every code path."""

import math

import pytest
import timm
import torch
from torch import nn

import interpreted
import interpreted_layers
from selfvil.diagnostics.gates import gate_vitals, horizons, record_forget_gates
from selfvil.models.blocks import TRAVERSALS
from selfvil.models.layers import ViLLayer
from selfvil.models.layout import TokenLayout
from selfvil.models.vision_lstm import VisionLSTM

SCANS = {
    "alternating": ["00_forward", "01_backward", "02_forward", "03_backward"],
    "unidirectional": ["00_forward", "01_forward", "02_forward", "03_forward"],
    "bidirectional": [f"{block:02d}_{way}" for block in range(4) for way in ("forward", "backward")],
    "bidirectional_shared": [f"{block:02d}_{way}" for block in range(4) for way in ("forward", "backward")],
    "quad": [f"{block:02d}_{way}" for block in range(4) for way in ("forward", "backward", "down", "up")],
    "quad_shared": [f"{block:02d}_{way}" for block in range(4) for way in ("forward", "backward", "down", "up")],
    "quad_alternating": ["00_forward", "01_backward", "02_down", "03_up"],
}


def network(traversal: str = "alternating", **how) -> VisionLSTM:
    """A network whose gates depend on the tokens, as after some training."""
    model = timm.create_model(
        "vil_nano_patch4_32", img_size=(16, 24), embed_dim=16, depth=2, num_classes=0, traversal=traversal, **how
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def record(model: nn.Module, run, **how) -> dict[str, list[torch.Tensor]]:
    with record_forget_gates(model) as gates:
        run(**how)
    return dict(gates)


def assert_same(got, want) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("how", [{}, {"conv": "causal1d", "bias": False}, {"global_pool": "middle_cls", "conv": "none"},
                                 {"num_registers": 3, "global_pool": "registers"}])  # fmt: skip
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_every_scan_of_every_design_is_recorded_and_the_recorders_are_removed(traversal, how):
    model, images = network(traversal, **how), torch.rand(3, 3, 16, 24)
    expected = model(images)
    with record_forget_gates(model) as gates:
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert list(gates) == SCANS[traversal]
    num_tokens = 24 + model.num_prefix_tokens
    assert {tuple(f.shape) for passes in gates.values() for f in passes} == {(3, 4, num_tokens)}
    assert {len(passes) for passes in gates.values()} == {1}
    model(images)
    assert {len(passes) for passes in gates.values()} == {1}
    assert all(layer.forget_gate_recorder is None for layer in model.modules() if isinstance(layer, ViLLayer))
    if how.get("conv") != "none":  # without a convolution a gate depends only on its token
        different = {tuple(f.flatten().tolist()) for (f,) in gates.values()}
        assert len(different) == len(gates), "directions that share parameters have gates of their own"


@pytest.mark.parametrize("traversal", ["bidirectional_shared", "quad_shared", "quad_alternating"])
def test_names_of_scans_match_their_directions(traversal):
    """With a causal convolution a gate depends on its token and the three before it in the order of the scan."""
    model = network(traversal, conv="causal1d")
    tokens = torch.randn(1, 24, 16)
    pair = model.blocks[1]

    def gates_of(x):
        return record(model, lambda: pair(x, TokenLayout((4, 6))))

    changed = tokens.clone()
    changed[0, 2 * 6 + 3] = torch.randn(16)  # row 2, column 3
    before, after = gates_of(tokens), gates_of(changed)
    before_and_after = {name: (before[name], after[name]) for name in before if before[name]}
    first = [name for name in before_and_after if name.startswith("02_")]
    by_rows, by_columns = 2 * 6 + 3, 3 * 4 + 2
    expected = {
        "forward": [by_rows + i for i in range(4)], "backward": [by_rows - i for i in range(4)],
        "down": [by_columns + i for i in range(4)], "up": [by_columns - i for i in range(4)],
    }  # fmt: skip
    assert first
    for name in first:
        (f,), (g,) = before_and_after[name]
        moved = (f - g).abs().amax(dim=(0, 1)).nonzero().flatten().tolist()
        assert moved == sorted(expected[name.partition("_")[2]]), name


def test_gates_start_as_published():
    """Biases 3 to 6 and no dependence on the image."""
    backbone = timm.create_model("vil_nano_patch4_32", embed_dim=32, depth=2, num_classes=0).eval()
    gates = record(backbone, lambda: backbone(torch.rand(3, 3, 32, 32)))
    torch.testing.assert_close(gates["00_forward"][0][0, :, 0], torch.linspace(3, 6, 4))


def test_a_network_without_forget_gates_records_nothing():
    layer = nn.Linear(2, 2)
    assert record(layer, lambda: layer(torch.rand(1, 2))) == {}


@pytest.mark.parametrize("traversal", ["alternating", "quad_shared"])
def test_gradient_checkpointing_records_each_pass_once(traversal):
    model, images = network(traversal).train(), torch.rand(2, 3, 16, 24)
    want = record(model, lambda: model(images).square().sum().backward())
    model.set_grad_checkpointing()
    got = record(model, lambda: model(images).square().sum().backward())
    assert_same(got, want)


def test_a_compiled_network_is_recorded_and_stays_compiled():
    torch.compiler.reset()
    model, images = network("bidirectional_shared"), torch.rand(2, 3, 16, 24)
    model.blocks = model.blocks[:1]
    want = record(model, lambda: model(images))
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    expected = compiled(images)
    assert_same(record(model, lambda: compiled(images)), want)
    torch.testing.assert_close(compiled(images), expected)
    assert len(graphs) == 1


def test_the_fused_path_is_recorded():
    pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not tested")
    model, images = network("quad_shared").double(), torch.rand(1, 3, 16, 24).double()
    model.blocks = model.blocks[:1]
    with interpreted.start() as pool:
        got, want = (
            pool.submit(interpreted_layers.forget_gates, model, images, fuse).result() for fuse in (True, False)
        )
    assert len(got) == 8
    assert_same(got, want)


def test_horizon_of_a_constant_gate():
    """A gate of σ(f) = e^(-1/50) forgets to 1/e in 50 tokens."""
    decay = math.exp(-1 / 50)
    f = torch.full((2, 4, 9), math.log(decay / (1 - decay)))
    torch.testing.assert_close(horizons([f, f[..., :5]]), torch.full((4,), 50.0), rtol=1e-4, atol=0)
    values = gate_vitals({"00_forward": [f], "01_backward": [torch.full((2, 4, 9), 9.0), torch.zeros(2, 4, 3)]})
    assert values["horizon/00_forward"] == pytest.approx(50, rel=1e-4)
    assert values["saturated/00_forward"] == 0
    assert values["saturated"] == values["saturated/01_backward"] == 0.75
