"""A linear head on frozen patch features: batch normalisation and a 1 × 1 convolution, predicted in sliding windows.

The linear segmentation protocol of DINOv2 (Oquab et al., 2023, arXiv 2304.07193) and DINOv3 (Siméoni et al., 2025,
arXiv 2508.10104): crops of 512 pixels of images at 0.5 to 2 times their size, flipped at random; logits are resized to
the pixels of the crop by bilinear interpolation; cross-entropy of every labelled pixel; AdamW, a linear warm-up and a
linear decay. A test image is predicted in windows of 512 pixels with a stride of 341, whose logits are averaged.

Shapes: T tokens, D features, K classes, h and w the grid of an image of H × W pixels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from selfvil.data.base import DamagedSample
from selfvil.data.read import DamagedImage
from selfvil.evaluate.dense.masks import Classes, Masked, ahead
from selfvil.evaluate.dense.patches import PatchFeatures, windows
from selfvil.evaluate.processes import Processes


@dataclass(frozen=True)
class Training:
    """How a head is trained; the names are those of the settings of `segment`."""

    iterations: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    scale: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class LinearHead:
    """The batch normalisation and the convolution as one affine map: weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (K, H, W) of features (D, h, w), resized to `size` = (H, W)."""
        scores = torch.einsum("kd,dhw->khw", self.weight, features) + self.bias[:, None, None]
        return F.interpolate(scores[None], tuple(size), mode="bilinear", align_corners=False)[0]

    def predict(
        self,
        features: Callable[[tuple[int, int, int, int]], Tensor],
        size: Sequence[int],
        crop: Sequence[int],
        stride: Sequence[int],
    ) -> Tensor:
        """Classes uint8 (H, W) of an image of `size`, the mean of the logits of all windows at each pixel.

        features: the features (D, h, w) of a window (top, left, height, width). Only the logits of one row of windows
        are held.
        """  # fmt: skip
        boxes = windows(size, crop, stride)
        tops = sorted({top for top, *_ in boxes})
        rows: list[Tensor] = []
        total: Tensor | None = None
        for number, top in enumerate(tops):
            for box in (box for box in boxes if box[0] == top):
                _, left, height, width = box
                found = self.logits(features(box), (height, width))
                if total is None:
                    total = found.new_zeros(len(self.weight) + 1, height, size[1])
                total[:-1, :, left : left + width] += found
                total[-1, :, left : left + width] += 1
            assert total is not None
            done = (tops[number + 1] if number + 1 < len(tops) else size[0]) - top
            rows.append((total[:-1, :done] / total[-1, :done]).argmax(dim=0).to(torch.uint8))
            total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], dim=1)
        return torch.cat(rows)

    def to(self, device: torch.device) -> "LinearHead":
        return LinearHead(self.weight.to(device), self.bias.to(device))


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Crop:
    """A crop: the image, the box (left, top, right, bottom) in its pixels, the size of the result, and a flip."""

    image: int
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool


def draw_crops(features: PatchFeatures, part: Masked, crop: Sequence[int], how: Training, seed: int) -> list[_Crop]:
    """The crops of all iterations; each image is used once before one is used again."""
    generator, crops, order = random.Random(seed), list[_Crop](), list[int]()
    while len(crops) < how.iterations * how.batch_size:
        if not order:
            order = generator.sample(range(len(part)), len(part))
        image = order.pop()
        height, width = (int(side) for side in part.sizes[image])
        full = features.size_of(height, width, generator.uniform(*how.scale))
        size = (min(full[0], crop[0]), min(full[1], crop[1]))
        top, left = generator.randint(0, full[0] - size[0]), generator.randint(0, full[1] - size[1])
        y, x = height / full[0], width / full[1]
        box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
        crops.append(_Crop(image, box, size, how.flip and generator.random() < 0.5))
    return crops


def train_head(
    features: PatchFeatures,
    part: Masked,
    classes: Classes,
    crop: Sequence[int],
    how: Training,
    seed: int,
    bad: list[DamagedSample],
    processes: Processes,
    show: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> LinearHead | None:
    """A head trained on crops of `part`; None but on the main process.

    Every process computes the features of its share of each batch, and the main process alone trains on all, so that
    the result does not depend on the number of processes, to rounding. A collective.
    """
    crops = draw_crops(features, part, crop, how, seed)
    rank, world, batch = processes.rank, processes.world_size, how.batch_size
    starts = range(0, len(crops), batch)
    mine = [each for start in starts for each in crops[start : start + batch][rank::world]]
    loaded = _load(features, part, mine, bad)
    trainer: _Trainer | None = None
    for start in show(iter(starts), len(starts)):
        group = crops[start : start + batch]
        own = len(group[rank::world])
        tokens, labels = processes.together(partial(_tokens, features, loaded, own))
        if world > 1:
            gathered = processes.gather_rows(tokens.cpu()), processes.gather_rows(labels)
        else:
            gathered = tokens, labels
        if gathered[0] is None or gathered[1] is None:
            continue
        by_rank = [each for first in range(world) for each in group[first::world]]
        if trainer is None:
            trainer = _Trainer(gathered[0].shape[1], len(classes), how, seed, features.device)
        with processes.interrupts():
            trainer.step(gathered[0], gathered[1], [each.size for each in by_rank], features.cell, classes)
    return None if trainer is None else trainer.head()


class _Trainer:
    def __init__(self, width: int, num_classes: int, how: Training, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm, self.conv = nn.BatchNorm1d(width), nn.Linear(width, num_classes)  # 1 × 1: linear on each token
            nn.init.normal_(self.conv.weight, std=0.01)
            nn.init.zeros_(self.conv.bias)
        self.model = nn.Sequential(self.norm, self.conv).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        warm = max(1, round(how.warmup * how.iterations))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm, max(0.0, (how.iterations - step) / max(1, how.iterations - warm))),
        )
        self.device = device

    @torch.enable_grad()
    def step(
        self, tokens: Tensor, pixels: Tensor, sizes: list[tuple[int, int]], cell: Sequence[int], classes: Classes
    ) -> None:
        """One update on the tokens (T, D) of crops of these sizes and the ids of their pixels, uint8 (sum H W, 1)."""
        target = torch.from_numpy(classes.without_ignored(pixels[:, 0].numpy())).to(self.device)
        labelled = int((target >= 0).sum())
        if labelled and len(tokens) > 1:
            scores = self.model(tokens.to(self.device))
            grids = [(height // cell[0], width // cell[1]) for height, width in sizes]
            parts = zip(scores.split([h * w for h, w in grids]), target.split([h * w for h, w in sizes]), grids, sizes)
            loss = scores.new_zeros(())
            for found, truth, grid, size in parts:
                logits = F.interpolate(found.mT.reshape(1, -1, *grid), size, mode="bilinear", align_corners=False)
                loss = loss + F.cross_entropy(logits, truth.view(1, *size), ignore_index=-1, reduction="sum")
            self.optimizer.zero_grad()
            (loss / labelled).backward()
            self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def head(self) -> LinearHead:
        norm: Any = self.norm
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * factor
        return LinearHead(self.conv.weight * factor, self.conv.bias + self.conv.weight @ shift)


def _load(
    features: PatchFeatures, part: Masked, crops: list[_Crop], bad: list[DamagedSample]
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Image (C, H, W) and ids uint8 (H, W) of each crop. One of a damaged image is grey and has the id 255 everywhere.
    """  # fmt: skip
    known: set[int] = set()

    def files() -> Iterator[tuple[_Crop, tuple[bytes, bytes] | DamagedImage]]:
        for crop in crops:
            try:
                yield crop, part.read(crop.image)
            except DamagedImage as error:
                yield crop, error

    def decode(item: tuple[_Crop, tuple[bytes, bytes] | DamagedImage]) -> tuple[Tensor, np.ndarray]:
        crop, data = item
        try:
            if isinstance(data, DamagedImage):
                raise data
            image, mask = part.decode(data, features.channels)
        except DamagedImage as error:
            if crop.image not in known:
                known.add(crop.image)
                bad.append(DamagedSample(part.shards.shard_of(crop.image), part.shards.key(crop.image), str(error)))
            return torch.zeros(features.channels, *crop.size), np.full(crop.size, 255, np.uint8)
        x = features.prepare(image, crop.size, crop.box)
        ids = Image.fromarray(mask).resize(crop.size[::-1], Image.Resampling.NEAREST, box=crop.box)
        y = np.asarray(ids)
        return (x.flip(2), y[:, ::-1].copy()) if crop.flip else (x, y)

    return ahead(decode, files())


def _tokens(features: PatchFeatures, crops: Iterator[tuple[Tensor, np.ndarray]], count: int) -> tuple[Tensor, Tensor]:
    """Tokens (T, D) of the next crops, and the ids of their pixels (sum H W, 1); crops of equal size in one pass."""
    loaded = list(islice(crops, count))
    if not loaded:
        return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.uint8)
    found: dict[int, Tensor] = {}
    sizes = [tuple(image.shape[-2:]) for image, _ in loaded]
    for size in dict.fromkeys(sizes):
        rows = [i for i, each in enumerate(sizes) if each == size]
        for i, each in zip(rows, features(torch.stack([loaded[i][0] for i in rows]))):
            found[i] = each.flatten(1).mT
    pixels = np.concatenate([mask.reshape(-1, 1) for _, mask in loaded])
    return torch.cat([found[i] for i in range(len(loaded))]), torch.from_numpy(pixels)
