"""Images with many channels or more than 8 bits: exact values, limits, and damaged or hostile files."""

import contextlib
import io
import pickle
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images import dicom, encode, npy, png16, png_chunk, tiff, tifffile_bytes
from selfvil.data import read
from selfvil.data.arrays import array_extension, channels_last, decode_pixels, to_rgb
from selfvil.data.read import MAX_ARRAY_BYTES, DamagedImage, decode_image
from selfvil.errors import UserError

DTYPES = ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]


def values(height=7, width=5, channels=12, dtype="u2", seed=0):
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(0, 100, (height, width, channels)).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, (height, width, channels), kind, endpoint=True)


def check(data, expected, channels=None):
    found = decode_pixels(data, channels or expected.shape[2])
    found = np.asarray(found)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


# --- exact values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 12, 32])
def test_npy_is_exact_in_any_layout(dtype, channels):
    expected = values(40, 36, channels, dtype)
    for big in ("<", ">"):
        check(npy(expected.astype(expected.dtype.newbyteorder(big))), expected)
    check(npy(np.asfortranarray(expected)), expected)
    check(npy(np.ascontiguousarray(expected.transpose(2, 0, 1))), expected)
    check(npy(expected, (2, 0)), expected)
    if channels == 1:
        check(npy(expected[:, :, 0]), expected)


def test_channels_of_an_array_are_found_by_a_rule():
    assert channels_last((64, 64, 12), 12)
    assert not channels_last((12, 64, 64), 12)
    assert channels_last((12, 64, 12), 12)
    assert channels_last((64, 64, 12), None)
    assert not channels_last((12, 64, 64), None)
    assert channels_last((8, 64, 8), None)
    assert not channels_last((3, 20, 6), 3), "the expected number decides, not the shorter axis"
    assert channels_last((6, 20, 3), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["interleaved", "planar", "pages"])
def test_tiff_is_exact_in_any_layout(dtype, layout):
    expected = values(33, 50, 12, dtype)
    if layout == "interleaved":
        content, settings = expected, {"planarconfig": "contig"}
    elif layout == "planar":
        content, settings = expected.transpose(2, 0, 1), {"planarconfig": "separate"}
    else:
        content, settings = [expected[:, :, channel] for channel in range(12)], {}
    check(tifffile_bytes(content, **settings), expected)
    check(tifffile_bytes(content, **settings, byteorder=">", bigtiff=True), expected)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "lzma", "zstd"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_compressed_and_tiled_tiff_is_exact(compression, planar, tile):
    expected = values(40, 70, 5)
    content = expected.transpose(2, 0, 1) if planar else expected
    settings = {"planarconfig": "separate" if planar else "contig", "compression": compression}
    settings |= {"tile": tile} if tile else {"rowsperstrip": 7}
    check(tifffile_bytes(content, **settings), expected)
    if compression in ("zlib", "lzw"):
        check(tifffile_bytes(content, **settings, predictor=True), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_is_exact(channels):
    expected = values(9, 6, channels)
    found = decode_pixels(png16(expected), None)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint16


def paeth(a, b, c):
    return min((a, b, c), key=lambda value: abs(a + b - c - value))  # of equal ones the first


@pytest.mark.parametrize("shape", [(9, 6, 3), (1, 7, 4), (8, 1, 2), (5, 5, 3)])
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [0, 1], [0, 1, 2, 3, 4]])
def test_all_filters_of_png(shape, filters):
    """Against an encoder that filters byte by byte."""
    expected = values(*shape)
    expected[2:4, 1:5] = 700  # equal neighbours
    step, kinds = 2 * shape[2], np.random.default_rng(1).choice(filters, shape[0])
    raw = expected.astype(">u2").view(np.uint8).reshape(shape[0], -1).astype(int)
    rows = b""
    for y, kind in enumerate(kinds):
        rows += bytes([kind])
        for x in range(raw.shape[1]):
            left, up = raw[y, x - step] if x >= step else 0, raw[y - 1, x] if y else 0
            corner = raw[y - 1, x - step] if y and x >= step else 0
            predicted = (0, left, up, (left + up) // 2, paeth(left, up, corner))[kind]
            rows += bytes([(raw[y, x] - predicted) % 256])
    data = png16(expected)
    start = data.index(b"IDAT") - 4
    data = data[:start] + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_pixels(data, None), expected)


def test_sixteen_bit_grey_of_any_format_is_not_rounded():
    grey = np.array([[0, 1, 128, 257, 32768, 65535]], np.uint16)[:, :, None]
    for kind in ("PNG", "TIFF", "PPM"):
        check(encode(Image.fromarray(grey[:, :, 0]), kind), grey)
    twelve = np.array([[0, 1, 2048, 4095]], np.uint16)
    found = decode_pixels(tiff(twelve, bits=12), 1)
    np.testing.assert_array_equal(found[:, :, 0], twelve / np.float32(4095))


def test_sixteen_bit_colours_become_the_requested_channels():
    rgba = values(9, 6, 4)
    np.testing.assert_array_equal(decode_pixels(png16(rgba), 3), rgba[:, :, :3])
    grey = decode_pixels(png16(rgba), 1)
    expected = (rgba[:, :, :3] @ np.array([0.299, 0.587, 0.114]) / 65535)[:, :, None]
    np.testing.assert_allclose(grey, expected, rtol=1e-5)
    np.testing.assert_array_equal(decode_pixels(png16(rgba[:, :, :1]), 3), rgba[:, :, [0, 0, 0]])
    with pytest.raises(DamagedImage, match="it has 3 channels, 12 are expected"):
        decode_pixels(png16(rgba[:, :, :3]), 12)
    with pytest.raises(DamagedImage, match="it has 3 channels, 12 are expected"):
        decode_pixels(encode(Image.new("RGB", (4, 4)), "PNG"), 12)


def test_images_of_eight_bits_stay_with_pillow():
    """Also those in NPY, and in TIFF with several pages, of which grey ones are channels if their number is right."""
    rgb = values(9, 6, 3, "u1")
    for data in (encode(Image.fromarray(rgb), "PNG"), encode(Image.fromarray(rgb), "TIFF"), npy(rgb)):
        found = decode_pixels(data, 3)
        assert isinstance(found, Image.Image)
        np.testing.assert_array_equal(np.asarray(found), rgb)
    pages = [Image.fromarray(rgb[:, :, channel]) for channel in range(3)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(np.asarray(decode_pixels(data, 3)), rgb)
    np.testing.assert_array_equal(np.asarray(decode_pixels(data, 1)), rgb[:, :, 0])


def test_the_fourth_band_of_a_tiff_is_no_alpha_channel_unless_it_is_declared():
    bands = values(9, 6, 4, "u1")
    check(tifffile_bytes(bands, photometric="rgb", extrasamples=["unspecified"]), bands)
    check(tifffile_bytes(bands, planarconfig="contig"), bands)
    alpha = decode_pixels(tifffile_bytes(bands, photometric="rgb", extrasamples=["unassalpha"]), 4)
    assert isinstance(alpha, Image.Image)
    assert alpha.mode == "RGBA"


def test_smaller_copies_among_the_pages_are_no_channels():
    import tifffile

    expected, file = values(32, 32, 3), io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(expected, photometric="minisblack", planarconfig="contig", metadata=None)
        out.write(expected[::2, ::2], subfiletype=1, photometric="minisblack", planarconfig="contig", metadata=None)
    check(file.getvalue(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_arrays_as_it_turns_images(orientation):
    grey = values(5, 8, 1, "u1")[:, :, 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(decode_image(encode(Image.fromarray(grey), "PNG", exif=exif), 1))
    bands = np.repeat(grey[:, :, None], 5, axis=2).astype(np.uint16)
    found = decode_pixels(tifffile_bytes(bands, planarconfig="contig", extratags=[(274, 3, 1, orientation, True)]), 5)
    np.testing.assert_array_equal(found[:, :, 4], expected)


# --- DICOM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("big", [False, True])
def test_dicom_is_rescaled_without_a_window(dtype, big):
    stored = values(6, 8, 1, dtype)[:, :, 0]
    plain = decode_pixels(dicom(stored, big=big, WindowCenter=40, WindowWidth=80), 1)
    np.testing.assert_array_equal(plain[:, :, 0], stored.astype(np.float32))
    rescaled = decode_pixels(dicom(stored, big=big, RescaleSlope=0.5, RescaleIntercept=-1024), 1)
    np.testing.assert_array_equal(rescaled[:, :, 0], (stored * 0.5 - 1024).astype(np.float32))


def test_dicom_with_twelve_bits():
    stored = np.array([[0, 1, -1, 2047], [-2048, 5, 6, 7]], np.int16)
    raw = (stored.astype(np.int64) & 0xFFF | 0x5000).astype(np.uint16).view(np.int16)  # other bits hold overlays
    np.testing.assert_array_equal(decode_pixels(dicom(raw, bits=12), 1)[:, :, 0], stored.astype(np.float32))
    unsigned = np.array([[0, 4095, 17]], np.uint16)
    inverted = decode_pixels(dicom(unsigned, bits=12, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2), 1)
    np.testing.assert_array_equal(inverted[:, :, 0], (2.0 * (4095 - unsigned)).astype(np.float32))


def test_dicom_equals_pydicom():
    import pydicom

    stored = values(6, 8, 1, "i2")[:, :, 0]
    data = dicom(stored, RescaleSlope=1.5, RescaleIntercept=3)
    image = pydicom.dcmread(io.BytesIO(data))
    expected = pydicom.pixels.apply_modality_lut(image.pixel_array, image).astype(np.float32)
    np.testing.assert_array_equal(decode_pixels(data, 1)[:, :, 0], expected)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"SamplesPerPixel": 3}, "expected MONOCHROME"), ({"PhotometricInterpretation": "RGB"}, "expected MONOCHROME"),
        ({"NumberOfFrames": 2}, "2 frames"), ({"Rows": 60000, "Columns": 60000}, "more than the limit"),
        ({"Rows": 7}, "bytes of pixels"), ({"BitsStored": 40}, "stores 40 bits"), ({"Columns": 0}, "declares"),
        ({"RescaleSlope": "1e300"}, "NaN or infinite"),
    ],
)  # fmt: skip
def test_dicom_of_other_kinds_is_refused(elements, message):
    with np.errstate(over="ignore"), pytest.raises(DamagedImage, match=message):
        decode_pixels(dicom(values(6, 8, 1, "i2")[:, :, 0], **elements), 1)


def test_compressed_dicom_is_refused():
    data = dicom(values(6, 8, 1)[:, :, 0])
    for transfer, message in ((b"1.2.840.10008.1.2.5", "is compressed"), (b"1.2.840.10008.1.2.1.99", "deflated")):
        known = b"UI\x14\x001.2.840.10008.1.2.1\0"
        padded = transfer + b"\0" * (len(transfer) % 2)
        length = len(padded).to_bytes(2, "little")
        with pytest.raises(DamagedImage, match=message):
            decode_pixels(data.replace(known, b"UI" + length + padded), 1)


# --- refused ------------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_pickled_arrays_are_refused(capsys):
    file = io.BytesIO()
    np.save(file, np.array([Harmful()] * 4, object), allow_pickle=True)
    hidden = file.getvalue().replace(b"'|O'", b"'<f8'")
    for data in (file.getvalue(), hidden, b"\x93NUMPY" + pickle.dumps(Harmful())):
        with pytest.raises(DamagedImage):
            decode_pixels(data, None)
    assert capsys.readouterr().out == ""
    structured = np.zeros((4, 4), [("a", "u2"), ("b", "u2")])
    with pytest.raises(DamagedImage, match="expected integers or floats"):
        decode_pixels(npy(structured), None)


@pytest.mark.parametrize("dtype", ["?", "c8", "S3", "M8[s]"])
def test_other_values_in_npy_are_refused(dtype):
    with pytest.raises(DamagedImage, match="expected integers or floats"):
        decode_pixels(npy(np.zeros((4, 4), dtype)), None)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), (0, 4), ()])
def test_other_shapes_in_npy_are_refused(shape):
    with pytest.raises(DamagedImage, match="expected \\(H, W\\)"):
        decode_pixels(npy(np.zeros(shape)), None)


def test_values_that_are_not_finite_are_refused():
    for bad in (np.nan, np.inf):
        pixels = np.ones((4, 4, 6), np.float32)
        pixels[2, 2, 2] = bad
        for data in (npy(pixels), tifffile_bytes(pixels, planarconfig="contig")):
            with pytest.raises(DamagedImage, match="NaN or infinite"):
                decode_pixels(data, 6)


def with_size(data, side):
    """A little-endian TIFF whose first page declares this width and height."""
    (start,) = struct.unpack_from("<I", data, 4)
    changed = bytearray(data)
    for number in range(struct.unpack_from("<H", data, start)[0]):
        entry = start + 2 + 12 * number
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):
            struct.pack_into("<HII", changed, entry + 2, 4, 1, side)
    return bytes(changed)


def bombs():
    """Files of a few kilobytes whose headers declare more than may be decoded, in each format."""
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    description = "{'descr': '<u2', 'fortran_order': False, 'shape': (8000, 8000, 12), }".ljust(117) + "\n"
    yield "npy", header + description.encode() + bytes(100)
    ihdr = (8000).to_bytes(4, "big") * 2 + bytes([16, 6, 0, 0, 0])
    yield "png", b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    small = tifffile_bytes(np.zeros((64, 64, 12), np.uint16), planarconfig="contig", compression="zlib")
    yield "tiff", with_size(small, 60000)
    yield "dicom", dicom(np.zeros((4, 4), np.uint16), Rows=60000, Columns=60000)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in bombs()])
def test_bombs_are_refused_from_the_header(data):
    tracemalloc.start()
    try:
        with pytest.raises(DamagedImage, match="limit of"):
            decode_pixels(data, None)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_strips_that_decompress_to_more_than_their_pixels_are_bounded():
    """Their header declares 8 × 8 pixels of 12 channels; decompressed, they have 24 MB."""
    for compression in ("zlib", "lzw", "packbits", "lzma", "zstd"):
        black = np.zeros((1000, 1000, 12), np.uint16)
        settings = {"planarconfig": "contig", "compression": compression, "rowsperstrip": 1000}
        data = with_size(tifffile_bytes(black, **settings), 8)
        del black
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        with contextlib.suppress(DamagedImage):
            decode_pixels(data, 12)
        assert memory("VmHWM") - before < 12_000, "kilobytes"


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_limits():
    with pytest.raises(DamagedImage, match="33 channels, more than the limit of 32"):
        decode_pixels(npy(np.zeros((40, 40, 33), np.uint8)), None)
    with pytest.raises(DamagedImage, match=str(MAX_ARRAY_BYTES)):
        read.check_size(8000, 8000, 12, 2)
    read.check_size(3344, 3344, 12, 2)


def test_missing_packages_are_named(monkeypatch):
    stack = tifffile_bytes(values(), planarconfig="contig", compression="lzw")
    uncompressed, scan = tifffile_bytes(values(), planarconfig="contig"), dicom(values()[:, :, 0])
    from selfvil.data import tiff as reader

    monkeypatch.setattr(reader, "_has_imagecodecs", lambda: False)
    with pytest.raises(UserError, match=r"LZW compression needs imagecodecs: pip install 'selfvil\[tiff\]'"):
        decode_pixels(stack, 12)
    check(uncompressed, values())
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"needs tifffile: pip install 'selfvil\[tiff\]'"):
        decode_pixels(uncompressed, 12)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"needs pydicom: pip install 'selfvil\[dicom\]'"):
        decode_pixels(scan, 1)


# --- damaged ------------------------------------------------------------------------------------------------------


def samples():
    bands = values(24, 20, 6)
    return {
        "npy": npy(bands),
        "tiff": tifffile_bytes(bands, planarconfig="contig"),
        "tiff lzw": tifffile_bytes(bands, planarconfig="contig", compression="lzw", rowsperstrip=5),
        "tiff deflate": tifffile_bytes(bands, planarconfig="contig", compression="zlib", predictor=True, tile=(16, 16)),
        "tiff zstd": tifffile_bytes(bands.transpose(2, 0, 1), planarconfig="separate", compression="zstd"),
        "tiff pages": tifffile_bytes([bands[:, :, channel] for channel in range(6)], compression="packbits"),
        "tiff float": tifffile_bytes(bands.astype(np.float32), planarconfig="contig", compression="lzma"),
        "dicom": dicom(bands[:, :, 0], bits=16, RescaleSlope=2),
        "png": png16(bands[:, :, :3]),
    }


@pytest.mark.parametrize("kind", samples())
def test_truncated_files_are_refused(kind):
    data = samples()[kind]
    for share in (0.02, 0.2, 0.5, 0.9, 0.99):
        with pytest.raises(DamagedImage):
            decode_pixels(data[: int(len(data) * share)], None)


@pytest.mark.parametrize("kind", samples())
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_give_an_image_or_are_refused(kind):
    """Nothing else is raised, and an image has a possible size."""
    data, rng = samples()[kind], np.random.default_rng(0)
    refused = 0
    for number in range(120):
        changed = bytearray(data)
        reach = len(data) if number % 3 == 0 else min(len(data), 400)  # headers are where it matters
        for place in rng.integers(0, reach, rng.integers(1, 6)):
            changed[place] = rng.integers(256)
        try:
            found = decode_pixels(bytes(changed), None)
        except DamagedImage:
            refused += 1
            continue
        array_extension(bytes(changed))
        assert np.asarray(found).nbytes <= MAX_ARRAY_BYTES
    assert refused
    assert (refused == 120) == (kind == "png"), "a PNG has checksums"


def test_pictures_of_arrays():
    bands = values(20, 30, 12)
    picture = to_rgb(bands)
    assert (picture.mode, picture.size) == ("RGB", (30, 20))
    assert np.asarray(to_rgb(bands[:, :, :2])).std() > 0
    assert np.unique(np.asarray(to_rgb(np.full((4, 4, 5), 7.0)))).size == 1
    eight = Image.fromarray(values(5, 5, 3, "u1"))
    np.testing.assert_array_equal(np.asarray(to_rgb(eight)), np.asarray(eight))
