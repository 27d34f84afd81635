"""The mLSTM in Triton for GPUs: forward and backward pass that store no scores.

Two forms of one set of kernels. `triton` loops over all unmasked columns of a row: time is quadratic and memory linear
in N. `triton_chunkwise` loops over those in the row's chunk and takes earlier chunks from states, which `chunkwise`
defines: time is linear in N. The equations and the custom operators are those of `torch_mlstm`.

Products have the dtype of q, and sums that of the gates. bfloat16 and float16 are rounded as seldom as in `parallel`. A
float32 product is three products in tf32, of the upper and lower halves of the numbers, which preserves the precision
of float32; or one, if torch may use tf32 for its own products (`torch.backends.cuda.matmul`). With plain float32
products (Triton's "ieee"), the compiler spilled kilobytes of registers for each thread. All sums have a fixed order.

For tests, the kernels run on a CPU in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported.

Shapes: the batch includes the heads: q, k, v are (B·H, N, D), values per token are (B·H, N).
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.operators import custom_operator
from selfvil.ops.reference import EPS

INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; not all systems have it. A constant, because torch.compile cannot trace the call."""

CHUNK = 256
"""Tokens in a chunk. Larger chunks need more products within them, smaller ones more states."""

MAX_WIDTH = 384
"""Maximum head width: a block of tokens must fit into shared memory, and its sums into registers."""

MAX_WIDTH_OF_BOTH = 192
"""Maximum head width for which one program computes the gradients of both k and v."""

STATE_TILE = 64
"""Rows and columns of a state that one program computes."""


class KernelConfig(NamedTuple):
    """Launch configuration of a kernel: tokens of a program's block, tokens of one iteration of its loop, warps, and
    pipeline stages."""

    block: int
    step: int
    warps: int
    stages: int


SCAN = KernelConfig(block=1024, step=0, warps=4, stages=1)
"""For the gates: a program processes a whole sequence."""


def _check(q: Tensor) -> None:
    if not INSTALLED:
        raise ValueError('this mLSTM backend needs the package triton: install it, or use "auto" or "parallel"')
    if not q.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f'this mLSTM backend needs a GPU, but q is on {q.device}; use "auto" or "parallel"')
    if q.dtype == torch.float64 and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError('this mLSTM backend supports at most float32, but q is float64; use "auto" or "parallel"')
    if q.shape[-1] > MAX_WIDTH:  # all widths are equal here
        raise ValueError(
            f'this mLSTM backend supports head widths up to {MAX_WIDTH}, got {q.shape[-1]}; use "auto" or "parallel"'
        )


def mlstm_triton(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, chunked: bool) -> Tensor:
    """mLSTM output h, of the shape of v (B, H, N, D), of q, k, v, i (B, H, N) and the log of the forget gate (B, H, N).

    Products run in the dtype of q, gates in that of log_f, float32. First derivatives only.
    """
    # The kernels have one width for q, k and v. Padding a narrower head with zeros does not change its products.
    width = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return _forward(*padded, i, log_f, reverse, chunked, q.shape[-1])[0][..., : v.shape[-1]]


@custom_operator("selfvil::mlstm_triton")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, chunked: bool, score_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, and for the backward pass a, M, n and lim, each (B, H, N). Scores are divided by √score_width."""
    _check(q)
    q, k, v, i, log_f = (x.contiguous() for x in (q, k, v, i, log_f))
    h, (a, row_max, row_sum, limit) = torch.empty_like(q), (torch.empty_like(log_f) for _ in range(4))
    _launch("scan_gates", i.shape[:2].numel(), SCAN, i, log_f, a, row_max, limit, i.shape[2], **_scan(reverse))
    state, norm = _states(k, v, a, row_max, a, a, reverse, after=False) if chunked else _no_states(q, a)
    config, sizes = _config(q), _sizes(q, chunked)
    _launch(
        "forward", _programs(q, config.block), config,
        q, k, v, a, row_max, limit, state, norm, h, row_sum, *sizes,
        **_root(score_width), **_constants(q, chunked, reverse),
    )  # fmt: skip
    return h, a, row_max, row_sum, limit


@_forward.register_fake
def _(q, k, v, i, log_f, reverse, chunked, score_width):
    gates = [log_f.new_empty(log_f.shape) for _ in range(4)]
    return q.new_empty(q.shape), *gates


@custom_operator("selfvil::mlstm_triton_backward")
def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, row_sum: Tensor, limit: Tensor,
    reverse: bool, chunked: bool, score_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v (B, H, N, D), and of i and log_f (B, H, N) in the dtype of a."""
    dh, q, k, v = dh.to(q.dtype).contiguous(), *(x.contiguous() for x in (q, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    r, dn, row_scale, da, di, dlog_f = (torch.empty_like(a) for _ in range(6))
    config, sizes, constants = _config(q), _sizes(q, chunked), _constants(q, chunked, reverse)
    state, norm = _states(k, v, a, row_max, a, a, reverse, after=False) if chunked else _no_states(q, a)
    _launch(
        "backward_rows", _programs(q, config.block), config,
        q, k, v, dh, a, row_max, row_sum, limit, state, norm, dq, r, dn, row_scale, *sizes,
        **_root(score_width), **constants,
    )  # fmt: skip
    after, after_sum = _states(q, dh, a, row_max, row_scale, dn, reverse, after=True) if chunked else (state, norm)
    # For wide heads, the sums for both k and v do not fit into the registers.
    for keys, values in [(True, True)] if q.shape[-1] <= MAX_WIDTH_OF_BOTH else [(True, False), (False, True)]:
        _launch(
            "backward_columns", _programs(q, config.block), config,
            q, k, v, dh, a, row_max, row_scale, dn, after, after_sum, dk, dv, da, *sizes,
            KEYS=keys, VALUES=values, **constants,
        )  # fmt: skip
    _launch(
        "gate_gradients", a.shape[:2].numel(), SCAN,
        a, row_max, row_sum, limit, r, da, di, dlog_f, a.shape[2], EPS=EPS, BACK=not reverse, **_scan(reverse),
    )  # fmt: skip
    return dq, dk, dv, di, dlog_f


@_backward.register_fake
def _(dh, q, k, v, a, row_max, row_sum, limit, reverse, chunked, score_width):
    return *(q.new_empty(q.shape) for _ in range(3)), *(a.new_empty(a.shape) for _ in range(2))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, i, _, *ctx.settings = inputs
    ctx.i_dtype = i.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output[1:])


def _gradients(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, di, dlog_f = _backward(dh, *ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, di.to(ctx.i_dtype), dlog_f, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _states(
    x: Tensor, y: Tensor, a: Tensor, row_max: Tensor, row_scale: Tensor, dn: Tensor, reverse: bool, after: bool
) -> tuple[Tensor, Tensor]:
    """A state (B·H, chunks, D, D) and a vector (B·H, chunks, D) for each chunk: of the keys and values before it, or,
    with row_scale and dn, of the queries and gradients after it."""
    heads, num_tokens, width = x.shape[:2].numel(), *x.shape[2:]
    chunks = math.ceil(num_tokens / CHUNK)
    state, vector = x.new_empty(heads, chunks, width, width, dtype=_wide(x.dtype)), a.new_empty(heads, chunks, width)
    config = KernelConfig(block=64 if x.element_size() == 2 else 32, step=0, warps=4, stages=3)
    _launch(
        "states", heads * math.ceil(width / STATE_TILE) ** 2, config,
        x, y, a, row_max, row_scale, dn, state, vector, *_sizes(x, True),
        D=width, TILE=STATE_TILE, BLOCK=config.block, AFTER=after, REVERSE=reverse, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    return state, vector


def _no_states(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholders for the states if there is one chunk; only their dtypes matter."""
    return q.new_empty(1, dtype=_wide(q.dtype)), a.new_empty(1)


def _programs(q: Tensor, block: int) -> int:
    return q.shape[:2].numel() * math.ceil(q.shape[2] / block)


def _sizes(q: Tensor, chunked: bool) -> tuple[int, int]:
    """Tokens of a sequence, and of a chunk."""
    return q.shape[2], CHUNK if chunked else 2**30


def _scan(reverse: bool) -> dict[str, Any]:
    return {"BLOCK": SCAN.block, "REVERSE": reverse}


def _root(score_width: int) -> dict[str, float]:
    return {"EPS": EPS, "ROOT": math.sqrt(score_width)}


def _constants(q: Tensor, chunked: bool, reverse: bool) -> dict[str, Any]:
    """Compile-time constants of the kernels for blocks of rows or columns."""
    block, step, *_ = _config(q)
    width = {"D": q.shape[-1], "TILES": tiles(q.shape[-1]), "PRECISION": _precision(q.dtype)}
    return {"BLOCK": block, "STEP": step, "CARRY": chunked, "REVERSE": reverse, **width}


def tiles(width: int) -> tuple[int, ...]:
    """One or two powers of two, each at least 16, with the smallest possible sum that is not below the head width."""
    above = max(16, 1 << (width - 1).bit_length())
    rest = max(16, 1 << (width - above // 2 - 1).bit_length())
    return (above,) if above // 2 + rest >= above else (above // 2, rest)


def _config(q: Tensor) -> KernelConfig:
    """Not tuned; the compiler reports that these fit the memory and registers of an H200, which a test checks."""
    width, size = sum(tiles(q.shape[-1])), q.element_size()
    if size == 2:
        narrow = width <= 192
        return KernelConfig(block=64, step=64 if narrow else 32, warps=4 if narrow else 8, stages=2)
    narrow = width <= 96
    return KernelConfig(block=64 if narrow else 32, step=32, warps=8, stages=2 if narrow else 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for values not yet divided by their row's sum, whose range may exceed that of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _precision(dtype: torch.dtype) -> str:
    """Precision of products. tf32 has the digits of float16; float64, for tests, keeps its own precision."""
    # Not allow_tf32: reading it raises an error if the setting was made by its new name. This attribute works for both.
    tf32 = dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "ieee" if dtype == torch.float64 else "tf32" if tf32 else "tf32x3"


def _launch(kernel: str, programs: int, config: KernelConfig, *args: Tensor | int, **constants: Any) -> None:
    from selfvil.ops import triton_kernels  # here, so that other backends work without Triton

    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(args[0]):  # Triton launches on the current one
        getattr(triton_kernels, kernel)[(programs,)](*args, **constants, **options)
