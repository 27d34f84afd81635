"""Blocks of Vision-LSTM, in pairs, and the orders in which they read.

The traversals beside "alternating" are those of the published ablations (Alkin et al., "Vision-LSTM", 2024, version 1).

Shapes: B images, K tokens of the sequence (kept patches of a grid, and extra tokens if there are any), C channels.
"""

from typing import Any, NamedTuple

from timm.layers import DropPath, LayerScale, PatchEmbed
from timm.models import register_notrace_module
from torch import Tensor, nn

from selfvil.models.layers import Grid, ResidualLayerNorm, ViLLayer
from selfvil.models.mlp_block import MLPBlock
from selfvil.models.order import Columns


class Traversal(NamedTuple):
    """How blocks read.

    directions: readings within each block: 1, 2 (both ways) or 4 (rows and columns, both ways).
    shared: they share their parameters.
    alternates: with one reading, every second block reads backwards.
    columns: and every second pair reads columns instead of rows.
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
    """timm's patch embedding with a stride, in pixels, that may be less than the patch; None takes the patch.

    `grid_size` stays that of patches without overlap: it is the grid for which positions are learned, as published.
    """

    def __init__(self, img_size, patch_size, in_chans: int, embed_dim: int, stride: int | None = None) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False)
        self.overlap = stride is not None
        if stride is not None:
            self.proj.stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, H', W', dim). Raises ValueError if sides are not whole patches."""
        # timm's own has the sizes in its assertions' messages, for which torch.compile would compile each size anew.
        if x.shape[-2] % self.patch_size[0] or x.shape[-1] % self.patch_size[1]:
            raise ValueError(
                f"an image of {x.shape[-2]}x{x.shape[-1]} pixels is no grid of {self.patch_size[0]}x"
                f"{self.patch_size[1]} patches: both sides must be multiples of the patch's"
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
        drop_path: probability of leaving the block out for a sample.
        init_values: initial value of LayerScale; None leaves LayerScale out, as published.
        bias: see `ViLLayer`, as for all further arguments.
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

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` is None), to the same shape."""
        return x + self.drop_path(self.ls(self.layer(self.norm(x), grid, keep, places)))


BLOCKS: dict[str, type[nn.Module]] = {"gated": ViLBlock, "mlp": MLPBlock}


@register_notrace_module
class ViLBlockPair(nn.Module):
    """Two blocks, the first reading the image from its first token, the second, unless told otherwise, from its last.

    Args:
        dim: width C of the tokens.
        index: number of the pair in its network, which decides between rows and columns in "quad_alternating".
        traversal: a name from `TRAVERSALS`.
        single: leave out the second block, as at the end of an odd number of blocks.
        block: "gated", as published, or "mlp" (see `selfvil.models.mlp_block`).
        options: of the blocks, see `ViLBlock` and `MLPBlock`.
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
        order = TRAVERSALS[traversal]
        self.columns = order.columns and index % 2 == 1
        self.first, second = (
            BLOCKS[block](
                dim,
                reverse=order.alternates and is_second,
                directions=order.directions,
                shared=order.shared,
                **options,
            )
            for is_second in (False, True)
        )
        self.second = None if single else second

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` is None), to the same shape."""
        if self.columns:  # both blocks read the transposed image: it is transposed but once, outside of them
            columns = Columns(x, grid, keep, places)
            return columns.to_rows(self.run(columns.from_rows(x), columns.grid, columns.keep, columns.places))
        return self.run(x, grid, keep, places)

    def run(self, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None) -> Tensor:
        """Both blocks one after the other."""
        x = self.first(x, grid, keep, places)
        return x if self.second is None else self.second(x, grid, keep, places)
