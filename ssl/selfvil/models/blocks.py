"""Blocks of Vision-LSTM: a layer with its norm and its residual, and pairs of them.

Shapes: B images, K tokens kept of a grid, C channels.
"""

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from selfvil.models.layers import Grid, ResidualLayerNorm, ViLLayer


class ViLBlock(nn.Module):
    """x + DropPath(LayerScale(layer(norm(x)))).

    Args:
        dim: width C of the tokens.
        reverse: read the tokens from the last to the first.
        drop_path: probability of leaving the block out for a sample.
        init_values: initial value of LayerScale; None leaves LayerScale out, as published.
        num_blocks: see `ViLLayer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        reverse: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        num_blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = ResidualLayerNorm(dim)
        self.layer = ViLLayer(dim, reverse=reverse, num_blocks=num_blocks)
        self.ls = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` (B, K) is None), to the same shape."""
        return x + self.drop_path(self.ls(self.layer(self.norm(x), grid, keep)))


class ViLBlockPair(nn.Module):
    """Two blocks, the first reading the image from its first token, the second from its last. Arguments: `ViLBlock`."""

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float = 0.0,
        init_values: float | None = None,
        num_blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second = (
            ViLBlock(dim, reverse=reverse, drop_path=drop_path, init_values=init_values, num_blocks=num_blocks)
            for reverse in (False, True)
        )

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` (B, K) is None), to the same shape."""
        return self.second(self.first(x, grid, keep), grid, keep)
