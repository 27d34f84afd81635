"""Where tokens stand: on the grid of patches, in the sequence that blocks process, and in column order.

A sequence holds the kept patches of an image in row-major order. Extra tokens (class token, registers) are inserted
among them at fixed points of the full grid: of R extra tokens, each stands in the middle of one of R equal parts. A
`TokenLayout` is made once for a forward pass and passed to every block, so that no block sorts or counts again.

Shapes: B images, H × W grid, N = H·W patches, K kept ones, R extra tokens, L = K + R tokens of the sequence, C
channels. Indices are int64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of tokens."""


class TokenIndex(NamedTuple):
    """Positions of some tokens in a longer sequence, for each image.

    Attributes:
        ids: (B, K).
        flat: the same (B·K,) for the images' sequences end to end. Copying whole rows of a matrix is several times
            faster than `torch.gather`.
        length: of the longer sequence.
    """

    ids: Tensor
    flat: Tensor
    length: int

    @classmethod
    def of(cls, ids: Tensor, length: int) -> "TokenIndex":
        """The index for `ids` (B, K), each below `length`."""
        first = torch.arange(0, ids.shape[0] * length, length, device=ids.device)
        return cls(ids, (ids + first.unsqueeze(1)).flatten(), length)

    def gather(self, x: Tensor) -> Tensor:
        """Tokens (B, length, C) to those at `ids`, (B, K, C)."""
        return x.flatten(0, 1).index_select(0, self.flat).unflatten(0, self.ids.shape)

    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Tokens (B, K, C) to (B, length, C), in the dtype of x, with `fill` at all other positions.

        `fill` is (C,) or broadcasts to (B, length, C); None fills with zeros. Differentiable in x and fill.
        """
        fill = x.new_zeros(()) if fill is None else fill.to(x.dtype)
        canvas = fill.expand(x.shape[0], self.length, x.shape[-1]).flatten(0, 1)
        return canvas.index_copy(0, self.flat, x.flatten(0, 1)).unflatten(0, (-1, self.length))


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """Tokens x (B, N, C) to the kept ones (B, K, C); `keep` holds their ids (B, K)."""
    return TokenIndex.of(keep, x.shape[1]).gather(x)


def scatter_tokens(x: Tensor, keep: Tensor, fill: Tensor, num_tokens: int) -> Tensor:
    """Kept tokens x (B, K, C) to (B, N, C), with `fill` where no token was kept.

    Args:
        x: kept tokens (B, K, C).
        keep: their ids (B, K), each below `num_tokens`.
        fill: (C,), or anything that broadcasts to (B, N, C).
        num_tokens: N.

    Returns:
        (B, N, C) in the dtype of x, differentiable in x and fill.
    """
    return TokenIndex.of(keep, num_tokens).scatter(x, fill)


class TokenLayout(NamedTuple):
    """Where the tokens of a sequence (B, L, C) stand. `TokenLayout(grid)` is the layout of all patches and no others.

    A named tuple: immutable, understood by torch.compile, and DeepSpeed and FSDP find the tensors in it.

    Attributes:
        grid: H × W, rows and columns of the full grid.
        num_extra: R.
        kept: positions of the kept patches (B, K) on the full grid; None keeps all.
        sequence_index: positions in the sequence (B, L) of the patches and, after them, of the extra tokens; None if
            there are no extra tokens.
        full_index: positions of the sequence's tokens (B, L) in the sequence of all N patches and the same extra
            tokens; None if all patches are kept.
        places: positions of the sequence's tokens (B, L) on `places_grid`; None if it holds all patches and no others.
        token_at: the token of the sequence at each place (B, places), -1 for none: the inverse of `places`, or None.
        gap_aware: see `scan_positions`.
        compact_grid: the grid on which a convolution places kept patches side by side, as if there were no others;
            None places them on the full grid, with zeros in place of dropped patches.
        column_order: positions in the sequence (B, L) of its tokens in column order, see `columns`.
        column_layout: the layout of the sequence in column order, see `columns`.
    """

    grid: Grid
    num_extra: int = 0
    kept: TokenIndex | None = None
    sequence_index: TokenIndex | None = None
    full_index: TokenIndex | None = None
    places: Tensor | None = None
    token_at: Tensor | None = None
    gap_aware: bool = False
    compact_grid: Grid | None = None
    column_order: TokenIndex | None = None
    column_layout: "TokenLayout | None" = None

    @classmethod
    def of(
        cls,
        patches: Tensor,
        grid: Grid,
        keep: Tensor | None = None,
        *,
        num_extra: int = 0,
        gap_aware: bool = False,
        compact_conv: bool = False,
        columns: bool = True,
    ) -> "TokenLayout":
        """The layout of a sequence of patches and extra tokens.

        Args:
            patches: (B, K, C); only their number and their device matter.
            grid: H × W, rows and columns of the full grid.
            keep: ids (B, K) of the kept patches, ascending; None keeps all.
            num_extra: R, the number of extra tokens.
            gap_aware: each dropped patch between two kept ones makes the mLSTM forget once more.
            compact_conv: convolutions place kept patches side by side.
            columns: prepare `columns`; without it, only a layout of all patches and no others has them.
        """
        if keep is None and not num_extra:
            return cls(grid)
        num_patches = grid[0] * grid[1]
        ids = keep
        if ids is None:
            ids = torch.arange(num_patches, device=patches.device).expand(patches.shape[0], -1)
        layout = cls._by_rows(ids, grid, keep is not None, num_extra, gap_aware, compact_conv)
        if not columns:
            return layout
        height, width = grid
        row = ids // width
        ids, order = ((ids - row * width) * height + row).sort(dim=1)  # ONNX has no remainder of a dynamic width
        transposed = cls._by_rows(ids, (width, height), keep is not None, num_extra, gap_aware, compact_conv)
        if layout.sequence_index is not None and transposed.sequence_index is not None:
            rows, num_kept = layout.sequence_index.ids, ids.shape[1]
            rows = torch.cat([rows[:, :num_kept].gather(1, order), rows[:, num_kept:]], dim=1)
            order = torch.empty_like(rows).scatter_(1, transposed.sequence_index.ids, rows)
        return layout._replace(column_order=TokenIndex.of(order, order.shape[1]), column_layout=transposed)

    @classmethod
    def _by_rows(
        cls, ids: Tensor, grid: Grid, dropped: bool, num_extra: int, gap_aware: bool, compact_conv: bool
    ) -> "TokenLayout":
        """The layout of patches `ids` (B, K) without its columns; `dropped`: they are not all patches of the grid."""
        num_patches, num_kept = grid[0] * grid[1], ids.shape[1]
        kept = full_index = TokenIndex.of(ids, num_patches) if dropped else None
        sequence_index, places = None, ids if dropped else None
        if num_extra:
            points = insertion_points(num_patches, num_extra, ids.device)
            extra_number = torch.arange(num_extra, device=ids.device)
            extra_before = (ids.unsqueeze(-1) >= points).sum(dim=-1)  # (B, K): extra tokens before each patch
            extra = (ids.unsqueeze(-1) < points).sum(dim=1) + extra_number
            patches = torch.arange(num_kept, device=ids.device) + extra_before
            sequence = torch.cat([patches, extra], dim=1)
            sequence_index = TokenIndex.of(sequence, num_kept + num_extra)
            places = torch.cat([ids, apart(grid, num_extra, ids.device).expand(ids.shape[0], -1)], dim=1)
            places = torch.empty_like(places).scatter_(1, sequence, places)
            if dropped:
                full = torch.cat([ids + extra_before, (points + extra_number).expand(ids.shape[0], -1)], dim=1)
                full = torch.empty_like(full).scatter_(1, sequence, full)
                full_index = TokenIndex.of(full, num_patches + num_extra)
        side_by_side = compact_grid(num_kept, grid) if compact_conv and dropped else None
        layout = cls(
            grid, num_extra, kept, sequence_index, full_index, places, gap_aware=gap_aware, compact_grid=side_by_side
        )
        if places is None:
            return layout
        tokens = torch.arange(places.shape[1], device=ids.device).expand_as(places)
        free = places.new_full((places.shape[0], math.prod(layout.places_grid)), -1)
        return layout._replace(token_at=free.scatter_(1, places, tokens))

    @property
    def dense(self) -> bool:
        """The sequence holds all patches and no other tokens."""
        return self.kept is None and self.sequence_index is None

    @property
    def places_grid(self) -> Grid:
        """The grid with rows below it in which each extra token stands alone: a 3 × 3 convolution on this grid reaches
        no other token from there."""
        height, width = self.grid
        return height + 2 * -(-self.num_extra // _apart_in_row(width)), width

    @property
    def placed(self) -> tuple[Tensor, Tensor] | None:
        """`places` and `token_at`, or None."""
        return None if self.places is None or self.token_at is None else (self.places, self.token_at)

    @property
    def scan_positions(self) -> Tensor | None:
        """Positions (B, L) for `selfvil.ops.mlstm`, if it forgets once for each dropped patch; else None."""
        return self.full_index.ids if self.gap_aware and self.full_index is not None else None

    def insert_extra(self, patches: Tensor, extra: Tensor) -> Tensor:
        """Patches (B, K, C) and extra tokens (B, R, C) to the sequence (B, L, C)."""
        assert self.sequence_index is not None, "the layout was made without extra tokens"
        return self.sequence_index.scatter(torch.cat([patches, extra], dim=1))

    def separate_extra(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sequence (B, L, C) to patches (B, K, C) and extra tokens (B, R, C), None if there are none."""
        if self.sequence_index is None:
            return x, None
        x, num_kept = self.sequence_index.gather(x), x.shape[1] - self.num_extra
        return x[:, :num_kept], x[:, num_kept:]

    def to_grid(self, patches: Tensor) -> Tensor:
        """Patches (B, K, C) to the grid of a convolution (B, H, W, C), zeros in place of dropped patches."""
        if self.compact_grid is not None:
            return patches.unflatten(1, self.compact_grid)
        return (patches if self.kept is None else self.kept.scatter(patches)).unflatten(1, self.grid)

    def from_grid(self, x: Tensor) -> Tensor:
        """The inverse of `to_grid`: (B, H, W, C) to (B, K, C)."""
        x = x.flatten(1, 2)
        return x if self.kept is None or self.compact_grid is not None else self.kept.gather(x)

    @property
    def columns(self) -> "TokenLayout":
        """The layout of the sequence in column order: that of the transposed grid, extra tokens at the same points."""
        if self.dense:
            return TokenLayout(self.grid[::-1])
        assert self.column_layout is not None, "the layout was made with columns=False"
        return self.column_layout

    def to_columns(self, x: Tensor) -> Tensor:
        """The sequence (B, L, C) in row order to the sequence in column order."""
        if self.dense:
            return x.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)
        assert self.column_order is not None, "the layout was made with columns=False"
        return self.column_order.gather(x)

    def to_rows(self, x: Tensor) -> Tensor:
        """The inverse of `to_columns`."""
        if self.dense:
            return x.unflatten(1, self.grid[::-1]).transpose(1, 2).flatten(1, 2)
        assert self.column_order is not None, "the layout was made with columns=False"
        return self.column_order.scatter(x)


def insertion_points(num_patches: int, num_extra: int, device: torch.device) -> Tensor:
    """For each extra token the number of patches before it, (R,): the middles of R equal parts of the sequence."""
    return num_patches * (2 * torch.arange(num_extra, device=device) + 1) // (2 * num_extra)


def apart(grid: Grid, num_extra: int, device: torch.device) -> Tensor:
    """Positions of extra tokens (R,) on `TokenLayout.places_grid`: every second column of every second row below."""
    (height, width), number = grid, torch.arange(num_extra, device=device)
    in_row = _apart_in_row(width)
    return (height + 1 + 2 * (number // in_row)) * width + 2 * (number % in_row)


def _apart_in_row(width: int) -> int:
    return (width + 1) // 2


def compact_grid(count: int, grid: Grid) -> Grid:
    """The grid of `count` tokens whose aspect ratio is nearest to that of `grid`."""
    ratio = math.log(grid[1] / grid[0])
    columns = (c for c in range(1, count + 1) if count % c == 0)
    best = min(columns, key=lambda c: abs(math.log(c * c / count) - ratio))
    return count // best, best
