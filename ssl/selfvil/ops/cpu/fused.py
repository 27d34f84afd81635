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
from selfvil.ops.exporting import exporting
from selfvil.ops.fused import SWITCH, autocast

DTYPES = (torch.float32, torch.bfloat16)

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
    values = (m.data_ptr() if isinstance(m, Tensor) else 0 if m is None else int(m) for m in members)
    loaded.call(function, x.dtype == torch.bfloat16, *values)


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _single(x: Tensor | None) -> Tensor | None:
    """A parameter in float32 and contiguous."""
    return None if x is None else x.float().contiguous()


# --- convolution and SiLU --------------------------------------------------------------------------------------------


def conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], reverse: bool, kept: Tensor | None = None
) -> Tensor:
    """See `selfvil.ops.fused.conv_silu`. kept: positions (B, N) of the tokens on the grid, with zeros at all others."""
    return _conv(autocast(x), weight, bias, kept, *grid, reverse)


@torch.library.custom_op("selfvil::native_conv_silu", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, height: int, width: int, reverse: bool
) -> Tensor:
    x = _rows(x)
    y = x.new_empty(x.shape)
    members = _conv_members(x, weight, bias, kept, (height, width), reverse)
    _call("conv_forward", x, *members[:-2], None, *members[-2:], y, None, None)
    return y


@_conv.register_fake
def _(x, weight, bias, kept, height, width, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("selfvil::native_conv_silu_backward", mutates_args=())
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, height: int, width: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weights and the bias as one (10, E)."""
    x, dy = _rows(x), dy.contiguous()
    dx = x.new_empty(x.shape)
    sums = x.new_zeros(max(1, x.shape[0]), 10, x.shape[2], dtype=torch.float32)
    members = _conv_members(x, weight, bias, kept, (height, width), reverse)
    _call("conv_backward", x, *members[:-2], dy, *members[-2:], None, dx, sums)
    return dx, sums[0].clone()


@_conv_backward.register_fake
def _(dy, x, weight, bias, kept, height, width, reverse):
    return x.new_empty(x.shape), x.new_empty(10, x.shape[2], dtype=torch.float32)


def _conv_members(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, grid: tuple[int, int], reverse: bool
) -> tuple[int | Tensor | None, ...]:
    kept = None if kept is None else kept.contiguous()
    return (*x.shape[:2], *grid, x.shape[2], reverse, *x.stride()[:2], kept, x, _single(weight), _single(bias))


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.height, ctx.width, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, kept = ctx.saved_tensors
    dx, sums = _conv_backward(dy, x, weight, bias, kept, ctx.height, ctx.width, ctx.reverse)
    d_weight = sums[:9].mT.reshape(weight.shape).to(weight.dtype)
    return dx, d_weight, sums[9].to(bias.dtype), None, None, None, None


_conv.register_autograd(_conv_gradients, setup_context=_conv_setup)


# --- q, k, v and the gates -------------------------------------------------------------------------------------------


def project(
    c: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `selfvil.ops.fused.project`. The blocks of the weights are 4 wide."""
    return _project(autocast(c), autocast(x), *weights, *biases, c_gates, x_gates, gates_bias)


@torch.library.custom_op("selfvil::native_project", mutates_args=())
def _project(
    c: Tensor, x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c, x = _rows(c), _rows(x)
    outputs = _projected(c, gates_bias)
    parameters = [
        _single(p) for p in (q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, c_gates, x_gates, gates_bias)
    ]
    _call("project_forward", c, *_project_sizes(c, x, c_gates), c, x, *parameters, *outputs, *8 * [None])
    return outputs


@_project.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, c_gates, x_gates, gates_bias):
    return _projected(c, gates_bias)


@torch.library.custom_op("selfvil::native_project_backward", mutates_args=())
def _project_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, di: Tensor, df: Tensor, c: Tensor, x: Tensor,
    q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, c_gates: Tensor, x_gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of c and x; of the weights by column of a block, and biases, of q, k and v (3, 5, E); of the gates'
    weights (2, 2 H, E)."""
    c, x = _rows(c), _rows(x)
    gradients = [dy.contiguous() for dy in (dq, dk, dv, di.float(), df.float())]
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    width, gates, parts = c.shape[2], len(c_gates), c.shape[0] * math.ceil(c.shape[1] / SPAN)
    sums = c.new_empty(max(parts, 1) * (15 + 2 * gates) * width, dtype=torch.float32)
    parameters = [_single(p) for p in (q_weight, k_weight, v_weight)]
    gate_weights = _single(c_gates), _single(x_gates)
    _call(
        "project_backward", c, *_project_sizes(c, x, c_gates), c, x, *parameters, None, None, None, *gate_weights, None,
        *5 * [None], *gradients, dc, dx, sums,
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
    # (3, 4 columns, E / 4 blocks, 4 rows) to blocks of rows and columns
    d_weights = sums[:, :4].unflatten(2, (-1, 4)).permute(0, 2, 3, 1)
    return (
        dc, dx, *(dw.to(w.dtype) for dw, w in zip(d_weights, weights, strict=True)),
        *(None if dtype is None else db.to(dtype) for db, dtype in zip(sums[:, 4], ctx.bias_dtypes, strict=True)),
        d_gates[0].to(c_gates.dtype), d_gates[1].to(x_gates.dtype),
        torch.cat([di.sum((0, 2)), df.sum((0, 2))]).to(ctx.gates_bias_dtype),
    )  # fmt: skip


_project.register_autograd(_project_gradients, setup_context=_project_setup)


def _projected(c: Tensor, gates_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised q, k, v, i and f."""
    (batch, num_tokens, width), heads = c.shape, len(gates_bias) // 2
    q, k, v = (c.new_empty(batch, heads, num_tokens, width // heads) for _ in range(3))
    i, f = (c.new_empty(batch, heads, num_tokens, dtype=torch.float32) for _ in range(2))
    return q, k, v, i, f


def _project_sizes(c: Tensor, x: Tensor, gates: Tensor) -> tuple[int, ...]:
    return (*c.shape, len(gates) // 2, *c.stride()[:2], *x.stride()[:2])


# --- norm, skip and gate ---------------------------------------------------------------------------------------------


def norm_skip_gate(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """See `selfvil.ops.fused.norm_skip_gate`. The result is in the dtype of h."""
    return _norm(autocast(h), autocast(c), None if gate is None else autocast(gate), weight, bias, skip, eps)


@torch.library.custom_op("selfvil::native_norm_skip_gate", mutates_args=())
def _norm(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    h, c, gate = _rows(h), _rows(c), None if gate is None else _rows(gate)
    y = c.new_empty(c.shape)
    parameters = [_single(p) for p in (weight, bias, skip)]
    _call("norm_forward", h, *_norm_sizes(h, c, gate, eps), h, c, gate, None, *parameters, y, *4 * [None])
    return y


@_norm.register_fake
def _(h, c, gate, weight, bias, skip, eps):
    return c.new_empty(c.shape)


@torch.library.custom_op("selfvil::native_norm_skip_gate_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, c and gate (empty without a gate), and of weight, bias and skip as one (3, E)."""
    dy, h, c, gate = dy.contiguous(), _rows(h), _rows(c), None if gate is None else _rows(gate)
    dh, dc, dgate = h.new_empty(h.shape), c.new_empty(c.shape), c.new_empty(0 if gate is None else c.shape)
    sums = c.new_zeros(max(1, c.shape[0] * math.ceil(c.shape[1] / SPAN)), 3, c.shape[2], dtype=torch.float32)
    parameters = [_single(p) for p in (weight, bias, skip)]
    _call(
        "norm_backward", h, *_norm_sizes(h, c, gate, eps), h, c, gate, dy, *parameters,
        None, dh, dc, None if gate is None else dgate, sums,
    )  # fmt: skip
    return dh, dc, dgate, sums[0].clone()


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


def _norm_sizes(h: Tensor, c: Tensor, gate: Tensor | None, eps: float) -> tuple[int, ...]:
    batch, heads, num_tokens, width = h.shape
    (bits,) = struct.unpack("q", struct.pack("d", eps))
    strides = (0, 0) if gate is None else gate.stride()[:2]
    return batch, heads, num_tokens, width, *h.stride()[:3], *c.stride()[:2], *strides, bits
