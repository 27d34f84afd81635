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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfvil.ops.reference import EPS

ROW_BLOCK = 64
"""Rows handled at once. Smaller ones skip more of the masked triangle, larger ones make fewer, larger products."""


def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, reverse: bool = False) -> Tensor:
    """mLSTM output h (B, H, N, D) of q, k, v (B, H, N, D) and gate pre-activations i, f (B, H, N).

    Products run in the dtype of q, gates in float32 (float64 if q, i or f is float64). First derivatives only.
    """
    return _MLSTM.apply(q, k, v, i, f, reverse)


class _MLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, reverse):
        with torch.autocast(q.device.type, enabled=False):  # dtypes are chosen here, not by a surrounding autocast
            gate_dtype = torch.promote_types(torch.promote_types(q.dtype, torch.float32), f.dtype)
            log_forget = _scan(torch.cumsum, F.logsigmoid(f.to(gate_dtype)), reverse)
            a = i.to(gate_dtype) - log_forget
            row_max, argmax = _cummax(a, reverse)
            limit = torch.exp(-(log_forget + row_max))

            h = torch.empty_like(v)
            row_sum = torch.empty_like(a)
            for rows, cols in _blocks(q.shape[2], reverse):
                weights = _scores(q, k, rows, cols) * _decay(a, row_max, rows, cols, reverse)
                torch.sum(weights, -1, out=row_sum[..., rows])
                h[:, :, rows] = weights.to(v.dtype) @ v[:, :, cols]
            h /= (torch.maximum(row_sum.abs(), limit) + EPS).unsqueeze(-1)
        ctx.save_for_backward(q, k, v, f, h, a, row_max, argmax, row_sum, limit)
        ctx.reverse = reverse
        ctx.i_dtype = i.dtype
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        q, k, v, f, h, a, row_max, argmax, row_sum, limit = ctx.saved_tensors
        reverse = ctx.reverse
        with torch.autocast(q.device.type, enabled=False):
            den = torch.maximum(row_sum.abs(), limit) + EPS
            r = (h.to(a.dtype) * dh.to(a.dtype)).sum(-1)
            sum_rules = row_sum.abs() >= limit  # the row sum, not its lower limit, is the normaliser
            d_row_sum = torch.where(sum_rules, row_sum.sign() * r / den, 0)
            scaled_dh = (dh / den.unsqueeze(-1)).to(q.dtype)

            dq = torch.empty_like(q)
            dk = torch.zeros_like(k, dtype=a.dtype)
            dv = torch.zeros_like(v, dtype=a.dtype)
            for rows, cols in _blocks(q.shape[2], reverse):
                decay = _decay(a, row_max, rows, cols, reverse)
                weights = _scores(q, k, rows, cols) * decay
                dv[:, :, cols] += weights.to(v.dtype).transpose(-2, -1) @ scaled_dh[:, :, rows]
                d_weights = scaled_dh[:, :, rows] @ v[:, :, cols].transpose(-2, -1) - d_row_sum[..., rows, None]
                d_scores = (d_weights * decay).to(q.dtype)
                dq[:, :, rows] = d_scores @ k[:, :, cols]
                dk[:, :, cols] += d_scores.transpose(-2, -1) @ q[:, :, rows]
            scale = 1 / math.sqrt(q.shape[-1])
            dq *= scale
            dk *= scale

            da = (k * dk).sum(-1).scatter_add(-1, argmax, -r * EPS / den)
            # 1 - EPS/den is d/den, and stays finite where the limit overflows.
            d_log_forget = torch.where(sum_rules, 0, r * (1 - EPS / den)) - da
            df = _scan(torch.cumsum, d_log_forget, not reverse) * torch.sigmoid(-f.to(a.dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), da.to(ctx.i_dtype), df.to(f.dtype), None


def _blocks(num_tokens: int, reverse: bool) -> list[tuple[slice, slice]]:
    """Blocks of rows, each with the columns that any of its rows sees."""
    starts = range(0, num_tokens, ROW_BLOCK)
    ends = [min(start + ROW_BLOCK, num_tokens) for start in starts]
    return [(slice(s, e), slice(s, num_tokens) if reverse else slice(0, e)) for s, e in zip(starts, ends)]


def _scores(q: Tensor, k: Tensor, rows: slice, cols: slice) -> Tensor:
    return q[:, :, rows] @ k[:, :, cols].transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))


def _decay(a: Tensor, row_max: Tensor, rows: slice, cols: slice, reverse: bool) -> Tensor:
    """D of one block of rows, zero where a row does not see a column. Only the block's own square needs the mask."""
    exponent = a[..., None, cols] - row_max[..., rows, None]
    size = rows.stop - rows.start
    square = exponent[..., :size] if reverse else exponent[..., -size:]
    hidden = torch.ones(size, size, dtype=torch.bool, device=a.device)
    # Masked before exp: a hidden entry may exceed the row's maximum by any amount.
    square.masked_fill_(hidden.tril(-1) if reverse else hidden.triu(1), -math.inf)
    return exponent.exp_()


def _scan(scan, x: Tensor, reverse: bool) -> Tensor:
    """A scan over the last axis, from its end if `reverse`. Only ever (B, H, N), so flipping costs nothing."""
    return scan(x.flip(-1), -1).flip(-1) if reverse else scan(x, -1)


def _cummax(a: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Running maximum and its position, from the end if `reverse`."""
    values, positions = torch.cummax(a.flip(-1) if reverse else a, -1)
    if not reverse:
        return values, positions
    return values.flip(-1), a.shape[-1] - 1 - positions.flip(-1)
