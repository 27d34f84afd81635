"""Matrix products and norms of native layers, as functions on tensors without gradients.

`products.cpp` and `norms.cpp` explain them. Products of bfloat16 factors sum in float32; a factor in float32 is rounded
while it is copied for the kernel. Results are rounded once.

Shapes: M rows, I inputs, O outputs; a linear map has a weight (O, I).
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from selfvil.ops.cpu.build import available, kernels
from selfvil.ops.cpu.fused import DTYPES, bits
from selfvil.ops.exporting import exporting
from selfvil.ops.fused import SWITCH

PARTS = 4
"""Weights that one product takes, as in products.cpp."""
SPAN = 64
"""Rows whose sums for parameters' gradients are one part, as in norms.cpp."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which linear maps of x are multiplied."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def applies(x: Tensor, *weights: Tensor) -> bool:
    """Whether native layers support tokens x (B, N, C) and these weights (O, I).

    On a CPU, in float32 or bfloat16, with widths that are multiples of 16. ZeRO-3's weights are empty here.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and os.environ.get(SWITCH) != "0"
        and all(w.ndim == 2 and w.shape[0] % 16 == w.shape[1] % 16 == 0 and w.numel() for w in weights)
        and (all(w.dtype == x.dtype for w in weights) or torch.is_autocast_enabled("cpu"))
        and all(w.dtype == weights[0].dtype for w in weights)
        and weights[0].dtype in DTYPES
        and compute_dtype(x) in DTYPES
        and x.numel() > 0
        and not exporting()
        and available()
    )


def call(function: str, *members: int | Tensor | None) -> None:
    """Call a kernel with the members of its structure."""
    loaded = kernels()
    if loaded is None:
        raise ValueError(f"the CPU kernel {function} could not be built (see the log)")
    loaded.call(function, *members)


def multiply(
    a: Tensor, b: Sequence[Tensor], c: Tensor, *, pairs: bool, transposed: bool = False, bias: Tensor | None = None,
    tail: Tensor | None = None, gelu: int = 0, before: Tensor | None = None, after: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """c (M, N) = a (M, K) · b, or a · bᵀ if `transposed`.

    Args:
        a: one of its strides is 1.
        b: matrices one below the other, each with contiguous rows, of one dtype and stride.
        c: with contiguous rows.
        pairs: multiply in bfloat16.
        bias: (N,), float32.
        tail: receives the last columns of the product, (M, T), float32.
        gelu: 1: c = GELU(product), and `before` receives the product, if given; 2: c = product · GELU'(before), and
            `after` receives GELU(before). Both have the dtype and the strides of c.
        residual: (M, N), with contiguous rows, is added at the end.
        scale: (S,), float32: the product of M / S rows each is multiplied by one of them before that.
        sums: (M,), float32, receives the sums of the rows of a, if a.stride(0) is 1.
    """
    half, (rows, inner) = torch.bfloat16, a.shape
    columns = c.shape[1] + (0 if tail is None else tail.shape[1])
    missing = [0] * (PARTS - len(b))
    call(
        "product", pairs, rows, columns, inner, a, a.dtype == half, *a.stride(),
        b[0].dtype == half, transposed, b[0].stride(0), *b, *missing, *map(len, b), *missing,
        c, c.dtype == half, c.stride(0), tail, 0 if tail is None else tail.shape[1], bias, gelu, before, after,
        residual, residual is not None and residual.dtype == half, 0 if residual is None else residual.stride(0),
        scale, 1 if scale is None else rows // len(scale), sums,
    )  # fmt: skip


def weight_gradients(dy: Tensor, x: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (O, I) and bias (O,) of a linear map, in float32, of dy (M, O) and x (M, I)."""
    dw, sums = (
        dy.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32),
        dy.new_empty(dy.shape[1], dtype=torch.float32),
    )
    multiply(dy.mT, [x], dw, pairs=pairs, sums=sums)
    return dw, sums


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm of x (M, C) in `dtype`, whose weight is stored minus 1; mean and 1 / deviation of rows (M, 2)."""
    y, statistics = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), 2, dtype=torch.float32)
    weight, bias = weight.float(), None if bias is None else bias.float()
    call("layer_norm_forward", *_norm_members(x, dtype, eps), x, weight, bias, y, statistics, *4 * [None])
    return y, statistics


def layer_norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of x (M, C) plus `residual`, and those of weight and bias (2, C)."""
    dx = x.new_empty(x.shape)
    parts = x.new_empty(max(1, -(-len(x) // SPAN)), 2, x.shape[1], dtype=torch.float32)
    members = _norm_members(x, dy.dtype, eps)
    call("layer_norm_backward", *members, x, weight.float(), None, None, statistics, dy, residual, dx, parts)
    return dx, parts[0]


def _norm_members(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[int, ...]:
    return *x.shape, bits(eps), x.dtype == torch.bfloat16, dtype == torch.bfloat16


def gates(raw: Tensor, gaps: Tensor | None, cap: float, batch: int) -> tuple[Tensor, Tensor]:
    """Input gates and log forget gates (B, H, N) of pre-activations (B·N, 2 H), float32, the input gates first.

    gaps: (B, N), float32: how often a token's forget gate is applied. cap: 0 leaves pre-activations unbounded.
    """
    heads = raw.shape[1] // 2
    i, log_f = raw.new_empty(2, batch, heads, len(raw) // batch)
    call("gates_forward", batch, i.shape[2], heads, bits(cap), raw, gaps, i, log_f, None, None, False, 0, None)
    return i, log_f


def gates_backward(raw: Tensor, gaps: Tensor | None, cap: float, di: Tensor, dlog_f: Tensor, to: Tensor) -> None:
    """Writes the gradients of `raw` to `to` (B·N, ...), with zeros up to the next multiple of 16 columns."""
    batch, heads, num_tokens = di.shape
    call(
        "gates_backward", batch, num_tokens, heads, bits(cap), raw, gaps, None, None, di, dlog_f,
        to.dtype == torch.bfloat16, to.stride(0), to,
    )  # fmt: skip
