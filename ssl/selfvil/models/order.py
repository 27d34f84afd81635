"""Where tokens stand in the sequence that is read: extra ones among patches, and columns instead of rows.

Patches are told by `keep` (B, K), ascending ids on the grid, row after row; None keeps all. R extra tokens (class
token, registers) stand among them at fixed slots of the full sequence; `places` (B, K + R) says where in the sequence
the patches and, after them, the extra tokens stand; None if there are no extra tokens.

Shapes: B images, H × W grid, N = H·W patches, K kept ones, R extra tokens, C channels.
"""

import math

import torch
from torch import Tensor

from selfvil.models.masking import gather_tokens, scatter_tokens

Grid = tuple[int, int]
"""Rows and columns of tokens."""


def compact_grid(count: int, grid: Grid) -> Grid:
    """The grid of `count` tokens whose sides are in the ratio nearest to that of `grid`."""
    ratio = math.log(grid[1] / grid[0])
    columns = (c for c in range(1, count + 1) if count % c == 0)
    best = min(columns, key=lambda c: abs(math.log(c * c / count) - ratio))
    return count // best, best


def slots(num_patches: int, num_extra: int, device: torch.device) -> Tensor:
    """Patches (R,) that stand before each extra token: each is in the middle of its part of R equal parts."""
    return num_patches * (2 * torch.arange(num_extra, device=device) + 1) // (2 * num_extra)


def places_of(keep: Tensor, num_patches: int, num_extra: int) -> Tensor:
    """Places (B, K + R) in the sequence of patches `keep` (B, K) and, after them, of the extra tokens."""
    before = slots(num_patches, num_extra, keep.device)
    extra = (keep.unsqueeze(-1) < before).sum(dim=1) + torch.arange(num_extra, device=keep.device)
    patches = torch.arange(keep.shape[1], device=keep.device) + extra_before(keep, num_patches, num_extra)
    return torch.cat([patches, extra], dim=1)


def extra_before(keep: Tensor, num_patches: int, num_extra: int) -> Tensor:
    """Extra tokens (B, K) that stand before each of the patches `keep` (B, K)."""
    return (keep.unsqueeze(-1) >= slots(num_patches, num_extra, keep.device)).sum(dim=-1)


def steps_of(keep: Tensor, places: Tensor | None, num_patches: int) -> Tensor:
    """Where each token of the sequence (B, K + R) stands in the one of all patches and the same extra tokens."""
    if places is None:
        return keep
    num_extra = places.shape[1] - keep.shape[1]
    extra = slots(num_patches, num_extra, keep.device) + torch.arange(num_extra, device=keep.device)
    steps = torch.cat([keep + extra_before(keep, num_patches, num_extra), extra.expand(len(keep), -1)], dim=1)
    return torch.empty_like(steps).scatter_(1, places, steps)


def all_patches(x: Tensor, grid: Grid) -> Tensor:
    """Ids (B, N) that keep every patch."""
    return torch.arange(grid[0] * grid[1], device=x.device).expand(x.shape[0], -1)


def join(patches: Tensor, extra: Tensor, places: Tensor) -> Tensor:
    """Patches (B, K, C) and extra tokens (B, R, C) at their places in one sequence (B, K + R, C)."""
    x = torch.cat([patches, extra], dim=1)
    return scatter_tokens(x, places, x.new_zeros(()), places.shape[1])


def split(x: Tensor, places: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """The `num_patches` patches and the extra tokens of a sequence, the reverse of `join`."""
    x = gather_tokens(x, places)
    return x[:, :num_patches], x[:, num_patches:]


class Columns:
    """Reads a sequence column after column, and puts it back row after row.

    Without dropped and extra tokens that is a transposition. With them, kept patches go into the order of their
    columns, and extra tokens stay at the same slots.

    Args:
        x: the sequence (B, K + R, C), for its size and device alone.
        grid, keep, places: of the sequence by rows.

    Attributes:
        grid, keep, places: of the sequence by columns.
    """

    def __init__(self, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None) -> None:
        height, width = self.rows_grid = grid
        self.grid, self.keep, self.places = (width, height), keep, places
        self.source: Tensor | None = None
        if keep is None and places is None:
            return
        ids = all_patches(x, grid) if keep is None else keep
        ids, order = (ids % width * height + ids // width).sort(dim=1)
        self.keep = None if keep is None else ids
        if places is None:
            self.source = order
            return
        num_extra = places.shape[1] - ids.shape[1]
        self.places = places_of(ids, height * width, num_extra)
        by_rows = torch.cat([places[:, : ids.shape[1]].gather(1, order), places[:, ids.shape[1] :]], dim=1)
        self.source = torch.empty_like(by_rows).scatter_(1, self.places, by_rows)

    def from_rows(self, x: Tensor) -> Tensor:
        """Sequence (B, K + R, C) by rows to the same by columns."""
        if self.source is None:
            return x.unflatten(1, self.rows_grid).transpose(1, 2).flatten(1, 2)
        return gather_tokens(x, self.source)

    def to_rows(self, x: Tensor) -> Tensor:
        """Sequence (B, K + R, C) by columns to the same by rows."""
        if self.source is None:
            return x.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)
        return scatter_tokens(x, self.source, x.new_zeros(()), x.shape[1])
