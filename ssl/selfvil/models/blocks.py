"""Blocks of Vision-LSTM, in pairs, and their scan orders.

The traversals other than "alternating" are those of the published ablations (Alkin et al., "Vision-LSTM", 2024,
version 1).

Shapes: B images, L tokens of the sequence (kept patches and extra tokens), C channels. Where tokens stand:
`selfvil.models.layout`.
"""

from typing import Any, NamedTuple

from timm.layers import DropPath, LayerScale, PatchEmbed
from timm.models import register_notrace_module
from torch import Tensor, nn

from selfvil.models.layers import ResidualLayerNorm, ViLLayer, residual_factors
from selfvil.models.layout import TokenLayout
from selfvil.models.mlp_block import MLPBlock


class Traversal(NamedTuple):
    """The scans of a network's blocks.

    Attributes:
        directions: scans within each block: 1, 2 (both directions) or 4 (rows and columns, in both directions).
        shared: the scans of a block share their parameters.
        alternates: every second block scans from the last token to the first.
        columns: every second pair scans columns instead of rows.
    """

    directions: int = 1
    shared: bool = False
    alternates: bool = False
    columns: bool = False


TRAVERSALS = {
    "alternating": Traversal(alternates=True),
    "unidirectional": Traversal(),
    "bidirectional": Traversal(directions=2),
    "bidirectional_shared": Traversal(directions=2, shared=True),
    "quad": Traversal(directions=4),
    "quad_shared": Traversal(directions=4, shared=True),
    "quad_alternating": Traversal(alternates=True, columns=True),
}


@register_notrace_module
class OverlappingPatchEmbed(PatchEmbed):
    """timm's patch embedding with a stride, in pixels, which may be smaller than the patch; None takes the patch size.

    `grid_size` remains that of patches without overlap: it is the grid for which positions are learned, as published.
    """

    def __init__(self, img_size, patch_size, in_chans: int, embed_dim: int, stride: int | None = None) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False)
        self.overlap = stride is not None
        if stride is not None:
            self.proj.stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, H', W', dim). Raises ValueError if the patch does not divide the sides."""
        # timm's version formats the sizes into the messages of its assertions, so that torch.compile would compile
        # again for each size.
        if x.shape[-2] % self.patch_size[0] or x.shape[-1] % self.patch_size[1]:
            raise ValueError(
                f"an image of {x.shape[-2]}x{x.shape[-1]} pixels cannot be divided into patches of "
                f"{self.patch_size[0]}x{self.patch_size[1]}: both sides must be multiples of the patch's"
            )
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        stride = self.proj.stride
        super().set_input_size(img_size, patch_size)
        if self.overlap:
            self.proj.stride = stride

    def feat_ratio(self, as_scalar: bool = True):
        return max(self.proj.stride) if as_scalar else self.proj.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (
            (side - patch) // stride + 1
            for side, patch, stride in zip(img_size, self.patch_size, self.proj.stride, strict=True)
        )
        return rows, columns


class ViLBlock(nn.Module):
    """The published block: x + DropPath(LayerScale(layer(norm(x)))).

    Args:
        dim: width C of the tokens.
        drop_path: probability of skipping the block for a sample.
        init_values: initial value of LayerScale; None omits LayerScale, as published.
        reverse, directions, shared, conv, bias, num_blocks: see `ViLLayer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        reverse: bool = False,
        directions: int = 1,
        shared: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        conv: str | None = "2d",
        bias: bool = True,
        num_blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = ResidualLayerNorm(dim, bias=bias)
        self.layer = ViLLayer(
            dim, reverse=reverse, directions=directions, shared=shared, conv=conv, bias=bias, num_blocks=num_blocks
        )
        self.ls = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Sequence x (B, L, C) to the same shape."""
        layer = self.layer
        if layer.runs_native(x, layout):
            residual = residual_factors(x, layer.proj_down, self.ls, self.drop_path)
            return layer.add_native(x, layout, self.norm, *residual)
        return x + self.drop_path(self.ls(layer(self.norm(x), layout)))


BLOCKS: dict[str, type[nn.Module]] = {"gated": ViLBlock, "mlp": MLPBlock}


@register_notrace_module
class ViLBlockPair(nn.Module):
    """Two blocks. In most traversals the first scans from the first token, and the second from the last.

    Args:
        dim: width C of the tokens.
        index: number of the pair in its network; in "quad_alternating", odd pairs scan columns.
        traversal: a name from `TRAVERSALS`.
        single: omit the second block, at the end of a network with an odd number of blocks.
        block: "gated", as published, or "mlp" (see `selfvil.models.mlp_block`).
        options: of the blocks, see `ViLBlock` and `MLPBlock`.

    Raises:
        ValueError: the block or the traversal does not exist.
    """

    def __init__(
        self,
        dim: int,
        *,
        index: int = 0,
        traversal: str = "alternating",
        single: bool = False,
        block: str = "gated",
        **options: Any,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block = {block!r} does not exist; choose one of: {', '.join(BLOCKS)}")
        if traversal not in TRAVERSALS:
            raise ValueError(f"traversal = {traversal!r} does not exist; choose one of: {', '.join(TRAVERSALS)}")
        scans = TRAVERSALS[traversal]
        self.columns = scans.columns and index % 2 == 1
        self.first, second = (
            BLOCKS[block](
                dim,
                reverse=scans.alternates and is_second,
                directions=scans.directions,
                shared=scans.shared,
                **options,
            )
            for is_second in (False, True)
        )
        self.second = None if single else second

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Sequence x (B, L, C) to the same shape."""
        if not self.columns:
            return self._run(x, layout)
        # Both blocks scan columns: reorder the tokens once, not in each block.
        return layout.to_rows(self._run(layout.to_columns(x), layout.columns))

    def _run(self, x: Tensor, layout: TokenLayout) -> Tensor:
        x = self.first(x, layout)
        return x if self.second is None else self.second(x, layout)
