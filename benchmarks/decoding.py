"""Memory and time that a data worker needs for the largest accepted images: decoding, and a view of 224 x 224.

    python benchmarks/decoding.py

Prints JSON. Each image of `MAX_PIXELS` pixels, or array of `MAX_ARRAY_BYTES` bytes, is decoded in its own process, and
its peak memory is compared with its memory before.
"""

import argparse
import io
import json
import multiprocessing
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from about import about
from PIL import Image

from selfvil.data.arrays import decode_pixels
from selfvil.data.read import MAX_ARRAY_BYTES, MAX_PIXELS
from selfvil.data.views import CenterCrop

SIDE = int(MAX_PIXELS**0.5)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def encoded(mode: str, kind: str, size: tuple[int, int], **settings: object) -> Callable[[], bytes]:
    def encode() -> bytes:
        file = io.BytesIO()
        image = Image.fromarray(np.zeros(size[::-1], np.uint16)) if mode == "I;16" else Image.new(mode, size)
        image.save(file, kind, **settings)
        return file.getvalue()

    return encode


def array(kind: str, channels: int, dtype: str, **settings: object) -> Callable[[], bytes]:
    """A file of the largest array with these channels."""

    def encode() -> bytes:
        value = np.dtype(dtype)
        side = min(SIDE, int((MAX_ARRAY_BYTES / channels / value.itemsize) ** 0.5))
        pixels = np.random.default_rng(0).integers(0, 200, (side, side, channels), np.uint8).astype(value)
        file = io.BytesIO()
        if kind == "NPY":
            np.save(file, pixels)
        elif kind == "TIFF":
            import tifffile

            tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig", metadata=None, **settings)
        elif kind == "PNG":
            rows = np.zeros((side, 1 + side * channels * 2), np.uint8)
            rows[:, 0], rows[:, 1:] = 4, pixels.astype(">u2").view(np.uint8).reshape(side, -1)
            header = struct.pack(">IIBBBBB", side, side, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
            file.write(b"\x89PNG\r\n\x1a\n")
            for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")):
                crc = struct.pack(">I", zlib.crc32(name + content))
                file.write(struct.pack(">I", len(content)) + name + content + crc)
        else:
            file.write(dicom(pixels[:, :, 0]))
        return file.getvalue()

    return encode


def dicom(stored: np.ndarray) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta, file = FileMetaDataset(), io.BytesIO()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    image = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
    image.BitsAllocated = image.BitsStored = 8 * stored.dtype.itemsize
    image.HighBit, image.PixelData = image.BitsStored - 1, stored.tobytes()
    image["PixelData"].VR = "OW"
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()


CASES = {
    "JPEG, RGB": (3, encoded("RGB", "JPEG", (SIDE, SIDE))),
    "JPEG, progressive RGB": (3, encoded("RGB", "JPEG", (SIDE, SIDE), progressive=True)),
    "JPEG, grey to 1 channel": (1, encoded("L", "JPEG", (SIDE, SIDE))),
    "PNG, RGB": (3, encoded("RGB", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, RGBA to 4 channels": (4, encoded("RGBA", "PNG", (SIDE, SIDE), compress_level=1)),
    "JPEG, RGB, rotated by EXIF": (3, encoded("RGB", "JPEG", (SIDE, SIDE), exif=ROTATED)),
    "PNG, palette": (3, encoded("P", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, palette with alpha to 4 channels": (4, encoded("P", "PNG", (SIDE, SIDE), compress_level=1, transparency=0)),
    "PNG, 16-bit grey": (1, encoded("I;16", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, 16-bit grey to 3 channels": (3, encoded("I;16", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, 16-bit RGB to 1 channel": (1, array("PNG", 3, "u2")),
    "PNG, 16-bit RGB": (3, array("PNG", 3, "u2")),
    "NPY, 2 channels, uint16": (2, array("NPY", 2, "u2")),
    "NPY, 12 channels, uint16": (12, array("NPY", 12, "u2")),
    "NPY, 32 channels, uint8": (32, array("NPY", 32, "u1")),
    "NPY, 1 channel, float32": (1, array("NPY", 1, "f4")),
    "NPY, 3 channels, float64": (3, array("NPY", 3, "f8")),
    "TIFF, 12 channels, uint16": (12, array("TIFF", 12, "u2")),
    "TIFF, 12 channels, uint16, deflate with predictor": (
        12,
        array("TIFF", 12, "u2", compression="zlib", predictor=True),
    ),
    "TIFF, 32 channels, uint8, LZW": (32, array("TIFF", 32, "u1", compression="lzw")),
    "DICOM, uint16": (1, array("DICOM", 1, "u2")),
    "PNG, RGB, a strip of 1 x 65,000": (3, encoded("RGB", "PNG", (1, 65_000), compress_level=1)),
}


def memory(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM its peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str) -> dict[str, float]:
    channels, encode = CASES[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # encoding must not count
        return pool.apply(_measure, (encode(), channels))


def _measure(data: bytes, channels: int) -> dict[str, float]:
    view = CenterCrop(224, (0.5,) * channels, (0.5,) * channels)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory("VmRSS"), time.perf_counter()
    view(decode_pixels(data, channels))
    return {"gigabytes": round((memory("VmHWM") - before) / 1e9, 2), "seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time that a data worker needs for the largest images.")
    args = parser.parse_args()
    args.device, args.threads = "cpu", 1
    print(json.dumps(about(args) | {"pixels": MAX_PIXELS, "images": {name: measure(name) for name in CASES}}, indent=2))


if __name__ == "__main__":
    main()
