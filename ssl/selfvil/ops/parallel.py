"""Products of the mLSTM over blocks of rows: time grows with N², memory with N.

A block of rows touches no column that none of its rows sees, so about half of the N × N scores is never computed. The
backward pass computes scores and decay anew from the inputs rather than keep them. What the symbols mean, and where
these gradients lead: `torch_mlstm`.

Shapes: heads have joined the batch, so q, k, v are (B·H, N, D), and what belongs to a token is (B·H, N).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from selfvil.ops.reference import EPS

ROW_BLOCK = 64
"""Rows handled at once, about. Smaller blocks skip more of what is masked, larger ones make fewer, larger products."""


def products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, limit: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B·H, N, D), and the row sums of C (B·H, N)."""
    h, row_sum, root = torch.empty_like(v), torch.empty_like(a), math.sqrt(q.shape[-1])
    for rows, cols, square in _blocks(q.shape[1], reverse):
        weights = times(q[:, rows] @ k[:, cols].mT, decay(a[:, cols], row_max[:, rows], square, reverse))
        row_sum[:, rows] = weights.sum(-1) / root
        row_scale = 1 / (root * denominator(row_sum[:, rows], limit[:, rows]).unsqueeze(-1))
        if v.dtype == a.dtype:
            h[:, rows] = (weights @ v[:, cols]).mul_(row_scale)
        else:  # rounded once, when all is in it
            h[:, rows] = weights.mul_(row_scale).to(v.dtype) @ v[:, cols]
    return h, row_sum


def gradients(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, den: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of h; r = h · dh, and column sums of C ∘ dC, (B·H, N)."""
    full = q.dtype == a.dtype
    row_scale = 1 / (math.sqrt(q.shape[-1]) * den).unsqueeze(-1)
    dq, r, da = torch.empty_like(q), (h * dh).sum(-1, dtype=a.dtype), torch.zeros_like(a)
    if full:
        scaled_q, scaled_dh, scaled_dn = q * row_scale, dh * row_scale, -(sign * r).unsqueeze(-1) * row_scale
    blocks = _blocks(q.shape[1], reverse)
    for index, (rows, cols, square) in enumerate(blocks):
        kept = decay(a[:, cols], row_max[:, rows], square, reverse)
        if full:
            weights = (scaled_q[:, rows] @ k[:, cols].mT).mul_(kept)
            d_scores = torch.baddbmm(scaled_dn[:, rows], scaled_dh[:, rows], v[:, cols].mT).mul_(kept)
        else:  # sums before rounding, and rounded once, when all is in it
            kept *= row_scale[:, rows]
            weights, d_weights = q[:, rows] @ k[:, cols].mT * kept, dh[:, rows] @ v[:, cols].mT
            both = weights * d_weights
            r[:, rows] = both.sum(-1)
            dn = -(sign[:, rows] * r[:, rows]).unsqueeze(-1)
            da[:, cols] += both.sum(-2) + (weights.mT @ dn).squeeze(-1)
            weights, d_scores = weights.to(q.dtype), (d_weights + dn).mul_(kept).to(q.dtype)
        dq[:, rows] = d_scores @ k[:, cols]
        if index == 0:  # this block sees all columns
            dk, dv = d_scores.mT @ q[:, rows], weights.mT @ dh[:, rows]
            if len(blocks) > 1:  # sums of many products, in float32
                dk, dv = dk.to(a.dtype), dv.to(a.dtype)
        else:
            _add_product(dk[:, cols], d_scores.mT, q[:, rows])
            _add_product(dv[:, cols], weights.mT, dh[:, rows])
    return dq, dk, dv, r, (k * dk).sum(-1) if full else da


def decay(a: Tensor, row_max: Tensor, square: slice, reverse: bool) -> Tensor:
    """D of the rows and columns of a block, (B·H, n, m); 0 where a row does not see a column.

    square: where among the columns the block's own lie, which alone need a mask.
    """
    exponent = a[:, None, :] - row_max[:, :, None]
    size = square.stop - square.start
    hidden = torch.ones(size, size, dtype=torch.bool, device=a.device)
    # Masked before exp: a hidden entry may exceed the row's maximum by any amount.
    exponent[..., square].masked_fill_(hidden.tril(-1) if reverse else hidden.triu(1), -math.inf)
    return exponent.exp_()


def denominator(row_sum: Tensor, limit: Tensor) -> Tensor:
    """What a row is divided by."""
    return torch.maximum(row_sum.abs(), limit) + EPS


def times(product: Tensor, factor: Tensor) -> Tensor:
    """product · factor in the dtype of `factor`, the more precise one; in place where it can be."""
    return product.mul_(factor) if product.dtype == factor.dtype else product * factor


def plus(product: Tensor, summand: Tensor) -> Tensor:
    """product + summand in the dtype of `summand`, the more precise one; in place where it can be."""
    return product.add_(summand) if product.dtype == summand.dtype else product + summand


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one go unless `total` is the more precise, as it is for bfloat16 products."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right


def _blocks(num_tokens: int, reverse: bool) -> list[tuple[slice, slice, slice]]:
    """Blocks of rows of about equal size, the one that sees most first: its rows, the columns that any of them sees,
    and where among these columns the block's own square lies."""
    count = math.ceil(num_tokens / ROW_BLOCK)
    bounds = list(pairwise(num_tokens * block // count for block in range(count + 1)))
    if reverse:
        return [(slice(s, e), slice(s, num_tokens), slice(0, e - s)) for s, e in bounds]
    return [(slice(s, e), slice(0, e), slice(s, e)) for s, e in reversed(bounds)]
