"""The fused operations around the mLSTM against the plain layers, on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import interpreted
import interpreted_layers
from selfvil.models.layers import GatedScan
from selfvil.models.layout import TokenLayout
from selfvil.models.vision_lstm import VisionLSTM
from selfvil.ops import fused

pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not tested")

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels support at most float32")


@pytest.fixture(scope="module")
def interpreter():
    with interpreted.start() as pool:
        yield lambda function, *args, **how: pool.submit(function, *args, **how).result()


@pytest.fixture
def run(request):
    """`interpreted_layers.gradients`, on a GPU if there is one."""
    if torch.cuda.is_available():
        return lambda *args, **how: interpreted_layers.gradients(*args, device="cuda", **how)
    return lambda *args, **how: request.getfixturevalue("interpreter")(interpreted_layers.gradients, *args, **how)


def randomised(module, dtype=torch.float64):
    """With no parameter left at zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return module.to(dtype)


def make_inputs(part, batch, num_tokens, inner, dtype=torch.float64):
    """Inputs of a part: up-projections, the convolved branch and the output of the mLSTM, with tokens before heads."""
    wanted = {"conv": ["xz"], "add_conv": ["c"], "project": ["c", "xz"], "norm": ["h", "c", "xz"]}[part]
    sizes = {"xz": (2 * inner,), "c": (inner,), "h": (4, inner // 4)}
    return {name: torch.randn(batch, num_tokens, *sizes[name]).to(dtype) for name in wanted}


def check(run, part, inner, batch, num_tokens, bias=True, **how):
    scan = randomised(GatedScan(inner, bias=bias))
    inputs = make_inputs(part, batch, num_tokens, inner)
    if not how.get("gated", True):
        del inputs["xz"]
    got, want = run(part, scan, inputs, True, **how), interpreted_layers.gradients(part, scan, inputs, False, **how)
    assert len(got) > 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def on_grid(part, grid):
    """Arguments of a part for a full grid."""
    return {"conv": {"layout": TokenLayout(grid), "reverse": True}, "add_conv": {"layout": TokenLayout(grid)}}.get(
        part, {}
    )


SHAPES = [(80, 1, 7), (192, 2, 20), (384, 1, 1)]
"""Channels, images and tokens: heads 20, 48 and 96 wide."""


@on_a_cpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inner", "batch", "num_tokens"), SHAPES)
def test_norm_skip_and_gate(inner, batch, num_tokens, bias, run):
    check(run, "norm", inner, batch, num_tokens, bias)


@on_a_cpu
def test_norm_and_skip_without_a_gate(run):
    check(run, "norm", 80, 3, 7, gated=False)


@on_a_cpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inner", "batch", "num_tokens"), SHAPES)
def test_projections_and_gates(inner, batch, num_tokens, bias, run):
    check(run, "project", inner, batch, num_tokens, bias)


@on_a_cpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("inner", "batch", "grid"), [(80, 1, (7, 1)), (192, 2, (4, 5)), (384, 1, (1, 1))])
def test_convolution_and_silu(inner, batch, grid, reverse, run):
    check(run, "conv", inner, batch, grid[0] * grid[1], layout=TokenLayout(grid), reverse=reverse)


def layout_of(grid, batch, kept=None, num_extra=0):
    """With `kept` of the patches, others in each image, and extra tokens; and the number of all tokens."""
    count = grid[0] * grid[1]
    keep = None if kept is None else torch.rand(batch, count).argsort(1)[:, :kept].sort(1).values
    patches = torch.zeros(batch, kept or count, 1)
    return TokenLayout.of(patches, grid, keep, num_extra=num_extra), (kept or count) + num_extra


PLACED = [((4, 5), 7, 0), ((4, 5), None, 3), ((3, 4), 5, 4), ((1, 3), 1, 1), ((5, 1), 5, 2)]
"""Grid, kept patches and extra tokens."""


@on_a_cpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("grid", "kept", "num_extra"), PLACED)
def test_convolution_of_kept_and_extra_tokens(grid, kept, num_extra, reverse, run):
    layout, tokens = layout_of(grid, 3, kept, num_extra)
    check(run, "conv", 80, 3, tokens, layout=layout, reverse=reverse)


@on_a_cpu
@pytest.mark.parametrize(("grid", "kept", "num_extra"), [((4, 5), None, 0), *PLACED])
def test_sum_with_the_convolution(grid, kept, num_extra, run):
    layout, tokens = layout_of(grid, 3, kept, num_extra)
    check(run, "add_conv", 80, 3, tokens, layout=layout)


@on_a_cpu
@pytest.mark.parametrize("part", ["norm", "project", "conv", "add_conv"])
def test_sums_of_several_spans_add_up(part, run, interpreter):
    """More tokens than one program sums over."""
    config = {"norm": fused.NORM, "project": fused.PROJECT_BACKWARD}.get(part, fused.CONV)
    height = -(-(config.span + 1) // 3)
    check(run, part, 16, 3, height, **on_grid(part, (height, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("part", "grid"), [
    ("norm", (4, 5)), ("project", (4, 5)), ("conv", (4, 5)), ("conv", (7, 8)), ("add_conv", (4, 5)),
    ("add_conv", (7, 8)),
])  # fmt: skip
def test_is_as_accurate_as_the_plain_layers(part, grid, dtype, run):
    """With the larger grid, 17 of its patches are kept, and there are three other tokens."""
    scan, inputs = randomised(GatedScan(192), dtype), make_inputs(part, 2, 20, 192, dtype)
    how = on_grid(part, grid)
    if grid == (7, 8):
        how["layout"], _ = layout_of(grid, 2, 17, 3)
    got, plain = (
        run(part, scan, inputs, True, **how),
        interpreted_layers.gradients(part, scan, inputs, False, **how),
    )
    double = {name: x.double() for name, x in inputs.items()}
    exact = interpreted_layers.gradients(part, scan.double(), double, False, **how)
    assert [x.dtype for x in got] == [x.dtype for x in plain]
    for a, b, x in zip(got, plain, exact, strict=True):
        assert (a - x).norm() <= 1.05 * (b - x).norm() + 1e-6 * x.norm()


@pytest.mark.parametrize("part", ["norm", "project", "conv", "add_conv"])
def test_dtypes_under_autocast_are_those_of_the_plain_layers(part, run):
    scan, inputs = randomised(GatedScan(80), torch.float32), make_inputs(part, 1, 7, 80, torch.float32)
    how = on_grid(part, (7, 1))
    if part == "norm":  # the output of a product
        inputs["h"], inputs["c"], inputs["xz"] = (inputs[name].bfloat16() for name in ("h", "c", "xz"))
    got = run(part, scan, inputs, True, amp=torch.bfloat16, **how)
    plain = interpreted_layers.gradients(part, scan, inputs, False, amp=torch.bfloat16, **how)
    assert [x.dtype for x in got] == [x.dtype for x in plain]
    assert got[0].dtype == (torch.float32 if part == "add_conv" else torch.bfloat16)


@on_a_cpu
def test_custom_operators_pass_opcheck(interpreter):
    inputs = {name: x.requires_grad_() for name, x in make_inputs("norm", 1, 5, 16).items()}
    interpreter(interpreted_layers.check_operators, randomised(GatedScan(16)), inputs)


def tiny(**how):
    return randomised(VisionLSTM(img_size=(48, 32), patch_size=16, num_classes=0, embed_dim=8, depth=1, **how))


@on_a_cpu
@pytest.mark.parametrize(("how", "kept"), [
    ({}, None), ({}, 4), ({"num_registers": 2, "global_pool": "registers"}, None), ({"traversal": "quad"}, None),
    ({"conv": "causal1d", "bias": False}, None), ({"num_registers": 2, "global_pool": "registers"}, 3),
    ({"block": "mlp"}, None), ({"block": "mlp", "num_registers": 2, "global_pool": "registers"}, 3),
])  # fmt: skip
def test_a_network_equals_the_plain_one(how, kept, interpreter):
    model, x = tiny(**how), torch.randn(2, 6, 8, dtype=torch.float64)
    keep = None if kept is None else torch.rand(2, 6).argsort(1)[:, :kept].sort(1).values
    got, want = (interpreter(interpreted_layers.of_model, model, x, keep, fuse) for fuse in (True, False))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@on_a_cpu
def test_checkpointing_changes_no_bit(interpreter):
    model, x = tiny(), torch.randn(1, 6, 8, dtype=torch.float64)
    want = interpreter(interpreted_layers.of_model, model, x, None, True)
    model.train().set_grad_checkpointing()
    got = interpreter(interpreted_layers.of_model, model, x, None, True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@on_a_cpu
def test_a_network_compiles_to_one_graph(interpreter):
    model, x = tiny(), torch.randn(1, 6, 8, dtype=torch.float64)
    got = interpreter(interpreted_layers.of_model, model, x, None, True, compiled=True)
    want = interpreter(interpreted_layers.of_model, model, x, None, False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_which_tensors_are_supported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(fused.SWITCH, raising=False)
    with FakeTensorMode():
        on_gpu = {d: torch.empty(1, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64)}
    assert {dtype: fused.applies(x) for dtype, x in on_gpu.items()} == {
        torch.bfloat16: True, torch.float32: True, torch.float64: False,
    }  # fmt: skip
    assert not fused.applies(torch.empty(1))
    assert not fused.applies(torch.empty(1, device="meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.applies(torch.empty(1))
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.applies(on_gpu[torch.bfloat16])
    monkeypatch.delenv(fused.SWITCH)
    monkeypatch.setattr(fused, "INSTALLED", False)
    assert not fused.applies(on_gpu[torch.bfloat16])
