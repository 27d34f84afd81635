"""The mLSTM in plain torch, as custom operators: O(N) scans for the gates, and products in one of two forms.

With F = cumsum(log sigmoid(f)) and a_j = i_j - F_j, the log decay of the reference is F_i + a_j, so that a row's
maximum is F_i + M_i with M = cummax(a), and the stabilised decay is D_ij = exp(a_j - M_i) for unmasked j. The gates
are thus three scans over (B, H, N). The rest are products with S ∘ D, S = q kᵀ / sqrt(D): `parallel` takes time N²,
`chunkwise` time N. A reversed mLSTM runs the same scans from the other end, and moves no token.

Gradients (C = S ∘ D, n_i = sum_j C_ij, lim_i = exp(-(F_i + M_i)), d = max(|n|, lim), den = d + eps,
h_i = sum_j C_ij v_j / den_i, r_i = h_i · dh_i):
    dC_ij = (dh_i · v_j - [|n_i| >= lim_i] sign(n_i) r_i) / den_i
    da_j = sum_i C_ij dC_ij - sum over i with argmax M_i = j of r_i eps / den_i
    di = da,  dF_i = [lim_i > |n_i|] r_i d_i / den_i - da_i
The eps term exists because M cancels in h except for eps. If several tokens attain the same maximum exactly, one of
them receives it, which is a valid subgradient. In low precision, decay and 1 / den are float32; they multiply the
scores before these are rounded for the next product, and r and da are summed before the rounding.

For `torch.compile`, forward and backward are one opaque operator each, without a graph break.

Shapes: B batch, H heads, N tokens, D width of a head of v. Heads of q and k may be narrower; in scores and their scale
D is the width of these.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfvil.ops import chunkwise, parallel
from selfvil.ops.operators import custom_operator
from selfvil.ops.parallel import denominator
from selfvil.ops.reference import EPS


class Form(NamedTuple):
    """How the products with C = S ∘ D are computed. The batch includes the heads, a is i - F and row_max is M.

    `products(q, k, v, a, row_max, limit, reverse)` returns h (B·H, N, D) in the dtype of v, n (B·H, N) in that of a.
    `gradients(q, k, v, h, dh, sign, a, row_max, den, reverse)` returns those of q, k and v in the dtype of q or better,
    and r and the sums over i of C_ij dC_ij (B·H, N) in that of a; sign is that of n where |n| >= lim, and else 0.
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


@custom_operator("selfvil::mlstm")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, and for the backward pass a, M, its position, n and lim, each (B·H, N)."""
    # Merge the heads into the batch: with three axes, a slice of rows is multiplied without a copy. Contiguous, which
    # flatten does not guarantee for a single image, so that chunks are views.
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


@custom_operator("selfvil::mlstm_backward")
def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, h: Tensor, a: Tensor, row_max: Tensor, argmax: Tensor,
    row_sum: Tensor, limit: Tensor, reverse: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v in their shapes, and of i and log_f (B, H, N) in the dtype of a."""
    shape, v_shape = q.shape, v.shape
    dh, q, k, v, h = (x.flatten(0, 1).contiguous() for x in (dh, q, k, v, h))
    den = denominator(row_sum, limit)
    sum_dominates = row_sum.abs() >= limit  # the normaliser is the row sum, not its lower limit
    sign = row_sum.sign() * sum_dominates
    with _no_autocast(q):
        dq, dk, dv, r, da = FORMS[form].gradients(q, k, v, h, dh.to(q.dtype), sign, a, row_max, den, reverse)

    da = da.scatter_add_(-1, argmax, -r * EPS / den)
    # 1 - EPS/den is d/den, and stays finite where the limit overflows.
    d_log_forget = torch.where(sum_dominates, 0, r * (1 - EPS / den)) - da
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
    """Run products in the dtype of q, whatever the surrounding autocast (which does not exist for the meta device)."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _cumsum(x: Tensor, reverse: bool) -> Tensor:
    """Running sum over the last axis, from the end if `reverse`. The cost of flipping (B·H, N) is negligible."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _cummax(a: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Running maximum and its position, from the end if `reverse`."""
    values, positions = torch.cummax(a.flip(-1) if reverse else a, -1)
    if not reverse:
        return values, positions
    return values.flip(-1), a.shape[-1] - 1 - positions.flip(-1)
