"""Masks of patches, and moving tokens between the full grid and the kept ones.

`keep` (B, K) int64 always holds ascending token ids, so that kept tokens stay in row-major order; `masked` (B, N) bool
is true where a patch is hidden.

Shapes: B images, N = H·W tokens on the full grid, K kept ones, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def keep_from_noise(noise: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the tokens with the smallest noise; `noise` is (B, N). Ties go to the first."""
    return noise.argsort(dim=1, stable=True)[:, :num_keep].sort(dim=1).values


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each patch independently: MAE's mask."""
    return noise


def row_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whole rows of the grid, at random; the last one is cut where the requested number is reached."""
    return noise[:, : grid[0]].repeat_interleave(grid[1], dim=1)


def block_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Overlapping rectangles, as in BEiT (Bao et al., 2022), until the requested number of patches is hidden.

    Each covers between a twelfth and a third of the grid, with an aspect ratio from 0.3 to 1 / 0.3. The score of a
    patch depends on the first rectangle that covers it, so that the last rectangle is cut and the number of hidden
    patches is exact. As in BEiT, patches at the border are hidden less often. Four values of the noise make one
    rectangle; patches that no rectangle covers have random scores.
    """
    rows, columns = grid
    count = noise.shape[1] // 4
    if not count:
        return noise
    area, aspect, top, left = noise[:, : 4 * count].unflatten(1, (count, 4)).unsqueeze(-2).unbind(-1)  # (B, R, 1)
    area = rows * columns * (1 / 12 + area * (1 / 3 - 1 / 12))
    side = 0.3 ** (1 - 2 * aspect)  # uniform in the logarithm
    height = (area * side).sqrt().round().clamp(1, rows)
    width = (area / side).sqrt().round().clamp(1, columns)
    top, left = ((top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor())
    ids = torch.arange(rows * columns, device=noise.device)
    row, column = ids // columns, ids % columns
    covers = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (B, R, N)
    order = torch.arange(count, 0, -1, device=noise.device).view(-1, 1)
    scores = (covers * order).amax(dim=1)
    return torch.where(scores > 0, scores, noise)


MASKS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "random": random_scores,
    "block": block_scores,
    "row": row_scores,
}
"""For each kind of mask, from uniform noise (B, N) and the grid to scores (B, N): the highest scores are hidden."""


def sample_mask(kind: str, noise: Tensor, grid: tuple[int, int], num_hidden: int | Tensor) -> Tensor:
    """Masks (B, N), true where hidden, with exactly `num_hidden` hidden patches each.

    Args:
        kind: a name from `MASKS`.
        noise: uniform in [0, 1), (B, N), from `keyed_noise`, so that a mask depends on the sample and not on its batch.
        grid: rows and columns of patches, H · W = N.
        num_hidden: one number for all images, or int64 (B,).
    """
    scores = MASKS[kind](noise, grid)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= noise.shape[1] - torch.as_tensor(num_hidden, device=noise.device).view(-1, 1)


def kept_ids(masked: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the patches that are not masked in `masked` (B, N): num_keep in each row."""
    return masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_keep]
