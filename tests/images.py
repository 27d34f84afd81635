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


def png16(values: np.ndarray) -> bytes:
    """A PNG of uint16 values (H, W, C): grey, grey with alpha, RGB or RGBA, without filters."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def npy(values: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=version, allow_pickle=False)
    return file.getvalue()


def tifffile_bytes(values: np.ndarray, **settings: object) -> bytes:
    """A TIFF by tifffile; several pages where `values` is a list."""
    import tifffile

    file = io.BytesIO()
    pages = values if isinstance(values, list) else [values]
    with tifffile.TiffWriter(
        file, byteorder=settings.pop("byteorder", "<"), bigtiff=settings.pop("bigtiff", False)
    ) as out:
        for page in pages:
            out.write(page, contiguous=False, **{"photometric": "minisblack", "metadata": None} | settings)
    return file.getvalue()


def dicom(stored: np.ndarray, *, bits: int | None = None, big: bool = False, **elements: object) -> bytes:
    """A DICOM file of one monochrome frame, integers (H, W)."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRBigEndian if big else ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    file = io.BytesIO()
    image = FileDataset(
        file, Dataset(), file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False, is_little_endian=not big
    )
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = 8 * stored.dtype.itemsize
    image.BitsStored = bits or image.BitsAllocated
    image.HighBit, image.PixelRepresentation = image.BitsStored - 1, int(stored.dtype.kind == "i")
    image.PixelData = stored.astype(stored.dtype.newbyteorder(">" if big else "<")).tobytes()
    image["PixelData"].VR = "OB" if image.BitsAllocated == 8 else "OW"
    for name, value in elements.items():
        setattr(image, name, value)
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()
