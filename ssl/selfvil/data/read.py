"""Bytes of an image file to pixels, safely: known formats only, sizes checked before anything is decoded."""

import io

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26
"""Largest width × height that is decoded, 67 million: a 20 KB PNG may claim enough pixels to fill the memory."""

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "ppm", "pgm", "pbm", "pnm")
"""Names of image members, the most likely photograph first."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DamagedImage(Exception):
    """These bytes give no image; the message is the reason, without a file's name."""


def decode_image(data: bytes, channels: int = 3) -> Image.Image:
    """Decode a JPEG, PNG, WebP, TIFF, BMP or PNM file.

    Turned upright by its EXIF orientation. 8 bits a channel: mode L for 1 channel, RGB for 3, RGBA for 4; 16-bit grey
    is scaled by 255/65535. An alpha channel is dropped for 1 and 3 channels, as torchvision does.

    Raises:
        DamagedImage: no image of these formats, cut or damaged, more than MAX_PIXELS, or of a kind without a range
            (floating point).
    """
    if channels not in _MODES:
        raise ValueError(f"channels must be 1, 3 or 4, not {channels}")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} × {height} pixels are more than the limit of {MAX_PIXELS}")
        image.load()
        image = ImageOps.exif_transpose(image)
        return image if image.mode == _MODES[channels] else _convert(image, _MODES[channels])
    except DamagedImage:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage(f"not an image file ({len(data)} bytes)") from None
    except Exception as error:  # on hostile bytes Pillow raises nearly anything: OSError, SyntaxError, struct.error ...
        raise DamagedImage(f"cannot be decoded: {type(error).__name__}: {error}") from None


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
