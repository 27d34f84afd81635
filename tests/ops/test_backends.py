"""Every backend over many shapes and gates, in low precision, and under torch.compile."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selfvil.ops import mlstm
from selfvil.ops.cpu import build
from selfvil.ops.mlstm import BACKENDS, _log_once, choose
from selfvil.ops.reference import EPS
from selfvil.ops.torch_mlstm import FORMS

NAMES = ("h", "dq", "dk", "dv", "di", "df")


def run(inputs, dh, **how):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    h = mlstm(*inputs, **how)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), st.sampled_from([2, 3, 8, 24, 48])),
    gate_range=st.tuples(st.floats(0.01, 60), st.floats(-40, 40), st.floats(0, 60), st.floats(-40, 40)),
    gaps=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", FORMS)
def test_values_and_all_gradients_for_any_shape_and_gates(backend, shape, gate_range, gaps, reverse, seed):
    """Errors relative to the norm of each result, or to 1 % of the largest gradient's.

    All scores have one sign: h is divided by their sum, and if that cancels, the rounding errors of the reference are
    as large as those under test.
    """
    torch.manual_seed(seed)
    batch, _, num_tokens, _ = shape
    q, k = torch.rand(2, *shape, dtype=torch.float64) + 0.1
    v, dh = torch.randn(2, *shape, dtype=torch.float64)
    i = gate_range[0] * torch.randn(shape[:3], dtype=torch.float64) + gate_range[1]
    f = gate_range[2] * torch.randn(shape[:3], dtype=torch.float64) + gate_range[3]
    positions = torch.randint(1, 4, (batch, num_tokens)).cumsum(1) if gaps else None
    how = {"reverse": reverse, "positions": positions}
    expected = run((q, k, v, i, f), dh, backend="reference", **how)
    floor = 1e-2 * max(x.norm() for x in expected[1:])
    for name, got, want in zip(NAMES, run((q, k, v, i, f), dh, backend=backend, **how), expected, strict=True):
        error = (got - want).norm() / max(want.norm(), floor)
        assert error < 1e-11, f"{name}: relative error {error:.1e}"


def published_form(q, k, v, i, f):
    """The form of the published networks: float32 gates, an N × N matrix of logs, products in the dtype of q."""
    num_tokens = q.shape[2]
    log_forget = F.logsigmoid(f.float()).cumsum(-1)
    log_decay = log_forget.unsqueeze(-1) - log_forget.unsqueeze(-2) + i.float().unsqueeze(-2)
    log_decay = log_decay.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -math.inf)
    row_max = log_decay.amax(-1, keepdim=True)
    weights = (q @ (k / math.sqrt(q.shape[-1])).mT) * torch.exp(log_decay - row_max)
    normaliser = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-row_max))
    return (weights / (normaliser + EPS)).to(q.dtype) @ v


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("num_tokens", [64, 196, 400])
def test_bfloat16_is_as_accurate_as_the_published_form(num_tokens, backend):
    """All scores have one sign: if they cancel, a few rows with a sum near 0 dominate the errors of both.

    Measured over seeds and lengths, as multiples of the published form's error: h, dq, dk, di 0.8 to 1.1; dv 1.1 to
    1.25, because each block's product is rounded; df 0.8 to 1.4, and up to 2 from states in `chunkwise`.
    """
    torch.manual_seed(0)
    q, k = torch.rand(2, 4, 4, num_tokens, 48)
    v, dh = torch.randn(2, 4, 4, num_tokens, 48)
    i, f = torch.randn(2, 4, 4, num_tokens) * 0.5
    half = [x.bfloat16() for x in (q, k, v)]
    exact_inputs = [x.double().requires_grad_() for x in (*half, i, f + 4)]
    exact = mlstm(*exact_inputs, backend="reference")
    exact = [exact.detach(), *torch.autograd.grad(exact, exact_inputs, dh.bfloat16().double())]

    def errors(function):
        inputs = [x.detach().clone().requires_grad_() for x in (*half, i, f + 4)]
        h = function(*inputs)
        results = [h.detach(), *torch.autograd.grad(h, inputs, dh.bfloat16())]
        return [((x - y).norm() / y.norm()).item() for x, y in zip(results, exact, strict=True)]

    ours, theirs = errors(lambda *x: mlstm(*x, backend=backend)), errors(published_form)
    for name, mine, other in zip(NAMES, ours, theirs, strict=True):
        allowed = {"dv": 1.3, "df": 2.2}.get(name, 1.1)
        assert mine < allowed * other, f"{name}: {mine:.2e} against {other:.2e}"


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_finite_for_gates_within_80(dtype, backend):
    torch.manual_seed(0)
    q, k, v, dh = torch.randn(4, 1, 2, 300, 16).to(dtype)
    for i in (-80.0, 0.0, 80.0):
        for f in (-80.0, 0.0, 80.0):
            gates = (x + torch.randn(1, 2, 300) for x in (i, f))
            results = run((q, k, v, *gates), dh, backend=backend)
            assert all(torch.isfinite(x).all() for x in results), (i, f)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_custom_operator_passes_opcheck(form, dtype):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, 9, 4).to(dtype))
    gate_dtype = torch.promote_types(dtype, torch.float32)
    i, f = (x.requires_grad_() for x in torch.randn(2, 2, 2, 9).to(gate_dtype))
    torch.library.opcheck(torch.ops.selfvil.mlstm.default, (q, k, v, i, F.logsigmoid(f).detach(), False, form))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form):
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in (*torch.randn(3, 1, 2, 20, 4).unbind(), *torch.randn(2, 1, 2, 20).unbind())]
    compiled = torch.compile(lambda *x: mlstm(*x, reverse=True, backend=form), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*inputs).square().sum(), inputs)
               for function in (compiled, lambda *x: mlstm(*x, reverse=True, backend=form))]  # fmt: skip
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_auto_backend(monkeypatch, caplog):
    torch.manual_seed(0)
    rule = [choose(n, d, "cpu", torch.float64) for n, d in ((196, 96), (1024, 96), (4096, 384))]
    assert rule == ["parallel", "chunkwise", "chunkwise"]
    monkeypatch.setattr(build, "available", lambda: True)
    rule = [choose(196, 96, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    assert rule == ["native", "native", "parallel", "parallel"]
    assert choose(196, 96, "meta", torch.float32) == "parallel"
    monkeypatch.setattr(build, "available", lambda: False)
    assert choose(196, 96, "cpu", torch.float32) == "parallel"
    q, k, v = torch.randn(3, 1, 1, 4, 2)
    i, f = torch.randn(2, 1, 1, 4)
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, "selfvil"):
        mlstm(q, k, v, i, f)
        mlstm(q, k, v, i, f)
    assert [record.getMessage() for record in caplog.records] == ["mLSTM backend: parallel"]
    monkeypatch.setitem(BACKENDS, "parallel", None)
    monkeypatch.setenv("SELFVIL_MLSTM", "reference")
    torch.testing.assert_close(mlstm(q, k, v, i, f), mlstm(q, k, v, i, f, backend="reference"))
    monkeypatch.setenv("SELFVIL_MLSTM", "fast")
    with pytest.raises(ValueError, match="no mLSTM backend 'fast'"):
        mlstm(q, k, v, i, f)
