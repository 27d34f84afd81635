"""Views: callables from a decoded image to a normalised float32 tensor (C, H, W).

A decoded image is one of Pillow, with 8 bits, or an array (`data/arrays.py`), which is augmented channel by channel
(`data/array_views.py`).

A view uses the global generators of torch, numpy and Python. The loader seeds them by (seed, position, view) before
each call, so a view depends on nothing else: not on workers, ranks or resumes.

A random view draws all random numbers first, and then applies them. `render.py` does the second part for a whole batch.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from selfvil.data import array_views
from selfvil.data.arrays import Pixels, divisor, size_of
from selfvil.errors import UserError
from selfvil.ops.cpu.build import kernels

Size = int | Sequence[int]
"""Height and width in pixels; a single number means a square."""


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the global generators of torch (CPU), numpy and Python at the end. Takes 90 µs: once for a batch."""
    states = torch.default_generator.get_state(), np.random.get_state(legacy=False), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def seed_randomness(seed: int, position: int, view: int) -> None:
    """Seed the global generators of torch (CPU), numpy and Python from these three numbers. Takes 8 µs."""
    key = int.from_bytes(blake2b(pack("<3q", seed, position, view), digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(key)


class _Normalise:
    """Pixels to (value / divisor - mean) / std, channels first, where the divisor is 255 for 8 bits."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {list(mean)} and std {list(std)} must have one value per channel, std above 0")
        centre, spread = np.array(mean, np.float64)[:, None, None], np.array(std, np.float64)[:, None, None]
        self.spread, self.unit_scale = spread, min(mean) >= 0 and max(mean) <= 1
        self.factor = (1 / (255 * spread)).astype(np.float32)
        self.shift = (centre / spread).astype(np.float32)

    def __call__(self, image: Pixels, flip: bool = False) -> Tensor:
        pixels, factor = np.asarray(image), self.factor
        if pixels.dtype != np.uint8:
            factor = (1 / (divisor(pixels.dtype) * self.spread)).astype(np.float32)
        elif not self.unit_scale:
            raise UserError(
                f"data.mean has the value {float((self.shift * self.spread).max()):g}, and an image has 8 bits, whose "
                "values are on a scale of 0 to 1: divide mean and std by 255, or set data.stats to auto"
            )
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.shape[2] != len(self.factor):
            raise ValueError(f"the image has {pixels.shape[2]} channels, mean and std have {len(self.factor)}")
        if flip:
            pixels = pixels[:, ::-1]
        channels_first = np.empty((pixels.shape[2], *pixels.shape[:2]), np.float32)
        channels_first[...] = pixels.transpose(2, 0, 1)  # alone, since NumPy does not vectorise a product of this order
        channels_first *= factor
        channels_first -= self.shift
        return torch.from_numpy(channels_first)


class Draw(NamedTuple):
    """All random numbers of one view of one image."""

    box: tuple[float, float, float, float]
    """Left, top, width and height of the crop, in pixels of the image; integers, unless it was scaled."""
    flip: bool
    changes: tuple[tuple[int, float], ...] = ()
    """Changes of colour in their order: 0 brightness, 1 contrast, 2 saturation or 3 hue, each with its amount."""
    grey: bool = False
    blur: float = 0.0
    """Standard deviation of the Gaussian blur, in pixels of the view; 0 for none."""
    solarise: bool = False

    def scaled(self, across: float, down: float) -> "Draw":
        """The same view of an image whose width and height were multiplied by these factors."""
        left, top, width, height = self.box
        return self._replace(box=(left * across, top * down, width * across, height * down))


class RandomCropFlip:
    """A random crop, resized by bicubic interpolation, and flipped left to right with probability 0.5.

    MAE's augmentation (He et al., 2021). The share of the area is drawn from `scale`, the width/height ratio
    log-uniformly from `ratio` (Szegedy et al., 2015; torchvision's RandomResizedCrop draws the same way). flip=False
    never flips, for images whose mirror image means something else: letters, digits, organs.
    channel_drop: probability that a channel of the view is 0 (see `array_views.drop_channels`).
    """

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        channel_drop: float = 0.0,
    ) -> None:
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"scale {scale} must lie within (0, 1], ratio {ratio} above 0, both ascending")
        self.height, self.width = _pair(size)
        self.scale, self.ratio, self.flip, self.channel_drop = tuple(scale), tuple(ratio), flip, channel_drop
        self.normalise = _Normalise(mean, std)

    def __call__(self, image: Pixels, full: tuple[int, int] | None = None) -> Tensor:
        """A random view (C, H, W). full: width and height of the image of Pillow before its decoder reduced it."""
        if isinstance(image, Image.Image):
            draw = self.draw(*(full or image.size), image.mode)
            view = self.apply(image, draw.scaled(image.width / full[0], image.height / full[1]) if full else draw)
        else:
            view = self._of_array(image)
        return array_views.drop_channels(self._erase(view), self.channel_drop)

    def draw(self, width: int, height: int, mode: str) -> Draw:
        """Draw a view of an image of this size in pixels and Pillow's mode (L, RGB or RGBA)."""
        return Draw(self._box(width, height), self._flips())

    def apply(self, image: Image.Image, draw: Draw) -> Tensor:
        """The view (C, H, W) by `draw`, which was made for the size and mode of this image."""
        return self.normalise(self._crop(image, draw), flip=draw.flip)

    def _of_array(self, image: np.ndarray) -> Tensor:
        """Crop and flip of an array; subclasses distort it."""
        draw = Draw(self._box(*size_of(image)), self._flips())
        return self.normalise(self._crop(image, draw), flip=draw.flip)

    def _erase(self, view: Tensor) -> Tensor:
        """The view; subclasses replace a part of it by noise."""
        return view

    def _flips(self) -> bool:
        return self.flip and random.random() < 0.5

    def _crop(self, image: Pixels, draw: Draw) -> Any:
        left, top, width, height = draw.box
        if isinstance(image, Image.Image) and not all(isinstance(side, int) for side in draw.box):
            box = left, top, min(left + width, image.width), min(top + height, image.height)
            return image.resize((self.width, self.height), Image.Resampling.BICUBIC, box)
        if (left, top, width, height) != (0, 0, *size_of(image)):
            image = array_views.crop(image, (left, top, left + width, top + height))  # type: ignore[arg-type]
        if (width, height) != (self.width, self.height):
            image = array_views.resize(image, (self.width, self.height))
        return image

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        (low, high), (narrow, wide) = self.scale, map(math.log, self.ratio)
        for _ in range(10):
            area = width * height * random.uniform(low, high)
            aspect = math.exp(random.uniform(narrow, wide))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return random.randrange(width - w + 1), random.randrange(height - h + 1), w, h
        # No box fitted, as happens for very long images: use the largest central one with an allowed ratio.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (width - w) // 2, (height - h) // 2, w, h


class DINOCrop(RandomCropFlip):
    """A random crop with colour jitter, blur and solarisation: the augmentation of DINO (Caron et al., 2021) and BYOL.

    After crop and flip: with probability 0.8, brightness, contrast, saturation and hue change, in random order, by
    amounts up to `jitter`; with probability 0.2, colours become grey; with probability `blur`, a Gaussian blur of 0.1
    to 2 pixels; with probability `solarise`, values from 128 are inverted. Grey images (L) skip the changes that need
    colours. An alpha channel (RGBA) is only cropped and resized. Arrays have changes of contrast, gamma and brightness
    of each channel instead of those of colours, and are neither made grey nor inverted.
    """

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        blur: float,
        solarise: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        flip: bool = True,
        channel_drop: float = 0.0,
    ) -> None:
        super().__init__(size, scale, mean, std, flip=flip, channel_drop=channel_drop)
        if not (0 <= blur <= 1 and 0 <= solarise <= 1 and min(jitter) >= 0 and jitter[3] <= 0.5):
            raise ValueError(
                f"blur {blur} and solarise {solarise} must lie within [0, 1], jitter {jitter} above 0, hue at most 0.5"
            )
        self.blur, self.solarise, self.jitter = blur, solarise, jitter

    def draw(self, width: int, height: int, mode: str) -> Draw:
        box, in_colour = self._box(width, height), mode in ("RGB", "RGBA")
        changes: list[tuple[int, float]] = []
        if random.random() < 0.8:
            reaches = list(enumerate(self.jitter))[: None if in_colour else 2]
            random.shuffle(reaches)
            changes = [(change, random.uniform(-reach, reach)) for change, reach in reaches]
        grey = in_colour and random.random() < 0.2
        blur = random.uniform(0.1, 2.0) if random.random() < self.blur else 0.0
        solarise = random.random() < self.solarise
        return Draw(box, self._flips(), tuple(changes), grey, blur, solarise)

    def apply(self, image: Image.Image, draw: Draw) -> Tensor:
        image = self._crop(image, draw)
        if image.mode == "RGBA":
            alpha, image = image.getchannel("A"), self._distort(image.convert("RGB"), draw)
            image.putalpha(alpha)
        else:
            image = self._distort(image, draw)
        return self.normalise(image, flip=draw.flip)

    def _of_array(self, image: np.ndarray) -> Tensor:
        view = super()._of_array(image)
        if random.random() < 0.8:
            brightness, contrast, gamma, _ = self.jitter
            view = array_views.jitter(view, contrast, gamma, brightness)
        return array_views.blur(view, random.uniform(0.1, 2.0)) if random.random() < self.blur else view

    def _distort(self, image: Image.Image, draw: Draw) -> Image.Image:
        for kind, amount in draw.changes:
            image = _change(image, kind, amount)
        if draw.grey:
            image = image.convert("L").convert("RGB")
        if draw.blur:
            image = image.filter(ImageFilter.GaussianBlur(draw.blur))
        if draw.solarise:
            image = ImageOps.solarize(image)
        return image


class ClassifierCrop(RandomCropFlip):
    """A random crop for supervised training: after crop and flip, distortions of the image, each of them optional.

    Args:
        three_augment: grey, inverted from 128 or blurred by 0.1 to 2 pixels, one of the three at random (Touvron et
            al., "DeiT III", 2022). Grey images (L) are not made grey, and stay as they are in that case. Arrays stay
            as they are, have another gamma in each channel, or are blurred.
        jitter: largest change of brightness, contrast and saturation, in random order; for arrays, of brightness and
            contrast of each channel.
        randaugment: magnitude, 0 to 10, of timm's RandAugment (Cubuk et al., 2020), whose operations increase with it
            ("rand-m9-mstd0.5-inc1" for 9); None leaves it out. Only for images of 8 bits, grey or RGB.
        erasing: probability that a rectangle is replaced by noise (Zhong et al., 2017; timm's, "pixel").
    """

    def __init__(
        self,
        size: Size,
        scale: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        three_augment: bool = False,
        jitter: float = 0.0,
        randaugment: int | None = None,
        erasing: float = 0.0,
        flip: bool = True,
        channel_drop: float = 0.0,
    ) -> None:
        from timm.data.auto_augment import rand_augment_transform  # slow: it imports all of timm
        from timm.data.random_erasing import RandomErasing

        super().__init__(size, scale, mean, std, flip=flip, channel_drop=channel_drop)
        if not (0 <= jitter <= 1 and 0 <= erasing <= 1 and 0 <= (randaugment or 0) <= 10):
            raise ValueError(
                f"jitter {jitter} and erasing {erasing} must lie within [0, 1], randaugment {randaugment} in [0, 10]"
            )
        if randaugment is not None and len(mean) not in (1, 3):
            raise ValueError("RandAugment is for grey and RGB images; it would leave an alpha channel in place")
        self.three_augment, self.jitter = three_augment, jitter
        grey = tuple(round(255 * value) for value in mean)
        fill = {
            "translate_const": int(0.45 * min(self.height, self.width)),
            "img_mean": grey[0] if len(grey) == 1 else grey,  # only for RandAugment
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_max": 9.99,  # at 10, timm asks Pillow for an image of 0 bits, which Pillow refuses
        }
        name = f"rand-m{randaugment}-mstd0.5-inc1"
        self.randaugment = None if randaugment is None else rand_augment_transform(name, fill)
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None

    def _erase(self, view: Tensor) -> Tensor:
        return view if self.erase is None else self.erase(view)

    def apply(self, image: Image.Image, draw: Draw) -> Tensor:
        image = self._crop(image, draw)
        if draw.flip:
            image = ImageOps.mirror(image)
        if image.mode == "RGBA":
            alpha, image = image.getchannel("A"), self._distort(image.convert("RGB"))
            image.putalpha(alpha)
        else:
            image = self._distort(image)
        return self.normalise(image)

    def _of_array(self, image: np.ndarray) -> Tensor:
        if self.randaugment is not None:
            raise UserError(
                "objective.randaugment is for images of 8 bits, and an image has more: set it to null, and "
                "objective.three_augment or objective.color_jitter instead"
            )
        view = super()._of_array(image)
        choice = random.randrange(3) if self.three_augment else 0
        if choice == 1:
            view = array_views.jitter(view, contrast=0, gamma=0.5, brightness=0)
        elif choice == 2:
            view = array_views.blur(view, random.uniform(0.1, 2.0))
        return array_views.jitter(view, self.jitter, 0, self.jitter) if self.jitter else view

    def _distort(self, image: Image.Image) -> Image.Image:
        if self.three_augment:
            choice = random.randrange(3)
            if choice == 0:
                image = image.convert("L").convert(image.mode)
            elif choice == 1:
                image = ImageOps.solarize(image)
            else:
                image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        if self.jitter:
            changes = [0, 1] if image.mode == "L" else [0, 1, 2]
            random.shuffle(changes)
            for change in changes:
                image = _change(image, change, random.uniform(-self.jitter, self.jitter))
        return image if self.randaugment is None else self.randaugment(image)


def _change(image: Image.Image, kind: int, amount: float) -> Image.Image:
    """One of `Draw.changes`, rounded to 8 bits, as in the published augmentation. An amount of 0 changes nothing."""
    if kind == 3:
        return _hue(image, amount)
    enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind](image)
    return enhancer.enhance(max(0.0, 1 + amount))


def _hue(image: Image.Image, amount: float) -> Image.Image:
    """Rotate the hue by `amount` turns of the colour wheel, in Pillow's HSV of 8 bits."""
    if (library := kernels()) is not None:
        pixels = np.array(image)  # a copy, which is changed in place
        library.call("turn_hue", pixels.ctypes.data, image.width * image.height, int(amount * 255) % 256)
        return Image.fromarray(pixels)
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(int(amount * 255) % 256))  # the hue is periodic
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


class CenterCrop:
    """The centre of the image, without randomness, for evaluation.

    The image is resized (bicubic, aspect ratio kept) to the smallest size that covers `size / crop_pct`, and `size` is
    cropped from its centre. `crop_pct` 1 keeps all of the shorter side; the usual ImageNet protocol is 224/256. Images
    of the right size are not resampled. If an image is more than `LONGEST` times as long as the crop, only the cropped
    part is resized, which bounds the memory.
    """

    LONGEST = 16

    def __init__(self, size: Size, mean: Sequence[float], std: Sequence[float], crop_pct: float = 1.0) -> None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct {crop_pct} must lie within (0, 1]")
        self.height, self.width = _pair(size)
        self.crop_pct = crop_pct
        self.normalise = _Normalise(mean, std)

    def __call__(self, image: Pixels) -> Tensor:
        width, height = size_of(image)
        factor = max(round(self.width / self.crop_pct) / width, round(self.height / self.crop_pct) / height)
        resized = max(self.width, round(width * factor)), max(self.height, round(height * factor))
        left, top = (resized[0] - self.width) // 2, (resized[1] - self.height) // 2
        if (
            resized[0] * self.crop_pct > self.LONGEST * self.width
            or resized[1] * self.crop_pct > self.LONGEST * self.height
        ):
            # The same pixels up to rounding: a box has coordinates in single precision.
            across, down = width / resized[0], height / resized[1]
            box = left * across, top * down, (left + self.width) * across, (top + self.height) * down
            return self.normalise(array_views.resize(image, (self.width, self.height), box))
        if resized != (width, height):
            image = array_views.resize(image, resized)
        if resized != (self.width, self.height):
            image = array_views.crop(image, (left, top, left + self.width, top + self.height))
        return self.normalise(image)


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"a view needs at least one pixel per side, not {size}")
    return height, width
