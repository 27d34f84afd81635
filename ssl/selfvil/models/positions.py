"""Position embeddings, and their resampling to another grid."""

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models import register_notrace_function
from torch import Tensor

from selfvil.models.layout import Grid
from selfvil.ops.exporting import exporting

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
    if exporting() and any(isinstance(side, torch.SymInt) for side in grid):
        return _resample_in_graph(pos_embed, grid, interpolation)
    old = tuple(pos_embed.shape[1:3])
    if old == tuple(grid):
        return pos_embed
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    shrinks = grid[0] < old[0] or grid[1] < old[1]
    antialias = shrinks if interpolation == "auto" else interpolation == "bicubic_antialias"
    x = pos_embed.to(dtype).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(grid), mode="bicubic", antialias=antialias)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)


def _resample_in_graph(pos_embed: Tensor, grid: Grid, interpolation: str) -> Tensor:
    """`resample_positions` for a grid that is unknown when a graph is exported.

    The graph cannot branch on the grid, and not every runtime has torch's antialiased resize. Bicubic interpolation is
    linear and separable: positions are multiplied by one matrix for rows and one for columns, and both matrices are
    computed from the grid. For the original grid they are identity matrices.
    """
    rows, columns = (torch.arange(side, device=pos_embed.device, dtype=torch.float32) for side in grid)
    height, width = pos_embed.shape[1:3]
    if interpolation == "auto":
        antialias = (rows[-1] + 1 < height) | (columns[-1] + 1 < width)
    else:
        antialias = torch.tensor(interpolation == "bicubic_antialias", device=pos_embed.device)
    x = pos_embed[0].float()
    x = (_bicubic_weights(rows, height, antialias) @ x.flatten(1)).unflatten(1, (width, -1))  # (H, old width, C)
    x = _bicubic_weights(columns, width, antialias) @ x
    return x.unsqueeze(0).to(pos_embed.dtype)


def _bicubic_weights(rows: Tensor, old: int, antialias: Tensor) -> Tensor:
    """Weights (new, old) by which torch's bicubic interpolation sums old values; rows is 0, 1 ... new - 1.

    As in torch, the cubic has the parameter -0.5 with antialiasing, whose weights are renormalised at the borders, and
    -0.75 without, where the border's values are repeated.
    """
    scale = old / (rows[-1] + 1)
    places = torch.arange(old, device=rows.device, dtype=rows.dtype)
    centre = ((rows + 0.5) * scale).unsqueeze(1)
    smooth = _cubic((places + 0.5 - centre) / scale.clamp(min=1), -0.5)
    smooth = smooth / smooth.sum(dim=1, keepdim=True)
    taps = (centre - 0.5).floor() + torch.arange(-1, 3, device=rows.device)  # (new, 4)
    sharp = _cubic(centre - 0.5 - taps, -0.75)
    is_tap = taps.clamp(0, old - 1).unsqueeze(2) == places
    return torch.where(antialias, smooth, (sharp.unsqueeze(2) * is_tap).sum(dim=1))


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel with parameter `a`; 0 where |x| >= 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
