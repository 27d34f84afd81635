"""Pixels of PNG files with 16 bits in several channels, of which Pillow reads only the upper 8 bits.

Written in numpy after the PNG specification (third edition), sections 7, 9 and 10: the decoder of torchvision 0.29
crashes on some damaged files. Interlaced files of this kind are not read.
"""

import io
import sys
import zlib

import numpy as np
from PIL import Image

from selfvil.data.read import (
    PNG_SIGNATURE,
    DamagedImage,
    Decoded,
    check_size,
    png_chunks,
    upright,
    without_metadata,
)

_CHANNELS = {2: 3, 4: 2, 6: 4}  # by colour type
_NONE, _SUB, _UP, _AVERAGE, _PAETH = range(5)


def is_array(data: bytes) -> bool:
    """Whether `read` must decode it: 16 bits, and more channels than grey, which Pillow reads."""
    return (
        data.startswith(PNG_SIGNATURE) and data[12:16] == b"IHDR" and data[24:25] == b"\x10" and data[25] in _CHANNELS
    )


def read(data: bytes) -> Decoded:
    """The pixels of a file for which `is_array` is true, uint16. Raises DamagedImage."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    channels = _CHANNELS[data[25]]
    check_size(width, height, channels, 2)
    if data[26:29] != b"\0\0\0":
        raise DamagedImage("it is interlaced, which is not read for 16-bit colours: save it without")
    # No name here holds the compressed bytes or the rows, so that each is freed as soon as it has been used.
    pixels = _unfilter(_inflate(_compressed(data), width, height, channels), width, 2 * channels)
    return Decoded(upright(pixels, _orientation(data)), colour=True)


def _compressed(data: bytes) -> bytes:
    parts = []
    for chunk in png_chunks(data):
        if chunk.kind in (b"IHDR", b"IDAT") and not chunk.sound:
            raise DamagedImage(f"the CRC-32 of its chunk {chunk.kind.decode()} differs")
        if chunk.kind == b"IDAT":
            parts.append(chunk.content[8:-4])
    return b"".join(parts)


def _inflate(data: bytes, width: int, height: int, channels: int) -> np.ndarray:
    """Filtered rows, uint8 (height, 1 + bytes of a row)."""
    size = height * (1 + 2 * channels * width)
    try:
        rows = zlib.decompressobj().decompress(data, size)
    except zlib.error as error:
        raise DamagedImage(f"cannot be decoded: {error}") from None
    if len(rows) != size:
        raise DamagedImage(f"it holds {len(rows)} bytes of pixels, {size} are expected")
    return np.frombuffer(rows, np.uint8).reshape(height, -1)


def _unfilter(rows: np.ndarray, width: int, step: int) -> np.ndarray:
    """Undo the filters of rows; `step` is the number of bytes of a pixel. Returns uint16 (height, width, step / 2).

    A byte depends on those of the same channel to the left, above, and above to the left, which are 0 outside of the
    image. All pixels of an anti-diagonal are therefore computed together.
    """
    height, kinds = len(rows), rows[:, :1]
    if kinds.max() > _PAETH:
        raise DamagedImage(f"a row has the filter {kinds.max()}, which PNG does not have")
    padded = np.zeros((height + 1, width + 1, step), np.uint8)
    padded[1:, 1:] = rows[:, 1:].reshape(height, width, step)
    kinds = kinds.copy()
    del rows  # as large as the image
    if kinds.max() <= _UP and not (kinds == _UP).any():
        sub = kinds[:, 0] == _SUB
        padded[1:, 1:][sub] = padded[1:, 1:][sub].cumsum(axis=1, dtype=np.uint8)
    elif kinds.any():
        _unfilter_diagonals(padded, kinds)
    values = np.ascontiguousarray(padded[1:, 1:]).view(np.uint16)
    return values.byteswap(inplace=True) if sys.byteorder == "little" else values  # PNG is big-endian


def _unfilter_diagonals(padded: np.ndarray, kinds: np.ndarray) -> None:
    height, width = padded.shape[0] - 1, padded.shape[1] - 1
    pixels = padded.reshape(-1, padded.shape[2])
    is_kind = {kind: kinds == kind for kind in (_SUB, _UP, _AVERAGE, _PAETH) if (kinds == kind).any()}
    for diagonal in range(height + width - 1):
        first, last = max(0, diagonal - width + 1), min(height, diagonal + 1)  # rows of the diagonal
        start = (first + 1) * (width + 1) + diagonal - first + 1
        # The next row is one row further and one pixel back: `width` pixels further in the padded image.
        stop = start + (last - first - 1) * width + 1
        current = pixels[start:stop:width]
        left, up, corner = (
            pixels[start - back : stop - back : width].astype(np.int16) for back in (1, width + 1, width + 2)
        )
        predicted = np.zeros_like(left)
        for kind, mask in is_kind.items():
            if kind == _SUB:
                value = left
            elif kind == _UP:
                value = up
            elif kind == _AVERAGE:
                value = (left + up) >> 1
            else:
                value = _paeth(left, up, corner)
            np.copyto(predicted, value, where=mask[first:last])
        current += predicted.astype(np.uint8)


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """The neighbour that is closest to left + up - corner; of equal ones left, then up."""
    to_left, to_up = np.abs(up - corner), np.abs(left - corner)
    to_corner = np.abs(left + up - 2 * corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(without_metadata(data)), formats=["PNG"]) as header:
            return int(header.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF raises many classes; the pixels can be used
        return 1
