"""DINO's views: each change of colour equals torchvision's bit for bit, with the published probabilities and ranges."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from selfvil.data import views
from selfvil.data.views import DINOCrop, seed_randomness
from selfvil.ops.cpu import build
from selfvil.ops.cpu.build import kernels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def picture(height: int = 32, width: int = 32, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def whole(channels: int = 3, **settings) -> DINOCrop:
    """A view of a whole 32 x 32 image in 8-bit values: only changes of colour and flips are left."""
    view = DINOCrop(32, (1, 1), (0.0,) * channels, (1 / 255,) * channels, **{"blur": 0, "jitter": (0,) * 4, **settings})
    view.ratio = (1, 1)
    return view


def pixels(view: torch.Tensor) -> np.ndarray:
    return view.numpy().round().astype(np.uint8).transpose(1, 2, 0)


def same_or_flipped(view: torch.Tensor, image: Image.Image) -> bool:
    expected = np.asarray(image).reshape(image.height, image.width, -1)
    found = pixels(view)
    return np.array_equal(found, expected) or np.array_equal(found[:, ::-1], expected)


@pytest.mark.parametrize("amount", [-0.4, -0.1, 0.0, 0.03, 0.1, 0.4])
@pytest.mark.parametrize(
    ("kind", "theirs", "channels"),
    [
        (0, F.adjust_brightness, 1),
        (0, F.adjust_brightness, 3),
        (1, F.adjust_contrast, 1),
        (1, F.adjust_contrast, 3),
        (2, F.adjust_saturation, 3),
        (3, F.adjust_hue, 3),
    ],
)
def test_changes_of_colour_are_torchvisions(kind, theirs, channels, amount):
    image = picture(channels=channels)
    expected = theirs(image, amount if kind == 3 else 1 + amount)
    assert np.array_equal(np.asarray(views._change(image, kind, amount)), np.asarray(expected))


@pytest.fixture
def exact_hue(monkeypatch):
    """Skip hue rotations by 0, which would round by the conversion to HSV and back."""
    monkeypatch.setattr(views, "_hue", lambda image, amount: image)


def test_without_changes_of_colour_it_is_a_crop(exact_hue):
    """Except for grey, with probability 0.2."""
    image, view = picture(), whole()
    grey = image.convert("L").convert("RGB")
    kinds = [(same_or_flipped(v, image), same_or_flipped(v, grey)) for v in (view(image) for _ in range(400))]
    assert all(one != other for one, other in kinds)
    assert 50 < sum(is_grey for _, is_grey in kinds) < 112


@pytest.mark.parametrize("channels", [1, 3])
def test_solarise_inverts_the_bright_half(channels, exact_hue):
    image = picture(channels=channels)
    solarised, view = ImageOps.solarize(image), whole(channels, solarise=0.2)
    grey = ImageOps.solarize(image.convert("L")).convert(image.mode)
    count = sum(same_or_flipped(v, solarised) or same_or_flipped(v, grey) for v in (view(image) for _ in range(400)))
    assert 50 < count < 112


def test_blur_is_pillows_gaussian(monkeypatch):
    """Radii are drawn from 0.1 to 2 pixels; the result equals that of Pillow's filter."""
    image, radii = picture(channels=1), []

    class Recorded(ImageFilter.GaussianBlur):
        def __init__(self, radius: float) -> None:
            radii.append(radius)
            super().__init__(radius)

    monkeypatch.setattr(views.ImageFilter, "GaussianBlur", Recorded)
    seen = [whole(1, blur=0.5)(image) for _ in range(400)]
    assert 150 < len(radii) < 250
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2
    blurred = [v for v in seen if not same_or_flipped(v, image)]
    monkeypatch.undo()
    for view, radius in zip(blurred[:5], radii):
        assert same_or_flipped(view, image.filter(ImageFilter.GaussianBlur(radius)))


def test_jitter_follows_the_published_distribution():
    """With probability 0.8, all four changes in random order, with amounts uniform in their ranges."""
    view = whole(jitter=(0.4, 0.4, 0.2, 0.1))
    changes = [change for _ in range(2000) for change in view.draw(32, 32, "RGB").changes]
    assert len(changes) % 4 == 0
    assert 1500 < len(changes) / 4 < 1700
    firsts = [kind for kind, _ in changes[::4]]
    for kind, reach in enumerate((0.4, 0.4, 0.2, 0.1)):
        amounts = np.array([amount for changed, amount in changes if changed == kind])
        assert abs(amounts).max() <= reach
        assert amounts.min() < -0.95 * reach
        assert amounts.max() > 0.95 * reach
        assert abs(amounts.mean()) < 0.06 * reach
        assert 0.2 < firsts.count(kind) / len(firsts) < 0.3


def test_grey_images_have_no_changes_that_need_colours():
    view = DINOCrop(16, (0.4, 1), (0.5,), (0.2,), blur=0.5, solarise=0.2)
    seen = [view(picture(20, 28, channels=1)) for _ in range(40)]
    assert all(v.shape == (1, 16, 16) and v.dtype == torch.float32 and torch.isfinite(v).all() for v in seen)


def test_alpha_is_only_cropped():
    image = picture(channels=4)
    view = whole(4, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0, solarise=0.5)
    alpha = np.asarray(image)[:, :, 3]
    for _ in range(20):
        found = pixels(view(image))[:, :, 3]
        assert np.array_equal(found, alpha) or np.array_equal(found[:, ::-1], alpha)


def test_a_view_is_a_function_of_its_key():
    """It uses only Python's generator."""
    image, view = picture(40, 30), DINOCrop(24, (0.1, 0.9), MEAN, STD, blur=0.5, solarise=0.5)
    keys = [(0, 7, 1), (0, 7, 2), (0, 8, 1), (1, 7, 1)]
    first = []
    for key in keys:
        seed_randomness(*key)
        first.append(view(image))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for key, expected in zip(keys, first):
        random.seed(99)
        seed_randomness(*key)
        assert torch.equal(view(image), expected)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert len({tuple(v.flatten()[:20].tolist()) for v in first}) == len(keys)


@pytest.mark.parametrize(
    "settings", [{"blur": 1.5}, {"blur": 0, "solarise": -0.1}, {"blur": 0, "jitter": (0.4, 0.4, 0.2, 0.6)}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must lie within"):
        DINOCrop(32, (0.4, 1), MEAN, STD, **settings)


def pillows_hue(image: Image.Image, shift: int) -> np.ndarray:
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(shift))
    return np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


def test_the_native_hue_is_pillows_bit_for_bit():
    if kernels() is None:
        pytest.skip("the CPU kernels cannot be built here")
    levels = np.arange(0, 256, dtype=np.uint8)
    for blue in (0, 1, 37, 128, 200, 254, 255):
        colours = np.stack([*np.meshgrid(levels, levels), np.full((256, 256), blue, np.uint8)], 2)
        for amount in (0.0, 0.004, 0.1, -0.1, 0.37, -0.5, 0.5):
            image = Image.fromarray(colours[:255])  # no whole number of blocks
            expected = pillows_hue(image, int(amount * 255) % 256)
            np.testing.assert_array_equal(np.asarray(views._hue(image, amount)), expected)


@pytest.mark.slow
def test_the_native_hue_is_pillows_for_all_colours_and_instruction_sets():
    levels = np.arange(0, 256, dtype=np.uint8)
    for level in build._levels(""):
        library = build.Kernels(build._load(level))
        for blue in range(256):
            colours = np.stack([*np.meshgrid(levels, levels), np.full((256, 256), blue, np.uint8)], 2)
            for shift in (0, 1, 25, 43, 128, 230):
                pixels = colours.copy()
                library.call("turn_hue", pixels.ctypes.data, pixels.size // 3, shift)
                np.testing.assert_array_equal(pixels, pillows_hue(Image.fromarray(colours), shift))
