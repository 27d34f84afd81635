"""Views of arrays: crop, resampling, normalisation, changes of each channel, dropped channels."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfvil.data import array_views
from selfvil.data.render import drawn_on, require_renderable
from selfvil.data.views import CenterCrop, ClassifierCrop, DINOCrop, RandomCropFlip, seed_randomness
from selfvil.errors import UserError

MEAN, STD = [0.1 * (i + 1) for i in range(6)], [0.05 * (i + 1) for i in range(6)]


def bands(height=40, width=56, channels=6, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 60_000, (height, width, channels)).astype(dtype)


def normalised(pixels, divisor):
    return ((pixels.astype(np.float64) / divisor - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize(("dtype", "divisor"), [("u2", 65535), ("f4", 1), ("i4", 1)])
def test_a_view_of_the_right_size_is_only_normalised(dtype, divisor):
    pixels = bands(32, 32, dtype=dtype)
    view = CenterCrop(32, MEAN, STD)(pixels)
    assert view.dtype == torch.float32
    np.testing.assert_allclose(view, normalised(pixels, divisor), rtol=1e-5, atol=1e-4)
    whole = RandomCropFlip(32, (1, 1), MEAN, STD, ratio=(1, 1), flip=False)(pixels)
    assert torch.equal(whole, view)


@pytest.mark.parametrize("size", [(16, 24), (50, 60)])
def test_resampling_equals_torchs_antialiased_bicubic_in_float64(size):
    pixels = bands()
    found = array_views.resize(pixels, size[::-1])
    whole = torch.from_numpy(pixels.astype(np.float64) / 65535).permute(2, 0, 1)[None]
    expected = F.interpolate(whole, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32


def test_random_crops_are_crops_of_the_image():
    """The view of an array is that of its channels as images, to the rounding of 8 bits."""
    from PIL import Image

    eight = np.random.default_rng(0).integers(80, 176, (40, 56, 3), dtype=np.uint8)  # no overshoot
    crop = RandomCropFlip(24, (0.2, 1.0), [0.5] * 3, [1 / 255] * 3)
    for seed in range(20):
        seed_randomness(0, seed, 0)
        image = crop(Image.fromarray(eight))
        seed_randomness(0, seed, 0)
        array = crop((eight / 255).astype(np.float32))
        assert (image - array.clamp(-0.5 * 255, 0.5 * 255)).abs().max() <= 1.2  # in 255ths; Pillow rounds twice, and
        # the second filter, whose weights have absolute values of 1.26 together at most, magnifies the first rounding


@pytest.mark.parametrize(
    "view",
    [
        DINOCrop(16, (0.3, 1), MEAN, STD, blur=0.5, solarise=0.5),
        ClassifierCrop(16, (0.3, 1), MEAN, STD, three_augment=True, jitter=0.3, erasing=0.5),
        RandomCropFlip(16, (0.3, 1), MEAN, STD, channel_drop=0.5),
    ],
    ids=lambda view: type(view).__name__,
)
def test_views_depend_only_on_the_seed(view):
    pixels = bands()
    found = []
    for position in (0, 1, 0):
        seed_randomness(3, position, 0)
        found.append(view(pixels))
        random.random()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert found[0].shape == (6, 16, 16)
    assert torch.isfinite(found[0]).all()
    before = pixels.copy()
    view(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_jitter_is_that_of_its_definition():
    view, amounts = torch.randn(5, 8, 9, generator=torch.Generator().manual_seed(0)), (0.4, 0.2, 0.3)
    random.seed(1)
    found = array_views.jitter(view, *amounts)
    random.seed(1)
    contrast, gamma, shift = ([random.uniform(-most, most) for _ in range(5)] for most in amounts)
    for i, channel in enumerate(view.double().numpy()):
        expected = channel.mean() + (channel - channel.mean()) * (1 + contrast[i])
        low, high = expected.min(), expected.max()
        expected = low + (high - low) * ((expected - low) / (high - low)) ** np.exp(gamma[i]) + shift[i]
        np.testing.assert_allclose(found[i], expected, atol=1e-5)
    assert torch.equal(array_views.jitter(torch.full((2, 4, 4), 0.5), 0, 0.5, 0), torch.full((2, 4, 4), 0.5))


@pytest.mark.parametrize("deviation", [0.1, 0.7, 2.0])
def test_blur_is_a_normalised_gaussian(deviation):
    view = torch.zeros(2, 31, 31)
    view[0, 15, 15], view[1] = 1, 3
    found = array_views.blur(view, deviation)
    offsets = np.arange(-15, 16)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2) * (np.abs(offsets) <= np.ceil(3 * deviation))
    np.testing.assert_allclose(found[0], np.outer(weights, weights) / weights.sum() ** 2, atol=1e-6)
    np.testing.assert_allclose(found[1], 3, atol=1e-5)
    assert array_views.blur(torch.zeros(1, 2, 2), 2.0).shape == (1, 2, 2)


def test_dropped_channels_have_the_mean_and_the_probability():
    random.seed(0)
    dropped = np.zeros(12)
    for _ in range(1000):
        view = array_views.drop_channels(torch.ones(12, 2, 2), 0.3)
        assert set(view.unique().tolist()) <= {0.0, 1.0}
        dropped += (view[:, 0, 0] == 0).numpy()
    np.testing.assert_allclose(dropped / 1000, 0.3, atol=0.05)
    for _ in range(50):
        assert array_views.drop_channels(torch.ones(3, 2, 2), 0.99).sum() >= 4, "one channel always stays"


def test_without_channel_drop_no_random_number_is_drawn():
    random.seed(0)
    before = random.getstate()
    array_views.drop_channels(torch.ones(3, 2, 2), 0.0)
    assert random.getstate() == before


def test_each_view_drops_channels_of_its_own():
    views = [DINOCrop(8, (1, 1), MEAN, STD, blur=0, channel_drop=0.5) for _ in range(2)]
    sets = set()
    for number, view in enumerate(views):
        for position in range(8):
            seed_randomness(0, position, number)
            sets.add((position, number, tuple((view(bands(8, 8)).abs().sum((1, 2)) == 0).tolist())))
    first, second = ({kept for _, of, kept in sorted(sets) if of == number} for number in range(2))
    assert first != second


def test_what_needs_eight_bits_is_refused():
    pixels = bands()
    with pytest.raises(UserError, match=r"objective\.randaugment is for images of 8 bits.*set it to null"):
        ClassifierCrop(16, (0.3, 1), [0.5], [0.2], randaugment=5)(pixels[:, :, :1])
    with pytest.raises(UserError, match=r"data\.augment = device is for images of 8 bits.*to workers"):
        require_renderable([RandomCropFlip(16, (0.3, 1), MEAN, STD)])
    grey = RandomCropFlip(16, (0.3, 1), [0.5], [0.2])
    with pytest.raises(UserError, match=r"an image has uint16 values in 1 channels: set data\.augment to workers"):
        drawn_on(require_renderable([grey])[0], pixels[:, :, :1])
    with pytest.raises(UserError, match=r"without data\.channel_drop"):
        require_renderable([RandomCropFlip(16, (0.3, 1), [0.5], [0.2], channel_drop=0.5)])


def test_a_mean_on_another_scale_than_eight_bits_is_refused():
    from PIL import Image

    image = Image.new("RGB", (16, 16))
    with pytest.raises(UserError, match=r"data\.mean has the value 124, and an image has 8 bits"):
        CenterCrop(16, (124, 116, 104), (58, 57, 57))(image)
