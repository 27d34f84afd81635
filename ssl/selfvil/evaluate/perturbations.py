"""Views of a perturbed image: some of its cells are occluded, or its cells change places.

From Naseer et al., "Intriguing properties of vision transformers", 2021 (arXiv 2105.10497), sections 3.1 and 3.4:
random drop of patches, and shuffled patches. Cells are fractions of the image, not patches of a network, so that
networks with different patches get the same images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Perturbed:
    """A view that returns the image itself and its perturbations, (V, C, H, W), in the order of `names`.

    view: from a decoded image to a normalised tensor (C, H, W). occlusions: fractions of the cells that become 0, the
    mean colour. cells: cells per side, for the occlusions. shuffles: cells per side of images whose cells are shuffled.
    Draws come from torch's global generator, which the loader seeds for each image: every network gets the same draws.
    An image with a larger fraction occluded has the occluded cells of one with a smaller fraction.
    """

    def __init__(
        self, view: Callable[[Any], Tensor], occlusions: Sequence[float], shuffles: Sequence[int], cells: int = 8
    ) -> None:
        self.view, self.occlusions, self.shuffles, self.cells = view, tuple(occlusions), tuple(shuffles), cells

    @property
    def names(self) -> list[str]:
        occluded = [f"occlusion_{round(100 * fraction)}" for fraction in self.occlusions]
        return ["clean", *occluded, *(f"shuffle_{side}" for side in self.shuffles)]

    def __call__(self, image: Any) -> Tensor:
        clean = self.view(image)
        order = torch.randperm(self.cells**2)
        occluded = [occlude(clean, order, self.cells, fraction) for fraction in self.occlusions]
        shuffled = [shuffle(clean, torch.randperm(side**2), side) for side in self.shuffles]
        return torch.stack([clean, *occluded, *shuffled])


def occlude(image: Tensor, order: Tensor, cells: int, fraction: float) -> Tensor:
    """A copy of `image` (C, H, W) in which the first `fraction` of the cells, in the given order, are 0.

    order: int64 (cells²,), a permutation of the row-major cells. Cells differ by a pixel where cells does not divide
    H or W.
    """
    hidden = torch.zeros(cells * cells, dtype=torch.bool)
    hidden[order[: round(fraction * cells * cells)]] = True
    _, height, width = image.shape
    rows = torch.arange(height) * cells // height
    columns = torch.arange(width) * cells // width
    return image.masked_fill(hidden[rows[:, None] * cells + columns], 0.0)


def shuffle(image: Tensor, order: Tensor, cells: int) -> Tensor:
    """A copy of `image` (C, H, W) whose cell i, row-major, is the cell order[i] of the image.

    Cells have H // cells by W // cells pixels; rows and columns that are left at the bottom and the right stay.
    """
    channels, height, width = image.shape
    high, wide = height // cells, width // cells
    whole = image[:, : high * cells, : wide * cells].reshape(channels, cells, high, cells, wide)
    moved = whole.permute(1, 3, 0, 2, 4).reshape(cells * cells, channels, high, wide)[order]
    result = image.clone()
    result[:, : high * cells, : wide * cells] = (
        moved.reshape(cells, cells, channels, high, wide).permute(2, 0, 3, 1, 4).reshape(channels, high * cells, -1)
    )
    return result
