"""Augmentation of a whole batch on any device: the draws of `views.py`, applied by torch with Pillow's arithmetic.

Pixels are integers from 0 to 255 in float32, rounded after every operation for which Pillow rounds to 8 bits. Changes
of colour are equal to Pillow's. Resampled pixels may differ by one level where a value is close to the boundary of two
levels. The difference is larger if a later operation magnifies it (a higher saturation, a division by a small alpha),
or if Pillow 13 resizes the height of a tall crop first: here the width is always first, as in earlier versions.

This is meant for small images: all images of a batch are padded to the largest sides, and every pixel takes part in the
products. Large images are reduced first, which bounds the memory.

Resampling is a product with one matrix for each side of each row. The weights are multiples of 2^-15, so every sum of
their products with pixels is below 2^24 units and exact in float32, in any order. A view therefore depends neither on
its batch nor on the kernel of the product, and a step has the same tensors with one process or many.

Shapes: B images padded to (H, W), V views of each, R = V·B rows (the images of one view are adjacent), C channels of an
image, (h, w) sides of a view.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfvil.data.arrays import Pixels
from selfvil.data.views import DINOCrop, Draw, RandomCropFlip
from selfvil.errors import UserError

_ONE = 2.0**15  # units of a resampling weight of 1
_LONGEST_SIDE = 1024  # pixels of an image
_BLURS = 3  # passes of a box filter that approximate a Gaussian

# Columns of a draw: the box 0 to 3, flip, the kinds of four colour changes, their values, grey, radius, solarise.
_FLIP, _KINDS, _VALUES, _GREY, _RADIUS, _SOLARISE = 4, 5, 9, 13, 14, 15
_CONTRAST, _SATURATION, _HUE = 2, 3, 4  # kinds; 1 is brightness, 0 no change


def require_renderable(views: Sequence[object]) -> list[RandomCropFlip]:
    """The same views. Raises UserError if this module cannot render one of them: it computes with 8 bits."""
    crops: list[Any] = [view for view in views if type(view) in (RandomCropFlip, DINOCrop)]
    if len(crops) < len(views):
        other = next(view for view in views if type(view) not in (RandomCropFlip, DINOCrop))
        raise UserError(
            f"data.augment = device: {type(other).__name__} cannot be made on a device, only RandomCropFlip and "
            "DINOCrop can: set data.augment to workers"
        )
    if len(crops[0].normalise.factor) not in (1, 3, 4) or any(crop.channel_drop for crop in crops):
        raise UserError(
            "data.augment = device is for images of 8 bits with 1, 3 or 4 channels, without data.channel_drop: set "
            "data.augment to workers"
        )
    return crops


def drawn_on(crop: RandomCropFlip, image: Pixels) -> Draw:
    """The random numbers of a view of an image. Raises UserError for an array."""
    if isinstance(image, np.ndarray):
        raise UserError(
            f"data.augment = device is for images of 8 bits with 1, 3 or 4 channels, and an image has {image.dtype} "
            f"values in {image.shape[2]} channels: set data.augment to workers"
        )
    return crop.draw(*image.size, image.mode)


@dataclass(frozen=True)
class Drawn:
    """The images of a batch and the random draws of their views, on the CPU.

    images: uint8 (B, C, H, W), smaller ones in the upper left corner. draws: float32 (V, B, 16), with amounts as this
    module needs them: factors of blending, turns of hue in 255ths, radii of boxes.
    """

    images: Tensor
    draws: Tensor
    views: Sequence[RandomCropFlip]

    @classmethod
    def collate(
        cls, images: Sequence[Any], draws: Sequence[Sequence[Draw]], views: Sequence[RandomCropFlip]
    ) -> "Drawn":
        """From images of Pillow of one mode, whose sizes may differ. `draws[v][b]` belongs to view v of image b.

        Images with a side longer than 1,024 pixels and than twice the largest view are reduced by an integer first.
        """
        most = max(_LONGEST_SIDE, *(2 * max(view.height, view.width) for view in views))
        reductions = [(-(-image.width // most), -(-image.height // most)) for image in images]
        images = [image if by == (1, 1) else image.reduce(by) for image, by in zip(images, reductions)]
        height, width = max(image.height for image in images), max(image.width for image in images)
        padded = np.zeros((len(images), len(images[0].getbands()), height, width), np.uint8)
        for row, image in enumerate(images):
            pixels = np.asarray(image)
            padded[row, :, : image.height, : image.width] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        numbers = np.array(
            [[_numbers(_reduced(draw, *by)) for draw, by in zip(of_view, reductions)] for of_view in draws], np.float32
        )
        return cls(torch.from_numpy(padded), torch.from_numpy(numbers), views)

    def pin_memory(self) -> "Drawn":
        return replace(self, images=self.images.pin_memory(), draws=self.draws.pin_memory())

    @torch.no_grad()
    def render(self, device: torch.device | str) -> list[Tensor]:
        """The views, each float32 (B, C, h, w), normalised, on `device`. The host does not synchronise with it.

        Raises ValueError if a view's mean and std have not one value for each channel.
        """
        device, channels = torch.device(device), self.images.shape[1]
        rendered: dict[int, Tensor] = {}
        with torch.autocast(device.type, enabled=False), _exact_products():
            images = self.images.to(device, non_blocking=True).float()
            on_device = self.draws.to(device, non_blocking=True)
            for height, width in dict.fromkeys((view.height, view.width) for view in self.views):
                # All views of one size in one batch: for small images, starting kernels takes most of the time.
                numbers = [i for i, view in enumerate(self.views) if (view.height, view.width) == (height, width)]
                of_size = torch.stack([on_device[i] for i in numbers])
                pixels = _crop(images, of_size, height, width)
                colours = _distort(pixels[:, :3], self.draws[numbers].flatten(0, 1), of_size.flatten(0, 1))
                pixels = torch.cat([colours, pixels[:, 3:]], 1) if channels == 4 else colours
                for number, rows in zip(numbers, pixels.split(len(images))):
                    rendered[number] = _normalised(rows, self.views[number])
        return [rendered[number] for number in range(len(self.views))]


def _reduced(draw: Draw, across: int, down: int) -> Draw:
    """The same view of an image whose sides were divided by these numbers; its box covers the whole old box."""
    left, top, width, height = draw.box
    first, last = (left // across, top // down), (-(-(left + width) // across), -(-(top + height) // down))
    return draw._replace(box=(*first, last[0] - first[0], last[1] - first[1]))


def _numbers(draw: Draw) -> list[float]:
    kinds, values = [0.0] * 4, [1.0] * 4
    for place, (change, amount) in enumerate(draw.changes):
        kinds[place] = change + 1
        values[place] = int(amount * 255) % 256 if kinds[place] == _HUE else max(0.0, 1 + amount)
    radius = _box_radius(draw.blur) if draw.blur else 0.0
    return [*draw.box, draw.flip, *kinds, *values, draw.grey, radius, draw.solarise]


def _box_radius(deviation: float) -> float:
    """Radius in pixels of the box filter whose passes have this standard deviation.

    Its fractional part is the weight of the pixels at both ends (Gwosdek et al., "Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering", 2011).
    """
    variance = deviation**2 / _BLURS
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + share


@contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 matrix products in full precision, even if the run allows TF32 or bfloat16."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to the device without synchronising with it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _normalised(pixels: Tensor, view: RandomCropFlip) -> Tensor:
    factor, shift = (_send(torch.from_numpy(x), pixels.device) for x in (view.normalise.factor, view.normalise.shift))
    if len(factor) != pixels.shape[1]:
        raise ValueError(f"the images have {pixels.shape[1]} channels, mean and std have {len(factor)}")
    return (pixels * factor).sub_(shift)


# --- crop, resize, flip -------------------------------------------------------------------------------------------


def _crop(images: Tensor, draws: Tensor, height: int, width: int) -> Tensor:
    """Boxes of images (B, C, H, W), resized and flipped by `draws` (V, B, 16): (R, C, h, w)."""
    left, top, wide, high, flip = draws[..., : _FLIP + 1].unbind(-1)
    if images.shape[1] == 4:  # Pillow resizes colours times alpha, unless the size is already correct
        images = torch.cat([(images[:, :3] * images[:, 3:] / 255 + 0.5).floor_(), images[:, 3:], images[:, :3]], 1)
    across = _bicubic(left, wide, width, images.shape[3], flip)
    down = _bicubic(top, high, height, images.shape[2], torch.zeros_like(flip))
    pixels = _product(images, across.transpose(0, 1).flatten(1, 2))  # (B, C, H, V·w): one product for all views
    pixels = pixels.unflatten(-1, (len(draws), width)).permute(3, 0, 1, 4, 2).flatten(0, 1)
    pixels = _product(pixels, down.flatten(0, 1)).transpose(-1, -2).contiguous()
    if images.shape[1] == 7:
        colours, alpha, unresized = pixels.split([3, 1, 3], 1)
        divided = torch.where((alpha == 0) | (alpha == 255), colours, (255 * colours / alpha).floor().clamp(max=255))
        resized = ((wide != width) | (high != height)).flatten().view(-1, 1, 1, 1)
        pixels = torch.cat([torch.where(resized, divided, unresized), alpha], 1)
    return pixels


def _bicubic(first: Tensor, length: Tensor, out: int, size: int, flip: Tensor) -> Tensor:
    """Weights (V, B, out, size) that resize pixels [first, first + length) of `size` to `out`, in units of 1 / _ONE.

    Keys' cubic (a = -1/2), scaled to the larger of the pixels of source and result, truncated at the ends of the box.
    """
    scale = (length / out)[..., None, None]
    place = torch.arange(out, device=first.device)
    place = torch.where(flip[..., None] > 0, out - 1 - place, place)[..., None]
    pixel = (torch.arange(size, device=first.device) - first[..., None])[..., None, :]
    x = ((pixel + 0.5 - (place + 0.5) * scale) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = torch.where((pixel >= 0) & (pixel < length[..., None, None]), weights, 0)
    weights = (weights * 2**16).round_()  # integers, whose sum does not depend on the order of summation
    return (weights / weights.sum(-1, keepdim=True)).mul_(_ONE).round_()


def _product(pixels: Tensor, weights: Tensor) -> Tensor:
    """Resample each row of pixels (R, C, h, w) by its own weights (R, out, w): (R, C, h, out), rounded to 8 bits."""
    flat = pixels.flatten(1, 2)
    return _to_8_bits(torch.bmm(flat, weights.transpose(1, 2)).mul_(1 / _ONE).add_(0.5)).unflatten(1, pixels.shape[1:3])


def _to_8_bits(pixels: Tensor) -> Tensor:
    return pixels.floor_().clamp_(0, 255)


# --- colours ------------------------------------------------------------------------------------------------------


def _distort(pixels: Tensor, draws: Tensor, on_device: Tensor) -> Tensor:
    """Apply changes of colour, grey, blur and solarisation to pixels (R, C, h, w) with C 1 or 3, possibly in place.

    draws (R, 16): on the CPU, to select the affected rows without a synchronisation. on_device: the same on the device.
    """

    def affected(column: int, kind: int | None = None) -> Tensor:
        found = draws[:, column] > 0 if kind is None else draws[:, column] == kind
        return found.nonzero().flatten()

    columns = on_device[:, :, None, None, None].unbind(1)
    for place in range(4):
        kind, value = columns[_KINDS + place], columns[_VALUES + place]
        if len(affected(_KINDS + place)):
            grey = _luminance(pixels)
            base = _mean(grey) * (kind == _CONTRAST) + grey * (kind == _SATURATION)  # brightness: black
            pixels = _blend(base, pixels, torch.where(kind == _HUE, 1, value))
        if len(turned := affected(_KINDS + place, _HUE)):
            rows = _send(turned, pixels.device)
            pixels.index_copy_(0, rows, _turn_hue(pixels[rows], value[rows]))
    if len(affected(_GREY)):
        pixels = torch.where(columns[_GREY] > 0, _luminance(pixels), pixels)
    if len(blurred := affected(_RADIUS)):
        rows = _send(blurred, pixels.device)
        pixels.index_copy_(0, rows, _blur(pixels[rows], columns[_RADIUS][rows]))
    if len(affected(_SOLARISE)):
        pixels = torch.where((columns[_SOLARISE] > 0) & (pixels >= 128), 255 - pixels, pixels)
    return pixels


def _luminance(pixels: Tensor) -> Tensor:
    """Luminance (R, 1, h, w) with the weights of ITU-R 601 in 65536ths, rounded."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768).mul_(1 / 65536).floor_()


def _mean(grey: Tensor) -> Tensor:
    """Mean of each row (R, 1, 1, 1), rounded, by integer arithmetic, which is exact for any size."""
    count = grey.shape[-2] * grey.shape[-1]
    total = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).float()


def _blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from base (factor 0) to pixels (factor 1), or extrapolate, and truncate to 8 bits."""
    return _to_8_bits(base + factor * (pixels - base))


def _turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of RGB pixels by `turn` 255ths of the colour wheel, in Pillow's HSV of 8 bits.

    Float64 where Pillow uses it, since hues and saturations are truncated, not rounded.
    """
    red, green, blue = pixels.split(1, 1)
    value, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    spread = (value - low).clamp(min=1)
    saturation = ((value - low) / value.clamp(min=1)).double().mul_(255).floor_()
    to_red, to_green, to_blue = (((value - colour) / spread).double() for colour in (red, green, blue))
    hue = torch.where(
        red == value, to_blue - to_green, torch.where(green == value, 2 + to_red - to_blue, 4 + to_green - to_red)
    )
    hue = ((hue.float().double() / 6 + 1) % 1).float().double().mul_(255).floor_()
    hue = torch.where(value == low, 0, hue)
    sixth = ((hue + turn) % 256).float() * 6 / 255
    # Around the wheel, each colour falls from `value` to its minimum and rises again; red is a third ahead of green.
    share = torch.cat([(sixth + offset) % 6 for offset in (5, 3, 1)], 1)
    share = torch.minimum(share, 4 - share).clamp_(0, 1)
    turned = value * (1 - (saturation.float() / 255) * share)
    return _to_8_bits(turned + 0.5)


def _blur(pixels: Tensor, radius: Tensor) -> Tensor:
    """Three passes of a box filter along each side, with edge pixels repeated; radius (R, 1, 1, 1)."""
    for _ in range(2):  # along the width, then along the height
        weights = _box(radius[:, 0], pixels.shape[-1])
        for _ in range(_BLURS):
            pixels = _product(pixels, weights)
        pixels = pixels.transpose(-1, -2)
    return pixels


def _box(radius: Tensor, size: int) -> Tensor:
    """Weights (R, size, size) of the mean over `radius` + 1/2 on both sides, in units of 1 / _ONE; radius (R, 1, 1)."""
    edges = torch.arange(size + 1, device=radius.device) - 0.5
    edges[0], edges[-1] = -math.inf, math.inf
    reach = radius + 0.5
    place = torch.arange(size, device=radius.device)[:, None]
    covered = ((edges - place + reach) / (2 * reach)).clamp_(0, 1)
    return covered.diff(dim=-1).mul_(_ONE).round_()
