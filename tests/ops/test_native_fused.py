"""The native operations around the mLSTM against the plain layers in float64, for each instruction set here."""

import copy

import pytest
import torch
import torch.nn.functional as F

from selfvil.models.convolution import convolve
from selfvil.models.layers import NUM_HEADS, GatedScan
from selfvil.models.layout import TokenLayout
from selfvil.models.vision_lstm import VisionLSTM
from selfvil.ops.cpu import build, fused

if not build.available():
    pytest.skip("the CPU kernels cannot be built here (no C++ compiler?)", allow_module_level=True)

FEATURES = build._processor_features()
LEVELS = [name for name, (needed, _) in build.LEVELS.items() if FEATURES.issuperset(needed)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """The kernels for one instruction set."""
    loaded = build.Kernels(build._load(request.param))
    monkeypatch.setattr(fused, "kernels", lambda: loaded)


def make_scan(inner, bias=True):
    """A layer with no parameter left at zero or one."""
    scan = GatedScan(inner, bias=bias)
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return scan


def make_inputs(batch, num_tokens, inner, dtype):
    """Up-projections of both branches, the convolved branch and the output of the mLSTM."""
    sizes = {"xz": (2 * inner,), "c": (inner,), "h": (4, inner // 4)}
    return {name: torch.randn(batch, num_tokens, *size).to(dtype) for name, size in sizes.items()}


def conv(scan, inputs, native, layout, reverse):
    x = inputs["xz"].chunk(2, -1)[0]
    if native:
        kept = None if layout.kept is None else layout.kept.ids
        return (fused.conv_silu(x, scan.conv.weight, scan.conv.bias, layout.grid, reverse, kept),)
    return (F.silu(convolve(scan.conv, x, layout, reverse=reverse)),)


def project(scan, inputs, native):
    c, x = inputs["c"], inputs["xz"].chunk(2, -1)[0]
    maps = (scan.q_proj, scan.k_proj, scan.v_proj)
    if native:
        return fused.project(c, x, [p.weight for p in maps], [p.bias for p in maps], *scan.gate_weights())
    return scan.q_proj(c), scan.k_proj(c), scan.v_proj(x), *scan.gates(c, x)


def norm(scan, inputs, native, gated=True):
    h, c, head_norm = inputs["h"].transpose(1, 2), inputs["c"], scan.outnorm
    gate = inputs["xz"].chunk(2, -1)[1] if gated else None
    if native:
        return (fused.norm_skip_gate(h, c, gate, head_norm.weight, head_norm.bias, scan.skip, head_norm.eps),)
    y = torch.addcmul(head_norm(h), scan.skip, c)
    return (y if gate is None else y * F.silu(gate),)


def gradients(part, scan, inputs, native, **how):
    """The outputs of a part, and the gradients of inputs and parameters for fixed random gradients of the outputs."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = part(scan, inputs, native, **how)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    found = torch.autograd.grad(outputs, [*inputs.values(), *scan.parameters()], d_outputs, allow_unused=True)
    return [x.detach() for x in (*outputs, *(dx for dx in found if dx is not None))]


def check(part, inner=64, batch=2, num_tokens=20, dtype=torch.float32, bias=True, **how):
    """Errors relative to the norm of each result. In bfloat16, only results are rounded."""
    scan, inputs = make_scan(inner, bias), make_inputs(batch, num_tokens, inner, dtype)
    got = gradients(part, scan, inputs, True, **how)
    exact = gradients(part, copy.deepcopy(scan).double(), {n: x.double() for n, x in inputs.items()}, False, **how)
    assert len(got) > 3
    for place, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape
        tolerance = 3e-3 if a.dtype == torch.bfloat16 else 1e-5
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error < tolerance, f"result {place}: relative error {error:.1e}"


def make_layout(grid, share, batch):
    """A layout with this share of the patches, others in each image."""
    count = grid[0] * grid[1]
    if share == 1:
        return TokenLayout(grid)
    kept = torch.rand(batch, count).argsort(1)[:, : max(1, int(share * count))].sort(1).values
    return TokenLayout.of(torch.empty(batch, kept.shape[1], 1), grid, kept)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 0.4])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 4), (14, 14)])
def test_convolution(grid, share, dtype, reverse, level):
    layout = make_layout(grid, share, 2)
    num_tokens = grid[0] * grid[1] if layout.kept is None else layout.kept.ids.shape[1]
    check(conv, num_tokens=num_tokens, dtype=dtype, layout=layout, reverse=reverse)


@pytest.mark.parametrize("inner", [192, 576])
@pytest.mark.parametrize("grid", [(3, 4), (40, 40)])
def test_convolution_of_wide_and_large_grids(grid, inner):
    check(conv, inner, batch=1, num_tokens=grid[0] * grid[1], layout=TokenLayout(grid), reverse=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "num_tokens"), [(64, 1), (192, 64), (384, 130)])
def test_projections_and_gates(inner, num_tokens, dtype, bias, level):
    check(project, inner, num_tokens=num_tokens, dtype=dtype, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "num_tokens"), [(64, 1), (192, 64), (384, 130)])
def test_norm_skip_and_gate(inner, num_tokens, dtype, gated, bias, level):
    check(norm, inner, num_tokens=num_tokens, dtype=dtype, bias=bias, gated=gated)


def parts():
    layout = make_layout((5, 4), 1, 2)
    return ((conv, {"layout": layout, "reverse": True}), (project, {}), (norm, {}))


def test_equal_bits_on_repetition_and_for_any_number_of_threads():
    threads, scan, inputs = torch.get_num_threads(), make_scan(128), make_inputs(5, 20, 128, torch.float32)
    try:
        for part, how in parts():
            found = []
            for number in (1, 2, 2, 3):
                torch.set_num_threads(number)
                found.append(gradients(part, scan, inputs, True, **how))
            for other in found[1:]:
                assert all(map(torch.equal, other, found[0])), part.__name__
    finally:
        torch.set_num_threads(threads)


def test_an_empty_batch():
    for part, how in parts():
        results = gradients(part, make_scan(64), make_inputs(0, 20, 64, torch.float32), True, **how)
        assert all(torch.isfinite(x).all() for x in results)


def test_custom_operators_pass_opcheck():
    scan, inputs = make_scan(64), make_inputs(2, 20, 64, torch.float32)
    c, (x, z), h = inputs["c"], inputs["xz"].chunk(2, -1), inputs["h"].transpose(1, 2)
    c, x, z, h = (t.requires_grad_() for t in (c, x.detach(), z.detach(), h))
    head_norm, ops = scan.outnorm, torch.ops.selfvil
    maps = (scan.q_proj, scan.k_proj, scan.v_proj)
    parameters = [head_norm.weight, head_norm.bias, scan.skip, head_norm.eps]
    folded = [t.detach().requires_grad_() for t in scan.gate_weights()]
    torch.library.opcheck(ops.native_norm_skip_gate.default, (h, c, z, *parameters))
    torch.library.opcheck(ops.native_norm_skip_gate.default, (h, c, None, *parameters))
    kept = torch.arange(20).repeat(2, 1)
    for places in (None, kept):
        torch.library.opcheck(
            ops.native_conv.default, (x, scan.conv.weight, scan.conv.bias, places, 4, 5, True, True)
        )  # fmt: skip
    torch.library.opcheck(
        ops.native_project.default, (c, x, *(p.weight for p in maps), *(p.bias for p in maps), *folded)
    )  # fmt: skip


def of_model(model, x, keep, native, monkeypatch, **amp):
    """Tokens, and the gradients of the sum of their squares for x and all parameters that have one."""
    monkeypatch.setenv(fused.SWITCH, str(int(native)))
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, **amp):
        y = model.forward_tokens(x, model.grid_size, keep)
    found = torch.autograd.grad(y.double().square().sum(), [x, *model.parameters()], allow_unused=True)
    return [t.detach() for t in (y, *(dx for dx in found if dx is not None))]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kept", [None, 7])
@pytest.mark.parametrize("registers", [0, 1])
def test_a_network_equals_its_plain_operations(registers, kept, amp, monkeypatch):
    model = VisionLSTM(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=0, num_registers=registers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    x = torch.randn(2, 16, 32)
    keep = None if kept is None else torch.rand(2, 16).argsort(1)[:, :kept].sort(1).values
    monkeypatch.setenv(fused.SWITCH, "1")
    assert fused.applies(x.new_empty(2, 7, 64), NUM_HEADS)
    got = of_model(model, x, keep, True, monkeypatch, enabled=amp)
    plain = of_model(model, x, keep, False, monkeypatch, enabled=amp)
    exact = of_model(model.double(), x.double(), keep, False, monkeypatch, enabled=False)
    assert [a.dtype for a in got] == [a.dtype for a in plain]
    floor = 1e-3 * max(t.norm() for t in exact[1:])
    errors, others = ([(a - b).norm() / b.norm().clamp(min=floor) for a, b in zip(found, exact)]
                      for found in (got, plain))  # fmt: skip
    if amp:  # two ways of rounding: their errors are of one size on average
        assert sum(errors) < 1.2 * sum(others)
    else:
        assert max(errors) < 1e-4


def test_where_they_apply(monkeypatch):
    monkeypatch.delenv(fused.SWITCH, raising=False)
    assert fused.applies(torch.empty(1, 2, 64), 4)
    assert not fused.applies(torch.empty(1, 2, 64), 1)  # the gates are computed four at a time
    assert not fused.applies(torch.empty(1, 2, 80), 4)  # heads 20 wide
    assert not fused.applies(torch.empty(1, 2, 64, device="meta"), 4)
    assert not fused.applies(torch.empty(1, 2, 64, dtype=torch.float64), 4)
    assert not fused.applies(torch.empty(1, 2, 64, dtype=torch.float16), 4)
    monkeypatch.setattr(fused, "available", lambda: False)
    assert not fused.applies(torch.empty(1, 2, 64), 4)
    monkeypatch.undo()
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.applies(torch.empty(1, 2, 64), 4)
