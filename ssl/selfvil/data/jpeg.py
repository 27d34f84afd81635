"""Decode JPEG by simplejpeg, which calls libjpeg-turbo's decoder directly: the same pixels as Pillow, in less time.

Pillow uses the same library, with the same inverse DCT and upsampling, so pixels are equal bit for bit. A file for
which libjpeg has a warning, and a file of an unusual kind (CMYK, 12 bits), is left to Pillow. Which images are accepted
as undamaged therefore does not depend on this module. `benchmarks/data_layer.py` compares the decoders.

Reduced decoding: libjpeg can compute an image of a half, a quarter or an eighth of the width and height from the low
frequencies of each block, in a fraction of the time. `allowed_reduction` states when this is used.
"""

from collections.abc import Callable, Iterable

import simplejpeg
from PIL import Image

Reduction = Callable[[int, int], int]
"""Called with the width and height of an image in pixels; returns the factor 1, 2, 4 or 8 by which both may shrink."""

REMAINING = 2
"""A reduced crop keeps at least this many times the width and the height of its view.

The view is then made by bicubic interpolation with antialiasing, as from the full image. Photographs that were enlarged
to shorter sides of 1,024 to 4,096 pixels gave views of 224 pixels whose values differed by 0.5 levels of 255 on average
at 1/2, by 0.7 at 1/4 and by 1.2 at 1/8; in the worst of 82 views, by 2.2 (as `benchmarks/data_layer.py` measures)."""

_REDUCTIONS = (8, 4, 2)  # libjpeg has others, without SIMD instructions
_SPACES = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}
_APP1 = 0xE1  # EXIF and XMP, which may hold an orientation
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
_START_OF_SCAN = 0xDA


def allowed_reduction(crops: Iterable[tuple[float, float, float, float]]) -> int:
    """The largest reduction with which each crop keeps REMAINING times the size of its view: 1, 2, 4 or 8.

    crops: for each view, the width and height of its crop, then of the view, in pixels.
    """
    least = min((min(width / w, height / h) for width, height, w, h in crops), default=1.0)
    return next((factor for factor in _REDUCTIONS if least >= REMAINING * factor), 1)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels as stored, if `decode_jpeg` may decode this file; else None. Takes 2 µs."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError:
        return None
    return (width, height) if space in _SPACES else None


def decode_jpeg(data: bytes, factor: int = 1) -> Image.Image | None:
    """The pixels as stored, not rotated: mode L or RGB, sides divided by `factor` (1, 2, 4 or 8) and rounded up.

    None if libjpeg has a warning or an error, or the file is none that `jpeg_size` accepts.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if space not in _SPACES:
            return None
        pixels = simplejpeg.decode_jpeg(
            data, _SPACES[space], min_width=-(-width // factor), min_height=-(-height // factor), min_factor=factor
        )
    except ValueError:
        return None
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def may_be_rotated(data: bytes) -> bool:
    """Whether a JPEG has a segment that may hold an orientation (EXIF or XMP)."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and offset + 4 <= len(data):
        marker = data[offset + 1]
        if marker == _START_OF_SCAN:
            return False
        if marker == _APP1:
            return True
        offset += 2 if marker in _WITHOUT_LENGTH else 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return True  # unusual: Pillow examines it
