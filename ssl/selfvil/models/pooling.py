"""From a grid of tokens to one vector.

Alkin et al., "Vision-LSTM" (2024), section 4.3: the blocks read the image from its first token to its last and back,
so that these two have seen everything; bilateral pooling uses both.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def bilateral_concat(x: Tensor) -> Tensor:
    """First and last token side by side: (B, N, C) to (B, 2·C)."""
    return torch.cat([x[:, 0], x[:, -1]], dim=-1)


def bilateral_avg(x: Tensor) -> Tensor:
    """Mean of first and last token: (B, N, C) to (B, C)."""
    return (x[:, 0] + x[:, -1]) / 2


def avg(x: Tensor) -> Tensor:
    """Mean of all tokens: (B, N, C) to (B, C)."""
    return x.mean(dim=1)


def no_pooling(x: Tensor) -> Tensor:
    """Every token: (B, N, C) unchanged."""
    return x


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilateral_concat": bilateral_concat,
    "bilateral_avg": bilateral_avg,
    "avg": avg,
    "": no_pooling,
}


def pooled_dim(global_pool: str, dim: int) -> int:
    """Width of the pooled vector. Raises ValueError for a pooling that does not exist."""
    if global_pool not in POOLINGS:
        raise ValueError(
            f"global_pool = {global_pool!r} does not exist; choose one of: {', '.join(map(repr, POOLINGS))}"
        )
    return 2 * dim if global_pool == "bilateral_concat" else dim
