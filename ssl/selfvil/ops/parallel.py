"""Products of the mLSTM over blocks of rows: time is quadratic and memory linear in N, except for bfloat16's scores.

A block of rows skips the columns that are masked for all of its rows, so that about half of the N × N scores are not
computed. The backward pass recomputes scores and decay from the inputs instead of storing them. `torch_mlstm` defines
the symbols and derives the gradients.

Shapes: the batch includes the heads: q, k, v are (B·H, N, D), values per token are (B·H, N).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from selfvil.ops.reference import EPS

ROW_BLOCK = 64
"""Approximate number of rows in a block. Smaller blocks skip more masked scores, larger ones have larger products."""


def products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, limit: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B·H, N, D), and the row sums of C (B·H, N)."""
    full = q.dtype == a.dtype
    h, row_sum, root = torch.empty_like(v), torch.empty_like(a), math.sqrt(q.shape[-1])
    whole = None if full else q @ k.mT
    for rows, cols, square in _blocks(q.shape[1], reverse):
        scores = q[:, rows] @ k[:, cols].mT if whole is None else whole[:, rows, cols]
        weights = decay(a[:, cols], row_max[:, rows], square, reverse).mul_(scores)
        row_sum[:, rows] = weights.sum(-1) / root
        row_scale = 1 / (root * denominator(row_sum[:, rows], limit[:, rows]).unsqueeze(-1))
        if full:
            h[:, rows] = (weights @ v[:, cols]).mul_(row_scale)
        else:  # rounded once, after all factors
            h[:, rows] = weights.mul_(row_scale).to(v.dtype) @ v[:, cols]
    return h, row_sum


def gradients(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, den: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of h; r = h · dh, and column sums of C ∘ dC, (B·H, N)."""
    row_scale = 1 / (math.sqrt(q.shape[-1]) * den).unsqueeze(-1)
    if q.dtype != a.dtype:
        return _rounded_gradients(q, k, v, dh, sign, a, row_max, row_scale, reverse)
    dq, r = torch.empty_like(q), (h * dh).sum(-1)
    scaled_q, scaled_dh, scaled_dn = q * row_scale, dh * row_scale, -(sign * r).unsqueeze(-1) * row_scale
    for index, (rows, cols, square) in enumerate(_blocks(q.shape[1], reverse)):
        kept = decay(a[:, cols], row_max[:, rows], square, reverse)
        weights = (scaled_q[:, rows] @ k[:, cols].mT).mul_(kept)
        d_scores = torch.baddbmm(scaled_dn[:, rows], scaled_dh[:, rows], v[:, cols].mT).mul_(kept)
        dq[:, rows] = d_scores @ k[:, cols]
        if index == 0:  # this block has all columns
            dk, dv = d_scores.mT @ q[:, rows], weights.mT @ dh[:, rows]
        else:
            dk[:, cols].baddbmm_(d_scores.mT, q[:, rows])
            dv[:, cols].baddbmm_(weights.mT, dh[:, rows])
    return dq, dk, dv, r, (k * dk).sum(-1)


def _rounded_gradients(
    q: Tensor, k: Tensor, v: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, row_scale: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same where q is less precise than a: values are summed before rounding, and rounded once, at the end.

    Only the operations between the products run on blocks of rows. Low-precision products are so fast that whole ones,
    with N × N entries of 2 bytes, take less time than oneDNN's copies of slices of their inputs and sums of parts of dk
    and dv in float32.
    """
    r, da = torch.empty_like(a), torch.zeros_like(a)
    weights, d_scores = q @ k.mT, dh @ v.mT  # without decay and scale yet, masked columns included
    for rows, cols, square in _blocks(q.shape[1], reverse):
        kept = decay(a[:, cols], row_max[:, rows], square, reverse).mul_(row_scale[:, rows])
        block, d_block = kept * weights[:, rows, cols], d_scores[:, rows, cols].to(a.dtype)
        weights[:, rows, cols] = block
        r[:, rows] = torch.linalg.vecdot(block, d_block)
        d_block -= (sign[:, rows] * r[:, rows]).unsqueeze(-1)
        da[:, cols] += block.mul_(d_block).sum(-2)
        d_scores[:, rows, cols] = kept.mul_(d_block)
        hidden = slice(0, cols.start) if reverse else slice(cols.stop, None)
        weights[:, rows, hidden], d_scores[:, rows, hidden] = 0, 0
    return d_scores @ k, d_scores.mT @ q, weights.mT @ dh, r, da


def decay(a: Tensor, row_max: Tensor, square: slice, reverse: bool) -> Tensor:
    """D of the rows and columns of a block, (B·H, n, m); 0 where a column is masked for a row.

    square: the slice of the columns with the same tokens as the rows; only these need a mask.
    """
    exponent = a[:, None, :] - row_max[:, :, None]
    size = square.stop - square.start
    hidden = torch.ones(size, size, dtype=torch.bool, device=a.device)
    # Masked before exp: a masked entry may exceed the row's maximum by any amount.
    exponent[..., square].masked_fill_(hidden.tril(-1) if reverse else hidden.triu(1), -math.inf)
    return exponent.exp_()


def denominator(row_sum: Tensor, limit: Tensor) -> Tensor:
    """The normaliser of a row."""
    return torch.maximum(row_sum.abs(), limit) + EPS


def times(product: Tensor, factor: Tensor) -> Tensor:
    """product · factor in the dtype of `factor`, which is at least as precise; in place if the dtypes are equal."""
    return product.mul_(factor) if product.dtype == factor.dtype else product * factor


def plus(product: Tensor, summand: Tensor) -> Tensor:
    """product + summand in the dtype of `summand`, which is at least as precise; in place if the dtypes are equal."""
    return product.add_(summand) if product.dtype == summand.dtype else product + summand


def _blocks(num_tokens: int, reverse: bool) -> list[tuple[slice, slice, slice]]:
    """Blocks of rows of about equal size, that with the most columns first: its rows, the columns that are unmasked for
    any of them, and the slice of these columns with the same tokens as the rows."""
    count = math.ceil(num_tokens / ROW_BLOCK)
    bounds = list(pairwise(num_tokens * block // count for block in range(count + 1)))
    if reverse:
        return [(slice(s, e), slice(s, num_tokens), slice(0, e - s)) for s, e in bounds]
    return [(slice(s, e), slice(0, e), slice(s, e)) for s, e in reversed(bounds)]
