"""Depthwise convolutions of tokens at their places: 3 × 3 on the grid, or back along the sequence (version 1).

No tensor of tokens is flipped for a reading from the end: the kernel is, which is small.

Shapes: B images, N = H·W patches on the full grid, K tokens of the sequence (kept patches, and extra tokens if there
are any), C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.models.masking import gather_tokens, scatter_tokens
from selfvil.models.order import Grid, compact_grid, join, split, steps_of

CONVS = ("2d", "causal1d", "none", None)
"""3 × 3 on the grid, 4 tokens along the sequence, or none, which is a word too, because timm.create_model hands no None
on."""


def depthwise_conv(kind: str | None, dim: int) -> nn.Conv2d | nn.Conv1d | None:
    """The convolution of `kind`, one of `CONVS`. Raises ValueError for another."""
    if kind == "2d":
        return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
    if kind == "causal1d":
        return nn.Conv1d(dim, dim, kernel_size=4, padding=3, groups=dim)
    if kind in CONVS:
        return None
    raise ValueError(f"conv = {kind!r} does not exist; choose one of: {', '.join(map(repr, CONVS))}")


def convolve(
    conv: nn.Conv2d | nn.Conv1d,
    x: Tensor,
    grid: Grid,
    keep: Tensor | None = None,
    places: Tensor | None = None,
    *,
    reverse: bool = False,
    compact: bool = False,
) -> Tensor:
    """Tokens (B, K, C) to the same shape, with zeros where none was kept.

    Args:
        grid, keep, places: where the tokens stand, see `selfvil.models.order`.
        reverse: by the turned kernel, so that a sequence read from its end meets it as one read from its start does.
        compact: kept tokens stand side by side, as if they were all there is.
    """
    if compact and keep is not None:
        grid, keep = compact_grid(keep.shape[1], grid), None
    if isinstance(conv, nn.Conv2d):
        return _on_grid(conv, x, grid, keep, places, reverse)
    return _on_sequence(conv, x, grid, keep, places, reverse)


def _on_grid(
    conv: nn.Conv2d, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None, reverse: bool
) -> Tensor:
    """3 × 3 on the grid. Extra tokens have no place on it: they see themselves, through the kernel's centre."""
    if places is not None:
        patches, extra = split(x, places, grid[0] * grid[1] if keep is None else keep.shape[1])
        patches = _on_grid(conv, patches, grid, keep, None, reverse)
        extra = torch.addcmul(conv.bias, extra, conv.weight[:, 0, 1, 1])  # type: ignore[arg-type]  # it has one
        return join(patches, extra, places)
    weight = conv.weight.flip(2, 3) if reverse else conv.weight
    if keep is not None:
        x = scatter_tokens(x, keep, x.new_zeros(()), grid[0] * grid[1])
    # Tokens last to channels last is a change of strides, not of memory.
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, conv.bias, padding=conv.padding, groups=conv.groups)
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    return x if keep is None else gather_tokens(x, keep)


def _on_sequence(
    conv: nn.Conv1d, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None, reverse: bool
) -> Tensor:
    """A token and the three read before it, extra tokens among them."""
    ids = None
    if keep is not None:
        num_extra = 0 if places is None else places.shape[1] - keep.shape[1]
        ids = steps_of(keep, places, grid[0] * grid[1])
        x = scatter_tokens(x, ids, x.new_zeros(()), grid[0] * grid[1] + num_extra)
    weight, padding = conv.weight.flip(2) if reverse else conv.weight, conv.kernel_size[0] - 1
    x = F.conv1d(x.mT, weight, conv.bias, padding=padding, groups=conv.groups)
    x = (x[..., padding:] if reverse else x[..., :-padding]).mT
    return x if ids is None else gather_tokens(x, ids)
