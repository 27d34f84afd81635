"""Views: callables from a decoded image to a float32 tensor (C, H, W), normalised.

A view takes its randomness from the global generators of torch, numpy and Python. The loader seeds them by (seed,
position, view) before each call, so what a sample looks like depends on nothing else: not on workers, ranks or resumes.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from struct import pack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = int | Sequence[int]
"""Height and width in pixels; a single number means a square."""


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the global generators of torch (CPU), numpy and Python as they were. Takes 90 µs: once around a batch."""
    states = torch.default_generator.get_state(), np.random.get_state(legacy=False), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def seed_randomness(seed: int, position: int, view: int) -> None:
    """Make the global generators of torch (CPU), numpy and Python a function of these three numbers. Takes 8 µs."""
    key = int.from_bytes(blake2b(pack("<3q", seed, position, view), digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(key)


class _Normalise:
    """Pixels of 8 bits to (value / 255 - mean) / std, channels first."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {list(mean)} and std {list(std)} must have one value a channel, std above 0")
        centre, spread = np.array(mean, np.float64)[:, None, None], np.array(std, np.float64)[:, None, None]
        self.factor = (1 / (255 * spread)).astype(np.float32)
        self.shift = (centre / spread).astype(np.float32)

    def __call__(self, image: Image.Image, flip: bool = False) -> Tensor:
        pixels = np.asarray(image)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.shape[2] != len(self.factor):
            raise ValueError(f"the image has {pixels.shape[2]} channels, mean and std have {len(self.factor)}")
        if flip:
            pixels = pixels[:, ::-1]
        channels_first = np.multiply(pixels.transpose(2, 0, 1), self.factor, dtype=np.float32, order="C")
        channels_first -= self.shift
        return torch.from_numpy(channels_first)


class RandomCropFlip:
    """A random part of the image, resized by bicubic interpolation, flipped left to right half of the time.

    MAE's augmentation (He et al., 2021). The part covers a share of the area drawn from `scale`, with a width/height
    ratio drawn log-uniformly from `ratio` (Szegedy et al., 2015, as torchvision's RandomResizedCrop draws it).
    """

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"scale {scale} must lie within (0, 1], ratio {ratio} above 0, both ascending")
        self.height, self.width = _pair(size)
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.normalise = _Normalise(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        left, top, width, height = self._box(*image.size)
        if (left, top, width, height) != (0, 0, *image.size):
            image = image.crop((left, top, left + width, top + height))
        if (width, height) != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return self.normalise(image, flip=random.random() < 0.5)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        (low, high), (narrow, wide) = self.scale, map(math.log, self.ratio)
        for _ in range(10):
            area = width * height * random.uniform(low, high)
            aspect = math.exp(random.uniform(narrow, wide))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return random.randrange(width - w + 1), random.randrange(height - h + 1), w, h
        # No try fitted, as happens for very long images: the largest central part with an allowed ratio.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (width - w) // 2, (height - h) // 2, w, h


class CenterCrop:
    """The centre of the image, without randomness: for evaluation.

    The image is resized (bicubic) to the smallest size that covers `size / crop_pct` at its own aspect ratio, and
    `size` is cut from its centre. `crop_pct` 1 keeps all of the shorter side; the usual ImageNet protocol is 224/256.
    An image that has the size already is not resampled.
    """

    def __init__(self, size: Size, mean: Sequence[float], std: Sequence[float], crop_pct: float = 1.0) -> None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct {crop_pct} must lie within (0, 1]")
        self.height, self.width = _pair(size)
        self.crop_pct = crop_pct
        self.normalise = _Normalise(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        width, height = image.size
        factor = max(round(self.width / self.crop_pct) / width, round(self.height / self.crop_pct) / height)
        resized = max(self.width, round(width * factor)), max(self.height, round(height * factor))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        if resized != (self.width, self.height):
            image = image.crop((left, top, left + self.width, top + self.height))
        return self.normalise(image)


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"a view needs at least one pixel a side, not {size}")
    return height, width
