"""The mLSTM in Triton, for GPUs: forward and backward pass without a score in memory.

Two forms of one set of kernels. `triton` goes over all columns that a row sees: time grows with N², memory with N.
`triton_chunkwise` over those in the row's chunk, and takes what came before from states, as `chunkwise` does, which
also says what these are: time grows with N. The maths is that of `torch_mlstm`, the gates' scans included.

Products take the dtype of q and sum in that of the gates. bfloat16 and float16 are rounded as little as in `parallel`.
A product in float32 is three in tf32, of the numbers' upper and lower halves, and so keeps float32's digits; or one,
if torch may use tf32 for its own (`torch.backends.cuda.matmul`). Plain float32 products (Triton's "ieee") compiled into
kernels that kept kilobytes of each thread's registers in memory. No kernel sums in an order left to chance.

On a CPU kernels run in Triton's interpreter, to be tested: TRITON_INTERPRET=1 before anything imports triton.

Shapes: heads have joined the batch, so q, k, v are (B·H, N, D), and what belongs to a token is (B·H, N).
"""

import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.reference import EPS

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


@functools.cache
def is_installed() -> bool:
    """Whether there is a Triton; it exists for some systems only."""
    return importlib.util.find_spec("triton") is not None


def _check(q: Tensor) -> None:
    if not is_installed():
        raise ValueError('this mLSTM backend needs the package triton, which is missing; take "auto" or "parallel"')
    if not q.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f'this mLSTM backend needs a GPU, but q is on {q.device}; take "auto" or "parallel"')
    if q.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f'heads of this mLSTM backend are at most {MAX_WIDTH} wide, q has {q.shape[-1]}; take "auto" or "parallel"'
        )


def products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, limit: Tensor, reverse: bool, *, chunked: bool
) -> tuple[Tensor, Tensor]:
    """h (B·H, N, D), and the row sums of C (B·H, N)."""
    _check(q)
    q, k, v = (x.contiguous() for x in (q, k, v))
    h, row_sum = torch.empty_like(v), torch.empty_like(a)
    plan, sizes = _plan(q), _sizes(q, chunked)
    state, norm = _states_before(k, v, a, row_max, reverse) if chunked else _no_states(q, a)
    _launch(
        "forward", _programs(q, plan.block), plan,
        q, k, v, a, row_max, limit, state, norm, h, row_sum, *sizes,
        EPS=EPS, ROOT=math.sqrt(q.shape[-1]), BLOCK=plan.block, STEP=plan.step, CARRY=chunked, REVERSE=reverse,
        **_width(q),
    )  # fmt: skip
    return h, row_sum


def gradients(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, sign: Tensor, a: Tensor, row_max: Tensor, den: Tensor,
    reverse: bool, *, chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of h; r = h · dh, and column sums of C ∘ dC, (B·H, N)."""
    q, k, v, dh = (x.contiguous() for x in (q, k, v, dh))
    dq, dk, dv, r, da = *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(a), torch.empty_like(a)
    row_scale = 1 / (math.sqrt(q.shape[-1]) * den)
    plan, sizes = _plan(q), _sizes(q, chunked)
    constants = {"BLOCK": plan.block, "STEP": plan.step, "CARRY": chunked, "REVERSE": reverse, **_width(q)}
    state, norm = _states_before(k, v, a, row_max, reverse) if chunked else _no_states(q, a)
    _launch(
        "backward_rows", _programs(q, plan.block), plan,
        q, k, v, dh, a, row_max, row_scale, sign, state, norm, dq, r, *sizes, **constants,
    )  # fmt: skip
    dn = -sign * r
    after, after_sum = _states_after(q, dh, row_max, row_scale, dn, reverse) if chunked else (state, norm)
    # Sums for both k and v of wide heads are more than the registers hold.
    for keys, values in [(True, True)] if q.shape[-1] <= MAX_WIDTH_OF_BOTH else [(True, False), (False, True)]:
        _launch(
            "backward_columns", _programs(q, plan.block), plan,
            q, k, v, dh, a, row_max, row_scale, dn, after, after_sum, dk, dv, da, *sizes,
            KEYS=keys, VALUES=values, **constants,
        )  # fmt: skip
    return dq, dk, dv, r, da


def _states_before(k: Tensor, v: Tensor, a: Tensor, row_max: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """What the keys and values read before each chunk leave to its rows: state and norm, as in `chunkwise`."""
    last_max, fade = _maxima(row_max, reverse)[1:]
    weight = torch.exp(a - _by_token(last_max, a))
    return _states(k, v, weight, weight, fade, reverse)


def _states_after(
    q: Tensor, dh: Tensor, row_max: Tensor, row_scale: Tensor, dn: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What the rows read after each chunk ask of its keys and values."""
    before, _, fade = _maxima(row_max, reverse)
    weight = torch.exp(_by_token(before, row_max) - row_max) * row_scale
    return _states(q, dh, weight, weight * dn, fade, not reverse)


def _states(
    x: Tensor, y: Tensor, weight: Tensor, vector_weight: Tensor, fade: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    heads, _, width = x.shape
    state = x.new_empty(heads, fade.shape[1], width, width, dtype=_wide(x.dtype))
    vector = fade.new_empty(heads, fade.shape[1], width)
    plan = Plan(block=64 if x.element_size() == 2 else 32, step=0, warps=4, stages=3)
    _launch(
        "states", heads * math.ceil(width / STATE_TILE) ** 2, plan,
        x, y, weight, vector_weight, fade, state, vector, *_sizes(x, True),
        D=width, TILE=STATE_TILE, BLOCK=plan.block, REVERSE=reverse, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    return state, vector


def _no_states(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """In their place where there is one chunk; their dtypes count."""
    return q.new_empty(1, dtype=_wide(q.dtype)), a.new_empty(1)


def _maxima(row_max: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum before a chunk is read and after, (B·H, chunks), and what is left of the first by then."""
    if reverse:
        last_max = row_max[:, ::CHUNK]
    else:
        last_max = F.pad(row_max, (0, -row_max.shape[1] % CHUNK), mode="replicate")[:, CHUNK - 1 :: CHUNK]
    before = F.pad(last_max[:, 1:] if reverse else last_max[:, :-1], (0, 1) if reverse else (1, 0), value=-math.inf)
    return before, last_max, torch.exp(before - last_max)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """What belongs to a chunk (B·H, chunks), for each of its tokens (B·H, N)."""
    return x.repeat_interleave(CHUNK, 1)[:, : like.shape[1]]


def _programs(q: Tensor, block: int) -> int:
    return q.shape[0] * math.ceil(q.shape[1] / block)


def _sizes(q: Tensor, chunked: bool) -> tuple[int, int]:
    """Tokens of a sequence, and of a chunk."""
    return q.shape[1], CHUNK if chunked else 2**30


def _width(q: Tensor) -> dict[str, Any]:
    return {"D": q.shape[-1], "TILES": tiles(q.shape[-1]), "PRECISION": _precision(q.dtype)}


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
    getattr(triton_kernels, kernel)[(programs,)](*args, **constants, **options)
