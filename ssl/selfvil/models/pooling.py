"""Poolings: from tokens to one vector.

Alkin et al., "Vision-LSTM" (2024), section 4.3: the blocks scan the image from its first token to its last and back, so
that these two depend on the whole image; bilateral pooling uses both. Wang et al., "Mamba-R" (2024), concatenate the
register tokens instead.

Shapes: B images, R extra tokens (class token, registers), N patches in row-major order, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def bilateral_concat(x: Tensor) -> Tensor:
    """First and last token, concatenated: (B, N, C) to (B, 2·C)."""
    return torch.cat([x[:, 0], x[:, -1]], dim=-1)


def bilateral_avg(x: Tensor) -> Tensor:
    """Mean of first and last token: (B, N, C) to (B, C)."""
    return (x[:, 0] + x[:, -1]) / 2


def avg(x: Tensor) -> Tensor:
    """Mean of all tokens: (B, N, C) to (B, C)."""
    return x.mean(dim=1)


def middle_patch(x: Tensor) -> Tensor:
    """The token in the middle of the sequence, the later of two: (B, N, C) to (B, C)."""
    return x[:, x.shape[1] // 2]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bilateral_concat": lambda extra, patches: bilateral_concat(patches),
    "bilateral_avg": lambda extra, patches: bilateral_avg(patches),
    "bilateral_patch": lambda extra, patches: bilateral_avg(patches),  # a second name, used in published configurations
    "avg": lambda extra, patches: avg(patches),
    "middle_patch": lambda extra, patches: middle_patch(patches),
    "middle_cls": lambda extra, patches: extra[:, 0],
    "token": lambda extra, patches: extra[:, 0],  # timm's name for it
    "registers": lambda extra, patches: extra.flatten(1),
}
"""From extra tokens (B, R, C) and patches (B, N, C) to the pooled vector (B, D)."""

CLASS_TOKEN_POOLINGS = ("middle_cls", "token")


def pooled_dim(global_pool: str, dim: int, num_registers: int = 0) -> int:
    """Width D of the pooled vector; "" means no pooling, and D is `dim`.

    Raises ValueError for a pooling that does not exist, or for "registers" without registers.
    """
    names = [*POOLINGS, ""]
    if global_pool not in names:
        raise ValueError(f"global_pool = {global_pool!r} does not exist; choose one of: {', '.join(map(repr, names))}")
    if global_pool == "registers":
        if not num_registers:
            raise ValueError("global_pool = 'registers' needs register tokens: set num_registers, such as to 4")
        return num_registers * dim
    return 2 * dim if global_pool == "bilateral_concat" else dim
