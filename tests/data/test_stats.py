"""Means and deviations of channels: exact, the same for any number of processes, and never those of other images."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from images import encode, npy, tifffile_bytes
from selfvil.data import stats
from selfvil.data.images import open_images
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from tars import write_tar


def source(tmp_path, arrays, name="a.tar"):
    members = [(f"{i:04d}.npy", npy(array)) for i, array in enumerate(arrays)]
    return write_tar(tmp_path / name, members)


def check(found, arrays, scale):
    pixels = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays]).astype(np.float64) / scale
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-9)
    assert (found.images, found.pixels) == (len(arrays), len(pixels))


@pytest.mark.parametrize(("dtype", "scale"), [("u1", 255), ("u2", 65535), ("i2", 1), ("f4", 1), ("f8", 1)])
def test_statistics_equal_numpys(tmp_path, dtype, scale):
    rng = np.random.default_rng(0)
    shapes = rng.integers(5, 30, (40, 2))
    arrays = [rng.integers(0, 200, (*shape, 5)).astype(dtype) + np.array([0, 9, 50, 1, 2], dtype) for shape in shapes]
    shards = open_shards(source(tmp_path, arrays))
    found = stats.measure(shards)
    check(found, arrays, scale)
    for workers in (2, 3):
        assert stats.measure(shards, workers=workers) == found, "bit for bit"


def test_a_large_mean_loses_no_digits(tmp_path):
    """The textbook formula would return a deviation of 0 or a NaN."""
    arrays = [1e8 + np.random.default_rng(i).normal(0, 0.01, (20, 20, 2)) for i in range(20)]
    found = stats.measure(open_shards(source(tmp_path, arrays)))
    expected = np.concatenate([array.reshape(-1, 2) for array in arrays]).std(axis=0)
    np.testing.assert_allclose(found.std, expected, rtol=1e-5)


def test_large_images_are_summed_in_blocks(monkeypatch):
    array = np.random.default_rng(0).integers(0, 65536, (50, 30, 3), dtype=np.uint16)
    whole = stats.moments(array), stats.moments(array.astype(np.float32))
    monkeypatch.setattr(stats, "_BLOCK", 64)
    parts = stats.moments(array), stats.moments(array.astype(np.float32))
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-14)
        np.testing.assert_allclose(one.squares, other.squares, rtol=1e-12)


def test_images_of_eight_bits_and_damaged_ones(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 8, 3), dtype=np.uint8) for _ in range(5)]
    members = [(f"{i}.png", encode(Image.fromarray(image), "PNG")) for i, image in enumerate(images)]
    members += [("6.png", b"\x89PNG\r\n\x1a\nbroken"), ("7.npy", npy(np.zeros((4, 4, 7), np.uint8)))]
    shards, seen = open_shards(write_tar(tmp_path / "a.tar", members)), []
    found = stats.measure(shards, progress=lambda *count: seen.append(count))
    check(found, images, 255)
    assert found.damaged == 2
    assert "6 in " in found.first_damaged
    assert seen[-1] == (7, 7)
    assert "2 images could not be read" in str(found)
    with pytest.raises(UserError, match="none of the 7 images can be read as 9 channels"):
        stats.measure(shards, channels=9)


def test_they_are_found_only_for_the_same_images(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.random((6, 6, 4)).astype(np.float32) for _ in range(4)]
    path = source(tmp_path, arrays)
    with pytest.raises(UserError, match=r"have not been measured: run `selfvil index SHARDS --stats`"):
        stats.load(open_shards(path), 4)
    shards = open_shards(path)
    measured = stats.measure(shards)
    file = stats.save(shards, measured)
    assert file == path.with_name("a.tar.stats.json")
    assert stats.load(open_shards(path), 4) == measured
    with pytest.raises(UserError, match=r"is for 4 channels, and model\.in_chans is 3"):
        stats.load(shards, 3)
    other = open_shards(source(tmp_path, arrays[:3]))
    with pytest.raises(UserError, match="was measured on other images"):
        stats.load(other, 4)
    stats.save(other, stats.measure(other))
    assert stats.load(other, 4).images == 3
    assert len(json.loads(file.read_text())["sources"]) == 2, "those of the other images are kept"


def test_a_constant_channel_is_refused(tmp_path):
    arrays = [np.dstack([np.random.default_rng(0).random((6, 6)), np.ones((6, 6))])]
    shards = open_shards(source(tmp_path, arrays))
    stats.save(shards, stats.measure(shards))
    with pytest.raises(UserError, match=r"channel 1 of .* has the same value in all pixels"):
        stats.load(shards, 2)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"format": 2}', b"x" * 2_000_000, b'{"format": 1, "sources": {"F": {"mean": []}}}',
     b'{"format": 1, "sources": {"F": {"images": 1, "pixels": 1, "mean": [NaN], "std": [1.0], "damaged": 0, '
     b'"first_damaged": ""}}}'],
)  # fmt: skip
def test_damaged_sidecars_are_not_used(tmp_path, content):
    shards = open_shards(source(tmp_path, [np.random.default_rng(0).random((6, 6, 1))]))
    file = tmp_path / "a.tar.stats.json"
    file.write_bytes(content.replace(b"F", shards.fingerprint.encode()))
    with pytest.raises(UserError, match="measured"):
        stats.load(shards, 1)
    stats.save(shards, stats.measure(shards))
    stats.load(shards, 1)


def test_read_only_folders(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    path = source(folder, [np.random.default_rng(0).random((6, 6, 2))])
    shards = open_shards(path)
    os.chmod(folder, 0o555)
    try:
        file = stats.save(shards, stats.measure(shards))
        assert file.is_relative_to(os.environ["XDG_CACHE_HOME"])
        assert stats.load(shards, 2).images == 1
    finally:
        os.chmod(folder, 0o755)


def test_a_folder_of_images(tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    array = np.random.default_rng(0).integers(0, 65536, (20, 20, 5), dtype=np.uint16)
    (folder / "a.tif").write_bytes(tifffile_bytes(array, planarconfig="contig"))
    images = open_images(folder)
    found = stats.measure(images)
    check(found, [array], 65535)
    assert stats.save(images, found) == tmp_path / "tiles.stats.json"
    assert stats.load(images, 5) == found
