"""Decoding: exact for lossless formats, and safe on hostile bytes."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tests.images import encode, png_chunk, tiff

from selfvil.data import read
from selfvil.data.read import DamagedImage, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture
def rgb() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_are_exact(rgb, kind):
    np.testing.assert_array_equal(np.asarray(decode_image(encode(rgb, kind))), np.asarray(rgb))
    np.testing.assert_array_equal(
        np.asarray(decode_image(encode(rgb.convert("L"), kind), 1)), np.asarray(rgb.convert("L"))
    )


def test_webp_is_read(rgb):
    np.testing.assert_array_equal(np.asarray(decode_image(encode(rgb, "WEBP", lossless=True))), np.asarray(rgb))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("source", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_the_requested_channels(rgb, source, channels, mode):
    image = Image.fromarray(np.full((4, 4), 40000, np.uint16)) if source == "I;16" else rgb.convert(source)
    decoded = decode_image(encode(image, "TIFF" if source == "CMYK" else "PNG"), channels)
    assert decoded.mode == mode
    assert decoded.size == image.size


@pytest.mark.parametrize(("source", "channels"), [("1", 1), ("L", 1), ("LA", 4), ("P", 3), ("RGB", 3), ("RGBA", 4)])
def test_none_keeps_the_images_own_channels(rgb, source, channels):
    assert len(decode_image(encode(rgb.convert(source), "PNG"), None).getbands()) == channels


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), kind), 1))
    np.testing.assert_array_equal(decoded, np.rint(values / 257).astype(np.uint8))


def test_pixels_without_a_known_range_are_refused():
    for pixels in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 1 << 20, np.int32)):
        with pytest.raises(DamagedImage, match="range"):
            decode_image(encode(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]  # fmt: skip
    expected = rgb if upright is None else rgb.transpose(upright)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(rgb, "PNG", exif=exif))), np.asarray(expected))


def test_transparent_palette_keeps_its_colours():
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    data = encode(image, "PNG", transparency=b"\x00\xff")
    assert np.asarray(decode_image(data, 4)).tolist() == [[[10, 20, 30, 0], [40, 50, 60, 255]]]
    assert np.asarray(decode_image(data, 3)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8193, 8192), (13000, 13000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory was taken for the pixels"))
    with pytest.raises(DamagedImage, match=r"limit|bomb|decoded"):
        decode_image(png_claiming(*size))


def test_the_limit_itself_is_allowed(monkeypatch, rgb):
    monkeypatch.setattr(read, "MAX_PIXELS", 13 * 17)
    assert decode_image(encode(rgb, "PNG")).size == (17, 13)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"hello, I am a text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(20),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6\n0 0\n255\n", b"P6 9 9 255\n", b"BM" + bytes(60),
        b"II*\0\x08\0\0\0\xff\xff", b"RIFF\x10\0\0\0WEBPVP8 ", bytes(1000), b"\x80\x04\x95cos\nsystem\n",
    ],
)  # fmt: skip
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(DamagedImage):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_truncated_image_is_refused_at_any_length(rgb, kind):
    data = encode(rgb, kind)
    for length in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(DamagedImage):
            decode_image(data[:length])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_image_or_one_kind_of_error(rgb, kind):
    """Most damage decodes without an error (so the index has a CRC); all other damage must raise DamagedImage."""
    data, rng = encode(rgb, kind), np.random.default_rng(1)
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            broken[place] = rng.integers(256)
        try:
            image = decode_image(bytes(broken))
        except DamagedImage:
            continue
        assert image.mode == "RGB"


def test_channels_must_be_possible(rgb):
    with pytest.raises(ValueError, match="channels"):
        decode_image(encode(rgb, "PNG"), 2)


# --- metadata and declared depths ---------------------------------------------------------------------------------


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    return data[:33] + b"".join(chunks) + data[33:]


BROKEN_CHUNKS = {
    "zTXt of 5 MB": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5 << 20))),
    "iTXt of 5 MB": png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(5 << 20))),
    "tEXt of 70 MB": b"".join(png_chunk(b"tEXt", b"a%d\0" % i + bytes(1 << 20)) for i in range(70)),
    "iCCP of 5 MB": png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(5 << 20))),
    "iCCP": png_chunk(b"iCCP", b"a\0\0junk"),
    "pHYs": png_chunk(b"pHYs", b"a"),
    "gAMA": png_chunk(b"gAMA", b"a"),
    "cHRM": png_chunk(b"cHRM", b"a"),
    "sRGB": png_chunk(b"sRGB", b""),
    "eXIf": png_chunk(b"eXIf", b"junk"),
    "acTL": png_chunk(b"acTL", b"\0"),
    "CRC of tEXt": png_chunk(b"tEXt", b"a\0b")[:-1] + b"!",
}


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_broken_or_large_metadata_of_a_png_changes_no_pixels(rgb, name, place):
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(rgb, "PNG", exif=exif)
    chunk = BROKEN_CHUNKS[name]
    data = with_chunks(data, chunk) if place == "before" else data[:-12] + chunk + data[-12:]
    decoded = np.asarray(decode_image(data))
    upright = np.asarray(rgb.transpose(Image.Transpose.ROTATE_180))
    possible = [upright, np.asarray(rgb)] if name == "eXIf" else [upright]
    assert any(np.array_equal(decoded, each) for each in possible)


def test_broken_pixels_with_broken_metadata_are_refused(rgb):
    data = with_chunks(encode(rgb, "PNG"), BROKEN_CHUNKS["pHYs"])
    with pytest.raises(DamagedImage):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_changes_no_pixels(rgb, kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, (72, 1), "text"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01"
    raw, rng = exif.tobytes(), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(raw)
        for place in rng.integers(6, len(raw), rng.integers(1, 8)):
            broken[place] = rng.integers(256)
        assert sorted(decode_image(encode(rgb, kind, exif=bytes(broken))).size) == [13, 17]


def test_a_jpeg_with_a_broken_header_segment_is_read(rgb):
    data = encode(rgb, "JPEG")
    broken = data[:2] + b"\xff\xe0\0\7JFIF\0" + data[2:]
    np.testing.assert_array_equal(np.asarray(decode_image(broken)), np.asarray(decode_image(data)))


def test_a_declared_depth_is_the_scale():
    values = np.array([[0, 16, 2048, 4095]], np.uint16)
    expected = [[0, 1, 128, 255]]
    assert np.asarray(decode_image(tiff(values, bits=12), 1)).tolist() == expected
    assert np.asarray(decode_image(b"P5 4 1 4095\n" + values.astype(">u2").tobytes(), 1)).tolist() == expected


def test_tags_about_the_values_in_use_do_not_change_the_scale():
    """TIFF 6.0 has MaxSampleValue for statistics only; PNG writers with sBIT scale to the full range."""
    values = np.array([[0, 257, 4095, 4095]], np.uint16)
    assert np.asarray(decode_image(tiff(values, bits=16, more=((281, 3, 4095),)), 1)).tolist() == [[0, 1, 16, 16]]
    data = with_chunks(encode(Image.fromarray(values), "PNG"), png_chunk(b"sBIT", b"\x0c"))
    assert np.asarray(decode_image(data, 1)).tolist() == [[0, 1, 16, 16]]
