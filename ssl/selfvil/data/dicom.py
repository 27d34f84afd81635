"""Pixels of DICOM files, through pydicom (extra `dicom`).

Values are float32: stored value × Rescale Slope + Rescale Intercept, so computed tomography is in Hounsfield units; 1
and 0 where these are absent. MONOCHROME1, in which small values are white, is inverted within its stored bits first.
The window (Window Center and Width) is for display and is not applied. One frame, uncompressed.
"""

import io
import warnings
from typing import Any

import numpy as np

from selfvil.data.read import DamagedImage, check_size, raise_damage
from selfvil.errors import UserError

_TRANSFERS = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # little and big endian
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "PixelData",
]  # fmt: skip


def read(data: bytes) -> np.ndarray:
    """Pixels, float32 (H, W, 1).

    Raises:
        DamagedImage: it is damaged, too large, or of a kind that is not read.
        UserError: pydicom is not installed.
    """
    if _DEFLATED in data:  # pydicom would inflate it without a limit
        raise DamagedImage("it is deflated as a whole, which is not read: save it uncompressed")
    pydicom = _pydicom()
    with raise_damage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of many values that pixels do not depend on
        found = pydicom.dcmread(io.BytesIO(data), specific_tags=_TAGS)
        transfer = str(found.file_meta.TransferSyntaxUID)
        if transfer not in _TRANSFERS:
            raise DamagedImage(
                f"its transfer syntax {transfer} is compressed, which is not read: decompress it first, as by "
                "`gdcmconv --raw IN OUT`"
            )
        stored, bits = _stored(found)
        slope, intercept = (float(found.get(f"Rescale{name}", None) or 0) for name in ("Slope", "Intercept"))
        slope = slope or 1.0
        if found.PhotometricInterpretation == "MONOCHROME1":  # slope * (sum - stored) + intercept
            slope, intercept = -slope, intercept + slope * ((1 << bits) - 1 if found.PixelRepresentation == 0 else -1)
        pixels = np.empty(stored.shape, np.float32)
        for row, values in enumerate(stored):  # by rows: float64 takes more memory than the image
            pixels[row] = values * slope + intercept
        return pixels[:, :, None]


def _stored(found: Any) -> tuple[np.ndarray, int]:
    """Stored values (H, W) as integers, and their number of bits."""
    if int(found.SamplesPerPixel) != 1 or found.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise DamagedImage(f"it is {found.PhotometricInterpretation}; expected MONOCHROME1 or MONOCHROME2")
    if (frames := int(found.get("NumberOfFrames", None) or 1)) != 1:
        raise DamagedImage(f"it has {frames} frames; expected one: save each as a file")
    height, width, allocated = int(found.Rows), int(found.Columns), int(found.BitsAllocated)
    bits, high, signed = int(found.BitsStored), int(found.HighBit), int(found.PixelRepresentation)
    if allocated not in (8, 16, 32) or not 1 <= bits <= allocated or high != bits - 1 or signed not in (0, 1):
        raise DamagedImage(f"it stores {bits} bits in {allocated} with the highest at {high}, which is not read")
    check_size(width, height, 1, max(4, allocated // 8))  # the result is float32
    big_endian = str(found.file_meta.TransferSyntaxUID) == _TRANSFERS[2]
    content, size = found.PixelData, width * height * allocated // 8
    if not size <= len(content) <= size + 1:
        raise DamagedImage(f"it holds {len(content)} bytes of pixels, {size} are expected")
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    values = (
        np.frombuffer(content, kind.newbyteorder(">" if big_endian else "<"), width * height)
        .astype(kind)
        .reshape(height, width)
    )
    values <<= allocated - bits  # bits above the stored ones may hold anything
    values >>= allocated - bits  # of signed values with their sign
    return values, bits


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError("a DICOM file needs pydicom: pip install 'selfvil[dicom]'") from None
    return pydicom
