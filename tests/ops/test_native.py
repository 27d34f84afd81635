"""The native kernels for CPUs against the paper's equations in float64, for each instruction set of this processor."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selfvil.ops import mlstm
from selfvil.ops.cpu import build
from selfvil.ops.cpu import mlstm as native
from selfvil.ops.mlstm import BACKENDS

if not build.available():
    pytest.skip("the CPU kernels cannot be built here (no C++ compiler?)", allow_module_level=True)

NAMES = ("h", "dq", "dk", "dv", "di", "df")
FEATURES = build._processor_features()
LEVELS = [name for name, (needed, _) in build.LEVELS.items() if FEATURES.issuperset(needed)]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """The kernels for one instruction set."""
    loaded = build.Kernels(build._load(request.param))
    monkeypatch.setattr(native, "kernels", lambda: loaded)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks in short sequences."""
    monkeypatch.setattr(native, "CHUNK", 16)
    monkeypatch.setattr(native, "one_chunk", lambda *widths: 16)


def make_inputs(num_tokens, *, batch=2, heads=3, width=5, value_width=None, forget=2.0, dtype=torch.float32):
    """q, k, v, i, f and a gradient of h. Scores are positive: sums that cancel would amplify all rounding errors."""
    q, k = (torch.rand(2, batch, heads, num_tokens, width) + 0.1).to(dtype)
    v, dh = torch.randn(2, batch, heads, num_tokens, value_width or width).to(dtype)
    i, f = torch.randn(2, batch, heads, num_tokens)
    return [q, k, v, i, f + forget], dh


def run(inputs, dh, **how):
    """Output and the five gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    h = mlstm(*inputs, **how)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh)]


def exact(inputs, dh, **how):
    return run([x.double() for x in inputs], dh.double(), backend="reference", **how)


def assert_close(got, expected, tolerance, floor=1e-3):
    """Errors relative to the norm of each result, or to `floor` times the largest gradient's: some are exactly 0."""
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), name
        error = relative_error(a, b, expected, floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def relative_error(a, b, expected, floor) -> float:
    return float((a.double() - b).norm() / max(b.norm(), floor * max(x.norm() for x in expected[1:])))


def largest_error(got, expected, floor) -> float:
    return max(relative_error(a, b, expected, floor) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 31, 33, 64, 65, 131, 300])
def test_values_and_all_gradients(num_tokens, reverse, level):
    inputs, dh = make_inputs(num_tokens)
    assert_close(run(inputs, dh, backend="native", reverse=reverse), exact(inputs, dh, reverse=reverse), 2e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (96, 96), (64, 64), (24, 48), (50, 7), (7, 130)])
@pytest.mark.parametrize("num_tokens", [70, 200])
def test_widths_and_chunks(num_tokens, width, value_width, reverse, level, small_chunks):
    inputs, dh = make_inputs(num_tokens, batch=1, width=width, value_width=value_width)
    assert_close(run(inputs, dh, backend="native", reverse=reverse), exact(inputs, dh, reverse=reverse), 2e-5)


@pytest.mark.parametrize("chunk", [16, 64, 128, 400])
def test_chunk_size_does_not_change_results(chunk, monkeypatch):
    monkeypatch.setattr(native, "chunk_size", lambda *sizes: chunk)
    inputs, dh = make_inputs(333, forget=5.0)
    assert_close(run(inputs, dh, backend="native"), exact(inputs, dh), 2e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), st.sampled_from([2, 3, 8, 24, 48])),
    gate_range=st.tuples(st.floats(0.01, 60), st.floats(-40, 40), st.floats(0, 60), st.floats(-40, 40)),
    gaps=st.booleans(),
    reverse=st.booleans(),
    chunk=st.sampled_from([16, 48, 1000]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_gates_and_gaps(shape, gate_range, gaps, reverse, chunk, seed):
    """Gates of ±60 sum to thousands: the rounding of a sum in float32, 2e-4, is a relative error of its exp.

    A score that nearly cancels loses more digits in any order of sums: the error may be ten times that of torch's form.
    """
    torch.manual_seed(seed)
    batch, heads, num_tokens, width = shape
    (q, k, v, i, f), dh = make_inputs(num_tokens, batch=batch, heads=heads, width=width, forget=0)
    i, f = gate_range[0] * i + gate_range[1], gate_range[2] * f + gate_range[3]
    positions = torch.randint(1, 4, (batch, num_tokens)).cumsum(1) if gaps else None
    how = {"reverse": reverse, "positions": positions}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "chunk_size", lambda *sizes: chunk)
        got = run([q, k, v, i, f], dh, backend="native", **how)
    expected = exact([q, k, v, i, f], dh, **how)
    torchs = run([q, k, v, i, f], dh, backend="parallel", **how)
    assert_close(got, expected, max(5e-3, 10 * largest_error(torchs, expected, 1e-2)), floor=1e-2)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_extreme_gates_are_finite(dtype, level, small_chunks):
    for i, f in itertools.product((-100.0, -80.0, 0.0, 80.0, 100.0), repeat=2):
        (q, k, v, gate, forget), dh = make_inputs(70, dtype=dtype)
        results = run([q, k, v, gate + i, forget + f], dh, backend="native")
        assert all(torch.isfinite(x).all() for x in results), (i, f)


def test_what_is_not_a_number_is_not_hidden(level):
    for place in range(5):
        inputs, _ = make_inputs(40)
        inputs[place][0, 0, 20] = math.nan
        assert mlstm(*inputs, backend="native")[0, 0, 20:].isnan().any()
        assert not mlstm(*inputs, backend="native")[0, 1].isnan().any()


@pytest.mark.parametrize("reverse", [False, True])
def test_no_token_depends_on_later_ones(reverse, level, small_chunks):
    inputs, _ = make_inputs(70)
    changed = [x.clone() for x in inputs]
    later = slice(0, 20) if reverse else slice(50, 70)
    for x in changed:
        x[:, :, later] += 1.0
    earlier = slice(20, 70) if reverse else slice(0, 50)
    before, after = (mlstm(*x, reverse=reverse, backend="native")[:, :, earlier] for x in (inputs, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 6, 77])
def test_reverse_equals_flipping_bit_for_bit(num_tokens, small_chunks):
    inputs, dh = make_inputs(num_tokens)
    flipped = run([x.flip(2) for x in inputs], dh.flip(2), backend="native")
    for got, want in zip(run(inputs, dh, reverse=True, backend="native"), flipped, strict=True):
        assert torch.equal(got, want.flip(2))


def strided(x, kind):
    """x with other strides: heads side by side, parts of a wider tensor, every second channel, or images repeated."""
    if kind == "layer":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "part":
        return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.ndim == 4 else torch.cat([x, x], 2)[:, :, : x.shape[2]]
    if kind == "channels":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("kind", ["layer", "part", "channels", "expanded"])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_any_strides(kind, dtype, small_chunks):
    inputs, dh = make_inputs(50, dtype=dtype)
    inputs, dh = [strided(x, kind).contiguous() for x in inputs], strided(dh, kind).contiguous()
    expected = run(inputs, dh, backend="native")
    leaves = [strided(x, kind).detach().requires_grad_() for x in inputs]
    h = mlstm(*leaves, backend="native")
    for got, want in zip([h, *torch.autograd.grad(h, leaves, strided(dh, kind))], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_equal_differences(reverse, small_chunks):
    """Of the sum of the output times a random tensor, along a random direction, for each input."""
    inputs, dh = make_inputs(50)
    gradients = run(inputs, dh, reverse=reverse, backend="native")[1:]
    for place, gradient in enumerate(gradients):
        direction = torch.randn(inputs[place].shape, dtype=torch.float64)
        values = []
        for step in (1e-4, -1e-4):
            moved = [x.double() for x in inputs]
            moved[place] = moved[place] + step * direction
            values.append((mlstm(*moved, reverse=reverse, backend="reference") * dh).sum())
        expected = (values[0] - values[1]) / 2e-4
        assert (gradient * direction).sum() == pytest.approx(expected.item(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("width", "value_width"), [(48, 48), (7, 24), (33, 5)])
@pytest.mark.parametrize("num_tokens", [64, 196, 400])
def test_errors_in_bfloat16(num_tokens, width, value_width, level):
    """Without instructions for bfloat16 only results are rounded, and an entry's error is at most 2^-9. With them, no
    error is above that of torch's form, except by chance."""
    how = {"batch": 4, "width": width, "value_width": value_width, "forget": 4.0, "dtype": torch.bfloat16}
    inputs, dh = make_inputs(num_tokens, **how)
    got, expected = run(inputs, dh, backend="native", reverse=True), exact(inputs, dh, reverse=True)
    assert [x.dtype for x in got] == 4 * [torch.bfloat16] + 2 * [torch.float32]
    torch_form = run(inputs, dh, backend="parallel" if num_tokens <= 256 else "chunkwise", reverse=True)
    for name, a, b, other in zip(NAMES, got, expected, torch_form, strict=True):
        error, other_error = (((x.double() - b).norm() / b.norm()).item() for x in (a, other))
        allowed = 1.1 * other_error if level in ("amx", "avx512_bf16") else 1e-4 if name in ("di", "df") else 2e-3
        assert error < allowed, f"{name}: {error:.1e}, torch {other_error:.1e}"


def test_autocast_changes_nothing():
    inputs, dh = make_inputs(50)
    expected = run(inputs, dh, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, dh, backend="native")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_equal_bits_on_repetition_and_for_any_number_of_threads(dtype, small_chunks):
    inputs, dh = make_inputs(130, width=40, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(run(inputs, dh, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_threads_are_those_of_torch():
    """One OpenMP library, and after work by both no more threads than torch was given."""
    code = """
import os, torch
from selfvil.ops import mlstm
torch.set_num_threads(2)
x = torch.randn(500, 500)
x @ x, x.exp().sum()
before = len(os.listdir("/proc/self/task"))
q, i = torch.randn(2, 4, 100, 16, requires_grad=True), torch.randn(2, 4, 100)
for _ in range(3):
    mlstm(q, q, q, i, i, backend="native").sum().backward()
assert len(os.listdir("/proc/self/task")) <= before + 1, "new threads"  # 1: autograd's own
maps = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
assert len(maps) == 1, maps
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch(batch):
    inputs, dh = make_inputs(5, batch=batch)
    results = run(inputs, dh, backend="native")
    assert [x.shape for x in results] == [dh.shape, *(x.shape for x in inputs)]


def test_other_dtypes_are_refused_and_auto_uses_torch():
    inputs, _ = make_inputs(5)
    with pytest.raises(ValueError, match=r"supports float32 and bfloat16 on the CPU, got torch\.float64"):
        mlstm(*(x.double() for x in inputs), backend="native")
    half = [*(x.half() for x in inputs[:3]), *inputs[3:]]
    assert mlstm(*half).dtype == torch.float16
    precise = mlstm(*inputs[:3], *(x.double() for x in inputs[3:]))  # gates in float64 remain so
    assert torch.equal(precise, mlstm(*inputs[:3], *(x.double() for x in inputs[3:]), backend="parallel"))


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_custom_operator_passes_opcheck(dtype):
    inputs, _ = make_inputs(9, batch=1, heads=2, width=4, value_width=3, dtype=dtype)
    q, k, v, i, f = (x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.selfvil.mlstm_native.default, (q, k, v, i, F.logsigmoid(f).detach(), True))


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_compiles_to_one_graph(backend):
    inputs, dh = make_inputs(20)
    compiled = torch.compile(lambda *x: mlstm(*x, reverse=True, backend=backend), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in inputs]
    h = compiled(*leaves)
    for got, want in zip([h, *torch.autograd.grad(h, leaves, dh)], run(inputs, dh, reverse=True, backend="native"),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_exported_graphs_have_no_native_operator():
    class Operator(torch.nn.Module):
        def forward(self, *inputs):
            return mlstm(*inputs)

    inputs, _ = make_inputs(20)
    program = torch.export.export(Operator(), tuple(inputs))
    assert "native" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), mlstm(*inputs, backend="native"), rtol=1e-4, atol=1e-5)


def test_auto_is_native_unless_turned_off(monkeypatch):
    inputs, _ = make_inputs(20)
    assert torch.equal(mlstm(*inputs), mlstm(*inputs, backend="native"))
    build.kernels.cache_clear()
    monkeypatch.setenv(build.SWITCH, "0")
    try:
        assert torch.equal(mlstm(*inputs), mlstm(*inputs, backend="parallel"))
        with pytest.raises(ValueError, match='"native" cannot be used here'):
            mlstm(*inputs, backend="native")
    finally:
        build.kernels.cache_clear()
    assert "native" in BACKENDS
