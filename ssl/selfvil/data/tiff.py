"""Pixels of TIFF files that Pillow rounds or cannot read, through tifffile.

Channels may be samples of a pixel, interleaved or planar, or the pages of a file, in their order; smaller copies and
masks among the pages are ignored. In strips or tiles.

| compression | needs |
|---|---|
| none | tifffile |
| LZW, deflate, PackBits, LZMA, Zstandard, with and without predictor | tifffile and imagecodecs (the extra `tiff`) |
| others, such as JPEG and JPEG 2000, with more than 8 bits | not read |

tifffile itself can inflate deflate, but without a limit: a file of 1 MB could fill the memory. imagecodecs is given the
size that the header declares.
"""

import io
import logging
import math
from functools import cache
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

from selfvil.data.read import (
    MAX_CHANNELS,
    DamagedImage,
    Decoded,
    check_size,
    open_image,
    raise_damage,
    raw_modes,
    upright,
)  # fmt: skip
from selfvil.errors import UserError

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it logs an error for many channels

_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "ZSTD"}
_PHOTOMETRICS = (0, 1, 2)  # white is 0, black is 0, RGB
_SAMPLES, _EXTRA_SAMPLES, _ORIENTATION = 277, 338, 274  # tags
_ALPHA = (1, 2)  # of _EXTRA_SAMPLES


def is_array(data: bytes, channels: int | None) -> bool:
    """Whether `read` must decode it. Pillow reads the other files: 8 bits in 1, 3 or 4 channels, and single pages of
    grey with 12 or 16 bits or floats.

    channels: the expected number. Several grey pages of 8 bits are channels if there are so many of them.
    """
    try:
        header = open_image(data)
    except DamagedImage:  # Pillow knows no such pixels, or the file is damaged
        return True
    with raise_damage():
        pages = _count_pages(header)
        header.seek(0)
        tags: Any = header.tag_v2  # type: ignore[attr-defined]
        samples = tags.get(_SAMPLES, 1)
        extra = tags.get(_EXTRA_SAMPLES, ())
        if samples != len(header.getbands()) and header.mode not in ("P", "CMYK"):  # Pillow reads some of them only
            return True
        if header.mode in ("L", "1"):
            return 1 < pages <= MAX_CHANNELS and channels in (None, pages)
        if header.mode.startswith("I;16") or header.mode == "F" or "I;12" in raw_modes(header):
            return pages > 1
        if header.mode == "I" or any(";16" in mode for mode in raw_modes(header)):
            return True
        return samples > 3 and not (extra and extra[0] in _ALPHA) and header.mode in ("RGB", "RGBA")


def _count_pages(header: ImageFile) -> int:
    for number in range(1, MAX_CHANNELS + 1):
        try:
            header.seek(number)
        except EOFError:
            return number
    return MAX_CHANNELS + 1


def read(data: bytes) -> Decoded:
    """The pixels of a file.

    Raises:
        DamagedImage: it is damaged, too large, or of a kind that is not read.
        UserError: tifffile or imagecodecs is needed and not installed.
    """
    tifffile = _tifffile()
    with raise_damage(), tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = _channel_pages(file)
        first = pages[0]
        samples = first.samplesperpixel
        check_size(first.imagewidth, first.imagelength, samples * len(pages), first.dtype.itemsize)
        for page in pages:
            _check_segments(page, len(data))
        planes = [_planes(page.asarray(maxworkers=1), page) for page in pages]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        extra = tuple(first.extrasamples)
        colour = len(pages) == 1 and (
            samples == 1 or (first.photometric == 2 and (samples == 3 or (samples == 4 and extra[:1] in ((1,), (2,)))))
        )
        tag = first.tags.get(_ORIENTATION)
        return Decoded(upright(pixels, int(tag.value) if tag is not None else 1), colour)


def _channel_pages(file: Any) -> list[Any]:
    """The pages that hold channels, checked."""
    pages: list[Any] = []
    for number in range(2 * MAX_CHANNELS):
        try:
            page = file.pages[number]
        except IndexError:
            break
        if number == 0:
            _check_kind(page)
        elif page.is_reduced or page.is_mask or page.shape != pages[0].shape or page.dtype != pages[0].dtype:
            continue
        else:
            _check_kind(page)
        pages.append(page)
    if not pages:
        raise DamagedImage("it has no page")
    return pages


def _check_kind(page: Any) -> None:
    kind = np.dtype(page.dtype) if page.dtype is not None else None
    if kind is None or kind.kind not in "uif" or kind.itemsize > 8:
        raise DamagedImage(f"its values have {page.bitspersample} bits of an unknown kind")
    if page.imagedepth != 1 or page.photometric not in _PHOTOMETRICS or page.is_subsampled:
        raise DamagedImage("it is a volume, or its channels are not grey, RGB or values")
    if page.compression not in _COMPRESSIONS:
        raise DamagedImage(
            f"its compression {int(page.compression)} is not read for such pixels; expected none, "
            f"{', '.join(dict.fromkeys(list(_COMPRESSIONS.values())[1:]))}"
        )
    packed = page.bitspersample != kind.itemsize * 8
    if (page.compression != 1 or packed) and not _has_imagecodecs():
        what = f"{_COMPRESSIONS[page.compression]} compression" if page.compression != 1 else "packed bits"
        raise UserError(f"a TIFF file with {what} needs imagecodecs: pip install 'selfvil[tiff]'")


def _check_segments(page: Any, size: int) -> None:
    """Raise DamagedImage for tiles that are too large, and for missing segments, which tifffile fills with zeros."""
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    if page.is_tiled:
        check_size(page.tilewidth, page.tilelength, samples, page.dtype.itemsize)
    expected = math.prod(page.chunked)
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) < expected or len(counts) < expected:
        raise DamagedImage(f"it has {len(offsets)} strips or tiles, {expected} are expected")
    for offset, count in zip(offsets[:expected], counts[:expected]):
        if offset < 1 or count < 1 or offset + count > size:
            raise DamagedImage("a strip or tile is missing, or lies beyond the end of the file")
    bits = page.imagewidth * page.imagelength * page.samplesperpixel * page.bitspersample
    if page.compression == 1 and 8 * sum(counts[:expected]) < bits:
        raise DamagedImage("its strips or tiles are shorter than its pixels")


def _planes(values: np.ndarray, page: Any) -> np.ndarray:
    """Values of a page as (H, W, C)."""
    if page.samplesperpixel == 1:
        values = values.reshape(page.imagelength, page.imagewidth, 1)
    elif page.planarconfig != 1:
        values = values.reshape(page.samplesperpixel, page.imagelength, page.imagewidth).transpose(1, 2, 0)
    return values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel).astype(
        values.dtype.newbyteorder("="), copy=False
    )


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise UserError("a TIFF file with such pixels needs tifffile: pip install 'selfvil[tiff]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is reported by exceptions
    return tifffile


@cache
def _has_imagecodecs() -> bool:
    try:
        import imagecodecs
    except ImportError:
        return False
    return hasattr(imagecodecs, "lzw_decode")
