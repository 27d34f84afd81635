"""Positions of tokens on their grid, and on another one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.models.layers import Grid


def resample_positions(pos_embed: Tensor, grid: Grid) -> Tensor:
    """Positions (1, H, W, C) on another grid, by bicubic interpolation; smoothed only where the grid shrinks.

    Growing is interpolated as in the published code, whose fine-tuned checkpoints rely on it.
    """
    old = tuple(pos_embed.shape[1:3])
    if old == tuple(grid):
        return pos_embed
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    shrinks = grid[0] < old[0] or grid[1] < old[1]
    x = pos_embed.to(dtype).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(grid), mode="bicubic", antialias=shrinks)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)
