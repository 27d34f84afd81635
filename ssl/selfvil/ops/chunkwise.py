"""Products of the mLSTM over chunks that hand on a state: time and memory grow with N.

Within a chunk, a row's products with the columns it sees are those of the parallel form. What came before enters by a
state of fixed size. For the rows of a chunk, with m the largest a_j before it,
    state = sum over j before it of exp(a_j - m) k_j v_jᵀ,   norm = sum of exp(a_j - m) k_j,
    row i of C v gains exp(m - M_i) q_i · state / sqrt(D),   and its row sum exp(m - M_i) q_i · norm / sqrt(D).
The gradient of q is the same sum with k and v changed about. Those of k and v run over the rows that come after a
column: a state of q and of the gradients, built from the other end. All exponents are at most 0.

What the symbols mean, and where these gradients lead: `torch_mlstm`. Shapes: heads have joined the batch, so q, k, v
are (B·H, N, D), what belongs to a token is (B·H, N), and states are (B·H, D, D) in the dtype of a.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from selfvil.ops.parallel import decay, denominator, plus, times

CHUNK = 128
"""Tokens in a chunk, at most. Larger ones cost more products within, smaller ones more states."""


def products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, limit: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B·H, N, D), and the row sums of C (B·H, N)."""
    h, row_sum, root = torch.empty_like(v), torch.empty_like(a), math.sqrt(q.shape[-1])
    state, norm, before = _empty_state(q, a)
    for chunk, last in _chunks(q.shape[1], reverse):
        rows = q[:, chunk]
        weights = times(rows @ k[:, chunk].mT, _decay_within(a[:, chunk], row_max[:, chunk], reverse))
        carried = _carried(before, row_max[:, chunk])
        row_sum[:, chunk] = (weights.sum(-1) + carried * _dot(rows, norm)) / root
        row_scale = root * denominator(row_sum[:, chunk], limit[:, chunk]).unsqueeze(-1)
        # Side by side, so that what is within and what came before are summed before they are rounded.
        left = torch.cat([weights.div_(row_scale), rows * (carried.unsqueeze(-1) / row_scale)], dim=2).to(v.dtype)
        h[:, chunk] = left @ torch.cat([v[:, chunk], state.to(v.dtype)], dim=1)
        state, norm, before = _read(state, norm, before, k[:, chunk], v[:, chunk], a[:, chunk], row_max[:, last])
    return h, row_sum


def gradients(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, den: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of h; r = h · dh, and column sums of C ∘ dC, (B·H, N)."""
    dtype, row_scale = q.dtype, math.sqrt(q.shape[-1]) * den
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k, dtype=a.dtype), torch.empty_like(v, dtype=a.dtype)
    r, dn, da = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
    chunks = _chunks(q.shape[1], reverse)

    # In the order of reading, for the rows: within their chunk, and what came before it, as in the forward pass.
    state, norm, before = _empty_state(q, a)
    d_scores, weights = [], []
    for chunk, last in chunks:
        rows, cols, values, d_rows = q[:, chunk], k[:, chunk], v[:, chunk], dh[:, chunk]
        scale = _decay_within(a[:, chunk], row_max[:, chunk], reverse).div_(row_scale[:, chunk, None])
        carried = (_carried(before, row_max[:, chunk]) / row_scale[:, chunk]).unsqueeze(-1)
        now = state.to(dtype)
        within, d_within = times(rows @ cols.mT, scale), d_rows @ values.mT
        both = within * d_within
        r[:, chunk] = both.sum(-1) + ((rows * carried).to(dtype) @ now * d_rows).sum(-1, dtype=a.dtype)
        dn[:, chunk] = -sign[:, chunk] * r[:, chunk]
        da[:, chunk] = both.sum(-2) + _dot(within.mT, dn[:, chunk])
        weights.append(within.to(dtype))
        d_scores.append(times(plus(d_within, dn[:, chunk, None]), scale).to(dtype))
        left = [d_scores[-1], (d_rows * carried).to(dtype), (dn[:, chunk, None] * carried).to(dtype)]
        right = [cols, now.mT, norm.unsqueeze(1).to(dtype)]
        dq[:, chunk] = torch.cat(left, dim=2) @ torch.cat(right, dim=1)
        state, norm, before = _read(state, norm, before, cols, values, a[:, chunk], row_max[:, last])

    # From the other end, for the columns: what the rows after a chunk ask of it.
    after, after_sum = torch.zeros_like(state), torch.zeros_like(norm)
    for index in reversed(range(len(chunks))):
        chunk, last = chunks[index]
        rows, cols, values, d_rows = q[:, chunk], k[:, chunk], v[:, chunk], dh[:, chunk]
        seen = torch.exp(a[:, chunk] - row_max[:, last, None]).unsqueeze(-1)
        now = after.to(dtype)
        asked_keys = seen * (values @ now.mT + after_sum.unsqueeze(1))
        da[:, chunk] += (cols * asked_keys).sum(-1)
        dk[:, chunk] = d_scores.pop().mT @ rows + asked_keys
        dv[:, chunk] = weights.pop().mT @ d_rows + seen * (cols @ now)
        if index:
            start = row_max[:, chunks[index - 1][1]]  # the maximum before this chunk
            fade = torch.exp(start - row_max[:, last])
            carried = _carried(start, row_max[:, chunk]) / row_scale[:, chunk]
            asked = (rows * carried.unsqueeze(-1)).to(dtype)
            after = after * fade[:, None, None] + asked.mT @ d_rows
            after_sum = after_sum * fade[:, None] + _dot(asked.mT, dn[:, chunk])
    return dq, dk, dv, r, da


def _chunks(num_tokens: int, reverse: bool) -> list[tuple[slice, int]]:
    """Chunks of about equal size in the order of reading, and the token of each that is read last."""
    count = math.ceil(num_tokens / CHUNK)
    bounds = list(pairwise(num_tokens * chunk // count for chunk in range(count + 1)))
    return [(slice(s, e), s) for s, e in reversed(bounds)] if reverse else [(slice(s, e), e - 1) for s, e in bounds]


def _empty_state(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State, norm, and the maximum they are relative to, before anything was read."""
    size, _, width = q.shape
    return a.new_zeros(size, width, width), a.new_zeros(size, width), a.new_full((size,), -math.inf)


def _read(
    state: Tensor, norm: Tensor, before: Tensor, k: Tensor, v: Tensor, a: Tensor, new_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """State, norm and maximum after a chunk of k, v and a."""
    fade = torch.exp(before - new_max)
    taken = (k * torch.exp(a - new_max.unsqueeze(-1)).unsqueeze(-1)).to(k.dtype)
    state = state * fade[:, None, None] + taken.mT @ v
    return state, norm * fade[:, None] + taken.sum(1, dtype=a.dtype), new_max


def _decay_within(a: Tensor, row_max: Tensor, reverse: bool) -> Tensor:
    return decay(a, row_max, slice(0, a.shape[1]), reverse)


def _carried(before: Tensor, row_max: Tensor) -> Tensor:
    """Weight (B·H, n) in each of n rows of a state that is relative to the maximum `before`."""
    return torch.exp(before.unsqueeze(-1) - row_max)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Rows (B·H, n, D) times a vector (B·H, D): (B·H, n), in the dtype of the vector."""
    return (rows.to(vector.dtype) @ vector.unsqueeze(-1)).squeeze(-1)
