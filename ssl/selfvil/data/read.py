"""Bytes of an image file to pixels, safely: known formats only, sizes checked before anything is decoded.

Only the first page of a multi-page file and the first frame of an animation are decoded. Metadata (text, EXIF, colour
profiles, resolution) is not needed for the pixels: where it is broken or too large, it is ignored.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

MAX_PIXELS = 2**26
"""Largest width × height that is decoded, 67 million: a 20 KB PNG may claim enough pixels to fill the memory.

Such an image costs a data worker 0.3 GB as an RGB JPEG, 0.6 GB as a PNG with alpha or a palette, and 1.3 GB as a PNG of
16-bit grey, a view of 224 x 224 included (`benchmarks/decoding.py`)."""

MAX_BYTES = 2**28
"""Largest file that is read or unpacked: MAX_PIXELS in four channels, uncompressed."""

EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "tif", "tiff", "bmp", "ppm", "pgm", "pbm", "pnm",
)  # fmt: skip
"""File name extensions of images. Where a sample has several images, the first of these is used."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_T = TypeVar("_T")
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class DamagedImage(Exception):
    """These bytes give no image; the message is the reason, without a file's name."""


class BrokenMetadata(UserWarning):
    """An image was decoded without its metadata. Shown only where it is asked for: training need not know."""


warnings.simplefilter("ignore", BrokenMetadata)


class Loaded(NamedTuple):
    """An upright image with its own mode, and the value that stands for white if its mode is I or I;16 (None where the
    file does not declare it)."""

    image: Image.Image
    white: int | None


def open_image(data: bytes) -> ImageFile:
    """Read the header of a JPEG, PNG, WebP, TIFF, BMP or PNM file; its pixels are not decoded yet.

    Raises:
        DamagedImage: no image of these formats, or more than MAX_PIXELS.
    """
    return _despite_metadata(data, _open)


def load_image(data: bytes) -> Loaded:
    """Decode an image file that `open_image` accepts, turned upright by its EXIF orientation, in its own mode.

    Raises:
        DamagedImage: as `open_image`; or the data is cut or damaged.
    """
    return _despite_metadata(data, _load)


def decode_image(data: bytes, channels: int | None = 3) -> Image.Image:
    """Decode an image file that `open_image` accepts.

    Turned upright by its EXIF orientation. 8 bits a channel: mode L for 1 channel, RGB for 3, RGBA for 4; None keeps
    the image's own number. An alpha channel is dropped for 1 and 3 channels, as torchvision does.

    More than 8 bits are scaled by the depth that the file format declares, never by the content of the image: 12-bit
    TIFF by 255/4095, PNM by its maxval, other 16-bit grey by 255/65535. Tags about the values in use (MaxSampleValue
    of TIFF, sBIT of PNG) do not change the range, by their specifications. Files that hold 12 bits in 16 without a
    declaration must be packed with `selfvil pack --max-value 4095`.

    Raises:
        DamagedImage: as `load_image`; or of a kind without a known range (floating point).
    """
    if channels is not None and channels not in _MODES:
        raise ValueError(f"channels must be 1, 3 or 4, not {channels}")
    return convert_image(load_image(data), channels)


def convert_image(loaded: Loaded, channels: int | None, max_value: int | None = None) -> Image.Image:
    """An image with 8 bits a channel, as `decode_image` describes.

    `max_value` stands for white in 16-bit grey whose file does not declare another depth; 65535 without it.

    Raises:
        DamagedImage: pixels without a known range, or above `max_value`.
    """
    image = loaded.image
    mode = _MODES[_channels(image) if channels is None else channels]
    if image.mode == mode:
        return image
    with _damage():
        return _convert(image, mode, loaded.white or max_value or 65535)


def turn_upright(image: Image.Image, header: Image.Image) -> Image.Image:
    """`image` turned by the EXIF orientation of `header`, which may be itself. Without a readable one, as it is."""
    try:
        turn = _UPRIGHT.get(header.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF raises nearly anything; the pixels are sound
        turn = None
    return image if turn is None else image.transpose(turn)


def raw_modes(image: ImageFile) -> list[str]:
    """How the pixels are stored, in Pillow's names such as I;16; for an image that is not loaded yet."""
    args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    return [part for parts in args for part in parts if isinstance(part, str)]


# --- opening and loading ------------------------------------------------------------------------------------------


def _open(data: bytes) -> ImageFile:
    with _damage():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} × {height} pixels are more than the limit of {MAX_PIXELS}")
        return image


def _load(data: bytes) -> Loaded:
    image = _open(data)
    with _damage():
        white = 4095 if "I;12" in raw_modes(image) else 65535 if image.format == "PPM" else None
        image.load()
        return Loaded(turn_upright(image, image), white)


@contextmanager
def _damage() -> Iterator[None]:
    """On hostile bytes Pillow raises nearly anything (OSError, SyntaxError, struct.error ...): say it in one way."""
    try:
        yield
    except DamagedImage:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage("not an image file of a known format") from None
    except Exception as error:
        raise DamagedImage(f"cannot be decoded: {type(error).__name__}: {error}"[:300]) from None


def _despite_metadata(data: bytes, function: Callable[[bytes], _T]) -> _T:
    """`function(data)`; where that fails, the same without the metadata, which may be all that is broken."""
    try:
        return function(data)
    except DamagedImage as damage:
        pixels = without_metadata(data)
        if pixels == data:
            raise
        try:
            result = function(pixels)
        except DamagedImage:
            raise damage from None
        warnings.warn(f"its metadata is broken or too large, and was ignored: {damage}", BrokenMetadata, stacklevel=2)
        return result


# --- metadata -----------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """A chunk of a PNG: its type, the bytes of the whole chunk, and whether its CRC-32 holds."""

    kind: bytes
    content: bytes
    sound: bool


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG up to IEND, or to where the data is cut. (PNG specification, section 5.3)"""
    offset = len(PNG_SIGNATURE)
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        content = data[offset : offset + 12 + length]
        if len(content) < 12 + length:
            return
        kind = content[4:8]
        yield Chunk(kind, content, zlib.crc32(content[4:-4]) == struct.unpack(">I", content[-4:])[0])
        if kind == b"IEND":
            return
        offset += len(content)


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG with only what its pixels and its orientation need; other data as it is."""
    if data.startswith(PNG_SIGNATURE):
        kept = [chunk.content for chunk in png_chunks(data) if _needed(chunk)]
        return PNG_SIGNATURE + b"".join(kept)
    return _jpeg_without_metadata(data) if data.startswith(b"\xff\xd8") else data


def _needed(chunk: Chunk) -> bool:
    return chunk.kind[:1].isupper() or chunk.kind == b"tRNS" or (chunk.kind == b"eXIf" and chunk.sound)


def _jpeg_without_metadata(data: bytes) -> bytes:
    """Leaves out comments and application segments, except EXIF (APP1) and Adobe's, which names the colour space."""
    kept, offset = [data[:2]], 2
    while data[offset : offset + 1] == b"\xff" and offset + 4 <= len(data):
        marker, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
        if marker == 0xDA or length < 2:  # the entropy-coded data begins
            break
        if not (marker == 0xFE or (0xE0 <= marker <= 0xEF and marker not in (0xE1, 0xEE))):
            kept.append(data[offset : offset + 2 + length])
        offset += 2 + length
    return b"".join([*kept, data[offset:]])


# --- modes --------------------------------------------------------------------------------------------------------


def _channels(image: Image.Image) -> int:
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _convert(image: Image.Image, mode: str, white: int) -> Image.Image:
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DamagedImage("32-bit pixels have no known range")
        if pixels.max() > white:
            raise DamagedImage(f"it has a pixel of {pixels.max()}, above the maximum value {white}")
        image = Image.fromarray(((pixels * 510 + white) // (2 * white)).astype(np.uint8))
    if image.mode in ("P", "PA"):  # through the palette's own alpha, which a direct conversion may misread
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
