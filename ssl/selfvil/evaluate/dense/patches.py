"""Patch features of images of any size, and a sample of them with the labels of their pixels.

An image is resized so that its sides are multiples of a cell, the region of one feature: a patch of a transformer, or
the stride of a convolutional network. Shapes: an image is (C, H, W), its features (D, h, w) with H = h · cell.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from selfvil.data.base import DamagedSample
from selfvil.errors import UserError
from selfvil.evaluate.dense.masks import Classes, Masked, readable
from selfvil.evaluate.processes import Processes
from selfvil.models.adapter import adapt
from selfvil.weights import Network, Normalisation

MOST_PIXELS = 2**20
"""Largest image that is computed in one pass; a larger one is cut into tiles, so that memory is bounded."""
_RAW_SIDE = 8  # of the pixels of a cell that are its features where there is no network
_Box = tuple[int, int, int, int]  # top, left, height, width


class PatchFeatures:
    """Features of each cell of an image, of a frozen network, or its raw pixels.

    Args:
        network: whose last layers are read after the final norm; None: the pixels of each cell, averaged to at most
            8 × 8 of them.
        cell: height and width of the region of a feature, in pixels.
        layers: number of last layers (a ViL's pairs of blocks, a ViT's blocks, a ConvNeXt's stages), concatenated.
        short_side: pixels to which the shorter side of each image is resized; None keeps it.
    """

    def __init__(
        self,
        network: Network | None,
        normalisation: Normalisation,
        cell: tuple[int, int],
        layers: int = 1,
        short_side: int | None = None,
        device: torch.device | None = None,
        bf16: bool = False,
    ) -> None:
        self.cell, self.layers, self.short_side = cell, layers, short_side
        self.normalisation, self.device, self.bf16 = normalisation, device or torch.device("cpu"), bf16
        self.backbone: nn.Module | None = None
        if network is not None:
            self.backbone = copy.deepcopy(network.backbone).to(self.device).eval()
            adapt(self.backbone).enable_dynamic_img_size()

    @property
    def channels(self) -> int:
        return self.normalisation.channels

    def size_of(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width to which an image is resized: the nearest multiples of the cell, at least one cell."""
        if self.short_side is not None:
            scale *= self.short_side / min(height, width)
        return tuple(max(1, round(side * scale / cell)) * cell for side, cell in zip((height, width), self.cell))  # type: ignore[return-value]

    def prepare(
        self, image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ) -> Tensor:
        """An image, or the `box` (left, top, right, bottom) of it, as a normalised tensor (C, *size), bicubic."""
        if box is not None or image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, np.float32)
        x = torch.from_numpy(pixels[:, :, None] if pixels.ndim == 2 else pixels).permute(2, 0, 1) / 255
        if self.backbone is None:
            return x
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.normalisation.mean, self.normalisation.std))
        return (x - mean) / std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of equal size to float32 features (B, D, h, w) on the device."""
        height, width = images.shape[-2:]
        if height * width > MOST_PIXELS:
            return self._in_tiles(images)
        grid = height // self.cell[0], width // self.cell[1]
        if self.backbone is None:
            return self._raw(images.to(self.device), grid)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            maps = self._maps(images.to(self.device))
        found = [
            each.float() if each.shape[-2:] == grid else F.interpolate(each.float(), grid, mode="bilinear")
            for each in maps
        ]
        return torch.cat(found, dim=1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Features (B, D, h, w) of the last layers."""
        backbone: Any = self.backbone
        adapter = adapt(backbone)
        if self.layers > 1:
            return backbone.forward_intermediates(
                images, indices=self.layers, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        features = adapter.forward_features(images)
        grid = adapter.patch_grid(features, images)
        if grid is None:
            raise UserError(
                f"the features of {adapter.name} are no grid of patches, so they cannot be evaluated densely"
            )
        return [adapter.split_tokens(features)[1].mT.unflatten(2, grid)]

    def _in_tiles(self, images: Tensor) -> Tensor:
        out: Tensor | None = None
        side = int(MOST_PIXELS**0.5)
        crop = tuple(max(1, side // cell) * cell for cell in self.cell)
        for top, left, height, width in windows(images.shape[-2:], crop, crop):
            tile = self(images[..., top : top + height, left : left + width])
            if out is None:
                grid = (side // cell for side, cell in zip(images.shape[-2:], self.cell))
                out = tile.new_empty(*tile.shape[:2], *grid)
            y, x = top // self.cell[0], left // self.cell[1]
            out[..., y : y + tile.shape[-2], x : x + tile.shape[-1]] = tile
        assert out is not None
        return out

    def _raw(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        side = min(_RAW_SIDE, self.cell[0]), min(_RAW_SIDE, self.cell[1])
        small = F.adaptive_avg_pool2d(images, (grid[0] * side[0], grid[1] * side[1]))
        # (B, C, h, i, w, j) -> (B, C i j, h, w)
        cells = small.unflatten(3, (grid[1], side[1])).unflatten(2, (grid[0], side[0]))
        return cells.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def windows(size: Sequence[int], crop: Sequence[int], stride: Sequence[int]) -> list[_Box]:
    """Boxes of at most `crop` that cover an image of `size`, all (height, width); the last ones end at its border.

    As sliding inference in mmsegmentation and DINOv2: windows begin at multiples of the stride, and one that would
    cross the border is moved back. An image smaller than a window has one window, of its own size.
    """
    starts = []
    for length, window, step in zip(size, crop, stride):
        count = max(0, -(-(length - window) // step)) + 1
        starts.append([(max(0, min(i * step, length - window)), min(window, length)) for i in range(count)])
    return [(top, left, height, width) for top, height in starts[0] for left, width in starts[1]]


def cell_of(backbone: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the region of one feature. Raises UserError for a network without such a size."""
    adapter, embed = adapt(backbone), getattr(backbone, "patch_embed", None)
    if adapter.has_patches:
        proj = getattr(embed, "proj", None)
        stride = getattr(proj, "stride", None) or getattr(embed, "patch_size", None)
        if stride is not None:
            return (stride, stride) if isinstance(stride, int) else (int(stride[0]), int(stride[1]))
    elif info := getattr(backbone, "feature_info", None):
        reduction = int(info[-1]["reduction"])
        return reduction, reduction
    raise UserError(f"{adapter.name} does not tell the size of its patches, so it cannot be evaluated densely")


# --- a sample of labelled patches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchSample:
    """x: float32 (M, D), patch features. pixels: uint8 (M, P), the class of each pixel of the patch, all labelled.
    label: int64 (M,), the most frequent one. image: int64 (M,), the image of each patch, ascending."""

    x: Tensor
    pixels: Tensor
    label: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def select(self, rows: Tensor) -> "PatchSample":
        return PatchSample(self.x[rows], self.pixels[rows], self.label[rows], self.image[rows])


def patch_labels(
    mask: np.ndarray, grid: tuple[int, int], cell: tuple[int, int], classes: Classes
) -> tuple[Tensor, ...]:
    """Of a mask (H, W): the pixels of each patch, uint8 (h w, P), the most frequent id int64 (h w,), -1 if ignored.

    The mask is resized by nearest neighbour to the size of the resized image. As in CAPI, a patch whose most frequent
    id is ignored has no label, and of equal ids the smaller one counts; other ignored pixels take the patch's label.
    """
    size = (grid[1] * cell[1], grid[0] * cell[0])
    if mask.shape[::-1] != size:
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    cells = mask.reshape(grid[0], cell[0], grid[1], cell[1]).transpose(0, 2, 1, 3).reshape(grid[0] * grid[1], -1)
    pixels = torch.from_numpy(np.ascontiguousarray(cells))
    label = pixels.mode(dim=1).values
    ignored = torch.tensor(classes.ignore, dtype=torch.uint8)
    pixels = torch.where(torch.isin(pixels, ignored), label[:, None], pixels)
    return pixels, torch.where(torch.isin(label, ignored), -1, label.long())


def sample_patches(
    features: PatchFeatures,
    part: Masked,
    classes: Classes,
    most: int,
    seed: int,
    bad: list[DamagedSample],
    processes: Processes,
    show: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> PatchSample | None:
    """About `most` labelled patches of `part`, the same number of each image, drawn by `seed`; None but on the main
    process. Every process reads its share of the images; the sample does not depend on their number. A collective.
    """
    chosen = list(range(len(part)))
    if len(part) > most:
        chosen = sorted(random.Random(seed).sample(chosen, most))
    quota = max(1, -(-most // len(chosen)))

    def own() -> tuple[Tensor, ...]:
        rows: list[tuple[Tensor, ...]] = []
        mine = chosen[processes.rank :: processes.world_size]
        for i, image, mask in show(readable(part, mine, features.channels, bad), len(mine)):
            size = features.size_of(*mask.shape)
            grid = size[0] // features.cell[0], size[1] // features.cell[1]
            pixels, label = patch_labels(mask, grid, features.cell, classes)
            usable = (label >= 0).nonzero()[:, 0]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
            taken = usable[torch.randperm(len(usable), generator=generator)[:quota]].sort().values
            if len(taken):
                x = features(features.prepare(image, size)[None])[0].flatten(1).mT.cpu()[taken]
                rows.append((x, pixels[taken], label[taken], torch.full((len(taken),), i)))
        if not rows:
            return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.uint8), *(torch.zeros(0, dtype=torch.int64),) * 2
        return tuple(torch.cat(column) for column in zip(*rows))

    gathered = [processes.gather_rows(column) for column in processes.together(own)]
    x, pixels, label, image = gathered
    if x is None or pixels is None or label is None or image is None:
        return None
    order = image.argsort(stable=True)
    return PatchSample(x, pixels, label, image).select(order)
