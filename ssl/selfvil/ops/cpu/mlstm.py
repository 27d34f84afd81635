"""The mLSTM by native kernels for CPUs: float32 and bfloat16, forward and backward, without stored scores.

One kernel for all lengths: a sequence is cut into chunks that pass on a state, or is one chunk if it is short.
`mlstm.cpp` explains it; the symbols are those of `torch_mlstm`. Products and gates are float32, and results are rounded
once, at the end. Inputs may have any strides with contiguous channels: no tensor is copied or flipped.

For `torch.compile`, forward and backward are one opaque operator each, without a graph break.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfvil.ops.cpu.build import kernels
from selfvil.ops.operators import custom_operator

DTYPES = (torch.float32, torch.bfloat16)

CHUNK = 64
"""Tokens in a chunk, for sequences of more than one. A multiple of 16."""

WIDE_CHUNK = 128
"""The same for heads wider than `NARROW`, whose states are larger."""

NARROW = 128


def one_chunk(score_width: int, value_width: int) -> int:
    """The longest sequence that is one chunk: a row then multiplies N/2 columns instead of half a chunk and a state."""
    return max(score_width, value_width) * 2 + CHUNK


def chunk_size(num_tokens: int, score_width: int, value_width: int) -> int:
    """Tokens in a chunk."""
    if num_tokens <= one_chunk(score_width, value_width):
        return num_tokens
    return CHUNK if value_width <= NARROW else WIDE_CHUNK


def mlstm_native(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool) -> Tensor:
    """mLSTM output h, of the shape of v (B, H, N, D'), of q, k (B, H, N, D), i and log f (B, H, N), the forget gate.

    q, k and v are float32 or bfloat16 on the CPU. First derivatives only.

    Raises:
        ValueError: another dtype or device, or the kernels cannot be used here.
    """
    return _forward(q, k, v, i, log_f, reverse)[0]


@custom_operator("selfvil::mlstm_native")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scan(q, k, v, i.float(), log_f.float(), reverse)


def scan(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, and for the backward pass a, n and lim, each (B, H, N) and in the order of the scan. i and log_f: float32."""
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    h = v.new_empty(v.shape)
    saved = [log_f.new_empty(log_f.shape) for _ in range(3)]
    _call("mlstm_forward", (*q.shape, v.shape[3]), reverse, (q, k, v, i, log_f, None), saved, [h])
    return h, saved[0], saved[1], saved[2]


def scan_of_maps(
    c: Tensor, u: Tensor, maps: Sequence[Tensor | None], i: Tensor, log_f: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scan` of q and k, maps of c (B, N, E), and v, a map of u (B, N, E): they are never in memory.

    maps: weights (E / 4, 4, 4) of q, k and v, and their biases (E,) or None, in float32. The width of a head is a
    multiple of 16.
    """
    h = c.new_empty(*log_f.shape, c.shape[2] // log_f.shape[1])
    saved = [log_f.new_empty(log_f.shape) for _ in range(3)]
    strided = (None, None, None, i, log_f, None)
    _call(
        "mlstm_forward",
        (*h.shape, h.shape[3]),
        reverse,
        strided,
        saved,
        [h],
        (contiguous_channels(c), contiguous_channels(u), *maps),
    )
    return h, saved[0], saved[1], saved[2]


@_forward.register_fake
def _(q, k, v, i, log_f, reverse):
    return v.new_empty(v.shape), *(log_f.new_empty(log_f.shape, dtype=torch.float32) for _ in range(3))


@custom_operator("selfvil::mlstm_native_backward")
def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_sum: Tensor, limit: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their shapes, and of i and log_f (B, H, N) in float32."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, *scan_backward(dh, (q, k, v), (a, row_sum, limit), reverse, (dq, dk, dv))


def scan_backward(
    dh: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    reverse: bool,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of i and log_f (B, H, N) in float32; those of `inputs` q, k, v are written to `gradients`."""
    q, k, v, dh = (contiguous_channels(x) for x in (*inputs, dh.to(inputs[2].dtype)))
    found = [x.contiguous() for x in saved] + [saved[0].new_empty(saved[0].shape) for _ in range(2)]
    _call("mlstm_backward", (*q.shape, v.shape[3]), reverse, (q, k, v, None, None, dh), found, (None, *gradients))
    return found[3], found[4]


def scan_of_maps_backward(
    dh: Tensor, c: Tensor, u: Tensor, maps: Sequence[Tensor | None], saved: tuple[Tensor, Tensor, Tensor],
    reverse: bool, dc: Tensor, du: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of i and log_f (B, H, N) of `scan_of_maps`, and of the maps' weights by column of a block, and biases,
    (3, 5, E), in float32. The gradient of c is added to dc, and that of u is written to du, both (B, N, E)."""
    dh = contiguous_channels(dh)
    found = [*saved, *(saved[0].new_empty(saved[0].shape) for _ in range(2))]
    sources, strided = (contiguous_channels(c), contiguous_channels(u), *maps), (*5 * [None], dh)
    sums = found[3].new_zeros(max(1, c.shape[0]), 3, 5, c.shape[2])
    _call("mlstm_backward", (*dh.shape, dh.shape[3]), reverse, strided, found, (), sources, (dc, du, sums))
    return found[3], found[4], sums[0].clone()


@_backward.register_fake
def _(dh, q, k, v, a, row_sum, limit, reverse):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, a.new_empty(a.shape), a.new_empty(a.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, i, log_f, ctx.reverse = inputs
    ctx.dtypes = i.dtype, log_f.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of those, which would be tensors of zeros
    ctx.save_for_backward(q, k, v, *output[1:])


def _gradients(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, di, dlog_f = _backward(dh, *ctx.saved_tensors, ctx.reverse)
    return dq, dk, dv, di.to(ctx.dtypes[0]), dlog_f.to(ctx.dtypes[1]), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _call(
    function: str, sizes: tuple[int, ...], reverse: bool, strided: Sequence[Tensor | None],
    contiguous: Sequence[Tensor | None], results: Sequence[Tensor | None], maps: Sequence[Tensor | None] = 8 * (None,),
    of_maps: Sequence[Tensor | None] = 3 * (None,),
) -> None:  # fmt: skip
    """Fill in the members of `Arguments` in mlstm.cpp; None for those that the function does not use.

    Args:
        sizes: images, heads, tokens, width of q and k, and of v.
        strided: q, k, v, i, log f and the gradient of h.
        contiguous: a, n and lim, and the gradients of i and log f.
        results: h, and the gradients of q, k and v.
        maps: what makes q, k and v, in place of them: c, u, three weights and biases.
        of_maps: gradients of c and u, and the sums for those of weights and biases.
    """
    source = next(x for x in (*strided[:3], maps[0]) if x is not None)
    if source.dtype not in DTYPES or source.device.type != "cpu":
        raise ValueError(
            'the mLSTM backend "native" supports float32 and bfloat16 on the CPU, '
            f'got {source.dtype} on {source.device}; use "auto"'
        )
    loaded = kernels()
    if loaded is None:
        raise ValueError('the mLSTM backend "native" cannot be used here (see the log); use "auto" or "parallel"')
    contiguous = [*contiguous, *(5 - len(contiguous)) * [None]]
    results = [*results, *(4 - len(results)) * [None]]
    c, u, *parameters = maps
    loaded.call(
        function, source.dtype == torch.bfloat16, *sizes, chunk_size(*sizes[2:]), reverse,
        *strided, *_strides(strided, 3), *contiguous, *results, *_strides(results, 3), c, u, *_strides((c, u), 2),
        *parameters, *of_maps[:2], *_strides(of_maps[:2], 2), of_maps[2],
    )  # fmt: skip


def _strides(tensors: Sequence[Tensor | None], count: int) -> list[int]:
    return [stride for x in tensors for stride in (count * (0,) if x is None else x.stride()[:count])]


def contiguous_channels(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
