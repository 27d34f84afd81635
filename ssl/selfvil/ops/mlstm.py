"""The mLSTM operator and its table of backends."""

from collections.abc import Callable

from torch import Tensor

from selfvil.ops.parallel import mlstm_parallel
from selfvil.ops.reference import mlstm_reference

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]] = {
    "reference": mlstm_reference,  # the paper's equations
    "parallel": mlstm_parallel,  # the same, fast: time grows with N², memory with N
}


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Matrix LSTM over a sequence (Beck et al., "xLSTM", 2024).

    Args:
        q, k, v: queries, keys and values, (B, H, N, D), one floating dtype.
        i, f: pre-activations of the input gate (exponential) and the forget gate (sigmoid), (B, H, N). Keep them in
            float32 when q, k, v are bfloat16.
        reverse: read the sequence from its end; equal to flipping every input and the output.
        backend: a name from `BACKENDS`, or "auto" for the fastest one that fits.

    Returns:
        h (B, H, N, D) in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend does not exist.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must share one shape (B, H, N, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if i.shape != q.shape[:3] or f.shape != q.shape[:3]:
        raise ValueError(f"i and f must be (B, H, N) = {tuple(q.shape[:3])}, got {tuple(i.shape)} and {tuple(f.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[2] == 0:
        raise ValueError("the sequence is empty: N must be at least 1")
    if backend == "auto":
        backend = "parallel"
    if backend not in BACKENDS:
        raise ValueError(f"no mLSTM backend {backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, i, f, reverse)
