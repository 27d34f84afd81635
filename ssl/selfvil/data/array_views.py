"""Crops, resampling and augmentation of arrays (H, W, C), channel by channel; see `data/arrays.py`.

Augmentation works on normalised views (C, H, W), in float32: amounts are in standard deviations of a channel over all
images, so they mean the same for reflectances, counts of photons and Hounsfield units. Each channel has random numbers
of its own, which changes the relations between channels, as hue and saturation do for colours.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfvil.data.arrays import Pixels, divisor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def crop(image: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """The box (left, top, right, bottom) of an image."""
    if isinstance(image, Image.Image):
        return image.crop(box)
    left, top, right, bottom = box
    return image[top:bottom, left:right]


def resize(image: Pixels, size: tuple[int, int], box: Box | None = None) -> Pixels:
    """An image, or the box of it, resized to `size` (width, height) by antialiased bicubic interpolation.

    An array becomes float32 on the scale of `data.mean` (see `divisor`), resampled one channel at a time, by Pillow's
    resampling of floats, which rounds nothing to 8 bits.
    """
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BICUBIC, box)
    resized = np.empty((size[1], size[0], image.shape[2]), np.float32)
    for channel in range(image.shape[2]):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        resized[:, :, channel] = np.asarray(plane.resize(size, Image.Resampling.BICUBIC, box))
    resized /= np.float32(divisor(image.dtype))
    return resized


def jitter(view: Tensor, contrast: float, gamma: float, brightness: float) -> Tensor:
    """Each channel of a view (C, H, W) with random contrast, gamma and brightness, by amounts up to these.

    The contrast about the channel's mean is multiplied by 1 ± contrast; with g up to `gamma`, values x between the
    smallest (0) and the largest (1) one of the channel become x ** exp(g); and up to `brightness` is added.
    """
    factor, exponent, shift = (
        torch.tensor([random.uniform(-most, most) for _ in view]).view(-1, 1, 1)
        for most in (contrast, gamma, brightness)
    )
    mean = view.mean((1, 2), keepdim=True)
    view = mean + (view - mean) * (1 + factor)
    low, high = view.amin((1, 2), keepdim=True), view.amax((1, 2), keepdim=True)
    share = ((view - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return low + (high - low) * share ** exponent.exp() + shift


def blur(view: Tensor, deviation: float) -> Tensor:
    """A view (C, H, W) after a Gaussian blur of this standard deviation in pixels; edge pixels are repeated."""
    radius = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    weights /= weights.sum()
    rows = F.pad(view[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(rows, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def drop_channels(view: Tensor, probability: float) -> Tensor:
    """Set each channel of a view (C, H, W) to 0, the mean, with this probability; at least one channel stays.

    The others keep their values, as they do in an image of a sensor that has only them. (DINO-MM, Wang et al., 2022,
    drops whole sensors of each view; ChannelViT, Bao et al., 2024, samples channels.)
    """
    if probability:
        dropped = [random.random() < probability for _ in view]
        if all(dropped):
            dropped[random.randrange(len(dropped))] = False
        view[torch.tensor(dropped)] = 0
    return view
