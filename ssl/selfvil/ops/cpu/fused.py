"""The operations around the mLSTM by native kernels for CPUs: each loads and stores a tensor once.

The same three functions as in `selfvil.ops.fused`, whose docstrings describe arguments and results. The convolution
also runs at the places of kept tokens, without a scatter to the grid. Sums are float32 and results are rounded once;
sums for the gradients of parameters have a fixed order, so that equal inputs give equal bits, for any number of
threads. First derivatives only.

Shapes: B images, N tokens, E channels, H heads (an even number) of width D = E / H, a multiple of 16.
"""

import math
import os
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfvil.ops.cpu.build import available, kernels
from selfvil.ops.cpu.mlstm import DTYPES, contiguous_channels
from selfvil.ops.exporting import exporting
from selfvil.ops.fused import SWITCH, autocast
from selfvil.ops.operators import custom_operator

SPAN = 64
"""Tokens whose sums for parameters' gradients are one part, as in neighbours.cpp."""


def applies(x: Tensor, num_heads: int) -> bool:
    """Whether these operators support x (B, N, E): on a CPU, in float32 or bfloat16, and in heads of their widths."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.shape[-1] % (16 * num_heads) == 0
        and num_heads % 2 == 0
        and os.environ.get(SWITCH) != "0"
        and not exporting()
        and available()
    )


def _call(function: str, x: Tensor, *members: int | Tensor | None) -> None:
    """Call a kernel with the dtype of x and the members of its structure in neighbours.cpp."""
    loaded = kernels()
    if loaded is None or x.dtype not in DTYPES:
        raise ValueError(f"the CPU kernel {function} does not support {x.dtype}, or could not be built (see the log)")
    loaded.call(function, x.dtype == torch.bfloat16, *members)


def single(x: Tensor | None) -> Tensor | None:
    """x in float32 and contiguous."""
    return None if x is None else x.float().contiguous()


# --- convolution and SiLU --------------------------------------------------------------------------------------------


def conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], reverse: bool, kept: Tensor | None = None
) -> Tensor:
    """See `selfvil.ops.fused.conv_silu`. kept: positions (B, N) of the tokens on the grid, with zeros at all others."""
    return _conv(autocast(x), weight, bias, kept, *grid, reverse, True)


def add_conv(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
    """x (B, N, E) plus its depthwise 3 × 3 convolution, in the dtype of x; arguments as for `conv_silu`."""
    return _conv(x, weight, bias, kept, *grid, False, False)


@custom_operator("selfvil::native_conv")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, height: int, width: int, reverse: bool, silu: bool
) -> Tensor:
    return convolved(x, weight, bias, kept, (height, width), reverse, silu)


@_conv.register_fake
def _(x, weight, bias, kept, height, width, reverse, silu):
    return x.new_empty(x.shape)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, grid: tuple[int, int], reverse: bool, silu: bool
) -> Tensor:
    """SiLU(conv(x)), or x + conv(x) without `silu`."""
    x = contiguous_channels(x)
    y = x.new_empty(x.shape)
    members = _conv_members(x, weight, bias, kept, grid, reverse, silu, None, None)
    _call("conv_forward", x, *members, y, None, False, None, 0, *4 * [None])
    return y


@custom_operator("selfvil::native_conv_backward")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, height: int, width: int, reverse: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the weights and the bias as one (10, E)."""
    dx = x.new_empty(x.shape)
    return dx, convolved_backward(dy, x, weight, bias, kept, (height, width), reverse, silu, dx, False)[0]


@_conv_backward.register_fake
def _(dy, x, weight, bias, kept, height, width, reverse, silu):
    return x.new_empty(x.shape), x.new_empty(10, x.shape[2], dtype=torch.float32)


def convolved_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, grid: tuple[int, int], reverse: bool,
    silu: bool, dx: Tensor, add: bool, gates: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the weights and the bias as one (10, E). That of x is written to dx, or added to it.

    gates: gradients (B, N, G) of linear maps of the result and of x, and the maps' weights (G, E) for both, in float32.
    They add to the gradients of the result and of x. Those of their weights are (2, G, E), empty without gates.
    """
    x, dy = contiguous_channels(x), dy.contiguous()
    of_gates = (None, None, None) if gates is None else [gate.contiguous() for gate in gates]
    count = 0 if gates is None else gates[0].shape[2]
    batch, _, channels = x.shape
    sums, gate_sums = (x.new_zeros(max(1, batch), *rows, channels, dtype=torch.float32) for rows in ((10,), (2, count)))
    members = _conv_members(x, weight, bias, kept, grid, reverse, silu, dx, dy)
    _call("conv_backward", x, *members, None, dx, add, sums, count, *of_gates, gate_sums)
    return sums[0].clone(), gate_sums[0].clone()


def _conv_members(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, grid: tuple[int, int], reverse: bool, silu: bool,
    dx: Tensor | None, dy: Tensor | None,
) -> tuple[int | Tensor | None, ...]:  # fmt: skip
    kept = None if kept is None else kept.contiguous()
    strides = (0, 0) if dx is None else dx.stride()[:2]
    return (
        *x.shape[:2], *grid, x.shape[2], reverse, silu, *x.stride()[:2], *strides, kept, x, dy,
        single(weight.flatten(1).mT), single(bias),
    )  # fmt: skip


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.height, ctx.width, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, kept = ctx.saved_tensors
    dx, sums = _conv_backward(dy, x, weight, bias, kept, ctx.height, ctx.width, ctx.reverse, ctx.silu)
    return dx, *conv_parameters(sums, weight, bias), None, None, None, None, None


def conv_parameters(sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from their sums (10, E)."""
    return sums[:9].mT.reshape(weight.shape).to(weight.dtype), sums[9].to(bias.dtype)


_conv.register_autograd(_conv_gradients, setup_context=_conv_setup)


# --- q, k, v and the gates -------------------------------------------------------------------------------------------


def project(
    c: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `selfvil.ops.fused.project`. The blocks of the weights are 4 wide."""
    return _project(autocast(c), autocast(x), *weights, *biases, c_gates, x_gates, gates_bias)


@custom_operator("selfvil::native_project")
def _project(
    c: Tensor, x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return projected(c, x, (q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, c_gates, x_gates, gates_bias))


def projected(
    c: Tensor, x: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, i and f. parameters: weights and biases of q, k and v, gates' weights for c and x, and bias."""
    gates_bias = parameters[8]
    assert gates_bias is not None
    outputs = _projected(c, gates_bias)
    _project_into(outputs, c, x, parameters, len(gates_bias))
    return outputs


def gates_of(c: Tensor, x: Tensor, c_gates: Tensor, x_gates: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """i and f alone."""
    i, f = (c.new_empty(c.shape[0], len(bias) // 2, c.shape[1], dtype=torch.float32) for _ in range(2))
    _project_into((None, None, None, i, f), c, x, (*6 * [None], c_gates, x_gates, bias), len(bias))
    return i, f


def _project_into(
    outputs: Sequence[Tensor | None], c: Tensor, x: Tensor, parameters: Sequence[Tensor | None], gates: int
) -> None:
    c, x, parameters = contiguous_channels(c), contiguous_channels(x), [single(p) for p in parameters]
    sizes = _project_sizes(c, x, gates)
    _call("project_forward", c, *sizes, c, x, *parameters, *outputs, *8 * [None])


@_project.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, c_gates, x_gates, gates_bias):
    return _projected(c, gates_bias)


@custom_operator("selfvil::native_project_backward")
def _project_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, di: Tensor, df: Tensor, c: Tensor, x: Tensor,
    q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, c_gates: Tensor, x_gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of c and x; of the weights by column of a block, and biases, of q, k and v (3, 5, E); of the gates'
    weights (2, 2 H, E)."""
    c, x = contiguous_channels(c), contiguous_channels(x)
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    weights, gradients = (
        (q_weight, k_weight, v_weight),
        [dy.contiguous() for dy in (dq, dk, dv, di.float(), df.float())],
    )
    width, gates, parts = c.shape[2], len(c_gates), math.ceil(c.shape[0] * c.shape[1] / SPAN)
    sums = c.new_empty(max(parts, 1) * (15 + 2 * gates) * width, dtype=torch.float32)
    _call(
        "project_backward", c, *_project_sizes(c, x, gates), c, x, *(single(p) for p in weights),
        None, None, None, single(c_gates), single(x_gates), None, *5 * [None], *gradients, dc, dx, sums,
    )  # fmt: skip
    if not parts:
        sums.zero_()
    of_weights = sums[: 15 * width].view(3, 5, width)
    of_gates = sums[15 * max(parts, 1) * width :][: 2 * gates * width].view(2, gates, width)
    return dc, dx, of_weights.clone(), of_gates.clone()


@_project_backward.register_fake
def _(dq, dk, dv, di, df, c, x, q_weight, k_weight, v_weight, c_gates, x_gates):
    sums = (c.new_empty(shape, dtype=torch.float32) for shape in ((3, 5, c.shape[2]), (2, *c_gates.shape)))
    return c.new_empty(c.shape), x.new_empty(x.shape), *sums


def _project_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    c, x, *weights = inputs[:5]
    ctx.save_for_backward(c, x, *weights, *inputs[8:10])
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in inputs[5:8]]
    ctx.gates_bias_dtype = inputs[10].dtype


def _project_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    c, x, *weights, c_gates, x_gates = ctx.saved_tensors
    di, df = gradients[3:]
    dc, dx, sums, d_gates = _project_backward(*gradients, c, x, *weights, c_gates, x_gates)
    return (
        dc, dx, *(dw.to(w.dtype) for dw, w in zip(block_weights(sums), weights, strict=True)),
        *(None if dtype is None else db.to(dtype) for db, dtype in zip(sums[:, 4], ctx.bias_dtypes, strict=True)),
        d_gates[0].to(c_gates.dtype), d_gates[1].to(x_gates.dtype),
        torch.cat([di.sum((0, 2)), df.sum((0, 2))]).to(ctx.gates_bias_dtype),
    )  # fmt: skip


def block_weights(sums: Tensor) -> Tensor:
    """The weights' part of (3, 4 columns and bias, E) as blocks of rows and columns, (3, E / 4, 4, 4)."""
    return sums[:, :4].unflatten(2, (-1, 4)).permute(0, 2, 3, 1)


_project.register_autograd(_project_gradients, setup_context=_project_setup)


def _projected(c: Tensor, gates_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised q, k, v, i and f."""
    (batch, num_tokens, width), heads = c.shape, len(gates_bias) // 2
    q, k, v = (c.new_empty(batch, heads, num_tokens, width // heads) for _ in range(3))
    i, f = (c.new_empty(batch, heads, num_tokens, dtype=torch.float32) for _ in range(2))
    return q, k, v, i, f


def _project_sizes(c: Tensor, x: Tensor, gates: int) -> tuple[int, ...]:
    return (*c.shape, gates // 2, *c.stride()[:2], *x.stride()[:2])


# --- norm, skip and gate ---------------------------------------------------------------------------------------------


def norm_skip_gate(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """See `selfvil.ops.fused.norm_skip_gate`. The result is in the dtype of h."""
    return _norm(autocast(h), autocast(c), None if gate is None else autocast(gate), weight, bias, skip, eps)


@custom_operator("selfvil::native_norm_skip_gate")
def _norm(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    return normed(h, c, gate, (weight, bias, skip), eps)


def normed(
    h: Tensor, c: Tensor | None, gate: Tensor | None, parameters: Sequence[Tensor | None], eps: float,
    sigmoid: bool = False,
) -> Tensor:  # fmt: skip
    """See `norm_skip_gate`; parameters: weight, bias, skip. c may be None, and the gate the sigmoid."""
    h, c, gate = (
        contiguous_channels(h),
        None if c is None else contiguous_channels(c),
        None if gate is None else contiguous_channels(gate),
    )
    y = h.new_empty(h.shape[0], h.shape[2], h.shape[1] * h.shape[3])
    sizes = _norm_sizes(h, c, gate, None, sigmoid, eps)
    _call("norm_forward", h, *sizes, h, c, gate, None, *(single(p) for p in parameters), y, *4 * [None])
    return y


@_norm.register_fake
def _(h, c, gate, weight, bias, skip, eps):
    return c.new_empty(c.shape)


@custom_operator("selfvil::native_norm_skip_gate_backward")
def _norm_backward(
    dy: Tensor, h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, c and gate (empty without a gate), and of weight, bias and skip as one (3, E)."""
    dgate = c.new_empty(0 if gate is None else c.shape)
    dh, dc, sums = normed_backward(dy, h, c, gate, (weight, bias, skip), eps, dgate)
    assert dc is not None
    return dh, dc, dgate, sums


def normed_backward(
    dy: Tensor, h: Tensor, c: Tensor | None, gate: Tensor | None, parameters: Sequence[Tensor | None], eps: float,
    dgate: Tensor, sigmoid: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of h, of c, and of weight, bias and skip as one (3, E). That of the gate is written to dgate."""
    dy, h = dy.contiguous(), contiguous_channels(h)
    c, gate = None if c is None else contiguous_channels(c), None if gate is None else contiguous_channels(gate)
    dh, dc = h.new_empty(h.shape), None if c is None else c.new_empty(c.shape)
    (batch, num_tokens, width), target = dy.shape, None if gate is None else dgate
    sums = h.new_zeros(max(1, batch * math.ceil(num_tokens / SPAN)), 3, width, dtype=torch.float32)
    _call(
        "norm_backward", h, *_norm_sizes(h, c, gate, target, sigmoid, eps), h, c, gate, dy,
        *(single(p) for p in parameters), None, dh, dc, target, sums,
    )  # fmt: skip
    return dh, dc, sums[0].clone()


@_norm_backward.register_fake
def _(dy, h, c, gate, weight, bias, skip, eps):
    dgate = c.new_empty(0) if gate is None else c.new_empty(c.shape)
    return h.new_empty(h.shape), c.new_empty(c.shape), dgate, c.new_empty(3, c.shape[2], dtype=torch.float32)


def _norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, c, gate, weight, bias, skip = ctx.saved_tensors
    dh, dc, dgate, sums = _norm_backward(dy, h, c, gate, weight, bias, skip, ctx.eps)
    d_weight, d_bias, d_skip = sums.unbind()
    return (
        dh, dc, None if gate is None else dgate,
        d_weight.to(weight.dtype), None if bias is None else d_bias.to(bias.dtype), d_skip.to(skip.dtype), None,
    )  # fmt: skip


_norm.register_autograd(_norm_gradients, setup_context=_norm_setup)


def _norm_sizes(
    h: Tensor, c: Tensor | None, gate: Tensor | None, dgate: Tensor | None, sigmoid: bool, eps: float
) -> tuple[int, ...]:
    batch, heads, num_tokens, width = h.shape
    strides = (stride for x in (c, gate, dgate) for stride in ((0, 0) if x is None else x.stride()[:2]))
    return batch, heads, num_tokens, width, *h.stride()[:3], *strides, sigmoid, bits(eps)


def bits(x: float) -> int:
    """The bits of a member that is a double."""
    return struct.unpack("q", struct.pack("d", x))[0]
