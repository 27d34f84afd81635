"""Position embeddings, and their resampling to another grid."""

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models import register_notrace_function
from torch import Tensor

from selfvil.models.layout import Grid

INTERPOLATIONS = ("auto", "bicubic", "bicubic_antialias")
"""Antialiasing only where the grid shrinks, never (as published), or always (as in timm's vision transformers)."""


def sincos_positions(grid: Grid, dim: int) -> Tensor:
    """Fixed positions (1, H, W, C): sines and cosines of the column and the row, as in He et al., "MAE" (2022)."""
    return build_sincos2d_pos_embed(list(grid), dim).view(1, *grid, dim)


@register_notrace_function
def resample_positions(pos_embed: Tensor, grid: Grid, interpolation: str = "auto") -> Tensor:
    """Positions (1, H, W, C) resampled to another grid by bicubic interpolation.

    By default a larger grid is interpolated without antialiasing, as in the published code: its fine-tuned checkpoints
    depend on it. Raises ValueError for an `interpolation` that is not in `INTERPOLATIONS`.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"pos_interpolation = {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}")
    old = tuple(pos_embed.shape[1:3])
    if old == tuple(grid):
        return pos_embed
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    shrinks = grid[0] < old[0] or grid[1] < old[1]
    antialias = shrinks if interpolation == "auto" else interpolation == "bicubic_antialias"
    x = pos_embed.to(dtype).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(grid), mode="bicubic", antialias=antialias)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)
