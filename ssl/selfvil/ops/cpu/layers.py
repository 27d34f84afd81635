"""Parts of a block by native kernels for CPUs, each one node of autograd: from the tokens to the sum with them.

With y = norm(x) and s the factors of stochastic depth:

    mlp             x + s · (W2 GELU(W1 y + b1) + b2)
    mlstm_layer     x + s · (P (gate(O y) ∘ headnorm(mLSTM(q, k, v, i, f))) + b), with q, k, v, i, f linear in y

One node instead of ten to thirty saves the dispatch of each, and lets kernels write into one another's buffers: q, k, v
and the output gate are columns of one product, and so are their gradients. Results are those of the modules in
`selfvil.models` to rounding. Tokens are float32 or bfloat16; under autocast, tokens stay float32 and factors of
products are bfloat16. First derivatives only. Equal inputs give equal bits, for any number of threads.

Shapes: B images, N tokens, C channels, h heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfvil.ops.cpu.fused import normed, normed_backward, single
from selfvil.ops.cpu.mlstm import scan, scan_backward
from selfvil.ops.cpu.products import (
    compute_dtype,
    gates,
    gates_backward,
    layer_norm,
    layer_norm_backward,
    multiply,
    weight_gradients,
)
from selfvil.ops.operators import custom_operator

# --- MLP -------------------------------------------------------------------------------------------------------------


def mlp(
    x: Tensor, scale: Tensor | None, norm: tuple[Tensor, Tensor | None, float],
    first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None],
) -> Tensor:  # fmt: skip
    """The tokens x (B, N, C) plus the MLP of their norm, in the dtype of x.

    Args:
        scale: factor of the MLP for each image, (B,); None is 1.
        norm: weight minus 1 and bias (C,), and eps.
        first, second: weight and bias of the linear maps before and after GELU.
    """
    return _mlp(x, scale, *norm[:2], *first, *second, norm[2], compute_dtype(x), torch.is_grad_enabled())[0]


@custom_operator("selfvil::native_mlp")
def _mlp(
    x: Tensor, scale: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, eps: float, dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and for the backward pass y, its statistics and the units before GELU (empty if not `keep`)."""
    rows, pairs = x.flatten(0, 1).contiguous(), dtype == torch.bfloat16
    y, statistics = layer_norm(rows, norm_weight, norm_bias, eps, dtype)
    hidden = y.new_empty(len(rows), len(w1))
    before = torch.empty_like(hidden) if keep else y.new_empty(0)
    multiply(y, [w1], hidden, pairs=pairs, transposed=True, bias=single(b1), gelu=1, before=before if keep else None)
    out = torch.empty_like(rows)
    multiply(hidden, [w2], out, pairs=pairs, transposed=True, bias=single(b2), residual=rows, scale=single(scale))
    return out.view(x.shape), y, statistics, before


@_mlp.register_fake
def _(x, scale, norm_weight, norm_bias, w1, b1, w2, b2, eps, dtype, keep):
    rows = x.shape[0] * x.shape[1]
    return (
        x.new_empty(x.shape), x.new_empty(rows, x.shape[2], dtype=dtype), x.new_empty(rows, 2, dtype=torch.float32),
        x.new_empty((rows, len(w1)) if keep else 0, dtype=dtype),
    )  # fmt: skip


@custom_operator("selfvil::native_mlp_backward")
def _mlp_backward(
    d_out: Tensor, x: Tensor, scale: Tensor | None, norm_weight: Tensor, w1: Tensor, w2: Tensor,
    y: Tensor, statistics: Tensor, before: Tensor, eps: float, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x; of the norm's weight and bias as one (2, C); of w1, b1, w2 and b2 (empty if not `weights`)."""
    rows, pairs = x.flatten(0, 1).contiguous(), y.dtype == torch.bfloat16
    d_rows, d = scaled(d_out, scale, x)
    hidden, d_hidden = torch.empty_like(before), torch.empty_like(before)
    multiply(d, [w2], d_hidden, pairs=pairs, gelu=2, before=before, after=hidden)
    dy = torch.empty_like(y)
    multiply(d_hidden, [w1], dy, pairs=pairs)
    dx, d_norm = layer_norm_backward(dy, rows, statistics, norm_weight, d_rows, eps)
    if not weights:
        none = [d_norm.new_empty(0) for _ in range(4)]
        return dx.view(x.shape), d_norm.clone(), none[0], none[1], none[2], none[3]
    return (
        dx.view(x.shape), d_norm.clone(), *weight_gradients(d_hidden, y, pairs), *weight_gradients(d, hidden, pairs)
    )  # fmt: skip


@_mlp_backward.register_fake
def _(d_out, x, scale, norm_weight, w1, w2, y, statistics, before, eps, weights):
    shapes = (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]) if weights else 4 * (0,)
    of_parameters = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, x.shape[2]), *shapes))
    return x.new_empty(x.shape), *of_parameters


def _mlp_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, scale, norm_weight, norm_bias, w1, b1, w2, b2, ctx.eps, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of those, which would be tensors of zeros
    ctx.save_for_backward(x, scale, norm_weight, norm_bias, w1, b1, w2, b2, *output[1:])


def _mlp_gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, norm_weight, norm_bias, w1, b1, w2, b2, *saved = ctx.saved_tensors
    dx, d_norm, *rest = _mlp_backward(
        d_out, x, scale, norm_weight, w1, w2, *saved, ctx.eps, any(ctx.needs_input_grad[2:8])
    )
    needed = any(ctx.needs_input_grad[2:8])
    d_parameters: Sequence[Tensor | None] = [*d_norm.unbind(), *rest] if needed else 6 * [None]
    return dx, None, *as_parameters(d_parameters, (norm_weight, norm_bias, w1, b1, w2, b2)), None, None, None


_mlp.register_autograd(_mlp_gradients, setup_context=_mlp_setup)


# --- mLSTM of the block with an MLP ----------------------------------------------------------------------------------


def mlstm_layer(
    x: Tensor, scale: Tensor | None, gaps: Tensor | None, norm: tuple[Tensor, Tensor | None, float],
    qkv: tuple[Tensor, Tensor | None], gates: tuple[Tensor, Tensor], out_gate: tuple[Tensor, Tensor | None],
    head_norm: tuple[Tensor, Tensor | None, float], proj: tuple[Tensor, Tensor | None], *,
    cap: float | None, sigmoid: bool, reverse: bool,
) -> Tensor:  # fmt: skip
    """The tokens x (B, N, C) plus the gated and projected mLSTM of their norm, in the dtype of x.

    Args:
        scale: factor of the mLSTM for each image, (B,); None is 1.
        gaps: (B, N), how often the forget gate of a token is applied; None is once.
        norm, head_norm: weight minus 1 and bias (C,), and eps.
        qkv: weight (Q + Q + C, C) and bias.
        gates: weight (2 h, C) and bias; input gates come first.
        out_gate, proj: weight (C, C) and bias.
        cap: bound of the gates' pre-activations.
        sigmoid: the output gate is the sigmoid, else SiLU.
    """
    linear = (*qkv, *gates, *out_gate, *head_norm[:2], *proj)
    return _layer(
        x, scale, gaps, *norm[:2], *linear, norm[2], head_norm[2], cap or 0.0, sigmoid, reverse, compute_dtype(x)
    )[0]


@custom_operator("selfvil::native_mlstm_layer")
def _layer(
    x: Tensor, scale: Tensor | None, gaps: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None,
    qkv: Tensor, qkv_bias: Tensor | None, gate_weight: Tensor, gate_bias: Tensor, out_gate: Tensor,
    out_gate_bias: Tensor | None, head_weight: Tensor, head_bias: Tensor | None, proj: Tensor, proj_bias: Tensor | None,
    eps: float, head_eps: float, cap: float, sigmoid: bool, reverse: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and for the backward pass y, its statistics, the columns of the product (q, k, v, output gate), the
    gates' pre-activations, h, a, n and lim of the mLSTM, and the input of the last projection."""
    rows, pairs = x.flatten(0, 1).contiguous(), dtype == torch.bfloat16
    batch, num_tokens, width = x.shape
    y, statistics = layer_norm(rows, norm_weight, norm_bias, eps, dtype)
    columns, raw = _columns(x, qkv, gate_weight, dtype)
    bias = torch.cat([
        x.new_zeros(len(weight), dtype=torch.float32) if of is None else of.float()
        for weight, of in ((qkv, qkv_bias), (out_gate, out_gate_bias), (gate_weight, gate_bias))
    ])  # fmt: skip
    multiply(y, [qkv, out_gate, gate_weight], columns, pairs=pairs, transposed=True, bias=bias, tail=raw)
    i, log_f = gates(raw, gaps, cap, batch)
    q, k, v, gate = _split(columns.view(batch, num_tokens, -1), width, len(gate_weight) // 2)
    h, a, row_sum, limit = scan(q, k, v, i, log_f, reverse)
    inner = normed(h, None, gate, (head_weight, head_bias, None), head_eps, sigmoid)
    out = torch.empty_like(rows)
    multiply(
        inner.flatten(0, 1), [proj], out, pairs=pairs, transposed=True, bias=single(proj_bias), residual=rows,
        scale=single(scale),
    )  # fmt: skip
    return out.view(x.shape), y, statistics, columns, raw, h, a, row_sum, limit, inner


@_layer.register_fake
def _(
    x, scale, gaps, norm_weight, norm_bias, qkv, qkv_bias, gate_weight, gate_bias, out_gate, out_gate_bias, head_weight,
    head_bias, proj, proj_bias, eps, head_eps, cap, sigmoid, reverse, dtype,
):  # fmt: skip
    (batch, num_tokens, width), heads, rows = x.shape, len(gate_weight) // 2, x.shape[0] * x.shape[1]
    y, statistics = x.new_empty(rows, width, dtype=dtype), x.new_empty(rows, 2, dtype=torch.float32)
    h = y.new_empty(batch, heads, num_tokens, width // heads)
    of_tokens = (statistics.new_empty(batch, heads, num_tokens) for _ in range(3))
    columns, raw = _columns(x, qkv, gate_weight, dtype)
    return x.new_empty(x.shape), y, statistics, columns, raw, h, *of_tokens, y.new_empty(x.shape)


def _columns(x: Tensor, qkv: Tensor, gate_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised q, k, v and output gate of all tokens, side by side, and pre-activations of the gates."""
    rows = x.shape[0] * x.shape[1]
    columns = x.new_empty(rows, len(qkv) + x.shape[2], dtype=dtype)
    return columns, x.new_empty(rows, len(gate_weight), dtype=torch.float32)


def _split(columns: Tensor, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views q, k (B, h, N, Q / h), v (B, h, N, C / h) and the output gate (B, N, C) of columns (B, N, ...)."""
    of_q = (columns.shape[2] - 2 * width) // 2
    q, k, v, gate = columns.split([of_q, of_q, width, width], dim=2)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return q, k, v, gate


@custom_operator("selfvil::native_mlstm_layer_backward")
def _layer_backward(
    d_out: Tensor, x: Tensor, scale: Tensor | None, gaps: Tensor | None, norm_weight: Tensor, qkv: Tensor,
    gate_weight: Tensor, out_gate: Tensor, head_weight: Tensor, head_bias: Tensor | None, proj: Tensor,
    y: Tensor, statistics: Tensor, columns: Tensor, raw: Tensor, h: Tensor, a: Tensor, row_sum: Tensor, limit: Tensor,
    inner: Tensor, eps: float, head_eps: float, cap: float, sigmoid: bool, reverse: bool, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x; of the norm's weight and bias (2, C); of weights and biases of the first product; of the head
    norm's weight and bias (2, C); of weight and bias of the last projection. Without `weights`, some are empty."""
    (batch, num_tokens, width), heads, pairs = x.shape, len(gate_weight) // 2, y.dtype == torch.bfloat16
    rows = x.flatten(0, 1).contiguous()
    d_rows, d = scaled(d_out, scale, x)
    d_inner = torch.empty_like(inner)
    multiply(d, [proj], d_inner.view(len(rows), width), pairs=pairs)
    total = columns.shape[1]
    d_columns = columns.new_empty(len(rows), total + -(-2 * heads // 16) * 16)
    q, k, v, gate = _split(columns.view(batch, num_tokens, -1), width, heads)
    dq, dk, dv, d_gate = _split(d_columns.view(batch, num_tokens, -1)[..., :total], width, heads)
    dh, _, d_head = normed_backward(d_inner, h, None, gate, (head_weight, head_bias, None), head_eps, d_gate, sigmoid)
    di, dlog_f = scan_backward(dh, (q, k, v), (a, row_sum, limit), reverse, (dq, dk, dv))
    gates_backward(raw, gaps, cap, di, dlog_f, d_columns[:, total:])
    d_used, dy = d_columns[:, : total + 2 * heads], torch.empty_like(y)
    multiply(d_used, [qkv, out_gate, gate_weight], dy, pairs=pairs)
    dx, d_norm = layer_norm_backward(dy, rows, statistics, norm_weight, d_rows, eps)
    results = dx.view(x.shape), d_norm.clone()
    if not weights:
        return *results, *(d_norm.new_empty(0) for _ in range(5))  # type: ignore[return-value]  # as many
    dw, db = weight_gradients(d_used, y, pairs)
    return *results, dw, db, d_head[:2].clone(), *weight_gradients(d, inner.view(len(rows), width), pairs)


@_layer_backward.register_fake
def _(
    d_out, x, scale, gaps, norm_weight, qkv, gate_weight, out_gate, head_weight, head_bias, proj,
    y, statistics, columns, raw, h, a, row_sum, limit, inner, eps, head_eps, cap, sigmoid, reverse, weights,
):  # fmt: skip
    width, outputs = x.shape[2], len(qkv) + len(out_gate) + len(gate_weight)
    shapes = ((outputs, width), (outputs,), (2, width), (width, width), (width,)) if weights else 5 * (0,)
    of_parameters = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, width), *shapes))
    return x.new_empty(x.shape), *of_parameters


def _layer_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, eps, head_eps, cap, sigmoid, reverse, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of those, which would be tensors of zeros
    ctx.settings = eps, head_eps, cap, sigmoid, reverse
    ctx.save_for_backward(*tensors, *output[1:])


def _layer_gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, gaps, *parameters = ctx.saved_tensors[:15]
    norm_weight, _, qkv, _, gate_weight, _, out_gate, _, head_weight, head_bias, proj, _ = parameters
    needed = any(ctx.needs_input_grad[3:15])
    dx, d_norm, dw, db, d_head, d_proj, d_proj_bias = _layer_backward(
        d_out, x, scale, gaps, norm_weight, qkv, gate_weight, out_gate, head_weight, head_bias, proj,
        *ctx.saved_tensors[15:], *ctx.settings, needed,
    )  # fmt: skip
    found: Sequence[Tensor | None] = 12 * [None]
    if needed:
        sizes = len(qkv), len(out_gate), len(gate_weight)
        (of_qkv, of_out, of_gates), (qkv_b, out_b, gates_b) = dw.split(sizes), db.split(sizes)
        found = [
            *d_norm.unbind(), of_qkv, qkv_b, of_gates, gates_b, of_out, out_b, *d_head.unbind(), d_proj, d_proj_bias,
        ]  # fmt: skip
    return dx, None, None, *as_parameters(found, parameters), *6 * [None]


_layer.register_autograd(_layer_gradients, setup_context=_layer_setup)


# --- common ----------------------------------------------------------------------------------------------------------


def scaled(d_out: Tensor, scale: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the result as rows (B·N, C) in the dtype of x, and that of what was multiplied by `scale`."""
    d_out = d_out.to(x.dtype).contiguous()
    d = d_out if scale is None else d_out * scale.view(-1, 1, 1).to(x.dtype)
    return d_out.flatten(0, 1), d.flatten(0, 1)


def as_parameters(gradients: Sequence[Tensor | None], parameters: Any) -> list[Tensor | None]:
    """Gradients in the dtypes of their parameters; None for parameters that do not exist."""
    return [
        None if of is None or gradient is None else gradient.to(of.dtype)
        for gradient, of in zip(gradients, parameters, strict=True)
    ]
