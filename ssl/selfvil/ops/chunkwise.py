"""Products of the mLSTM over chunks that hand on a state: time and memory grow with N.

Within a chunk, a row's products with the columns it sees are those of the parallel form. What came before enters by a
state of fixed size. For the rows of a chunk, with m the largest a_j before it,
    state = sum over j before it of exp(a_j - m) k_j v_jᵀ,   norm = sum of exp(a_j - m) k_j,
    row i of C v gains exp(m - M_i) q_i · state / sqrt(D),   and its row sum exp(m - M_i) q_i · norm / sqrt(D).
The gradient of q is the same sum with k and v changed about. Those of k and v run over the rows that come after a
column: a state of q and of the gradients, built from the other end. All exponents are at most 0.

Only states follow one another, by one small step a chunk. All else is done for the chunks of some heads at once: as
many as are few, large operations and yet stay in a processor's cache.

What the symbols mean, and where these gradients lead: `torch_mlstm`. Shapes: heads have joined the batch, so q, k, v
are (B·H, N, D), and what belongs to a token is (B·H, N). Of some heads, Z chunks of c tokens: (Z, c, D), (Z, c), states
(Z, D, D) in the dtype of a.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.parallel import decay, denominator, plus, times

CHUNK = 128
"""Tokens in a chunk, at most. Larger ones cost more products within, smaller ones more states."""

NARROW = 64
"""Heads up to this wide take chunks of half the size: their states cost little beside what is done within a chunk."""

TOGETHER = 4096
"""Tokens handled at once, about."""


def products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, limit: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B·H, N, D), and the row sums of C (B·H, N)."""
    num_tokens, root, chunks = q.shape[1], math.sqrt(q.shape[-1]), _Chunks(v, reverse)
    q, k, v, limit = (chunks.pad(x) for x in (q, k, v, limit))
    a, row_max = chunks.pad(a, -math.inf), chunks.pad(row_max, math.inf)
    h, row_sum = torch.empty_like(v), torch.empty_like(a)
    for heads in chunks.heads():
        rows, cols, values, taken, maximum = (chunks.cut(x[heads]) for x in (q, k, v, a, row_max))
        before, last = chunks.maxima(maximum)
        state, norm = chunks.states(cols, values, taken, before, last)
        weights = times(rows @ cols.mT, _decay_within(taken, maximum, reverse))
        carried = torch.exp(before - maximum)
        total = (weights.sum(-1) + carried * _dot(rows, norm)) / root
        row_scale = root * denominator(total, chunks.cut(limit[heads])).unsqueeze(-1)
        # Divided first, so that low precision rounds what is of the size of h.
        parts = [(weights.div_(row_scale), values), (rows * (carried.unsqueeze(-1) / row_scale), state)]
        _sum_of_products(parts, chunks.cut(h[heads]))
        chunks.cut(row_sum[heads]).copy_(total)
    return h[:, :num_tokens].contiguous(), row_sum[:, :num_tokens].contiguous()


def gradients(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, den: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of h; r = h · dh, and column sums of C ∘ dC, (B·H, N)."""
    num_tokens, dtype, chunks = q.shape[1], q.dtype, _Chunks(v, reverse)
    row_scale = chunks.pad(math.sqrt(q.shape[-1]) * den, 1.0)
    q, k, v, dh, sign = (chunks.pad(x) for x in (q, k, v, dh, sign))
    a, row_max = chunks.pad(a, -math.inf), chunks.pad(row_max, math.inf)
    dq, dk, dv, r, da = (torch.empty_like(x) for x in (q, k, v, a, a))
    for heads in chunks.heads():
        rows, cols, values, d_rows = (chunks.cut(x[heads]) for x in (q, k, v, dh))
        taken, maximum = chunks.cut(a[heads]), chunks.cut(row_max[heads])
        scale = chunks.cut(row_scale[heads]).unsqueeze(-1)
        before, last = chunks.maxima(maximum)
        carried = torch.exp(before - maximum).unsqueeze(-1) / scale
        asked = (rows * carried).to(dtype)

        # For the rows: within their chunk, and what came before it, as in the forward pass.
        state, norm = chunks.states(cols, values, taken, before, last)
        kept = _decay_within(taken, maximum, reverse).div_(scale)
        weights, d_weights = times(rows @ cols.mT, kept), (d_rows @ values.mT).to(a.dtype)
        now = torch.linalg.vecdot(weights, d_weights)
        now += torch.linalg.vecdot((asked @ state.to(dtype)).to(a.dtype), d_rows.to(a.dtype))
        dn = (-chunks.cut(sign[heads]) * now).unsqueeze(-1)
        d_weights = plus(d_weights, dn)
        d_columns = (weights * d_weights).sum(-2)
        d_scores = kept.mul_(d_weights).to(dtype)
        parts = [(d_scores, cols), (d_rows * carried, state.mT), (dn * carried, norm.unsqueeze(1))]
        _sum_of_products(parts, chunks.cut(dq[heads]))
        chunks.cut(r[heads]).copy_(now)

        # For the columns: within their chunk, and what the rows after it ask of them.
        after, after_sum = chunks.states_after(asked, d_rows, dn, before, last)
        seen = torch.exp(taken - last).unsqueeze(-1)
        asked_keys = seen * plus(values @ after.to(dtype).mT, after_sum.unsqueeze(1))
        chunks.cut(da[heads]).copy_(d_columns + (cols * asked_keys).sum(-1))
        chunks.cut(dk[heads]).copy_(plus(d_scores.mT @ rows, asked_keys))
        chunks.cut(dv[heads]).copy_(plus(weights.to(dtype).mT @ d_rows, seen * (cols @ after.to(dtype))))
    dq, dk, dv, r, da = (x[:, :num_tokens].contiguous() for x in (dq, dk, dv, r, da))
    return dq, dk, dv, r, da


def chunk_size(width: int) -> int:
    """Tokens in a chunk, at most, for heads of v so wide."""
    return max(1, CHUNK // 2) if width <= NARROW else CHUNK


class _Chunks:
    """Chunks of equal size, the last one filled up with tokens that nobody sees and that ask for nothing."""

    def __init__(self, v: Tensor, reverse: bool) -> None:
        self.num_heads, num_tokens, width = v.shape
        self.count = math.ceil(num_tokens / chunk_size(width))
        self.size = math.ceil(num_tokens / self.count)
        self.missing, self.reverse = self.count * self.size - num_tokens, reverse

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(B·H, N, ...) to whole chunks."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.missing), value=value) if self.missing else x

    def heads(self) -> Iterator[slice]:
        """Heads to be handled together."""
        some = max(1, TOGETHER // (self.count * self.size))
        return (slice(first, first + some) for first in range(0, self.num_heads, some))

    def cut(self, x: Tensor) -> Tensor:
        """Some heads (heads, N, ...) to their chunks (Z, c, ...), without a copy."""
        return x.view(-1, self.size, *x.shape[2:])

    def maxima(self, row_max: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum when all before a chunk has been read, -inf for nothing, and when it has: (Z, 1) of (Z, c)."""
        last = row_max[:, 0 if self.reverse else -1].view(-1, self.count)
        nothing = last.new_full((len(last), 1), -math.inf)
        before = [last[:, 1:], nothing] if self.reverse else [nothing, last[:, :-1]]
        return torch.cat(before, dim=1).view(-1, 1), last.reshape(-1, 1)

    def states(self, k: Tensor, v: Tensor, a: Tensor, before: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """State (Z, D, D) and norm (Z, D) before each chunk of k, v (Z, c, D) and a (Z, c)."""
        taken = (k * torch.exp(a - last).unsqueeze(-1)).to(k.dtype)
        gains = (taken.mT @ v).to(a.dtype), taken.sum(1, dtype=a.dtype)
        fade = torch.exp(before - last)
        return self._follow(gains[0], fade, self.reverse), self._follow(gains[1], fade, self.reverse)

    def states_after(
        self, asked: Tensor, d_rows: Tensor, dn: Tensor, before: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the rows after each chunk ask of it: a state (Z, D, D) for their gradients, and (Z, D) for their dn."""
        gains = (asked.mT @ d_rows).to(dn.dtype), (asked * dn).sum(1, dtype=dn.dtype)
        fade = torch.exp(before - last)
        return self._follow(gains[0], fade, not self.reverse), self._follow(gains[1], fade, not self.reverse)

    def _follow(self, gains: Tensor, fade: Tensor, backwards: bool) -> Tensor:
        """For each chunk the sum of the gains (Z, ...) of those read before it, times fade (Z, 1) of those between."""
        gains, fade = (x.view(-1, self.count, *x.shape[1:]) for x in (gains, fade))
        fade = fade.view(*fade.shape[:2], *(1,) * (gains.ndim - 2))
        states = torch.empty_like(gains)
        order = range(self.count - 1, -1, -1) if backwards else range(self.count)
        states[:, order[0]] = 0
        for chunk, following in pairwise(order):
            torch.addcmul(gains[:, chunk], states[:, chunk], fade[:, chunk], out=states[:, following])
        return states.flatten(0, 1)


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """out (Z, c, D) = the sum of left @ right. Low precision is rounded but once: one product of all side by side."""
    if all(x.dtype == out.dtype for pair in pairs for x in pair):
        torch.bmm(*pairs[0], out=out)
        for left, right in pairs[1:]:
            out.baddbmm_(left, right)
    else:
        left = torch.cat([left.to(out.dtype) for left, _ in pairs], dim=2)
        torch.bmm(left, torch.cat([right.to(out.dtype) for _, right in pairs], dim=1), out=out)


def _decay_within(a: Tensor, row_max: Tensor, reverse: bool) -> Tensor:
    return decay(a, row_max, slice(0, a.shape[1]), reverse)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Rows (Z, c, D) times vectors (Z, D): (Z, c), in the dtype of the vectors."""
    return (rows.to(vector.dtype) @ vector.unsqueeze(-1)).squeeze(-1)
