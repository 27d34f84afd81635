"""Decode image files safely: only known formats, and the size is checked before pixels are decoded.

Only the first page of a multi-page file and the first frame of an animation are decoded. Metadata (text, EXIF, colour
profiles, resolution) is not needed for the pixels and is ignored if it is broken or too large.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from selfvil.data.jpeg import Reduction, decode_jpeg, jpeg_size, may_be_rotated
from selfvil.errors import UserError

MAX_PIXELS = 2**26
"""Largest width × height that is decoded, 67 million: a PNG of 20 KB may declare enough pixels to fill the memory.

An image of this size takes 0.5 GB in a data worker as an RGB JPEG, 0.6 GB as a PNG with alpha or a palette, and 0.9 GB
as a PNG of 16-bit grey, including a view of 224 x 224 (`benchmarks/decoding.py`, docs/howto/own_data.md)."""

MAX_BYTES = 2**28
"""Largest file, in bytes, that is read or decompressed: MAX_PIXELS in four channels, uncompressed."""

MAX_CHANNELS = 32
"""Largest number of channels of an image."""

MAX_ARRAY_BYTES = 2**28
"""Largest decoded array in bytes: width × height × channels × bytes of a value. It is checked in the header, before
anything of this size is allocated: 12 channels of 16 bits may have 3,344 × 3,344 pixels.

An array of this size takes up to 0.8 GB in a data worker, including a view of 224 x 224 (`benchmarks/decoding.py`,
docs/howto/own_data.md)."""

EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "tif", "tiff", "bmp", "ppm", "pgm", "pbm", "pnm",
    "npy", "dcm",
)  # fmt: skip
"""File name extensions of images. If a sample has several images, the first of these is used."""

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
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))  # width and height are exchanged


class DamagedImage(Exception):
    """The bytes cannot be decoded; the message is the reason, without a file name."""


class BrokenMetadata(UserWarning):
    """An image was decoded without its metadata. Ignored by default; `selfvil pack` reports it."""


warnings.simplefilter("ignore", BrokenMetadata)


class Loaded(NamedTuple):
    """An upright image in its own mode, and the value of white for the modes I and I;16 (None if the file does not
    declare it)."""

    image: Image.Image
    white: int | None


class Decoded(NamedTuple):
    """pixels (H, W, C). colour: they are grey or RGB, and the last one of 2 or 4 channels is alpha."""

    pixels: np.ndarray
    colour: bool = False


def open_image(data: bytes) -> ImageFile:
    """Read the header of a JPEG, PNG, WebP, TIFF, BMP or PNM file, without decoding its pixels.

    Raises:
        DamagedImage: not one of these formats, or more than MAX_PIXELS.
    """
    return _despite_metadata(data, _open)


def load_image(data: bytes, reduction: Reduction | None = None) -> Loaded:
    """Decode an image file that `open_image` accepts, in its own mode, and rotate it by its EXIF orientation.

    reduction: a JPEG may be decoded to a smaller size. It is called with the width and height of the upright image, and
    returns by which factor both may shrink; other images keep their size.

    Raises:
        DamagedImage: as `open_image`; or the data is truncated or damaged.
    """
    return _despite_metadata(data, partial(_load, reduction=reduction))


def decode_image(data: bytes, channels: int | None = 3, reduction: Reduction | None = None) -> Image.Image:
    """Decode an image file that `open_image` accepts. reduction: as in `load_image`.

    The image is rotated by its EXIF orientation and has 8 bits per channel: mode L for 1 channel, RGB for 3, RGBA for
    4; None keeps the image's own number. An alpha channel is dropped for 1 and 3 channels, as torchvision does.

    Deeper images are scaled by the depth that the file format declares, never by the content of the image: 12-bit
    TIFF by 255/4095, PNM by its maxval, other 16-bit grey by 255/65535. Tags about the values in use (MaxSampleValue
    of TIFF, sBIT of PNG) do not change the range, by their specifications. Files that store 12 bits in 16 without a
    declaration must be packed with `selfvil pack --max-value 4095`.

    Raises:
        DamagedImage: as `load_image`; or the pixels have no known range (floating point).
    """
    if channels is not None and channels not in _MODES:
        raise ValueError(f"channels must be 1, 3 or 4, not {channels}")
    return convert_image(load_image(data, reduction), channels)


def convert_image(loaded: Loaded, channels: int | None, max_value: int | None = None) -> Image.Image:
    """Convert an image to 8 bits per channel, as `decode_image` describes.

    max_value: the value of white in 16-bit grey whose file does not declare a depth; None means 65535.

    Raises:
        DamagedImage: pixels without a known range, or above `max_value`.
    """
    image = loaded.image
    mode = _MODES[_channels(image) if channels is None else channels]
    if image.mode == mode:
        return image
    with raise_damage():
        return _convert(image, mode, loaded.white or max_value or 65535)


def check_size(width: int, height: int, channels: int, value_bytes: int) -> None:
    """Raise DamagedImage unless an image of this size may be decoded."""
    if min(width, height, channels, value_bytes) < 1:
        raise DamagedImage(f"it declares {width} × {height} pixels of {channels} channels")
    if channels > MAX_CHANNELS:
        raise DamagedImage(f"it has {channels} channels, more than the limit of {MAX_CHANNELS}")
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"{width} × {height} pixels are more than the limit of {MAX_PIXELS}")
    if (size := width * height * channels * value_bytes) > MAX_ARRAY_BYTES:
        raise DamagedImage(
            f"{width} × {height} pixels of {channels} channels are {size} bytes, more than the limit of "
            f"{MAX_ARRAY_BYTES}"
        )


def turn_upright(image: Image.Image, header: Image.Image) -> Image.Image:
    """`image` rotated by the EXIF orientation of `header`, which may be the same image; unchanged without one."""
    turn = _turn(header)
    return image if turn is None else image.transpose(turn)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, C) rotated by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def _turn(header: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(header.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF raises many classes; the pixels can be used
        return None


def raw_modes(image: ImageFile) -> list[str]:
    """Storage formats of the pixels by Pillow's names, such as I;16, of an image that is not loaded yet."""
    args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    return [part for parts in args for part in parts if isinstance(part, str)]


# --- opening and loading ------------------------------------------------------------------------------------------


def _open(data: bytes) -> ImageFile:
    with raise_damage():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} × {height} pixels are more than the limit of {MAX_PIXELS}")
        return image


def _load(data: bytes, reduction: Reduction | None) -> Loaded:
    if (jpeg := _load_jpeg(data, reduction)) is not None:
        return Loaded(jpeg, None)
    image = _open(data)
    with raise_damage():
        white = 4095 if "I;12" in raw_modes(image) else 65535 if image.format == "PPM" else None
        image.load()
        return Loaded(turn_upright(image, image), white)


def _load_jpeg(data: bytes, reduction: Reduction | None) -> Image.Image | None:
    """The upright pixels by the faster decoder of `jpeg.py`; None if Pillow must decode this file."""
    if (size := jpeg_size(data)) is None or size[0] * size[1] > MAX_PIXELS:
        return None
    turn = _turn(_open(data)) if may_be_rotated(data) else None
    factor = 1 if reduction is None else reduction(*(size[::-1] if turn in _SIDEWAYS else size))
    image = decode_jpeg(data, factor)
    return image if image is None or turn is None else image.transpose(turn)


@contextmanager
def raise_damage() -> Iterator[None]:
    """Raise DamagedImage for every exception: on hostile bytes, Pillow raises OSError, SyntaxError, struct.error ..."""
    try:
        yield
    except (DamagedImage, UserError):
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage("not an image file of a known format") from None
    except Exception as error:
        raise DamagedImage(f"cannot be decoded: {type(error).__name__}: {error}"[:300]) from None


def _despite_metadata(data: bytes, function: Callable[[bytes], _T]) -> _T:
    """`function(data)`; if that fails, `function` of the same data without metadata, which may be the broken part."""
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
    """A chunk of a PNG: its type, the bytes of the whole chunk, and whether its CRC-32 is correct."""

    kind: bytes
    content: bytes
    sound: bool


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG up to IEND, or up to the last complete one. (PNG specification, section 5.3)"""
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
    """A PNG or JPEG with only the parts that pixels and orientation need; other data unchanged."""
    if data.startswith(PNG_SIGNATURE):
        kept = [chunk.content for chunk in png_chunks(data) if _needed(chunk)]
        return PNG_SIGNATURE + b"".join(kept)
    return _jpeg_without_metadata(data) if data.startswith(b"\xff\xd8") else data


def _needed(chunk: Chunk) -> bool:
    return chunk.kind[:1].isupper() or chunk.kind == b"tRNS" or (chunk.kind == b"eXIf" and chunk.sound)


def _jpeg_without_metadata(data: bytes) -> bytes:
    """Remove comments and application segments, except EXIF (APP1) and Adobe's, which gives the colour space."""
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
    if image.mode in ("P", "PA"):  # RGBA first: a direct conversion may misread the palette's alpha
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
