"""Small image files for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def random_image(seed: int, height: int = 9, width: int = 12, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(values: np.ndarray, bits: int, more: tuple[tuple[int, int, int], ...] = ()) -> bytes:
    """A grey TIFF of one strip with packed rows of `bits` (12 or 16) bits per pixel; `more`: (tag, type, value)."""
    height, width = values.shape
    if bits == 12:
        pairs = values.astype(np.uint32).reshape(-1, 2)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        pixels = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8).tobytes()
    else:
        pixels = values.astype("<u2").tobytes()
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (277, 3, 1), (278, 4, height),
        (279, 4, len(pixels)), *more,
    ]  # fmt: skip
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted([*tags, (273, 4, start)])
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + pixels
