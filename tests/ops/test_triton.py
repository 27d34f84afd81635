"""The kernels against the paper's equations, on a GPU, or without one in Triton's interpreter."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import interpreted
from selfvil.ops import mlstm, triton_mlstm
from selfvil.ops.mlstm import choose

pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not tested")

FORMS = ["triton", "triton_chunkwise"]
NAMES = ("h", "dq", "dk", "dv", "di", "df")
CHUNK = 64
"""A small chunk size, so that short sequences have several."""


@pytest.fixture(scope="module")
def interpreter():
    with interpreted.start() as pool:
        yield pool


@pytest.fixture
def run(request):
    """`interpreted.gradients`, on a GPU if there is one."""
    if torch.cuda.is_available():
        return lambda *args, **how: interpreted.gradients(*args, CHUNK, "cuda", **how)
    pool = request.getfixturevalue("interpreter")
    return lambda *args, **how: pool.submit(interpreted.gradients, *args, CHUNK, **how).result()


def make_inputs(shape, dtype, *, gates=1.0, one_sign=True):
    """q, k, v, i, f, and a gradient of h. Scores have one sign: a sum that cancels would amplify rounding errors."""
    q, k = torch.rand(2, *shape) + 0.1 if one_sign else torch.randn(2, *shape)
    v, dh = torch.randn(2, *shape)
    i, f = gates * torch.randn(2, *shape[:3])
    gate_dtype = torch.promote_types(dtype, torch.float32)
    return [*(x.to(dtype) for x in (q, k, v)), i.to(gate_dtype), f.to(gate_dtype)], dh.to(dtype)


def errors(got, inputs, dh, **how):
    """Errors of h and each gradient from the float64 reference, relative to its norm or 1e-3 of the largest one's."""
    double = [x.double().requires_grad_() for x in inputs]
    h = mlstm(*double, backend="reference", **how)
    exact = [h.detach(), *torch.autograd.grad(h, double, dh.double())]
    floor = 1e-3 * max(x.norm() for x in exact[1:])
    return {name: ((x - y).norm() / max(y.norm(), floor)).item() for name, x, y in zip(NAMES, got, exact, strict=True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 5), (64, 48), (130, 48), (100, 96), (65, 192)])
def test_values_and_all_gradients(num_tokens, head_dim, reverse, form, run):
    """In float64, so that rounding hides no error; the wide gates forget and keep many tokens."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels support at most float32")
    inputs, dh = make_inputs((1, 2 if head_dim < 96 else 1, num_tokens, head_dim), torch.float64, gates=4.0)
    got = run(inputs, dh, backend=form, reverse=reverse)
    for name, error in errors(got, inputs, dh, reverse=reverse).items():
        assert error < 1e-12, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", [(24, 48), (48, 24)], ids=["narrow q and k", "narrow v"])
def test_q_and_k_with_another_width_than_v(widths, form, run):
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels support at most float32")
    (q, k, v, *gates), dh = make_inputs((1, 2, 70, 48), torch.float64)
    inputs, dh = [q[..., : widths[0]], k[..., : widths[0]], v[..., : widths[1]], *gates], dh[..., : widths[1]]
    got = run(inputs, dh, backend=form)
    assert [x.shape[-1] for x in got[:4]] == [widths[1], widths[0], widths[0], widths[1]]
    assert max(errors(got, inputs, dh).values()) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "head_dim", "reverse"), [
    (torch.float32, 96, False), (torch.bfloat16, 96, True), (torch.bfloat16, 384, False), (torch.float16, 96, True),
])  # fmt: skip
def test_is_as_accurate_as_the_torch_form(dtype, head_dim, reverse, form, run):
    inputs, dh = make_inputs((1, 1, 130 if head_dim < 192 else 70, head_dim), dtype)
    inputs[4] += 4
    got = run(inputs, dh, backend=form, reverse=reverse)
    assert [x.dtype for x in got] == [dtype] * 4 + [torch.float32] * 2
    torch_form = interpreted.gradients(inputs, dh, CHUNK, backend="parallel", reverse=reverse)
    theirs = errors(torch_form, inputs, dh, reverse=reverse)
    for name, error in errors(got, inputs, dh, reverse=reverse).items():
        assert error < 1.3 * theirs[name] + 1e-6, f"{name}: {error:.1e} against {theirs[name]:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_finite_for_gates_within_80(dtype, form, run):
    inputs, dh = make_inputs((1, 4, 100, 16), dtype, one_sign=False)
    inputs[3] += torch.tensor([-80.0, -80.0, 80.0, 80.0]).view(1, 4, 1)
    inputs[4] += torch.tensor([-80.0, 80.0, -80.0, 80.0]).view(1, 4, 1)
    assert all(torch.isfinite(x).all() for x in run(inputs, dh, backend=form))


@pytest.mark.parametrize("form", FORMS)
def test_weights_below_the_range_of_float16_count(form, run):
    """With tiny q and k, scores are below the range of float16, but their weights in a row are not."""
    (q, k, *rest), dh = make_inputs((1, 1, 100, 16), torch.float16)
    rest[1] += 30  # a large input gate: the normaliser is the sum of the weights, not its lower limit
    inputs = [q * 2e-3, k * 2e-3, *rest]
    error = errors(run(inputs, dh, backend=form), inputs, dh)["h"]
    assert error < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_gaps_between_tokens(form, run):
    inputs, dh = make_inputs((2, 1, 70, 16), torch.float64)
    positions = torch.randint(1, 4, (2, 70)).cumsum(1)
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels support at most float32")
    got = run(inputs, dh, backend=form, positions=positions)
    assert max(errors(got, inputs, dh, positions=positions).values()) < 1e-12


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the operator on a CPU")
@pytest.mark.parametrize("form", FORMS)
def test_custom_operator_passes_opcheck_and_compiles_to_one_graph(form, interpreter):
    interpreter.submit(interpreted.check_operator, form).result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_equal_inputs_give_equal_bits(form, run):
    inputs, dh = make_inputs((4, 4, 700, 96), torch.bfloat16)
    for a, b in zip(run(inputs, dh, backend=form), run(inputs, dh, backend=form), strict=True):
        assert torch.equal(a, b)


def test_tiles_cover_a_width():
    assert [triton_mlstm.tiles(d) for d in (1, 48, 64, 96, 100, 192, 384)] == [
        (16,), (32, 16), (64,), (64, 32), (128,), (128, 64), (256, 128),
    ]  # fmt: skip
    for width in range(1, triton_mlstm.MAX_WIDTH + 1):
        found = triton_mlstm.tiles(width)
        assert sum(found) >= width
        assert sum(found[:-1]) < width
        assert all(size >= 16 and math.log2(size).is_integer() for size in found)


def test_choice_of_backend_on_gpus(monkeypatch):
    long = triton_mlstm.CHUNK * 16
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert [choose(n, 96, "cuda", dtype) for n in (196, 1024, long)] == ["triton", "triton", "triton_chunkwise"]
    assert choose(1500, 384, torch.device("cuda", 1), torch.bfloat16) == "triton"
    assert choose(196, 96, "cuda", torch.float64) == "parallel"
    assert choose(196, 1024, "cuda", torch.bfloat16) == "parallel"
    assert choose(196, 96, "cpu", torch.float64) == "parallel"
    assert choose(long, 96, "mps", torch.float32) == "chunkwise"
    monkeypatch.setattr(triton_mlstm, "INSTALLED", False)
    assert choose(long, 96, "cuda", torch.bfloat16) == "chunkwise"


def test_choice_of_backend_under_torch_compile():
    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + ["triton", "triton_chunkwise"].index(choose(x.shape[0], 96, "cuda", torch.bfloat16))

    assert chosen(torch.zeros(196)).max() == 0
    assert chosen(torch.zeros(5000)).min() == 1


def test_unsupported_inputs_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v, i, f = make_inputs((1, 1, 4, 8), torch.float32)[0]
    with FakeTensorMode(), pytest.raises(ValueError, match="at most float32, but q is float64"):
        triton_mlstm._check(torch.empty(1, 1, 4, 8, device="cuda", dtype=torch.float64))
    with pytest.raises(ValueError, match="needs a GPU, but q is on cpu"):
        mlstm(q, k, v, i, f, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="head widths up to 384, got 600"):
        mlstm(*torch.zeros(3, 1, 1, 4, 600), i, f, backend="triton")
    monkeypatch.setattr(triton_mlstm, "INSTALLED", False)
    with pytest.raises(ValueError, match="needs the package triton: install it"):
        mlstm(q, k, v, i, f, backend="triton_chunkwise")
