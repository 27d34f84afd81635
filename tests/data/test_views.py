"""Views: exact pixels, the right distribution, and randomness that is a function of (seed, position, view)."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from selfvil.data.views import CenterCrop, DINOCrop, RandomCropFlip, preserved_randomness, seed_randomness

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def normalised(image: Image.Image, mean=MEAN, std=STD) -> torch.Tensor:
    """Slow reference in float64."""
    pixels = np.asarray(image, np.float64)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(((pixels / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_normalisation_equals_its_formula(channels):
    image = picture(8, 11, channels)
    mean, std = (0.4, 0.3, 0.2, 0.1)[:channels], (0.2, 0.3, 0.4, 0.5)[:channels]
    view = CenterCrop((8, 11), mean, std)(image)
    assert view.dtype == torch.float32
    assert view.is_contiguous()
    torch.testing.assert_close(view.double(), normalised(image, mean, std), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "source"), [((24, 16), (24, 16)), ((16, 24), (50, 40)), ((16, 16), (16, 40))])
def test_center_crop_covers_the_size_and_crops_the_centre(size, source):
    image = picture(*source)
    factor = max(size[0] / source[0], size[1] / source[1])
    resized = image.resize((round(source[1] * factor), round(source[0] * factor)), Image.Resampling.BICUBIC)
    left, top = (resized.width - size[1]) // 2, (resized.height - size[0]) // 2
    expected = normalised(resized.crop((left, top, left + size[1], top + size[0])))
    torch.testing.assert_close(CenterCrop(size, MEAN, STD)(image).double(), expected, rtol=0, atol=1e-5)


def test_center_crop_of_the_usual_protocol():
    """224 of 256 equals torchvision's Resize(256, bicubic) and CenterCrop(224)."""
    image = picture(300, 400)
    reference = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    view = CenterCrop(224, MEAN, STD, crop_pct=224 / 256)(image)
    torch.testing.assert_close(view.double(), normalised(reference(image)), rtol=0, atol=1e-5)


def test_random_crop_is_resized_and_flipped_half_of_the_time():
    image = picture(20, 20)
    whole = RandomCropFlip(20, (1, 1), MEAN, STD, ratio=(1, 1))
    seen = [whole(image).double() for _ in range(200)]
    straight = [torch.allclose(view, normalised(image), atol=1e-5) for view in seen]
    flipped = [torch.allclose(view, normalised(image).flip(2), atol=1e-5) for view in seen]
    assert all(one != other for one, other in zip(straight, flipped))
    assert 70 < sum(flipped) < 130
    never = RandomCropFlip(20, (1, 1), MEAN, STD, ratio=(1, 1), flip=False)
    assert all(torch.allclose(never(image).double(), normalised(image), atol=1e-5) for _ in range(20))


@pytest.mark.parametrize("shape", [(32, 32), (200, 300), (500, 30), (3, 3)])
def test_boxes_are_inside_and_follow_scale_and_ratio(shape):
    height, width = shape
    view = RandomCropFlip(32, (0.2, 1), MEAN, STD)
    boxes = np.array([view._box(width, height) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert (boxes >= 0).all()
    assert ((w > 0) & (h > 0) & (left + w <= width) & (top + h <= height)).all()
    if shape == (200, 300):
        area, log_ratio = w * h / (width * height), np.log(w / h)
        assert area.min() > 0.19
        assert area.max() <= 1
        assert abs(log_ratio).max() < math.log(4 / 3) + 0.03
        reference = v2.RandomResizedCrop(32, (0.2, 1))
        params = [reference.make_params([torch.empty(3, height, width, device="meta")]) for _ in range(2000)]
        sides = np.array([(each["width"], each["height"]) for each in params])
        assert abs(area.mean() - (sides.prod(1) / (width * height)).mean()) < 0.025
        assert abs(log_ratio.mean() - np.log(sides[:, 0] / sides[:, 1]).mean()) < 0.02
        assert abs((left / np.maximum(width - w, 1)).mean() - 0.5) < 0.03


def test_very_long_images_use_the_centre():
    left, top, w, h = RandomCropFlip(32, (1, 1), MEAN, STD)._box(1000, 30)
    assert (w, h) == (40, 30)
    assert (left, top) == (480, 0)


def whole_image_resized(image: Image.Image, height: int, width: int, crop_pct: float) -> np.ndarray:
    """The crop by its definition: the whole image is resized, then its centre is cropped."""
    factor = max(round(width / crop_pct) / image.width, round(height / crop_pct) / image.height)
    resized = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    image = image.resize(resized, Image.Resampling.BICUBIC) if resized != image.size else image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


@pytest.mark.parametrize("crop_pct", [1.0, 224 / 256])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    "source", [(32, 32), (24, 40), (50, 40), (333, 500), (500, 333), (100, 31), (31, 100), (9, 30), (3, 5), (201, 900)]
)
def test_the_centre_of_usual_images_equals_the_definition_bit_for_bit(source, size, crop_pct):
    image = picture(*source)
    found = CenterCrop(size, **PLAIN, crop_pct=crop_pct)(image).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found.round(), whole_image_resized(image, *size, crop_pct))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("source", [(3, 200), (200, 3), (1, 300), (300, 1), (40, 1000), (900, 33)])
def test_the_centre_of_thin_images_equals_the_definition_within_one_level(source, channels):
    image = picture(*source, channels).point(lambda level: 64 + level // 2)  # no clamping at 0 and 255
    view = CenterCrop((32, 24), (0.0,) * channels, (1 / 255,) * channels, crop_pct=0.9)
    expected = whole_image_resized(image, 32, 24, 0.9).reshape(32, 24, channels).astype(np.float32)
    difference = np.abs(view(image).permute(1, 2, 0).numpy() - expected)
    # If Pillow resizes the two sides in another order, intermediate levels are rounded differently.
    assert channels == 4 or difference.max() <= 1.01  # the division by alpha magnifies one level
    assert difference.mean() < 1


@pytest.mark.parametrize("source", [(1, 20_000), (20_000, 1), (2, 60_000)])
def test_no_view_of_a_thin_image_is_larger_than_its_output(source, monkeypatch):
    """A whole strip of 1 x 20,000 pixels, resized to a height of 224, would have a thousand million pixels."""
    made = []
    resize = Image.Image.resize

    def counting(self, size, *args, **kwargs):
        made.append(size[0] * size[1])
        assert made[-1] < 1e7, f"an image of {size}"
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counting)
    image = picture(*source)
    for view in (
        CenterCrop(224, MEAN, STD, crop_pct=224 / 256),
        RandomCropFlip(224, (0.2, 1), MEAN, STD),
        DINOCrop(96, (0.05, 0.4), MEAN, STD, blur=0.5),
    ):
        for seed in range(5):
            seed_randomness(0, seed, 0)
            assert view(image).shape[0] == 3
    assert made
    assert max(made) <= 16 * 224 * 224


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_output_has_the_requested_size(size):
    expected = (3, 32, 32) if size == 32 else (3, 24, 40)
    for source in [(8, 8), (32, 32), (100, 70)]:
        assert RandomCropFlip(size, (0.2, 1), MEAN, STD)(picture(*source)).shape == expected
        assert CenterCrop(size, MEAN, STD)(picture(*source)).shape == expected
    assert RandomCropFlip(size, (0.2, 1), (0.5,), (0.5,))(picture(9, 9, 1)).shape == (1, *expected[1:])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="scale"):
        RandomCropFlip(32, (0, 1), MEAN, STD)
    with pytest.raises(ValueError, match="crop_pct"):
        CenterCrop(32, MEAN, STD, crop_pct=0)
    with pytest.raises(ValueError, match="pixel"):
        CenterCrop(0, MEAN, STD)
    with pytest.raises(ValueError, match="std"):
        CenterCrop(32, MEAN, (0.1, 0, 0.1))
    with pytest.raises(ValueError, match="channels"):
        CenterCrop(8, MEAN, STD)(picture(8, 8, 1))


def drawn() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


def test_randomness_depends_on_each_of_seed_position_and_view():
    draws = []
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10**12, 0), (2**31 - 1, 7, 9)]:
        seed_randomness(*key)
        first = drawn()
        seed_randomness(*key)
        assert drawn() == first
        draws.append(first)
    for source in range(3):
        assert len({str(draw[source]) for draw in draws}) == len(draws)


def test_randomness_of_neighbouring_positions_is_uniform():
    values = []
    for position in range(2000):
        seed_randomness(0, position, 0)
        values.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    values = np.array(values)
    assert abs(values.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(values[:-1].T, values[1:].T) - np.eye(6)).max() < 0.1


def test_generators_are_restored():
    before = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = drawn()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    with pytest.raises(ValueError, match="channels"), preserved_randomness():
        CenterCrop(8, (0.5,), (0.5,))(seed_and_draw())
    assert drawn() == expected != before


def seed_and_draw() -> Image.Image:
    seed_randomness(0, 0, 0)
    drawn()
    return picture(8, 8)
