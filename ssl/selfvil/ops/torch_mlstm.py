"""The mLSTM in plain torch, as custom operators: gates by O(N) scans, and products in one of two forms.

With F = cumsum(log sigmoid(f)) and a_j = i_j - F_j, the log decay of the reference is F_i + a_j, so that a row's
maximum is F_i + M_i with M = cummax(a), and the stabilised decay is D_ij = exp(a_j - M_i) for the j that i sees. Gates
are thus three scans over (B, H, N). What is left are products with S ∘ D, S = q kᵀ / sqrt(D): `parallel` has time N²,
`chunkwise` time N. Reading backwards takes the same scans from the other end; no token is moved.

Gradients (C = S ∘ D, n_i = sum_j C_ij, lim_i = exp(-(F_i + M_i)), d = max(|n|, lim), den = d + eps,
h_i = sum_j C_ij v_j / den_i, r_i = h_i · dh_i):
    dC_ij = (dh_i · v_j - [|n_i| >= lim_i] sign(n_i) r_i) / den_i
    da_j = sum_i C_ij dC_ij - sum over i with argmax M_i = j of r_i eps / den_i
    di = da,  dF_i = [lim_i > |n_i|] r_i d_i / den_i - da_i
The eps term is there because M cancels out of h but for eps. Where several tokens attain the same maximum exactly,
it goes to one of them, a subgradient as good as any other. In low precision, decay and 1 / den are float32 and meet
the scores before these are rounded to be multiplied again, and the sums for r and da run over them before that.

To `torch.compile` forward and backward are one operator each, which it neither looks into nor breaks at.

Shapes: B batch, H heads, N tokens, D width of a head of v; heads of q and k may be narrower, D is then theirs in
scores and their scale.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfvil.ops import chunkwise, parallel
from selfvil.ops.parallel import denominator
from selfvil.ops.reference import EPS


class Form(NamedTuple):
    """How the products with C = S ∘ D are computed; heads have joined the batch, a is i - F and row_max is M.

    `products(q, k, v, a, row_max, limit, reverse)` gives h (B·H, N, D) in the dtype of v, and n (B·H, N) in that of a.
    `gradients(q, k, v, h, dh, sign, a, row_max, den, reverse)` gives those of q, k and v, of the dtype of q or better,
    and r and the sums over i of C_ij dC_ij (B·H, N) in that of a; sign is that of n where n rules den, and else 0.
    """

    products: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


FORMS = {
    "parallel": Form(parallel.products, parallel.gradients),
    "chunkwise": Form(chunkwise.products, chunkwise.gradients),
}


def mlstm_torch(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, form: str) -> Tensor:
    """mLSTM output h, of the shape of v (B, H, N, D), of q, k, v, i (B, H, N) and the log of the forget gate (B, H, N).

    Products run in the dtype of q, gates in that of log_f, float32 or float64. First derivatives only.
    """
    return _forward(q, k, v, i, log_f, reverse, form)[0]


@torch.library.custom_op("selfvil::mlstm", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, and what the backward pass needs: a, M, its position, n and lim, each (B·H, N)."""
    # Heads join the batch: three axes, so that a slice of rows can be multiplied without being copied first. In order
    # in memory, which flatten alone does not see to for a single image, so that chunks can be cut without a copy.
    flat_q, flat_k, flat_v, i, log_f = (x.flatten(0, 1).contiguous() for x in (q, k, v, i, log_f))
    log_forget = _cumsum(log_f, reverse)
    a = i.to(log_f.dtype) - log_forget
    row_max, argmax = _cummax(a, reverse)
    limit = torch.exp(-(log_forget + row_max))
    with _no_autocast(q):
        h, row_sum = FORMS[form].products(flat_q, flat_k, flat_v, a, row_max, limit, reverse)
    return h.view(v.shape), a, row_max, argmax, row_sum, limit


@_forward.register_fake
def _(q, k, v, i, log_f, reverse, form):
    gates = log_f.new_empty(q.shape[0] * q.shape[1], q.shape[2])
    positions = torch.empty_like(gates, dtype=torch.long)
    h = v.new_empty(v.shape)
    return h, gates, torch.empty_like(gates), positions, torch.empty_like(gates), torch.empty_like(gates)


@torch.library.custom_op("selfvil::mlstm_backward", mutates_args=())
def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, h: Tensor, a: Tensor, row_max: Tensor, argmax: Tensor,
    row_sum: Tensor, limit: Tensor, reverse: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v in their shapes, and of i and log_f (B, H, N) in the dtype of a."""
    shape, v_shape = q.shape, v.shape
    dh, q, k, v, h = (x.flatten(0, 1).contiguous() for x in (dh, q, k, v, h))
    den = denominator(row_sum, limit)
    sum_rules = row_sum.abs() >= limit  # the row sum, not its lower limit, is the normaliser
    sign = row_sum.sign() * sum_rules
    with _no_autocast(q):
        dq, dk, dv, r, da = FORMS[form].gradients(q, k, v, h, dh.to(q.dtype), sign, a, row_max, den, reverse)

    da = da.scatter_add_(-1, argmax, -r * EPS / den)
    # 1 - EPS/den is d/den, and stays finite where the limit overflows.
    d_log_forget = torch.where(sum_rules, 0, r * (1 - EPS / den)) - da
    dlog_f = _cumsum(d_log_forget, not reverse)
    dq, dk, dv = (x.to(q.dtype).view(s) for x, s in ((dq, shape), (dk, shape), (dv, v_shape)))
    return dq, dk, dv, da.view(shape[:3]), dlog_f.view(shape[:3])


@_backward.register_fake
def _(dh, q, k, v, h, a, row_max, argmax, row_sum, limit, reverse, form):
    gates = a.new_empty(q.shape[:3])
    return q.new_empty(q.shape), q.new_empty(q.shape), v.new_empty(v.shape), gates, torch.empty_like(gates)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, i, _, ctx.reverse, ctx.form = inputs
    ctx.i_dtype = i.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, di, dlog_f = _backward(dh, *ctx.saved_tensors, ctx.reverse, ctx.form)
    return dq, dk, dv, di.to(ctx.i_dtype), dlog_f, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _no_autocast(q: Tensor) -> AbstractContextManager:
    """Products run in the dtype of q, whatever the surrounding autocast (which the meta device does not know) says."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _cumsum(x: Tensor, reverse: bool) -> Tensor:
    """Running sum over the last axis, from the end if `reverse`. Flipping (B·H, N) costs nothing beside the rest."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _cummax(a: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Running maximum and its position, from the end if `reverse`."""
    values, positions = torch.cummax(a.flip(-1) if reverse else a, -1)
    if not reverse:
        return values, positions
    return values.flip(-1), a.shape[-1] - 1 - positions.flip(-1)
