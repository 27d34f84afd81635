"""The operations around the mLSTM in a layer, fused in Triton for GPUs: each kernel reads and writes a tensor once.

Memory bandwidth limits these operations, and plain torch writes and reads each intermediate result. `models.layers` has
the plain operations, which these operators equal to rounding: they sum in float32, and round their results once.
Parameters are loaded in their own dtype, whatever that of the tokens. Their gradients are summed over fixed spans of
tokens, and these sums are added at the end, so that equal inputs give equal bits. First derivatives only.

Memory traffic below is counted in tensors of the size of (B, N, E), one for each read or write by a kernel, which is
2 B·N·E bytes in bfloat16. It is not measured.

For tests, the kernels run on a CPU in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported.

Shapes: B images, N tokens, E channels, H heads of width D = E / H.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfvil.ops import guard
from selfvil.ops.exporting import exporting
from selfvil.ops.operators import custom_operator
from selfvil.ops.triton_mlstm import INSTALLED, _precision

SWITCH = "SELFVIL_FUSED"
"""Environment variable: 0 uses plain torch for all operations."""


class FusedConfig(NamedTuple):
    """Launch configuration of a kernel: tokens and channels of a block (0: those of a head), tokens that one program
    sums over, warps, and pipeline stages. Not tuned; the compiler reports that the kernels fit an H200."""

    tokens: int
    channels: int
    span: int
    warps: int
    stages: int


CONV = FusedConfig(tokens=16, channels=64, span=256, warps=4, stages=1)
PROJECT = FusedConfig(tokens=32, channels=32, span=0, warps=4, stages=2)
PROJECT_BACKWARD = FusedConfig(tokens=16, channels=32, span=512, warps=4, stages=2)
NORM = FusedConfig(tokens=8, channels=0, span=64, warps=8, stages=1)


Placed = tuple[Tensor, Tensor]
"""Where tokens are that do not fill their grid: places (B, N), and the token at each place (B, places), -1 for none."""


def applies(x: Tensor) -> bool:
    """Whether the operators of a layer support x: on a GPU, in at most float32, with Triton installed, and if `guard`
    finds no error. In Triton's interpreter also on a CPU and in float64."""
    if not _supports(x):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    operators = (conv_silu, project, norm_skip_gate)
    return _interpreted() or guard.layer_agrees(operators, x.device, dtype, x.shape[-1])


def adds_conv(x: Tensor) -> bool:
    """The same for `add_conv`, whose x is not converted under autocast."""
    return _supports(x) and (_interpreted() or guard.conv_agrees(add_conv, x.device, x.dtype, x.shape[-1]))


def _supports(x: Tensor) -> bool:
    if not INSTALLED or os.environ.get(SWITCH) == "0" or exporting():
        return False
    if _interpreted():
        return x.device.type in ("cpu", "cuda")
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _interpreted() -> bool:
    return bool(os.environ.get("TRITON_INTERPRET"))


def conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], reverse: bool, placed: Placed | None = None
) -> Tensor:
    """SiLU of the depthwise 3 × 3 convolution of tokens on a grid, (B, N, E) to the same shape.

    The forward pass moves 2 tensors instead of 4, or instead of 6 and three grids where tokens do not fill their grid.
    The backward pass moves 5 instead of 8, or of 7 and five grids: 3 for the gradient of the convolution, which is
    recomputed, and 2 for that of x. The convolution without SiLU is not stored.

    Args:
        x: (B, N, E), which need not be contiguous.
        weight, bias: (E, 1, 3, 3), rotated by 180° if `reverse`, and (E,).
        grid: rows and columns.
        placed: where the tokens are on the grid, with zeros at all other places; None if they fill it in order.
    """
    return _conv(autocast(x), weight, bias, *(placed or (None, None)), *grid, reverse, True)


def add_conv(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], placed: Placed | None = None) -> Tensor:
    """x (B, N, E) plus its depthwise 3 × 3 convolution, in the dtype of x; arguments as for `conv_silu`.

    The forward pass moves 2 tensors instead of 5. The backward pass moves 4 instead of 7: 2 for the gradient of x, and
    2 for the sums of the parameters' gradients.
    """
    return _conv(x, weight, bias, *(placed or (None, None)), *grid, False, False)


@custom_operator("selfvil::conv_silu")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, places: Tensor | None, token_at: Tensor | None, height: int, width: int,
    reverse: bool, silu: bool,
) -> Tensor:  # fmt: skip
    """SiLU(conv(x)), or x + conv(x) without `silu`."""
    return _convolve(_rows(x), weight, bias, places, token_at, (height, width), reverse, silu, not silu)


@_conv.register_fake
def _(x, weight, bias, places, token_at, height, width, reverse, silu):
    return x.new_empty(x.shape)


@custom_operator("selfvil::conv_silu_backward")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, places: Tensor | None, token_at: Tensor | None, height: int,
    width: int, reverse: bool, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the weights and the bias as one (10, E)."""
    dy, x = dy.contiguous(), _rows(x)
    d_conv = x.new_empty(x.shape) if silu else dy
    spans = math.ceil(x.shape[:2].numel() / CONV.span)
    sums = _sums(x, spans, 10, x.shape[2])
    _launch(
        "conv_backward", spans * math.ceil(x.shape[2] / CONV.channels), CONV,
        dy, x, weight.contiguous(), bias, *_place_arguments(x, places, token_at), d_conv, sums,
        *_conv_sizes(x, (height, width)),
        SPAN=CONV.span, SILU=silu, REVERSE=reverse, PLACED=places is not None, **_conv_constants(x),
    )  # fmt: skip
    dx = _convolve(d_conv, weight, None, places, token_at, (height, width), not reverse, False, not silu)
    return dx, sums.sum(0)


@_conv_backward.register_fake
def _(dy, x, weight, bias, places, token_at, height, width, reverse, silu):
    return x.new_empty(x.shape), _sums(x, 10, x.shape[2])


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.height, ctx.width, ctx.reverse, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *placed = ctx.saved_tensors  # once: with checkpointing, each access recomputes them
    dx, sums = _conv_backward(dy, x, weight, bias, *placed, ctx.height, ctx.width, ctx.reverse, ctx.silu)
    return dx, sums[:9].mT.reshape(weight.shape).to(weight.dtype), sums[9].to(bias.dtype), *6 * [None]


_conv.register_autograd(_conv_gradients, setup_context=_conv_setup)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor | None, token_at: Tensor | None,
    grid: tuple[int, int], reverse: bool, silu: bool, add: bool,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape)
    programs = math.ceil(x.shape[:2].numel() / CONV.tokens) * math.ceil(x.shape[2] / CONV.channels)
    _launch(
        "conv_forward", programs, CONV,
        x, weight.contiguous(), weight if bias is None else bias, *_place_arguments(x, places, token_at), y,
        *_conv_sizes(x, grid), BIAS=bias is not None, SILU=silu, ADD=add, REVERSE=reverse, PLACED=places is not None,
        **_conv_constants(x),
    )  # fmt: skip
    return y


def _place_arguments(x: Tensor, places: Tensor | None, token_at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments of a kernel, which does not read them if the tokens fill their grid."""
    return (x, x) if places is None or token_at is None else (places.contiguous(), token_at.contiguous())


def _conv_sizes(x: Tensor, grid: tuple[int, int]) -> tuple[int, ...]:
    return x.shape[:2].numel(), x.shape[1], *grid, *x.stride()[:2]


def _conv_constants(x: Tensor) -> dict[str, int]:
    return {"E": x.shape[2], "BLOCK": CONV.tokens, "CHANNELS": CONV.channels}


def project(
    c: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys, values and gates of the mLSTM; the two branches are loaded once.

    The forward pass moves 5 tensors; plain torch moves at least 14: 4 for each of q, k and v, whose heads are permuted
    in a second step, and 2 for the gates. The backward pass moves 7 instead of 34: for each of q, k and v, 2 for the
    permutation, 2 for the gradient of the input, 2 for that of the weight and 1 for that of the bias; 4 for the gates;
    9 for the sums of three and of two gradients.

    Args:
        c, x: the convolved and the plain branch, (B, N, E), which need not be contiguous.
        weights, biases: of the maps from c to q and k and from x to v, (E / S, S, S) and (E,); all biases may be None.
        c_gates, x_gates, gates_bias: the gates' weights for c and for x, (2 H, E), and their bias (2 H,); the input
            gate comes first.

    Returns:
        q, k, v (B, H, N, D) in the dtype of c, and the gates' pre-activations i, f (B, H, N) in float32 or better.
    """
    return _project(autocast(c), autocast(x), *weights, *biases, c_gates, x_gates, gates_bias)


@custom_operator("selfvil::project")
def _project(
    c: Tensor, x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
    c_gates: Tensor, x_gates: Tensor, gates_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c, x, c_gates, x_gates = _rows(c), _rows(x), c_gates.contiguous(), x_gates.contiguous()
    q, k, v, i, f = _projected(c, gates_bias)
    biases = (q_weight if bias is None else bias for bias in (q_bias, k_bias, v_bias))
    parameters = [x for pair in zip((q_weight, k_weight, v_weight), biases, strict=True) for x in pair]
    _launch(
        "project_forward", math.ceil(c.shape[:2].numel() / PROJECT.tokens), PROJECT,
        c, x, *parameters, c_gates, x_gates, gates_bias, q, k, v, i, f, *_project_sizes(c, x),
        BIAS=q_bias is not None, **_project_constants(c, q_weight, gates_bias, PROJECT),
    )  # fmt: skip
    return q, k, v, i, f


@_project.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, c_gates, x_gates, gates_bias):
    return _projected(c, gates_bias)


@custom_operator("selfvil::project_backward")
def _project_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, di: Tensor, df: Tensor, c: Tensor, x: Tensor,
    q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, c_gates: Tensor, x_gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of c and x; of the weights (3, E, S) and biases (3, E) of q, k and v; and of the gates' (2, 2 H, E)."""
    c, x, c_gates, x_gates = _rows(c), _rows(x), c_gates.contiguous(), x_gates.contiguous()
    gradients = [dy.contiguous() for dy in (dq, dk, dv, di, df)]
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    config, width = PROJECT_BACKWARD, c.shape[2]
    spans = math.ceil(c.shape[:2].numel() / config.span)
    sums = [_sums(c, spans, *shape) for shape in _project_shapes(q_weight, c_gates)]
    _launch(
        "project_backward", spans * math.ceil(width / config.channels), config,
        *gradients, c, x, q_weight, k_weight, v_weight, c_gates, x_gates, dc, dx, *sums, *_project_sizes(c, x),
        SPAN=config.span, **_project_constants(c, q_weight, c_gates, config),
    )  # fmt: skip
    d_weights, d_biases, d_gates = (part.sum(0) for part in sums)
    return dc, dx, d_weights, d_biases, d_gates


@_project_backward.register_fake
def _(dq, dk, dv, di, df, c, x, q_weight, k_weight, v_weight, c_gates, x_gates):
    sums = (_sums(c, *shape) for shape in _project_shapes(q_weight, c_gates))
    return c.new_empty(c.shape), x.new_empty(x.shape), *sums


def _project_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    c, x, *weights = inputs[:5]
    ctx.save_for_backward(c, x, *weights, *inputs[8:10])
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in inputs[5:8]]
    ctx.gates_bias_dtype = inputs[10].dtype


def _project_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    c, x, *weights, c_gates, x_gates = ctx.saved_tensors
    di, df = gradients[3:]
    dc, dx, d_weights, d_biases, d_gates = _project_backward(*gradients, c, x, *weights, c_gates, x_gates)
    return (
        dc, dx, *(dw.view(w.shape).to(w.dtype) for dw, w in zip(d_weights, weights, strict=True)),
        *(None if dtype is None else db.to(dtype) for db, dtype in zip(d_biases, ctx.bias_dtypes, strict=True)),
        d_gates[0].to(c_gates.dtype), d_gates[1].to(x_gates.dtype),
        torch.cat([di.sum((0, 2)), df.sum((0, 2))]).to(ctx.gates_bias_dtype),
    )  # fmt: skip


_project.register_autograd(_project_gradients, setup_context=_project_setup)


def _projected(c: Tensor, gates_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised q, k, v, i and f."""
    (batch, num_tokens, width), heads = c.shape, len(gates_bias) // 2
    q, k, v = (c.new_empty(batch, heads, num_tokens, width // heads) for _ in range(3))
    i, f = (_sums(c, batch, heads, num_tokens) for _ in range(2))
    return q, k, v, i, f


def _project_shapes(weight: Tensor, gates: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the sums for the parameters' gradients."""
    width = gates.shape[1]
    return [(3, width, weight.shape[2]), (3, width), (2, *gates.shape)]


def _project_sizes(c: Tensor, x: Tensor) -> tuple[int, ...]:
    return c.shape[:2].numel(), c.shape[1], *c.stride()[:2], *x.stride()[:2]


def _project_constants(c: Tensor, weight: Tensor, gates: Tensor, config: FusedConfig) -> dict[str, Any]:
    """The first axis of `gates` has the heads of both gates."""
    return {
        "E": c.shape[2], "HEADS": len(gates) // 2, "SIDE": weight.shape[2],
        "GATES": max(16, 1 << (len(gates) - 1).bit_length()), "BLOCK": config.tokens, "CHANNELS": config.channels,
        "PRECISION": _precision(c.dtype),
    }  # fmt: skip


def norm_skip_gate(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """(layer_norm(h) of each head · (1 + weight) + bias + skip · c) · silu(gate).

    The forward pass moves 4 tensors, or 3 without a gate; plain torch moves 14, or 9: normalisation (2), concatenation
    of heads (2), weight and bias (2), skip (3), SiLU (2), product (3). The backward pass moves 7 or 5 instead of 27 or
    18. It stores h, c and gate, which other operations store as well, and none of the three intermediate results.

    Args:
        h: the output of the mLSTM, (B, H, N, D).
        c: the convolved branch, (B, N, E).
        gate: the branch of the gate, (B, N, E), which need not be contiguous; None multiplies by no gate.
        weight, bias, skip: (E,); the weight is stored minus 1, the bias may be None.

    Returns:
        (B, N, E) in the dtype of h. Without a gate under a GPU's autocast float32, as torch's norm returns there,
        because it will be summed. With a gate, the dtype in which the next projection takes it.
    """
    h, c = autocast(h), autocast(c)
    dtype = h.dtype
    if gate is not None:
        gate = autocast(gate)
    elif h.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.promote_types(dtype, torch.float32)
    return _norm(h, c, gate, weight, bias, skip, eps, dtype)


@custom_operator("selfvil::norm_skip_gate")
def _norm(
    h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    h, c = _rows(h), _rows(c)
    z = c if gate is None else _rows(gate)
    y = c.new_empty(c.shape, dtype=dtype)
    programs = math.ceil(c.shape[:2].numel() / NORM.tokens) * h.shape[1]
    _launch(
        "norm_forward", programs, NORM, h, c, z, weight, weight if bias is None else bias, skip, y,
        *_norm_sizes(h, c, z), **_norm_constants(h, gate, bias, eps),
    )  # fmt: skip
    return y


@_norm.register_fake
def _(h, c, gate, weight, bias, skip, eps, dtype):
    return c.new_empty(c.shape, dtype=dtype)


@custom_operator("selfvil::norm_skip_gate_backward")
def _norm_backward(
    dy: Tensor, h: Tensor, c: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, c and gate (empty without a gate), and of weight, bias and skip as one (3, E)."""
    dy, h, c = dy.contiguous(), _rows(h), _rows(c)
    z = c if gate is None else _rows(gate)
    dh, dc, dz = h.new_empty(h.shape), c.new_empty(c.shape), z.new_empty(0 if gate is None else z.shape)
    spans = math.ceil(c.shape[:2].numel() / NORM.span)
    sums = _sums(c, spans, 3, c.shape[2])
    _launch(
        "norm_backward", spans * h.shape[1], NORM,
        dy, h, c, z, weight, weight if bias is None else bias, skip, dh, dc, dz, sums,
        *_norm_sizes(h, c, z), SPAN=NORM.span, **_norm_constants(h, gate, bias, eps),
    )  # fmt: skip
    return dh, dc, dz, sums.sum(0)


@_norm_backward.register_fake
def _(dy, h, c, gate, weight, bias, skip, eps):
    dz = c.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return h.new_empty(h.shape), c.new_empty(c.shape), dz, _sums(c, 3, c.shape[2])


def _norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, c, gate, weight, bias, skip = ctx.saved_tensors
    dh, dc, dz, sums = _norm_backward(dy, h, c, gate, weight, bias, skip, ctx.eps)
    d_weight, d_bias, d_skip = sums.unbind()
    return (
        dh, dc, None if gate is None else dz,
        d_weight.to(weight.dtype), None if bias is None else d_bias.to(bias.dtype), d_skip.to(skip.dtype), None, None,
    )  # fmt: skip


_norm.register_autograd(_norm_gradients, setup_context=_norm_setup)


def _norm_sizes(h: Tensor, c: Tensor, gate: Tensor) -> tuple[int, ...]:
    return c.shape[:2].numel(), c.shape[1], *h.stride()[:3], *c.stride()[:2], *gate.stride()[:2]


def _norm_constants(h: Tensor, gate: Tensor | None, bias: Tensor | None, eps: float) -> dict[str, Any]:
    heads, width = h.shape[1], h.shape[3]
    above = 1 << (width - 1).bit_length()
    return {
        "HEADS": heads, "D": width, "EPS": eps, "BLOCK": NORM.tokens, "WIDTH": above,
        "BIAS": bias is not None, "GATED": gate is not None,
    }  # fmt: skip


def autocast(x: Tensor) -> Tensor:
    """x in the dtype in which `torch.nn.functional.linear` would multiply it."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sums(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor for sums over tokens, in float32 or better."""
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _launch(kernel: str, programs: int, config: FusedConfig, *args: Tensor | int, **constants: Any) -> None:
    from selfvil.ops import triton_neighbours  # here, so that other backends work without Triton

    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(args[0]):  # Triton launches on the current one
        getattr(triton_neighbours, kernel)[(programs,)](*args, **constants, **options)
