"""Checking images before packing: damage, notes, and images that are left out."""

import io
import os
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tests.images import encode, png_chunk, random_image, tiff

from selfvil.data.check import SEVERAL_PAGES, Checked, Checker
from selfvil.data.read import decode_image


def check(data: bytes, mask: bytes | None = None, **options) -> Checked:
    settings = {"size": None, "max_value": None, "strict": False} | options
    return Checker(lambda i: data, lambda i: mask, **settings)(0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth image: its JPEG has long runs of codes, like that of a photograph."""
    y, x = np.mgrid[:160, :200]
    noise = np.random.default_rng(0).normal(0, 6, (160, 200, 3))
    pixels = np.stack([x, y, 120 + 80 * np.sin(x / 9) * np.cos(y / 7)], 2) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    broken = bytearray(data)
    broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(broken)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_undamaged_images_are_kept_without_notes(photo, kind):
    data = encode(photo, kind)
    checked = check(data, strict=True)
    assert (checked.data, checked.reason, checked.damage, checked.notes) == (data, "", (), ())
    assert checked.size == photo.size


def test_every_flipped_bit_of_a_png_is_detected(photo):
    data, rng = encode(photo, "PNG"), np.random.default_rng(1)
    for _ in range(150):
        checked = check(flipped(data, rng))
        assert checked.reason or checked.damage


@pytest.mark.parametrize(("kind", "fewest"), [("JPEG", 0.08), ("PNG", 1.0)])
def test_damage_that_decoders_tolerate_is_reported(photo, kind, fewest):
    """Pillow alone refused 6 of 200 such JPEGs of photographs, and decoded 193 to other pixels."""
    data, rng = encode(photo, kind), np.random.default_rng(2)
    before = np.asarray(decode_image(data))
    changed = found = 0
    for _ in range(150):
        broken = flipped(data, rng)
        checked = check(broken)
        if checked.reason or not np.array_equal(np.asarray(decode_image(broken)), before):
            changed += 1
            found += bool(checked.reason or checked.damage)
    assert changed > 100
    assert found >= fewest * changed


def test_libjpegs_warning_is_reported_and_strict_leaves_the_image_out(photo, capfd):
    data = encode(photo, "JPEG")
    middle = data.index(b"\xff\xda") + (len(data) - data.index(b"\xff\xda")) // 2
    broken = data[:middle] + data[middle + 40 :]  # some codes are missing, the end mark is present
    checked = check(broken)
    assert checked.data == broken
    assert "Corrupt JPEG data" in " ".join(checked.damage)
    assert check(broken, strict=True).reason == "; ".join(checked.damage)
    assert not check(broken, strict=True).data
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there", "the warnings went to the report, and later output where it belongs"


def test_works_with_a_closed_standard_error(photo):
    saved = os.dup(2)
    os.close(2)
    try:
        checked = check(encode(photo, "JPEG")[:-300] + b"\xff\xd9")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert checked.damage


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_as_in_training(photo, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo.convert(mode), "JPEG", exif=exif)
    shrunk = check(data, size=50)
    expected = decode_image(data, None)
    assert shrunk.size == ((62, 50) if orientation == 1 else (50, 62))
    expected = np.asarray(expected.resize(shrunk.size, Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(decode_image(shrunk.data, None), np.float32) - expected).mean() < 3


def test_a_webp_of_another_length_than_it_declares_is_reported(photo):
    data = bytearray(encode(photo, "WEBP"))
    data += bytes(64)
    assert "declares" in " ".join(check(bytes(data)).damage)


def test_broken_metadata_is_noted_and_the_image_kept(photo):
    data = encode(photo, "PNG")
    broken = data[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5 << 20))) + data[33:]
    checked = check(broken, strict=True)
    assert checked.data == broken
    assert "metadata" in " ".join(checked.notes)
    wrong_crc = data[:33] + png_chunk(b"tEXt", b"a\0b")[:-1] + b"!" + data[33:]
    checked = check(wrong_crc, strict=True)
    assert checked.data == wrong_crc
    assert "tEXt" in " ".join(checked.notes)


@pytest.mark.parametrize(("kind", "several"), [("TIFF", True), ("WEBP", True), ("PNG", True), ("MPO", False)])
def test_only_the_first_page_is_packed_with_a_note(kind, several):
    """The first picture of an MPO is the photograph by definition; phones add a preview or a gain map."""
    first, second = random_image(0), random_image(1)
    data = encode(first, kind, save_all=True, append_images=[second])
    assert (SEVERAL_PAGES in check(data).notes) == several
    assert SEVERAL_PAGES not in check(encode(first, kind)).notes


def test_sixteen_bit_grey_is_scaled_by_max_value():
    values = np.array([[0, 1000, 2048, 4095]], np.uint16)
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(values), kind)
        checked = check(data)
        assert (checked.data, checked.deepest) == (data, 4095)
        told = check(data, max_value=4095)
        assert told.extension == "png"
        assert np.asarray(decode_image(told.data, 1)).tolist() == [[0, 62, 128, 255]]
        assert "above the maximum value 4000" in check(data, max_value=4000).reason
    declared = check(tiff(values, bits=12), max_value=1023)
    assert (declared.deepest, declared.reason) == (0, ""), "the file's own declaration has precedence"
    pgm = b"P5 4 1 4095\n" + values.astype(">u2").tobytes()
    assert (check(pgm).deepest, check(pgm, max_value=1023).data) == (0, pgm)


def test_deep_colours_cannot_be_rescaled():
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + np.array([4095] * 6, ">u2").tobytes())
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(*chunk) for chunk in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )
    assert check(data).data == data
    assert "16-bit colours" in check(data, max_value=4095).reason


# --- masks --------------------------------------------------------------------------------------------------------


def mask_of(height: int, width: int, mode: str = "L") -> Image.Image:
    ids = np.random.default_rng(0).choice([0, 1, 7, 255], (height, width)).astype(np.uint8)
    mask = Image.fromarray(ids)
    if mode == "P":
        mask.putpalette([value for id in range(256) for value in (id, 0, 255 - id)])
    return mask


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_resized_by_nearest_neighbour(photo, mode):
    mask = mask_of(160, 200, mode)
    data = encode(mask, "PNG")
    assert check(encode(photo, "JPEG"), data).mask == data
    shrunk = check(encode(photo, "JPEG"), data, size=40)
    after = Image.open(io.BytesIO(shrunk.mask))
    assert after.size == shrunk.size == (50, 40)
    assert set(np.unique(np.asarray(after))) == {0, 1, 7, 255}, "class ids are never mixed"
    np.testing.assert_array_equal(np.asarray(after), np.asarray(mask)[2::4, 2::4])


def test_masks_of_other_formats_become_png(photo):
    mask = mask_of(160, 200)
    checked = check(encode(photo, "JPEG"), encode(mask, "TIFF"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(checked.mask))), np.asarray(mask))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (mask_of(100, 200), "200 × 100 pixels, the image 200 × 160"),
        (random_image(0), "one channel"),
        (b"x", "its mask"),
    ],
)
def test_a_sample_whose_mask_does_not_fit_is_left_out(photo, mask, reason):
    data = mask if isinstance(mask, bytes) else encode(mask, "PNG")
    checked = check(encode(photo, "JPEG"), data)
    assert not checked.data
    assert reason in checked.reason


def test_a_damaged_mask_is_reported(photo):
    data = encode(mask_of(160, 200), "PNG")
    assert any("its mask" in text for text in check(encode(photo, "JPEG"), data[:-13] + b"!" + data[-12:]).damage)


def test_reading_errors_leave_the_image_out():
    read = partial(Checker.__call__, Checker(lambda i: b"no image", lambda i: None, None, None, False))
    assert "not an image" in read(0).reason


def test_libtiffs_messages_are_not_printed(photo, capfd):
    data, rng = encode(photo, "TIFF", compression="tiff_adobe_deflate"), np.random.default_rng(3)
    checked = [check(flipped(data, rng)) for _ in range(20)]
    assert sum(bool(each.reason or each.damage) for each in checked) >= 10
    assert capfd.readouterr().err == ""
