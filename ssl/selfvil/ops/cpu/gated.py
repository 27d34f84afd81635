"""The published layer by native kernels for CPUs, as one node of autograd: from the tokens to the sum with them.

With y = norm(x), s the factors of stochastic depth, and both halves of the up-projection, u, z = U y:

    c = SiLU(conv(u));   q, k = maps of c, v = a map of u;   i, f linear in c and u
    x + s · (D ((headnorm(mLSTM(q, k, v, i, f)) + skip ∘ c) ∘ SiLU(z)) + b)

See `selfvil.ops.cpu.layers` for dtypes, and for why this is one node. Shapes: B images, N tokens, C channels, E = 2 C.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.cpu.fused import (
    block_weights,
    conv_parameters,
    convolved,
    convolved_backward,
    gates_of,
    normed,
    normed_backward,
    single,
)
from selfvil.ops.cpu.layers import as_parameters, scaled
from selfvil.ops.cpu.mlstm import scan_of_maps, scan_of_maps_backward
from selfvil.ops.cpu.products import call, compute_dtype, layer_norm, layer_norm_backward, multiply, weight_gradients
from selfvil.ops.operators import custom_operator


def gated_layer(
    x: Tensor, scale: Tensor | None, gaps: Tensor | None, kept: Tensor | None, grid: tuple[int, int], *,
    norm: tuple[Tensor, Tensor | None, float], up: tuple[Tensor, Tensor | None], conv: tuple[Tensor, Tensor],
    projections: Sequence[tuple[Tensor, Tensor | None]], gates: tuple[Tensor, Tensor, Tensor, Tensor],
    head_norm: tuple[Tensor, Tensor | None, float], skip: Tensor, down: tuple[Tensor, Tensor | None], reverse: bool,
) -> Tensor:  # fmt: skip
    """The tokens x (B, N, C) plus the layer of their norm, in the dtype of x.

    Args:
        scale: factor of the layer for each image, (B,); None is 1.
        gaps: (B, N), how often the forget gate of a token is applied; None is once.
        kept: positions of the tokens on the grid, (B, N); None: all positions.
        grid: rows and columns of tokens.
        norm, head_norm: weight minus 1, bias and eps.
        up, down: weights (2 E, C) and (C, E), and biases.
        conv: weight (E, 1, 3, 3) and bias.
        projections: weights (E / 4, 4, 4) and biases of q, k and v.
        gates: weights (h, 3 E) for q, k and v of the input and of the forget gates, and biases (h,) of both.
        skip: (E,).
    """
    weights, biases = zip(*projections, strict=True)
    return _layer(
        x, scale, gaps, kept, *norm[:2], *up, *conv, *weights, *biases, *gates, *head_norm[:2], skip, *down,
        *grid, norm[2], head_norm[2], reverse, compute_dtype(x),
    )[0]  # fmt: skip


@custom_operator("selfvil::native_gated_layer")
def _layer(
    x: Tensor, scale: Tensor | None, gaps: Tensor | None, kept: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, conv: Tensor, conv_bias: Tensor, q: Tensor, k: Tensor,
    v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, i_weight: Tensor, f_weight: Tensor,
    i_bias: Tensor, f_bias: Tensor, head_weight: Tensor, head_bias: Tensor | None, skip: Tensor, down: Tensor,
    down_bias: Tensor | None, height: int, width: int, eps: float, head_eps: float, reverse: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The result, and for the backward pass y, its statistics, u and z side by side, the gates' weights for c and u, c,
    the forget gates' pre-activations, h, a, n and lim of the mLSTM, and the input of the down-projection."""
    rows, pairs = x.flatten(0, 1).contiguous(), dtype == torch.bfloat16
    y, statistics = layer_norm(rows, norm_weight, norm_bias, eps, dtype)
    both = y.new_empty(*x.shape[:2], len(up))
    multiply(y, [up], both.flatten(0, 1), pairs=pairs, transposed=True, bias=single(up_bias))
    u, z = both.chunk(2, dim=-1)
    c = convolved(u, conv, conv_bias, kept, (height, width), reverse, True)
    maps = (q, k, v, q_bias, k_bias, v_bias)
    gates = folded(i_weight, f_weight, i_bias, f_bias, maps)
    i, f = gates_of(c, u, *gates)
    log_f = F.logsigmoid(f)
    log_f = log_f if gaps is None else log_f * gaps.unsqueeze(1)
    h, *saved = scan_of_maps(c, u, [single(m) for m in maps], i, log_f, reverse)
    inner = normed(h, c, z, (head_weight, head_bias, skip), head_eps)
    out = torch.empty_like(rows)
    multiply(
        inner.flatten(0, 1), [down], out, pairs=pairs, transposed=True, bias=single(down_bias), residual=rows,
        scale=single(scale),
    )  # fmt: skip
    return [out.view(x.shape), y, statistics, both, *gates[:2], c, f, h, *saved, inner]


@_layer.register_fake
def _(
    x, scale, gaps, kept, norm_weight, norm_bias, up, up_bias, conv, conv_bias, q, k, v, q_bias, k_bias, v_bias,
    i_weight, f_weight, i_bias, f_bias, head_weight, head_bias, skip, down, down_bias, height, width, eps, head_eps,
    reverse, dtype,
):  # fmt: skip
    (batch, num_tokens, channels), inner, heads = x.shape, len(skip), len(i_bias)
    y = x.new_empty(batch * num_tokens, channels, dtype=dtype)
    statistics = x.new_empty(batch * num_tokens, 2, dtype=torch.float32)
    h = y.new_empty(batch, heads, num_tokens, inner // heads)
    of_tokens = [statistics.new_empty(batch, heads, num_tokens) for _ in range(4)]
    both, c, last = (y.new_empty(batch, num_tokens, size) for size in (len(up), inner, inner))
    gates = (statistics.new_empty(2 * heads, inner) for _ in range(2))
    return [
        x.new_empty(x.shape), y, statistics, both, *gates, c, of_tokens[0], h, *of_tokens[1:], last,
    ]  # fmt: skip


@custom_operator("selfvil::native_gated_layer_backward")
def _layer_backward(
    d_out: Tensor, x: Tensor, scale: Tensor | None, gaps: Tensor | None, kept: Tensor | None, norm_weight: Tensor,
    up: Tensor, conv: Tensor, conv_bias: Tensor, q_map: Tensor, k_map: Tensor, v_map: Tensor, q_bias: Tensor | None,
    k_bias: Tensor | None, v_bias: Tensor | None, i_weight: Tensor, f_weight: Tensor,
    head_weight: Tensor, head_bias: Tensor | None,
    skip: Tensor, down: Tensor, saved: Sequence[Tensor], height: int, width: int, eps: float, head_eps: float,
    reverse: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x; then, with `weights`, of the norm (2, C); of weight and bias of the up-projection; the sums of
    `conv_parameters`; of weights (3, E / 4, 4, 4) and biases (3, E) of q, k, v; of weights and biases of the gates;
    of the head norm and skip (3, E); of weight and bias of the down-projection."""
    y, statistics, both, c_gates, u_gates, c, f, h, a, row_sum, limit, inner = saved
    rows, pairs, grid = x.flatten(0, 1).contiguous(), y.dtype == torch.bfloat16, (height, width)
    d_rows, d = scaled(d_out, scale, x)
    d_inner, d_both = torch.empty_like(inner), torch.empty_like(both)
    (u, z), (du, dz) = both.chunk(2, dim=-1), d_both.chunk(2, dim=-1)
    multiply(d, [down], d_inner.flatten(0, 1), pairs=pairs)
    dh, dc, d_head = normed_backward(d_inner, h, c, z, (head_weight, head_bias, skip), head_eps, dz)
    assert dc is not None
    maps = (q_map, k_map, v_map, q_bias, k_bias, v_bias)
    singles = [single(m) for m in maps]
    di, dlog_f, d_maps = scan_of_maps_backward(dh, c, u, singles, (a, row_sum, limit), reverse, dc, du)
    df = torch.sigmoid(-f).mul_(dlog_f)
    df = df if gaps is None else df * gaps.unsqueeze(1)
    gates = torch.cat([di, df], dim=1).mT, c_gates, u_gates
    d_conv, d_gates = convolved_backward(dc, u, conv, conv_bias, kept, grid, reverse, True, du, True, gates)
    flat, dy = d_both.flatten(0, 1), torch.empty_like(y)
    multiply(flat, [up], dy, pairs=pairs)
    dx, d_norm = layer_norm_backward(dy, rows, statistics, norm_weight, d_rows, eps)
    if not weights:
        return [dx.view(x.shape)]
    d_gates_bias = torch.cat([di.sum((0, 2)), df.sum((0, 2))])
    of_maps = folded_backward(i_weight, f_weight, maps, d_gates, d_gates_bias, d_maps)
    return [
        dx.view(x.shape), d_norm.clone(), *weight_gradients(flat, y, pairs), d_conv, *of_maps, d_head,
        *weight_gradients(d, inner.flatten(0, 1), pairs),
    ]  # fmt: skip


@_layer_backward.register_fake
def _(
    d_out, x, scale, gaps, kept, norm_weight, up, conv, conv_bias, q_map, k_map, v_map, q_bias, k_bias, v_bias,
    i_weight, f_weight, head_weight, head_bias, skip, down, saved, height, width, eps, head_eps, reverse, weights,
):  # fmt: skip
    inner, channels, heads = len(skip), x.shape[2], len(i_weight)
    shapes = (
        (2, channels), up.shape, up.shape[:1], (10, inner), (3, inner // 4, 4, 4), (3, inner), i_weight.shape,
        f_weight.shape, (heads,), (heads,), (3, inner), down.shape, down.shape[:1],
    )  # fmt: skip
    return [x.new_empty(x.shape), *(x.new_empty(s, dtype=torch.float32) for s in (shapes if weights else ()))]


def _layer_setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of those, which would be tensors of zeros
    ctx.settings = inputs[25:30]
    ctx.save_for_backward(*inputs[:25], *output[1:])


def _layer_gradients(ctx: Any, d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, scale, gaps, kept, *parameters = saved[:25]
    norm_weight, _, up, _, conv, conv_bias, q, k, v, q_bias, k_bias, v_bias, i_weight, f_weight, *rest = parameters
    _, _, head_weight, head_bias, skip, down, _ = rest
    needed = any(ctx.needs_input_grad[4:25])
    dx, *found = _layer_backward(
        d_outputs[0], x, scale, gaps, kept, norm_weight, up, conv, conv_bias, q, k, v, q_bias, k_bias, v_bias, i_weight,
        f_weight, head_weight, head_bias, skip, down, saved[25:], *ctx.settings, needed,
    )  # fmt: skip
    gradients: Sequence[Tensor | None] = 21 * [None]
    if needed:
        d_norm, d_up, d_up_bias, d_conv, d_maps, d_map_biases, di_weight, df_weight, di_bias, df_bias, *rest = found
        d_head, d_down, d_down_bias = rest
        gradients = [
            *d_norm.unbind(), d_up, d_up_bias, *conv_parameters(d_conv, conv, conv_bias), *d_maps.unbind(),
            *d_map_biases.unbind(), di_weight, df_weight, di_bias, df_bias, *d_head.unbind(), d_down, d_down_bias,
        ]  # fmt: skip
    return dx, None, None, None, *as_parameters(gradients, parameters), *6 * [None]


_layer.register_autograd(_layer_gradients, setup_context=_layer_setup)


# --- weights of the gates --------------------------------------------------------------------------------------------

Maps = Sequence[Tensor | None]
"""Weights (E / 4, 4, 4) of q, k and v, and their biases (E,) or None."""


def folded(i_weight: Tensor, f_weight: Tensor, i_bias: Tensor, f_bias: Tensor, maps: Maps) -> tuple[Tensor, ...]:
    """The gates' weights for c and for u, (2 h, E), and their bias (2 h,): see `GatedScan.gate_weights`."""
    heads, channels = i_weight.shape[0], i_weight.shape[1] // 3
    c, u = (i_weight.new_empty(2 * heads, channels, dtype=torch.float32) for _ in range(2))
    bias = c.new_empty(2 * heads)
    parameters = [single(p) for p in (i_weight, f_weight, i_bias, f_bias, *maps)]
    call("fold_forward", heads, channels, *parameters, c, u, bias, *7 * [None])
    return c, u, bias


def folded_backward(
    i_weight: Tensor, f_weight: Tensor, maps: Maps, d_gates: Tensor, d_bias: Tensor, d_maps: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of weights (3, E / 4, 4, 4) and biases (3, E) of the maps, and of weights and biases of both gates.

    d_gates: of the gates' weights for c and u, (2, 2 h, E). d_maps: what the maps have from `projected_backward`.
    """
    heads, channels = i_weight.shape[0], i_weight.shape[1] // 3
    d_input, d_forget = (d_gates.new_empty(heads, 3 * channels) for _ in range(2))
    d_weights, d_biases = block_weights(d_maps).contiguous(), d_maps[:, 4].contiguous()
    parameters = [single(p) for p in (i_weight, f_weight, None, None, *maps)]
    call(
        "fold_backward", heads, channels, *parameters, None, None, None, d_gates[0], d_gates[1], d_bias,
        d_input, d_forget, d_weights, d_biases,
    )  # fmt: skip
    return d_weights, d_biases, d_input, d_forget, d_bias[:heads].clone(), d_bias[heads:].clone()
