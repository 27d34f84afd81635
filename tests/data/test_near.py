"""Near-duplicates: candidates against all pairs, copies that must be found, and images that must not be joined."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from tests.images import encode

from selfvil.data import near
from selfvil.data.near import BITS, near_groups, small_picture
from selfvil.data.read import decode_image


def hashes_near_each_other(count: int, seed: int) -> np.ndarray:
    """Random hashes, half of which are others with 0 to 12 bits changed."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 64), dtype=np.uint8)
    for i in range(count // 2):
        bits[i] = bits[count // 2 + i % 40]
        bits[i, rng.choice(64, rng.integers(0, 13), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_candidates_are_all_pairs_within_the_bits(seed):
    hashes = hashes_near_each_other(400, seed)
    i, j = np.triu_indices(len(hashes), 1)
    different = np.array([int(a ^ b).bit_count() for a, b in zip(hashes[i].tolist(), hashes[j].tolist())])
    expected = set(zip(i[different <= BITS].tolist(), j[different <= BITS].tolist()))
    found = list(zip(*(part.tolist() for part in near._candidates(hashes))))
    assert len(expected) > 100
    assert set(found) == expected
    assert len(found) == len(set(found))


def test_equal_hashes_of_thousands_of_images_stay_linear():
    first, _ = near._candidates(np.zeros(5_000, np.uint64))
    assert 5_000 <= len(first) <= 5_000 * near._WINDOW


def scene(seed: int, height: int = 240, width: int = 320) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_copies_are_found_and_other_images_are_not():
    images = [scene(seed) for seed in range(60)]
    copies = [
        decode_image(encode(images[3], "JPEG", quality=60)),
        images[3].resize((200, 150), Image.Resampling.BICUBIC),
        ImageEnhance.Brightness(images[20]).enhance(1.04),
    ]
    pictures = np.stack([np.frombuffer(small_picture(image), np.uint8) for image in images + copies])
    assert near_groups(pictures) == [[3, 60, 61], [20, 62]]


def test_plain_images_of_different_colours_are_different():
    images = [Image.new("RGB", (50, 40), (value, value, value)) for value in range(0, 256, 32)]
    pictures = np.stack([np.frombuffer(small_picture(image), np.uint8) for image in images])
    assert near_groups(pictures) == []
    assert near_groups(np.concatenate([pictures, pictures[2:3]])) == [[2, len(images)]]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 3), (8, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_of_any_size_have_a_small_picture(size, mode):
    assert len(small_picture(Image.new(mode, size))) == near.WIDTH * near.HEIGHT * 3
