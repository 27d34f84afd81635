"""The mLSTM in Triton, for GPUs: forward and backward pass without a score in memory.

Two forms of one set of kernels. `triton` goes over all columns that a row sees: time grows with N², memory with N.
`triton_chunkwise` over those in the row's chunk, and takes what came before from states, as `chunkwise` does, which
also says what these are: time grows with N. The maths is that of `torch_mlstm`, and so are the custom operators.

Products take the dtype of q and sum in that of the gates. bfloat16 and float16 are rounded as little as in `parallel`.
A product in float32 is three in tf32, of the numbers' upper and lower halves, and so keeps float32's digits; or one,
if torch may use tf32 for its own (`torch.backends.cuda.matmul`). Plain float32 products (Triton's "ieee") compiled into
kernels that kept kilobytes of each thread's registers in memory. No kernel sums in an order left to chance.

On a CPU kernels run in Triton's interpreter, to be tested: TRITON_INTERPRET=1 before anything imports triton.

Shapes: heads have joined the batch, so q, k, v are (B·H, N, D), and what belongs to a token is (B·H, N).
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.reference import EPS

INSTALLED = importlib.util.find_spec("triton") is not None
"""Whether there is a Triton; it exists for some systems only. A value, for torch.compile cannot follow the question."""

CHUNK = 256
"""Tokens in a chunk. Larger ones cost more products within, smaller ones more states."""

MAX_WIDTH = 384
"""Of heads: a block of tokens must fit into a processor's own memory, and their sums into its registers."""

MAX_WIDTH_OF_BOTH = 192
"""Of heads for which one program sums up the gradients of both k and v."""

STATE_TILE = 64
"""Rows and columns of a state that one program sums up."""


class Plan(NamedTuple):
    """How kernels are cut up: tokens that are a program's own, tokens it goes over at a time, the warps that share the
    work, and how many steps are under way at once."""

    block: int
    step: int
    warps: int
    stages: int


SCAN = Plan(block=1024, step=0, warps=4, stages=1)
"""Of the gates: a program has a whole sequence."""


def _check(q: Tensor) -> None:
    if not INSTALLED:
        raise ValueError('this mLSTM backend needs the package triton, which is missing; take "auto" or "parallel"')
    if not q.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f'this mLSTM backend needs a GPU, but q is on {q.device}; take "auto" or "parallel"')
    if q.dtype == torch.float64 and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError('this mLSTM backend computes in at most float32, but q is float64; take "auto" or "parallel"')
    if q.shape[-1] > MAX_WIDTH:  # of v too: widths are one by now
        raise ValueError(
            f'heads of this mLSTM backend are at most {MAX_WIDTH} wide, q has {q.shape[-1]}; take "auto" or "parallel"'
        )


def mlstm_triton(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, chunked: bool) -> Tensor:
    """mLSTM output h, of the shape of v (B, H, N, D), of q, k, v, i (B, H, N) and the log of the forget gate (B, H, N).

    Products run in the dtype of q, gates in that of log_f, float32. First derivatives only.
    """
    # The kernels know one width. Zeros beside a narrower head add nothing to its products.
    width = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return _forward(*padded, i, log_f, reverse, chunked, q.shape[-1])[0][..., : v.shape[-1]]


@torch.library.custom_op("selfvil::mlstm_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, reverse: bool, chunked: bool, score_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, and what the backward pass needs: a, M, n and lim, each (B, H, N). Scores are divided by √score_width."""
    _check(q)
    q, k, v, i, log_f = (x.contiguous() for x in (q, k, v, i, log_f))
    h, (a, row_max, row_sum, limit) = torch.empty_like(q), (torch.empty_like(log_f) for _ in range(4))
    _launch("scan_gates", i.shape[:2].numel(), SCAN, i, log_f, a, row_max, limit, i.shape[2], **_scan(reverse))
    state, norm = _states(k, v, a, row_max, a, a, reverse, after=False) if chunked else _no_states(q, a)
    plan, sizes = _plan(q), _sizes(q, chunked)
    _launch(
        "forward", _programs(q, plan.block), plan,
        q, k, v, a, row_max, limit, state, norm, h, row_sum, *sizes,
        **_root(score_width), **_constants(q, chunked, reverse),
    )  # fmt: skip
    return h, a, row_max, row_sum, limit


@_forward.register_fake
def _(q, k, v, i, log_f, reverse, chunked, score_width):
    gates = [log_f.new_empty(log_f.shape) for _ in range(4)]
    return q.new_empty(q.shape), *gates


@torch.library.custom_op("selfvil::mlstm_triton_backward", mutates_args=())
def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, row_sum: Tensor, limit: Tensor,
    reverse: bool, chunked: bool, score_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v (B, H, N, D), and of i and log_f (B, H, N) in the dtype of a."""
    dh, q, k, v = dh.to(q.dtype).contiguous(), *(x.contiguous() for x in (q, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    r, dn, row_scale, da, di, dlog_f = (torch.empty_like(a) for _ in range(6))
    plan, sizes, constants = _plan(q), _sizes(q, chunked), _constants(q, chunked, reverse)
    state, norm = _states(k, v, a, row_max, a, a, reverse, after=False) if chunked else _no_states(q, a)
    _launch(
        "backward_rows", _programs(q, plan.block), plan,
        q, k, v, dh, a, row_max, row_sum, limit, state, norm, dq, r, dn, row_scale, *sizes,
        **_root(score_width), **constants,
    )  # fmt: skip
    after, after_sum = _states(q, dh, a, row_max, row_scale, dn, reverse, after=True) if chunked else (state, norm)
    # Sums for both k and v of wide heads are more than the registers hold.
    for keys, values in [(True, True)] if q.shape[-1] <= MAX_WIDTH_OF_BOTH else [(True, False), (False, True)]:
        _launch(
            "backward_columns", _programs(q, plan.block), plan,
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
    """A state (B·H, chunks, D, D) and a vector (B·H, chunks, D) for each chunk: of the keys and values before it, or of
    the queries and gradients after it, which row_scale and dn are for."""
    heads, num_tokens, width = x.shape[:2].numel(), *x.shape[2:]
    chunks = math.ceil(num_tokens / CHUNK)
    state, vector = x.new_empty(heads, chunks, width, width, dtype=_wide(x.dtype)), a.new_empty(heads, chunks, width)
    plan = Plan(block=64 if x.element_size() == 2 else 32, step=0, warps=4, stages=3)
    _launch(
        "states", heads * math.ceil(width / STATE_TILE) ** 2, plan,
        x, y, a, row_max, row_scale, dn, state, vector, *_sizes(x, True),
        D=width, TILE=STATE_TILE, BLOCK=plan.block, AFTER=after, REVERSE=reverse, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    return state, vector


def _no_states(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """In their place where there is one chunk; their dtypes count."""
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
    """What the kernels of blocks of rows or columns are compiled for."""
    block, step, *_ = _plan(q)
    width = {"D": q.shape[-1], "TILES": tiles(q.shape[-1]), "PRECISION": _precision(q.dtype)}
    return {"BLOCK": block, "STEP": step, "CARRY": chunked, "REVERSE": reverse, **width}


def tiles(width: int) -> tuple[int, ...]:
    """One or two powers of two, 16 at the least, that cover a head width with as little to spare as these can."""
    above = max(16, 1 << (width - 1).bit_length())
    rest = max(16, 1 << (width - above // 2 - 1).bit_length())
    return (above,) if above // 2 + rest >= above else (above // 2, rest)


def _plan(q: Tensor) -> Plan:
    """Not measured yet: what fits an H200's memory and registers by the compiler's word, as a test asks it."""
    width, size = sum(tiles(q.shape[-1])), q.element_size()
    if size == 2:
        return Plan(block=64, step=64, warps=4, stages=2) if width <= 192 else Plan(64, 32, warps=8, stages=2)
    return Plan(block=64, step=32, warps=8, stages=2) if width <= 96 else Plan(32, 32, warps=8, stages=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """For what is not yet divided by its row's sum, and may be of any size: of the range of float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def _precision(dtype: torch.dtype) -> str:
    """Of products in float32. A float16 tensor has no more digits than tf32; float64, for tests, is what it is."""
    # Not allow_tf32: reading it is an error where the setting was made by its new name, and this one knows of both.
    tf32 = dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "ieee" if dtype == torch.float64 else "tf32" if tf32 else "tf32x3"


def _launch(kernel: str, programs: int, plan: Plan, *args: Tensor | int, **constants: Any) -> None:
    from selfvil.ops import triton_kernels  # only now: where the operator is not used, Triton need not be there

    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(args[0]):  # Triton launches on the current one
        getattr(triton_kernels, kernel)[(programs,)](*args, **constants, **options)
