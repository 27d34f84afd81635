"""JPEG by simplejpeg: Pillow's pixels bit for bit, the same images refused, and the bound of reduced decoding."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.images import encode

from selfvil.data import read
from selfvil.data.base import Images
from selfvil.data.index import open_shards
from selfvil.data.jpeg import REMAINING, allowed_reduction, decode_jpeg, jpeg_size
from selfvil.data.loader import train_batches
from selfvil.data.read import DamagedImage, decode_image, load_image
from selfvil.data.views import CenterCrop, ClassifierCrop, DINOCrop, RandomCropFlip

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def photo(height: int = 61, width: int = 83, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    pixels = np.stack([255 * x / width, 255 * y / height, 120 + 80 * np.sin(x / 9) * np.cos(y / 7)], 2) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def by_pillow(data: bytes, channels: int | None = 3) -> Image.Image:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "jpeg_size", lambda data: None)
        return decode_image(data, channels)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"},
                                     {"quality": 5}, {"restart_marker_rows": 1}])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3, None])
def test_pixels_are_those_of_pillow(mode, options, channels):
    data = encode(photo().convert(mode), "JPEG", **options)
    ours, pillow = decode_image(data, channels), by_pillow(data, channels)
    assert ours.mode == pillow.mode
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(pillow))
    assert (decode_jpeg(data) is None) == (mode == "CMYK")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), "JPEG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(by_pillow(data)))
    sizes = []
    reduced = load_image(data, lambda *size: sizes.append(size) or 2).image
    assert sizes == [by_pillow(data).size]
    assert reduced.size == tuple(-(-side // 2) for side in sizes[0])


def test_damaged_files_are_refused_or_decoded_as_by_pillow():
    data, rng, refused = encode(photo(), "JPEG", quality=90), np.random.default_rng(1), 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        broken = bytes(broken[: rng.integers(len(data))] if rng.random() < 0.2 else broken)
        try:
            expected = np.asarray(by_pillow(broken))
        except DamagedImage:
            refused += 1
            with pytest.raises(DamagedImage):
                decode_image(broken)
        else:
            np.testing.assert_array_equal(np.asarray(decode_image(broken)), expected)
    assert 10 < refused < 190


def test_a_bomb_is_refused_from_its_header():
    data = bytearray(encode(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x23\x28\x23\x28"
    assert jpeg_size(bytes(data)) == (9000, 9000)
    with pytest.raises(DamagedImage, match="more than the limit"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("crops", "factor"),
    [
        ([(448, 448, 224, 224)], 1), ([(896, 900, 224, 224)], 2), ([(895, 900, 224, 224)], 1),
        ([(1792, 1792, 224, 224)], 4), ([(9999, 9999, 224, 224)], 8), ([(9999, 9999, 224, 224), (300, 300, 96, 96)], 1),
        ([(9999, 900, 224, 224)], 2), ([], 1),
    ],
)  # fmt: skip
def test_every_crop_keeps_twice_the_size_of_its_view(crops, factor):
    assert allowed_reduction(crops) == factor
    assert factor == 1 or all(min(w / vw, h / vh) >= REMAINING * factor for w, h, vw, vh in crops)


class OneImage(Images):
    """A source of one image."""

    def __init__(self, image: Image.Image) -> None:
        self.data = encode(image, "JPEG", quality=92)
        super().__init__([Path("one")], [1], np.ones(1, np.uint32), np.ones(1, np.uint32), np.full(1, -1, np.int32))

    def read(self, i: int) -> bytes:
        return self.data

    def key(self, i: int) -> str:
        return "one"


def views_of(image: Image.Image, views: list, decode: str) -> list[np.ndarray]:
    batch = next(train_batches(OneImage(image), views, seed=3, batch_size=16, stop_step=1, decode=decode))
    return [view.numpy() * 0.25 * 255 for view in batch.views]


@pytest.mark.parametrize("side", [250, 520, 1040])
def test_views_of_reduced_images_are_those_of_the_full_image_within_the_bound(side, monkeypatch):
    factors = []
    monkeypatch.setattr(read, "decode_jpeg", lambda data, factor: factors.append(factor) or decode_jpeg(data, factor))
    views = [RandomCropFlip(64, (0.3, 1), MEAN, STD), RandomCropFlip((32, 48), (0.4, 1), MEAN, STD)]
    picture = photo(side, side * 5 // 4).resize((side * 5 // 4, side), Image.Resampling.BICUBIC)
    exact = views_of(picture, views, "exact")
    assert set(factors) == {1}
    factors.clear()
    scaled = views_of(picture, views, "scaled")
    assert max(factors) == {250: 1, 520: 4, 1040: 8}[side]
    for one, other in zip(exact, scaled):
        assert np.abs(one - other).mean() < 1, "levels of 255"
        assert (np.abs(one - other).max() == 0) == (side == 250)


def test_views_that_are_no_random_crops_get_the_full_image(monkeypatch):
    factors = []
    monkeypatch.setattr(read, "decode_jpeg", lambda data, factor: factors.append(factor) or decode_jpeg(data, factor))
    views_of(photo(900, 900), [CenterCrop(32, MEAN, STD)], "scaled")
    views_of(photo(900, 900), [RandomCropFlip(32, (0.9, 1), MEAN, STD), CenterCrop(32, MEAN, STD)], "scaled")
    assert set(factors) == {1}


def test_colour_augmentation_is_drawn_as_for_the_full_image():
    view = DINOCrop(32, (0.9, 1), MEAN, STD, blur=0.5, solarise=0.3)
    exact, scaled = (views_of(photo(700, 700), [view], decode)[0] for decode in ("exact", "scaled"))
    assert 0 < np.abs(exact - scaled).mean() < 2, "contrast and saturation magnify the differences"


def test_a_reduced_image_is_erased_and_loses_channels_as_the_full_one():
    view = ClassifierCrop(32, (0.9, 1), MEAN, STD, erasing=1.0, channel_drop=0.4)
    exact, scaled = (views_of(photo(700, 700), [view], decode)[0] for decode in ("exact", "scaled"))
    dropped = (exact == 0).all((2, 3))
    assert 5 < dropped.sum() < 40
    np.testing.assert_array_equal((scaled == 0).all((2, 3)), dropped)
    noise = (exact == scaled).mean((2, 3))[~dropped]
    assert 0 < noise.min() < noise.mean() < 0.5, "the erased part is the same noise, the rest differs a little"
    assert np.median(np.abs(exact - scaled)) < 1, "levels of 255"


@pytest.mark.parametrize("name", ["photos", "cifar10"])
def test_real_images_are_equal_to_pillows(name, shared_data):
    shards = open_shards(shared_data / name)
    for i in range(0, len(shards), len(shards) // 40):
        data = shards.read(i)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(by_pillow(data)))
        assert decode_jpeg(data) is not None
        assert Image.open(io.BytesIO(data)).size == jpeg_size(data)
