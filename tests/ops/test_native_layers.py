"""Native products, norms and whole layers against torch in float64, for each instruction set here."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F

from selfvil.models.blocks import ViLBlock
from selfvil.models.layers import GatedScan, native_linear
from selfvil.models.layout import TokenLayout
from selfvil.models.mlp_block import MLPBlock
from selfvil.ops.cpu import build, fused, gated, layers, mlstm, products
from selfvil.ops.mlstm import OVERRIDE
from small import nodes_before

if not build.available():
    pytest.skip("the CPU kernels cannot be built here (no C++ compiler?)", allow_module_level=True)

FEATURES = build._processor_features()
LEVELS = [name for name, (needed, _) in build.LEVELS.items() if FEATURES.issuperset(needed)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """The kernels for one instruction set."""
    loaded = build.Kernels(build._load(request.param))
    for module in (fused, mlstm, products):
        monkeypatch.setattr(module, "kernels", lambda: loaded)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-3)).item()


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 2, 16), (7, 34, 64), (70, 48, 112), (65, 2050, 16)])
def test_products(rows, inner, columns, pairs, a_dtype, b_dtype, level):
    """Both orders of each factor, with sums, bias, tail and several parts."""
    a, weight = torch.randn(rows, inner).to(a_dtype), torch.randn(columns, inner).to(b_dtype)
    used = [x.bfloat16().double() if pairs else x.double() for x in (a, weight)]
    exact, sums = used[0] @ used[1].T, torch.empty(rows)
    # In bfloat16 without bf16 instructions, factors keep the precision of float32.
    tolerance = 5e-3 if pairs else 1e-5
    main, tail = torch.empty(rows, columns), torch.empty(rows, 6)
    products.multiply(a, [weight], main, pairs=pairs, transposed=True)
    assert error(main, exact) < tolerance
    products.multiply(a.T.contiguous().T, [weight.T.contiguous()], main, pairs=pairs, sums=sums)
    assert error(main, exact) < tolerance
    assert error(sums, a.double().sum(1)) < 1e-4
    bias, last = torch.randn(columns + 6), torch.randn(6, inner).to(b_dtype)
    parts = [weight[: columns // 2], weight[columns // 2 :], last]
    products.multiply(a, parts, main, pairs=pairs, transposed=True, bias=bias, tail=tail)
    assert error(main, exact + bias[:columns]) < tolerance
    assert error(tail, used[0] @ last.double().T + bias[columns:]) < tolerance


@pytest.mark.parametrize(("rows", "inner"), [(3, 2), (17, 34), (65, 1046)])
def test_what_earlier_products_left_in_memory_has_no_effect(rows, inner, level):
    a, weight, c = torch.randn(rows, inner), torch.randn(48, inner), torch.empty(rows, 48)

    def both(a, weight, c):
        products.multiply(a, [weight], c, pairs=True, transposed=True)
        yield c.clone()
        products.multiply(a.T.contiguous().T, [weight.T.contiguous()], c, pairs=True)
        yield c.clone()

    expected = list(both(a, weight, c))
    list(both(torch.full((70, 2050), torch.nan), torch.full((48, 2050), torch.nan), torch.empty(70, 48)))
    assert all(torch.equal(*pair) for pair in zip(both(a, weight, c), expected, strict=True))


def test_products_of_torch_and_ours_in_turns(level):
    """Both set up the processor's tiles for themselves, where it has them."""
    a, weight, c = torch.randn(70, 96).bfloat16(), torch.randn(48, 96).bfloat16(), torch.empty(70, 48)
    expected = a @ weight.T
    for _ in range(3):
        products.multiply(a, [weight], c, pairs=True, transposed=True)
        assert torch.equal(a @ weight.T, expected)
        assert error(c, a.double() @ weight.double().T) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_residual_and_factors(dtype, level):
    rows, width = 20, 64
    a, weight = torch.randn(rows, 32).to(dtype), torch.randn(width, 32)
    exact, half = a.double() @ weight.to(dtype).double().T, dtype == torch.bfloat16
    tolerance = 1e-2 if half else 1e-5
    c, before, after = (torch.empty(rows, width, dtype=dtype) for _ in range(3))
    products.multiply(a, [weight], c, pairs=half, transposed=True, gelu=1, before=before)
    assert error(before, exact) < tolerance
    assert error(c, F.gelu(before.double())) < (4e-3 if half else 1e-6)
    reference = before.double().requires_grad_()
    slope = torch.autograd.grad(F.gelu(reference).sum(), reference)[0]
    products.multiply(a, [weight], c, pairs=half, transposed=True, gelu=2, before=before, after=after)
    assert error(after, F.gelu(before.double())) < (4e-3 if half else 1e-6)
    assert error(c, exact * slope) < tolerance
    residual, scale, out = torch.randn(rows, width), torch.tensor([0.0, 2.0]), torch.empty(rows, width)
    products.multiply(a, [weight], out, pairs=half, transposed=True, residual=residual, scale=scale)
    assert torch.equal(out[:10], residual[:10])
    assert error(out[10:], residual[10:].double() + 2 * exact[10:]) < tolerance


def test_gelu_is_exact_far_from_zero(level):
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([-100.0, 100.0, 0.0, 1e-20, -1e-20, 3e4, -3e4, -1e-3])])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])[None]
    one, c, before = torch.ones(1, 2), torch.empty_like(x), torch.empty_like(x)
    weight = torch.stack([x[0], torch.zeros_like(x[0])])
    products.multiply(one, [weight], c, pairs=False, gelu=1, before=before)
    assert torch.equal(before, x)
    torch.testing.assert_close(c.double(), F.gelu(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (130, 48), (7, 192)])
def test_layer_norm(rows, width, dtype, bias, level):
    x, weight, residual = torch.randn(rows, width).to(dtype) + 1, torch.randn(width), torch.randn(rows, width).to(dtype)
    shift, dy = torch.randn(width) if bias else None, torch.randn(rows, width).to(dtype)
    y, statistics = products.layer_norm(x, weight, shift, 1e-5, dtype)
    dx, sums = products.layer_norm_backward(dy, x, statistics, weight, residual, 1e-5)
    inputs = [t.double().requires_grad_() for t in (x, weight, torch.zeros(width) if shift is None else shift)]
    exact = F.layer_norm(inputs[0], (width,), 1 + inputs[1], inputs[2], 1e-5)
    of_x, *of_parameters = torch.autograd.grad(exact, inputs, dy.double())
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert error(y, exact) < tolerance
    assert error(dx, of_x + residual.double()) < tolerance
    for got, expected in zip(sums, of_parameters, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(50, 16), (200, 16), (330, 48)])
def test_scan_of_maps(num_tokens, width, dtype, reverse, level):
    """One chunk and several; q, k and v are made within the operator as outside."""
    heads, batch = 2, 3
    c, both = torch.randn(batch, num_tokens, heads * width), torch.randn(batch, num_tokens, 2 * heads * width)
    c, u = c.to(dtype), both.to(dtype).chunk(2, dim=-1)[0]  # u has the strides that it has in the layer
    maps = [torch.randn(heads * width // 4, 4, 4) / 2 for _ in range(3)]
    biases = [torch.randn(heads * width), None, torch.randn(heads * width)]
    i, log_f = torch.randn(batch, heads, num_tokens), F.logsigmoid(torch.randn(batch, heads, num_tokens) + 2)
    dh = torch.randn(batch, heads, num_tokens, width).to(dtype)

    def mapped(x, weight, bias):
        y = torch.einsum("bngi,goi->bngo", x.float().unflatten(-1, (-1, 4)), weight).flatten(2)
        return (y if bias is None else y + bias).unflatten(-1, (heads, width)).transpose(1, 2)

    def outside(dtype):
        inputs = [x.float().requires_grad_() for x in (c, u, *maps, *biases[::2])]
        of = zip((inputs[0], inputs[0], inputs[1]), inputs[2:5], (inputs[5], None, inputs[6]), strict=True)
        q, k, v = (mapped(x, weight, bias).to(dtype) for x, weight, bias in of)
        h, *saved = mlstm.scan(*(x.detach() for x in (q, k, v)), i, log_f, reverse)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        di, dlog_f = mlstm.scan_backward(dh.to(dtype), (q.detach(), k.detach(), v.detach()), saved, reverse, gradients)
        dc, *others = torch.autograd.grad((q, k, v), inputs, gradients)
        return h, *saved, di, dlog_f, before + dc.to(dtype), *others

    before, d_both = torch.randn(c.shape).to(dtype), torch.zeros_like(both).to(dtype)
    h, *saved = mlstm.scan_of_maps(c, u, (*maps, *biases), i, log_f, reverse)
    dc, du = before.clone(), d_both.chunk(2, dim=-1)[0]
    di, dlog_f, sums = mlstm.scan_of_maps_backward(dh, c, u, (*maps, *biases), saved, reverse, dc, du)
    assert not d_both.chunk(2, dim=-1)[1].any()
    got = (h, *saved, di, dlog_f, dc, du, *fused.block_weights(sums), sums[0, 4], sums[2, 4])
    for x, exact, plain in zip(got, outside(torch.float32), outside(dtype), strict=True):
        assert error(x, exact.double()) < max(1e-5, 1.1 * error(plain, exact.double()))


def test_weights_of_gates():
    scan = GatedScan(64)
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter.add_(torch.randn_like(parameter))
    maps = (scan.q_proj, scan.k_proj, scan.v_proj)
    parameters = [*(m.weight for m in maps), *(m.bias for m in maps)]
    of_gates = [scan.igate.weight, scan.fgate.weight, scan.igate.bias, scan.fgate.bias]
    expected = scan.gate_weights()
    with torch.no_grad():
        got = gated.folded(*of_gates, parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    d_gates, d_bias, before = torch.randn(2, 8, 64), torch.randn(8), torch.randn(3, 5, 64)
    d_expected = torch.autograd.grad(expected, [*parameters, *of_gates], [*d_gates, d_bias])
    with torch.no_grad():
        d_maps, d_biases, *d_of_gates = gated.folded_backward(*of_gates[:2], parameters, d_gates, d_bias, before)
    found = [*(d_maps - fused.block_weights(before)), *(d_biases - before[:, 4]), *d_of_gates]
    for a, b in zip(found, d_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- layers ----------------------------------------------------------------------------------------------------------

BLOCKS = {
    "gated": (ViLBlock, {}),
    "gated without biases": (ViLBlock, {"bias": False, "init_values": 0.5}),
    "mlp": (MLPBlock, {}),
    "mlp with LayerScale": (MLPBlock, {"init_values": 0.5, "gate_cap": None, "output_gate": "silu"}),
    "mlp without biases": (MLPBlock, {"bias": False, "num_heads": 2}),
}


def make_block(name, dim=64, **options):
    kind, settings = BLOCKS[name]
    block = kind(dim, reverse=True, **settings, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return block


def make_layout(batch, kept, num_extra=0):
    if not kept:
        return TokenLayout.of(torch.empty(batch, 20, 1), (4, 5), num_extra=num_extra)
    keep = torch.rand(batch, 20).argsort(1)[:, :7].sort(1).values
    return TokenLayout.of(torch.empty(batch, 7, 1), (4, 5), keep, gap_aware=True, num_extra=num_extra)


def results(block, x, layout, amp=False):
    """Tokens after the block, and all gradients of a weighted sum."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = block(x, layout)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    wanted = [t for t in (x, *block.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), wanted)]


def names_of(y):
    """Names of the nodes of autograd that lead to y."""
    return {node.name() for node in nodes_before(y)}


def errors_of(block, x, layout, amp, monkeypatch):
    """Relative errors of native kernels and of plain operations, against float64."""
    monkeypatch.delenv(fused.SWITCH, raising=False)
    got = results(block, x, layout, amp)
    monkeypatch.setenv(fused.SWITCH, "0")
    plain = results(block, x, layout, amp)
    exact = results(copy.deepcopy(block).double(), x.double(), layout)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    floor = 1e-3 * max(t.norm() for t in exact[1:])
    return [
        [((a - b).norm() / b.norm().clamp(min=floor)).item() for a, b in zip(found, exact, strict=True)]
        for found in (got, plain)
    ]


@pytest.mark.parametrize("num_extra", [0, 4])  # 3 tokens stand in a row of the places below the grid
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_their_plain_operations(name, kept, num_extra, level, monkeypatch):
    block, layout = make_block(name), make_layout(3, kept, num_extra)
    x = torch.randn(3, (7 if kept else 20) + num_extra, 64)
    monkeypatch.delenv(fused.SWITCH, raising=False)
    assert any("native" in node and "layer" in node for node in names_of(block(x, layout)))
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not any("layer" in node and "native" in node for node in names_of(block(x, layout)))
    assert max(errors_of(block, x, layout, False, monkeypatch)[0]) < 3e-5


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_is_as_exact_as_plain_operations(name, kept, level, monkeypatch):
    """On the median of five blocks: where the normaliser and its limit are almost equal, the gradient jumps, and
    rounding decides."""
    found = []
    for _ in range(5):
        layout, x = make_layout(3, kept), torch.randn(3, 7 if kept else 20, 64)
        found.append(map(sum, errors_of(make_block(name), x, layout, True, monkeypatch)))
    native, plain = (statistics.median(errors) for errors in zip(*found, strict=True))
    assert native < 1.2 * plain


@pytest.mark.parametrize("grid", [(1, 1), (1, 33)])
@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_one_image_of_one_row(name, grid):
    block, layout, x = make_block(name), TokenLayout(grid), torch.randn(1, grid[1], 64)
    exact = results(copy.deepcopy(block).double(), x.double(), layout)
    floor = 1e-3 * max(t.norm() for t in exact[1:])
    for got, expected in zip(results(block, x, layout), exact, strict=True):
        assert (got - expected).norm() / expected.norm().clamp(
            min=floor
        ) < 3e-4  # of one token, some gradients almost cancel


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_bfloat16_parameters(name, monkeypatch):
    block, layout, x = make_block(name).bfloat16(), TokenLayout((4, 5)), torch.randn(2, 20, 64).bfloat16()
    got = results(block, x, layout)
    monkeypatch.setenv(fused.SWITCH, "0")
    plain, exact = results(block, x, layout), results(copy.deepcopy(block).double(), x.double(), layout)
    errors, others = (sum(error(a, b) for a, b in zip(found, exact, strict=True)) for found in (got, plain))
    assert {t.dtype for t in got} == {torch.bfloat16}
    assert errors < 1.2 * others


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_stochastic_depth_draws_the_same_samples(name, monkeypatch):
    block, layout, x = make_block(name, drop_path=0.5), TokenLayout((4, 5)), torch.randn(8, 20, 64)
    torch.manual_seed(3)
    got = results(block, x, layout)
    monkeypatch.setenv(fused.SWITCH, "0")
    torch.manual_seed(3)
    for a, b in zip(got, results(block, x, layout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    block.eval()
    torch.testing.assert_close(block(x, layout), make_eval(block, x, layout, monkeypatch), rtol=1e-4, atol=1e-4)


def make_eval(block, x, layout, monkeypatch):
    monkeypatch.delenv(fused.SWITCH)
    with torch.no_grad():
        return block(x, layout)


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_frozen_parameters(name):
    block, layout, x = make_block(name), TokenLayout((4, 5)), torch.randn(2, 20, 64)
    of_x = results(block, x, layout)[1]
    block.requires_grad_(False)
    frozen = results(block, x, layout)
    assert len(frozen) == 2
    assert torch.equal(frozen[1], of_x)


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_equal_bits_on_repetition_and_for_any_number_of_threads(name):
    threads, block, layout = torch.get_num_threads(), make_block(name), TokenLayout((4, 5))
    x = torch.randn(9, 20, 64)
    try:
        found = []
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            found.append(results(block, x, layout))
        for other in found[1:]:
            assert all(map(torch.equal, other, found[0]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["gated", "mlp"])
def test_compiled_without_graph_breaks(name):
    block, layout, x = make_block(name), TokenLayout((4, 5)), torch.randn(2, 20, 64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda tokens: block(tokens, layout), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
    for a, b in zip(got, torch.autograd.grad(block(x, layout).square().sum(), [x, *block.parameters()]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def captured(monkeypatch, module, function, block, x, layout):
    """Arguments with which `block` calls an operator."""
    calls, original = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: calls.append(args) or original(*args))
    block(x, layout)
    return calls[0]


@pytest.mark.parametrize(
    ("name", "module", "function"), [("gated", gated, "_layer"), ("mlp", layers, "_layer"), ("mlp", layers, "_mlp")]
)
def test_custom_operators_pass_opcheck(name, module, function, monkeypatch):
    block, layout = make_block(name), make_layout(2, True)
    arguments = captured(monkeypatch, module, function, block, torch.randn(2, 7, 64), layout)
    monkeypatch.undo()
    fresh = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(getattr(module, function).custom, tuple(fresh))


class Replaced(torch.nn.Linear):
    """A map of another type, as LoRA's."""


def test_where_they_apply(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)
    block, layout, x = make_block("mlp"), TokenLayout((4, 5)), torch.randn(2, 20, 64)
    assert native_linear(x, block.mlp.fc1, block.mlp.fc2)
    assert not native_linear(x.double(), block.mlp.fc1.double())
    block.float()
    assert not native_linear(x, Replaced(64, 64))
    assert not native_linear(x.bfloat16(), block.mlp.fc1)  # torch reports the mismatch
    assert not native_linear(x[:0], block.mlp.fc1)
    assert not products.applies(x, torch.empty(0))  # ZeRO-3 has not gathered it
    assert not products.applies(x, torch.empty(64, 24))
    with torch.autocast("cpu", torch.float16):
        assert not native_linear(x, block.mlp.fc1)
    monkeypatch.setenv(OVERRIDE, "parallel")
    assert not any("mlstm_layer" in node for node in names_of(block(x, layout)))
    monkeypatch.delenv(OVERRIDE)
    block.mlp.fc1 = Replaced(64, 256)
    assert not any("native_mlp" in node for node in names_of(block(x, layout)))
    block.layer.forget_gate_recorder = lambda *_: None
    assert not any("mlstm_layer" in node for node in names_of(block(x, layout)))
