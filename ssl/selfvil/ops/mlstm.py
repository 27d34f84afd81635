"""The mLSTM operator and its table of backends."""

import functools
import logging
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops import guard, triton_mlstm
from selfvil.ops.cpu import build
from selfvil.ops.cpu.mlstm import DTYPES as NATIVE_DTYPES
from selfvil.ops.cpu.mlstm import mlstm_native
from selfvil.ops.exporting import exporting
from selfvil.ops.reference import mlstm_reference
from selfvil.ops.torch_mlstm import mlstm_torch
from selfvil.ops.triton_mlstm import mlstm_triton

log = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]] = {
    "reference": mlstm_reference,  # the paper's equations
    "parallel": functools.partial(mlstm_torch, form="parallel"),  # time grows with N², memory with N
    "chunkwise": functools.partial(mlstm_torch, form="chunkwise"),  # time and memory grow with N
    "native": mlstm_native,  # both in one, for CPUs, in C++
    "triton": functools.partial(mlstm_triton, chunked=False),  # parallel, for GPUs, fused
    "triton_chunkwise": functools.partial(mlstm_triton, chunked=True),  # chunkwise, for GPUs, fused
}
"""Name -> a function of q, k (B, H, N, D), v (B, H, N, D'), i, log f (B, H, N), float32 or float64, and reverse."""

OVERRIDE = "SELFVIL_MLSTM"
"""Environment variable with the name of the backend for "auto"."""


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    reverse: bool = False,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Matrix LSTM over a sequence (Beck et al., "xLSTM", 2024).

    Args:
        q, k, v: queries, keys and values of one floating dtype, (B, H, N, D). Heads of q and k may have another width
            than those of v (xLSTM 7B takes half, arXiv 2503.13427); scores are divided by the root of theirs.
        i, f: pre-activations of the input gate (exponential) and the forget gate (sigmoid), (B, H, N). Keep them in
            float32 when q, k, v are bfloat16.
        reverse: scan the sequence from its end; equal to flipping every input and the output.
        positions: of the tokens in a longer sequence from which they were selected, (B, N), integers, ascending. A
            token applies its forget gate once for each position since the previous token of the scan, so that a gap
            decays the memory as the whole sequence would. None: the positions are consecutive.
        backend: a name from `BACKENDS`, or "auto" for that of `choose`, or $SELFVIL_MLSTM if that is set. While a graph
            is exported, "auto" is "reference", which needs no custom operator.

    Returns:
        h in the shape of v and the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not match, or the backend does not exist.
    """
    _check(q, k, v, i, f, positions)
    log_f = F.logsigmoid(f.to(torch.promote_types(torch.promote_types(q.dtype, torch.float32), f.dtype)))
    if positions is not None:
        log_f = log_f * gaps(positions, reverse).unsqueeze(1).to(log_f.dtype)
    if backend == "auto":
        backend = (
            "reference"
            if exporting()
            else os.environ.get(OVERRIDE) or choose(q.shape[2], v.shape[3], q.device, _dtype_of(q, log_f))
        )
        if not torch.compiler.is_compiling():  # a graph cannot contain the message
            _log_once(backend)
    if backend not in BACKENDS:
        raise ValueError(f"no mLSTM backend {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, i, log_f, reverse)


def choose(num_tokens: int, head_dim: int, device: torch.device | str, dtype: torch.dtype) -> str:
    """The fastest backend for N tokens and head width D.

    On a CPU, the native kernels for float32 and bfloat16, if they can be built here. Otherwise parallel up to about
    N = 4 D, and chunkwise above. The Triton kernels are first compared with torch (`selfvil.ops.guard`).

    A row multiplies N/2 columns in the parallel form; in the chunkwise form, the columns of a chunk and a D × D state.
    Below the limit, few large products are faster than many small ones. On a GPU, the Triton version of each is taken
    if Triton is installed and supports the head width; its parallel form stores no scores and remains faster for
    larger N. The limit is measured on a CPU, and estimated from operation counts for a GPU.
    """
    if (
        torch.device(device).type == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and head_dim <= triton_mlstm.MAX_WIDTH
        and triton_mlstm.INSTALLED
    ):
        form = "triton" if num_tokens <= max(1024, 4 * head_dim) else "triton_chunkwise"
        if guard.mlstm_agrees(torch.device(device), dtype, head_dim, form):
            return form
    if torch.device(device).type == "cpu" and dtype in NATIVE_DTYPES and build.available():
        return "native"
    return "parallel" if num_tokens <= max(256, 4 * head_dim) else "chunkwise"


@functools.cache
def _log_once(backend: str) -> None:
    log.info("mLSTM backend: %s", backend)


def _dtype_of(q: Tensor, log_f: Tensor) -> torch.dtype:
    """The dtype of q, or float64 if the gates need that."""
    return log_f.dtype if log_f.dtype == torch.float64 else q.dtype


def _check(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, positions: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or v.ndim != 4:
        raise ValueError(
            "q and k must have the same shape (B, H, N, D), and v the same except for D, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if i.shape != q.shape[:3] or f.shape != q.shape[:3]:
        raise ValueError(f"i and f must be (B, H, N) = {tuple(q.shape[:3])}, got {tuple(i.shape)} and {tuple(f.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have the same floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[2] == 0:
        raise ValueError("the sequence is empty: N must be at least 1")
    if positions is not None and (
        positions.shape != (q.shape[0], q.shape[2]) or positions.is_floating_point() or positions.dtype == torch.bool
    ):
        raise ValueError(
            f"positions must be integers (B, N) = ({q.shape[0]}, {q.shape[2]}), "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )


def gaps(positions: Tensor, reverse: bool) -> Tensor:
    """Distance of each token (B, N) from the previous token of the scan; 1 for the first."""
    one = torch.ones_like(positions[:, :1])
    distances = positions.diff(dim=1)
    return torch.cat([distances, one] if reverse else [one, distances], dim=1)
