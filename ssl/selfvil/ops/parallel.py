"""The mLSTM in plain torch, fast: matrix products over blocks of rows, and an O(N) scan for the stabiliser.

With F = cumsum(log sigmoid(f)) and a_j = i_j - F_j, the log decay of the reference is F_i + a_j, so that a row's
maximum is F_i + M_i with M = cummax(a), and the stabilised decay is D_ij = exp(a_j - M_i). Gates are thus three scans
over (B, H, N), and the only N × N work is D, the two products, and nothing besides. Rows are handled in blocks that
touch no column they do not see, so memory grows with N; the backward pass computes D and q kᵀ anew from the inputs
rather than keep them. Reading backwards takes the same scans from the other end and the columns on the other side.

Gradients (S = scale · q kᵀ, C = S ∘ D, n_i = sum_j C_ij, lim_i = exp(-(F_i + M_i)), d = max(|n|, lim), den = d + eps,
h_i = sum_j C_ij v_j / den_i, r_i = h_i · dh_i):
    dC_ij = (dh_i · v_j) / den_i - [|n_i| >= lim_i] sign(n_i) r_i / den_i
    da_j = sum_i C_ij dC_ij - sum over i with argmax M_i = j of r_i eps / den_i;  the first sum equals k_j · dk_j
    di = da,  dF_i = [lim_i > |n_i|] r_i d_i / den_i - da_i
The eps term is there because M cancels out of h but for eps. Where several tokens attain the same maximum exactly,
it goes to one of them, a subgradient as good as any other.

Shapes: B batch, H heads, N tokens, D head width.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfvil.ops.reference import EPS

ROW_BLOCK = 64
"""Rows handled at once, about. Smaller blocks skip more of what is masked, larger ones make fewer, larger products."""


def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, reverse: bool = False) -> Tensor:
    """mLSTM output h (B, H, N, D) of q, k, v (B, H, N, D) and gate pre-activations i, f (B, H, N).

    Products run in the dtype of q, gates in float32 (float64 if q or f is float64). First derivatives only.
    """
    return _MLSTM.apply(q, k, v, i, f, reverse)


class _MLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, reverse):
        ctx.shape, ctx.i_dtype, ctx.reverse = q.shape, i.dtype, reverse
        # Heads join the batch: three axes, so that a slice of rows can be multiplied without being copied first.
        q, k, v, i, f = (x.flatten(0, 1) for x in (q, k, v, i, f))
        gate_dtype = torch.promote_types(torch.promote_types(q.dtype, torch.float32), f.dtype)
        log_forget = _cumsum(F.logsigmoid(f.to(gate_dtype)), reverse)
        a = i.to(gate_dtype) - log_forget
        row_max, argmax = _cummax(a, reverse)
        limit = torch.exp(-(log_forget + row_max))

        h, row_sum = torch.empty_like(v), torch.empty_like(a)
        with _no_autocast(q):
            for rows, cols, square in _blocks(q.shape[1], reverse):
                weights = (q[:, rows] @ k[:, cols].mT).mul_(_decay(a, row_max, rows, cols, square, ctx.reverse, q))
                row_sum[:, rows] = weights.sum(-1, dtype=gate_dtype)
                h[:, rows] = weights @ v[:, cols]
        h /= (torch.maximum(row_sum.abs(), limit) + EPS).unsqueeze(-1)
        ctx.save_for_backward(q, k, v, f, h, a, row_max, argmax, row_sum, limit)
        return h.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        q, k, v, f, h, a, row_max, argmax, row_sum, limit = ctx.saved_tensors
        dh = dh.flatten(0, 1)
        den = torch.maximum(row_sum.abs(), limit) + EPS
        r = (h * dh).sum(-1, dtype=a.dtype)
        sum_rules = row_sum.abs() >= limit  # the row sum, not its lower limit, is the normaliser
        d_row_sum = torch.where(sum_rules, row_sum.sign() * r / den, 0).to(q.dtype).unsqueeze(-1)
        dh = (dh / den.unsqueeze(-1)).to(q.dtype)

        dq = torch.empty_like(q)
        blocks = _blocks(q.shape[1], ctx.reverse)
        with _no_autocast(q):
            for index, (rows, cols, square) in enumerate(blocks):
                decay = _decay(a, row_max, rows, cols, square, ctx.reverse, q)
                weights = (q[:, rows] @ k[:, cols].mT).mul_(decay)
                d_scores = (dh[:, rows] @ v[:, cols].mT).sub_(d_row_sum[:, rows]).mul_(decay)
                dq[:, rows] = d_scores @ k[:, cols]
                if index == 0:  # this block sees all columns
                    dk, dv = d_scores.mT @ q[:, rows], weights.mT @ dh[:, rows]
                    if len(blocks) > 1:  # sums of many products, in float32
                        dk, dv = dk.to(a.dtype), dv.to(a.dtype)
                else:
                    _add_product(dk[:, cols], d_scores.mT, q[:, rows])
                    _add_product(dv[:, cols], weights.mT, dh[:, rows])

        da = (k * dk).sum(-1, dtype=a.dtype).scatter_add_(-1, argmax, -r * EPS / den)
        # 1 - EPS/den is d/den, and stays finite where the limit overflows.
        d_log_forget = torch.where(sum_rules, 0, r * (1 - EPS / den)) - da
        df = _cumsum(d_log_forget, not ctx.reverse) * torch.sigmoid(-f.to(a.dtype))
        dq, dk, dv = (x.to(q.dtype).view(ctx.shape) for x in (dq, dk, dv))
        return dq, dk, dv, da.to(ctx.i_dtype).view(ctx.shape[:3]), df.to(f.dtype).view(ctx.shape[:3]), None


def _no_autocast(q: Tensor) -> AbstractContextManager:
    """Products run in the dtype of q, whatever the surrounding autocast (which the meta device does not know) says."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _blocks(num_tokens: int, reverse: bool) -> list[tuple[slice, slice, slice]]:
    """Blocks of rows of about equal size, the one that sees most first: its rows, the columns that any of them sees,
    and where among these columns the block's own square lies, which alone needs a mask."""
    count = math.ceil(num_tokens / ROW_BLOCK)
    bounds = list(pairwise(num_tokens * block // count for block in range(count + 1)))
    if reverse:
        return [(slice(s, e), slice(s, num_tokens), slice(0, e - s)) for s, e in bounds]
    return [(slice(s, e), slice(0, e), slice(s, e)) for s, e in reversed(bounds)]


def _decay(a: Tensor, row_max: Tensor, rows: slice, cols: slice, square: slice, reverse: bool, q: Tensor) -> Tensor:
    """D of a block of rows, times the scale of the products, in the dtype of q; 0 where a row does not see a column."""
    exponent = a[:, None, cols] - (row_max[:, rows, None] + math.log(q.shape[-1]) / 2)
    size = square.stop - square.start
    hidden = torch.ones(size, size, dtype=torch.bool, device=a.device)
    # Masked before exp: a hidden entry may exceed the row's maximum by any amount.
    exponent[..., square].masked_fill_(hidden.tril(-1) if reverse else hidden.triu(1), -math.inf)
    return exponent.exp_().to(q.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one go unless `total` is the more precise, as it is for bfloat16 products."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right


def _cumsum(x: Tensor, reverse: bool) -> Tensor:
    """Running sum over the last axis, from the end if `reverse`. Flipping (B, H, N) costs nothing beside the rest."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _cummax(a: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Running maximum and its position, from the end if `reverse`."""
    values, positions = torch.cummax(a.flip(-1) if reverse else a, -1)
    if not reverse:
        return values, positions
    return values.flip(-1), a.shape[-1] - 1 - positions.flip(-1)
