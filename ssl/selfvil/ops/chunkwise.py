"""Products of the mLSTM over chunks that pass on a state: time and memory are linear in N.

Within a chunk, a row's products with its unmasked columns are those of the parallel form. Tokens before the chunk are
summarised in a state of fixed size. For the rows of a chunk, with m the largest a_j before it,
    state = sum over j before it of exp(a_j - m) k_j v_jᵀ,   norm = sum of exp(a_j - m) k_j,
    row i of C v gains exp(m - M_i) q_i · state / sqrt(D),   and its row sum exp(m - M_i) q_i · norm / sqrt(D).
The gradient of q is the same sum with k and v swapped. Those of k and v are sums over the rows after a column: a state
of q and of the gradients, computed from the other end. All exponents are at most 0.

Only the states are sequential, one small step for each chunk. Everything else is computed for the chunks of several
heads at once: enough for few, large operations, and few enough for the processor's cache.

`torch_mlstm` defines the symbols and derives the gradients. Shapes: the batch includes the heads: q, k, v are
(B·H, N, D), values per token are (B·H, N). For a group of heads, Z chunks of c tokens are (Z, c, D) and (Z, c), states
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
"""Maximum number of tokens in a chunk. Larger chunks need more products within them, smaller ones more states."""

NARROW = 64
"""Heads up to this width take chunks of half the size: their states are cheap compared to the work within a chunk."""

TOKENS_AT_ONCE = 4096
"""Approximate number of tokens that one operation processes."""


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
        # Divided before rounding to low precision, so that the rounded values have the magnitude of h.
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
        scaled_rows = (rows * carried).to(dtype)

        # Gradients of the rows: from their own chunk and from the state before it, as in the forward pass.
        state, norm = chunks.states(cols, values, taken, before, last)
        kept = _decay_within(taken, maximum, reverse).div_(scale)
        weights, d_weights = times(rows @ cols.mT, kept), (d_rows @ values.mT).to(a.dtype)
        now = torch.linalg.vecdot(weights, d_weights)
        now += torch.linalg.vecdot((scaled_rows @ state.to(dtype)).to(a.dtype), d_rows.to(a.dtype))
        dn = (-chunks.cut(sign[heads]) * now).unsqueeze(-1)
        d_weights = plus(d_weights, dn)
        d_columns = (weights * d_weights).sum(-2)
        d_scores = kept.mul_(d_weights).to(dtype)
        parts = [(d_scores, cols), (d_rows * carried, state.mT), (dn * carried, norm.unsqueeze(1))]
        _sum_of_products(parts, chunks.cut(dq[heads]))
        chunks.cut(r[heads]).copy_(now)

        # Gradients of the columns: from their own chunk and from the rows after it.
        after, after_sum = chunks.states_after(scaled_rows, d_rows, dn, before, last)
        fade = torch.exp(taken - last).unsqueeze(-1)
        d_keys = fade * plus(values @ after.to(dtype).mT, after_sum.unsqueeze(1))
        chunks.cut(da[heads]).copy_(d_columns + (cols * d_keys).sum(-1))
        chunks.cut(dk[heads]).copy_(plus(d_scores.mT @ rows, d_keys))
        chunks.cut(dv[heads]).copy_(plus(weights.to(dtype).mT @ d_rows, fade * (cols @ after.to(dtype))))
    dq, dk, dv, r, da = (x[:, :num_tokens].contiguous() for x in (dq, dk, dv, r, da))
    return dq, dk, dv, r, da


def chunk_size(width: int) -> int:
    """Maximum number of tokens in a chunk for heads of v with this width."""
    return max(1, CHUNK // 2) if width <= NARROW else CHUNK


class _Chunks:
    """Chunks of equal size. The last is padded with tokens that affect no other and have no gradient."""

    def __init__(self, v: Tensor, reverse: bool) -> None:
        self.num_heads, num_tokens, width = v.shape
        self.count = math.ceil(num_tokens / chunk_size(width))
        self.size = math.ceil(num_tokens / self.count)
        self.missing, self.reverse = self.count * self.size - num_tokens, reverse

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(B·H, N, ...) to whole chunks."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.missing), value=value) if self.missing else x

    def heads(self) -> Iterator[slice]:
        """Groups of heads that are processed together."""
        group = max(1, TOKENS_AT_ONCE // (self.count * self.size))
        return (slice(first, first + group) for first in range(0, self.num_heads, group))

    def cut(self, x: Tensor) -> Tensor:
        """A group of heads (heads, N, ...) to its chunks (Z, c, ...), without a copy."""
        return x.view(-1, self.size, *x.shape[2:])

    def maxima(self, row_max: Tensor) -> tuple[Tensor, Tensor]:
        """Running maxima (Z, 1) before each chunk, -inf before the first, and at its end; from `row_max` (B·H, N)."""
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
        self, scaled_rows: Tensor, d_rows: Tensor, dn: Tensor, before: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over the rows after each chunk: a state (Z, D, D) with their gradients, and (Z, D) with their dn."""
        gains = (scaled_rows.mT @ d_rows).to(dn.dtype), (scaled_rows * dn).sum(1, dtype=dn.dtype)
        fade = torch.exp(before - last)
        return self._follow(gains[0], fade, not self.reverse), self._follow(gains[1], fade, not self.reverse)

    def _follow(self, gains: Tensor, fade: Tensor, backwards: bool) -> Tensor:
        """For each chunk, the sum of the gains (Z, ...) before it, each times fade (Z, 1) of those between."""
        gains, fade = (x.view(-1, self.count, *x.shape[1:]) for x in (gains, fade))
        fade = fade.view(*fade.shape[:2], *(1,) * (gains.ndim - 2))
        states = torch.empty_like(gains)
        order = range(self.count - 1, -1, -1) if backwards else range(self.count)
        states[:, order[0]] = 0
        for chunk, following in pairwise(order):
            torch.addcmul(gains[:, chunk], states[:, chunk], fade[:, chunk], out=states[:, following])
        return states.flatten(0, 1)


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """out (Z, c, D) = the sum of left @ right. Low precision is rounded once, by one product of the concatenation."""
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
