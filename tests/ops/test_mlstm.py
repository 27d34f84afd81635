"""The operator against the paper's equations, and its reversed scan against flipped inputs."""

import pytest
import torch

from selfvil.ops import chunkwise, mlstm, parallel
from selfvil.ops.mlstm import BACKENDS

# In float64. test_triton.py and test_native.py test the others.
ANYWHERE = [name for name in BACKENDS if name != "native" and not name.startswith("triton")]
FAST = [name for name in ANYWHERE if name != "reference"]
NAMES = ("h", "dq", "dk", "dv", "di", "df")


@pytest.fixture
def small_blocks(monkeypatch):
    """Small blocks, so that short sequences have several."""
    monkeypatch.setattr(parallel, "ROW_BLOCK", 3)
    monkeypatch.setattr(chunkwise, "CHUNK", 3)


def make_inputs(num_tokens, *, gates="plain", batch=2, heads=3, head_dim=5, dtype=torch.float64):
    """q, k, v, i, f and a gradient of h. "extreme" shifts a third of the gates by 50 up or down.

    With extreme gates, all scores of a head get one sign: a sum that cancels would be the denominator, with the lower
    limit exp(-50) far below it, and amplify the rounding errors of both results.
    """
    q, k, v, dh = torch.randn(4, batch, heads, num_tokens, head_dim, dtype=dtype)
    i, f = torch.randn(2, batch, heads, num_tokens, dtype=dtype)
    if gates == "extreme":
        i, f = (torch.where(torch.rand_like(x) < 1 / 3, x + 50 * x.sign(), x) for x in (i, f))
        q, k = q.abs(), k.abs() * torch.randn(batch, heads, 1, 1).sign()
    return q, k, v, i, f, dh


def run(inputs, **settings):
    """Output and the five gradients."""
    *inputs, dh = inputs
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    h = mlstm(*inputs, **settings)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh)]


def assert_close(got, expected, tolerance, floor=1e-3):
    """Errors relative to the norm of each result, or to `floor` times the largest gradient's: some are exactly 0."""
    floor *= max(x.norm() for x in expected[1:])
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), name
        error = (a - b).norm() / max(b.norm(), floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", ["plain", "extreme"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33, 64, 65, 131, 300])
def test_equals_the_reference_in_values_and_all_gradients(num_tokens, gates, reverse, backend):
    inputs = make_inputs(num_tokens, gates=gates)
    expected = run(inputs, reverse=reverse, backend="reference")
    assert_close(run(inputs, reverse=reverse, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 64, 131, 300])
def test_heads_of_q_and_k_with_another_width(num_tokens, width, reverse, backend):
    q, k, *rest = make_inputs(num_tokens)
    q, k = torch.randn(2, 2, 3, num_tokens, width, dtype=torch.float64)
    expected = run((q, k, *rest), reverse=reverse, backend="reference")
    assert_close(run((q, k, *rest), reverse=reverse, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("head_dim", [chunkwise.NARROW, chunkwise.NARROW + 1])
def test_chunks_of_both_sizes(head_dim):
    inputs = make_inputs(300, batch=1, heads=2, head_dim=head_dim)
    assert_close(run(inputs, backend="chunkwise"), run(inputs, backend="reference"), 1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_narrow_heads_in_bfloat16(backend):
    q, k, v, i, f, dh = make_inputs(300, head_dim=32, dtype=torch.float32)
    half = [x.bfloat16() for x in (q[..., :16] / 3, k[..., :16] / 3, v)]
    expected = run((*(x.float() for x in half), i, f + 4, dh), backend="reference")
    got = run((*half, i, f + 4, dh.bfloat16()), backend=backend)
    assert_close([x.float() for x in got], expected, 0.03)


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_custom_operator_with_narrow_heads_passes_opcheck(form, small_blocks):
    q, k, v, i, f, _ = make_inputs(9, batch=1, heads=2, dtype=torch.float32)
    operands = [x.requires_grad_() for x in (q[..., :3], k[..., :3], v, i)]
    log_f = torch.nn.functional.logsigmoid(f)
    torch.library.opcheck(torch.ops.selfvil.mlstm.default, (*operands, log_f, True, form))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("i", [-50.0, 50.0])
@pytest.mark.parametrize("f", [-50.0, 50.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_gates_at_an_extreme(i, f, reverse, backend):
    q, k, v, _, _, dh = make_inputs(33)
    # Gates differ slightly: among equal maxima, the choice of the reference is arbitrary.
    inputs = (q, k, v, i + 0.1 * torch.randn_like(q[..., 0]), f + 0.1 * torch.randn_like(q[..., 0]), dh)
    expected = run(inputs, reverse=reverse, backend="reference")
    # If everything is forgotten, h = v except for eps, and other gradients are the rounding of terms that cancel.
    assert_close(run(inputs, reverse=reverse, backend=backend), expected, 1e-12, floor=1)


@pytest.mark.parametrize("backend", FAST)
def test_extreme_gates_do_not_overflow_in_float32(backend):
    for i in (-100.0, 100.0):
        for f in (-100.0, 100.0):
            q, k, v, _, _, dh = make_inputs(70, dtype=torch.float32)
            results = run((q, k, v, torch.full_like(q[..., 0], i), torch.full_like(q[..., 0], f), dh), backend=backend)
            assert all(torch.isfinite(x).all() for x in results), (i, f)


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("num_tokens", [1, 6, 77])
def test_reverse_equals_flipping_inputs_and_output(num_tokens, backend):
    inputs = make_inputs(num_tokens)
    flipped = run([x.flip(2) for x in inputs], backend=backend)
    assert_close(run(inputs, reverse=True, backend=backend), [x.flip(2) for x in flipped], 1e-12)


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("reverse", [False, True])
def test_no_token_depends_on_later_ones(reverse, backend, small_blocks):
    inputs = make_inputs(70)[:5]
    changed = [x.clone() for x in inputs]
    later = slice(0, 20) if reverse else slice(50, 70)
    for x in changed:
        x[:, :, later] += 1.0
    earlier = slice(20, 70) if reverse else slice(0, 50)
    before, after = (mlstm(*x, reverse=reverse, backend=backend)[:, :, earlier] for x in (inputs, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ANYWHERE)
def test_equals_the_recurrence(backend):
    """The recurrent form of the paper: matrix memory, normaliser and running maximum."""
    q, k, v, i, f, _ = make_inputs(23, gates="extreme")
    log_forget = torch.nn.functional.logsigmoid(f)
    memory = q.new_zeros(*q.shape[:2], 5, 5)
    normaliser, maximum = q.new_zeros(*q.shape[:2], 5), q.new_full(q.shape[:2], -torch.inf)
    outputs = []
    for t in range(q.shape[2]):
        new_maximum = torch.maximum(log_forget[:, :, t] + maximum, i[:, :, t])
        forget = torch.exp(log_forget[:, :, t] + maximum - new_maximum)
        take = torch.exp(i[:, :, t] - new_maximum)
        maximum = new_maximum
        key = k[:, :, t] / 5**0.5
        memory = forget[..., None, None] * memory + take[..., None, None] * (key[..., :, None] * v[:, :, t, None, :])
        normaliser = forget[..., None] * normaliser + take[..., None] * key
        numerator = (q[:, :, t, :, None] * memory).sum(-2)
        denominator = torch.maximum((q[:, :, t] * normaliser).sum(-1).abs(), torch.exp(-maximum)) + 1e-6
        outputs.append(numerator / denominator[..., None])
    torch.testing.assert_close(mlstm(q, k, v, i, f, backend=backend), torch.stack(outputs, 2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_equal_finite_differences(reverse, backend, small_blocks):
    inputs = [x.requires_grad_() for x in make_inputs(7, batch=1, heads=2, head_dim=3)[:5]]
    torch.autograd.gradcheck(lambda *x: mlstm(*x, reverse=reverse, backend=backend), inputs)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_block_size_does_not_change_results(size, reverse, backend, monkeypatch):
    inputs = make_inputs(37, gates="extreme")
    expected = run(inputs, reverse=reverse, backend="reference")
    monkeypatch.setattr(parallel, "ROW_BLOCK", size)
    monkeypatch.setattr(chunkwise, "CHUNK", size)
    assert_close(run(inputs, reverse=reverse, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_may_have_the_strides_of_a_layer(batch, backend, small_blocks):
    """Channels of all heads side by side, and gates likewise."""
    q, k, v, i, f, dh = make_inputs(9, batch=batch)
    inputs = [x.requires_grad_() for x in (q, k, v, i, f)]

    def strided(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    h = mlstm(*map(strided, inputs), backend=backend)
    found = [h.detach(), *torch.autograd.grad(h, inputs, strided(dh))]
    assert_close(found, run((*inputs, dh), backend="reference"), 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_with_float32_gates(autocast, reverse, backend):
    q, k, v, i, f, dh = make_inputs(100, head_dim=32, dtype=torch.float32)
    # Scores as small as those of a network: sums of larger ones are sometimes near 0, and divide h.
    half = [x.bfloat16() for x in (q / 3, k / 3, v)]
    f = f + 4
    expected = run((*(x.float() for x in half), i, f, dh), reverse=reverse, backend="reference")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = run((*half, i, f, dh.bfloat16()), reverse=reverse, backend=backend)
    assert [x.dtype for x in got] == 4 * [torch.bfloat16] + 2 * [torch.float32]
    assert_close([x.float() for x in got], expected, 0.03)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_lower_the_precision_of_float32_inputs(backend):
    inputs = make_inputs(50, dtype=torch.float32)
    expected = run([x.double() for x in inputs], backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(inputs, backend=backend)
    assert_close([x.double() for x in got], expected, 1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_token_forgets_once_for_each_position_since_the_previous_token(reverse):
    """Compared with the whole sequence, where missing tokens have a closed input gate and one forget gate per gap."""
    positions = torch.tensor([[0, 1, 4, 5, 9], [2, 3, 4, 5, 6]])
    q, k, v, i, f, _ = make_inputs(5)
    found = mlstm(q, k, v, i, f, positions=positions, reverse=reverse)
    for image, present in enumerate(positions.tolist()):
        whole = [x.new_zeros(1, *x.shape[1:2], 10, *x.shape[3:]) for x in (q, k, v, i, f)]
        whole[3] -= torch.inf  # missing tokens add nothing
        for x, y in zip(whole, (q, k, v, i, f), strict=True):
            x[0, :, present] = y[image]
        # A missing token has the forget gate of the next present token of the scan.
        for token, position in enumerate(present):
            gap = range(position + 1, present[token + 1]) if reverse and token < 4 else range(0)
            gap = range(present[token - 1] + 1, position) if not reverse and token > 0 else gap
            whole[4][0, :, list(gap)] = f[image, :, token, None]
        first = min(present) if not reverse else 0
        last = 10 if not reverse else max(present) + 1
        part = [x[:, :, first:last] for x in whole]
        h = mlstm(*part, reverse=reverse, backend="reference")
        expected = h[0, :, [position - first for position in present]]
        torch.testing.assert_close(found[image], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ANYWHERE)
def test_positions_without_gaps_change_nothing(backend):
    inputs = make_inputs(9)
    positions = torch.arange(5, 14).repeat(2, 1)
    assert_close(run(inputs, positions=positions, backend=backend), run(inputs, backend=backend), 1e-14)


@pytest.mark.parametrize("backend", FAST)
def test_heads_may_be_interleaved_in_memory(backend):
    inputs = make_inputs(40)
    interleaved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_close(run(interleaved, backend=backend), run(inputs, backend=backend), 1e-14)


def test_wrong_arguments_are_refused():
    q, k, v, i, f, _ = make_inputs(4)
    with pytest.raises(ValueError, match=r"choose one of: auto, reference, parallel"):
        mlstm(q, k, v, i, f, backend="fastest")
    with pytest.raises(ValueError, match=r"the same shape \(B, H, N, D\)"):
        mlstm(q, k[:, :, :3], v, i, f)
    with pytest.raises(ValueError, match="v the same except for D"):
        mlstm(q, k, v[:, :, :3], i, f)
    with pytest.raises(ValueError, match=r"must be \(B, H, N\) = \(2, 3, 4\)"):
        mlstm(q, k, v, i[..., None], f)
    with pytest.raises(ValueError, match="the same floating dtype"):
        mlstm(q, k.float(), v, i, f)
    with pytest.raises(ValueError, match=r"positions must be integers \(B, N\) = \(2, 4\), got torch.float32"):
        mlstm(q, k, v, i, f, positions=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"positions must be integers \(B, N\) = \(2, 4\), got torch.int64 \(4,\)"):
        mlstm(q, k, v, i, f, positions=torch.arange(4))
    with pytest.raises(ValueError, match="at least 1"):
        mlstm(q[:, :, :0], k[:, :, :0], v[:, :, :0], i[:, :, :0], f[:, :, :0])
