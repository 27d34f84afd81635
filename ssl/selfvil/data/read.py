"""Bytes of an image file to pixels, safely: known formats only, sizes checked before anything is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26
"""Largest width × height that is decoded, 67 million: a 20 KB PNG may claim enough pixels to fill the memory."""

MAX_BYTES = 2**28
"""Largest file that is read or unpacked: MAX_PIXELS in four channels, uncompressed."""

EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "tif", "tiff", "bmp", "ppm", "pgm", "pbm", "pnm",
)  # fmt: skip
"""File name extensions of images. Where a sample has several images, the first of these is used."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DamagedImage(Exception):
    """These bytes give no image; the message is the reason, without a file's name."""


def open_image(data: bytes) -> Image.Image:
    """Read the header of a JPEG, PNG, WebP, TIFF, BMP or PNM file; its pixels are not decoded yet.

    Raises:
        DamagedImage: no image of these formats, or more than MAX_PIXELS.
    """
    with _damage():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} × {height} pixels are more than the limit of {MAX_PIXELS}")
        return image


def decode_image(data: bytes, channels: int | None = 3) -> Image.Image:
    """Decode an image file that `open_image` accepts.

    Turned upright by its EXIF orientation. 8 bits a channel: mode L for 1 channel, RGB for 3, RGBA for 4; None keeps
    the image's own number. 16-bit grey is scaled by 255/65535; an alpha channel is dropped for 1 and 3 channels, as
    torchvision does.

    Raises:
        DamagedImage: as `open_image`; or cut, damaged, or of a kind without a known range (floating point).
    """
    if channels is not None and channels not in _MODES:
        raise ValueError(f"channels must be 1, 3 or 4, not {channels}")
    image = open_image(data)
    with _damage():
        image.load()
        image = ImageOps.exif_transpose(image)
        mode = _MODES[_channels(image) if channels is None else channels]
        return image if image.mode == mode else _convert(image, mode)


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
        raise DamagedImage(f"cannot be decoded: {type(error).__name__}: {error}") from None


def _channels(image: Image.Image) -> int:
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DamagedImage("32-bit pixels have no known range")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):  # through the palette's own alpha, which a direct conversion may misread
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
