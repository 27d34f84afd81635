"""Images with any number of channels, or with more than 8 bits: numpy arrays (H, W, C) in the dtype of the file.

`decode_pixels` decodes every format. An image with 8 bits and the channels of grey, RGB or RGBA is an image of Pillow;
all others are arrays, whose values are those of the file:

| format | pixels | needs |
|---|---|---|
| PNG | 16 bits, grey or RGB, with or without alpha | |
| TIFF | integers and floats of 8 to 64 bits, 1 to 32 channels: see `data/tiff.py` | extra `tiff` |
| NPY | integers and floats of 8 to 64 bits; (H, W), (H, W, C) or (C, H, W): see `channels_last` | |
| DICOM | monochrome, one frame, uncompressed: see `data/dicom.py` | extra `dicom` |
| PGM | grey up to 16 bits | |

On the scale of `data.mean` and `data.std`, unsigned integers of 8 and 16 bits are divided by 255 and 65535, the 12-bit
grey of a TIFF by 4095; values of all other dtypes are taken as they are, in their own unit.
"""

import io
import math

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from selfvil.data import dicom, png, tiff
from selfvil.data.jpeg import Reduction
from selfvil.data.read import (
    PNG_SIGNATURE,
    DamagedImage,
    Decoded,
    Loaded,
    check_size,
    convert_image,
    load_image,
    raise_damage,
)  # fmt: skip

Pixels = Image.Image | np.ndarray
"""A decoded image: of Pillow with 8 bits in mode L, RGB or RGBA; or an array (H, W, C) of another kind."""

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow


def decode_pixels(data: bytes, channels: int | None = 3, reduction: Reduction | None = None) -> Pixels:
    """Decode an image file of any known format, without rounding its values. reduction: as in `load_image`.

    channels: None keeps the image's own number. Images of Pillow are converted as by `decode_image`. Arrays must have
    this number of channels; but grey is repeated for 3, and 16-bit colours are converted to grey for 1, and lose their
    alpha channel for 1 and 3.

    Raises:
        DamagedImage: no known format, too large, damaged, another number of channels, or values that are not finite.
        UserError: a package that the format needs is not installed.
    """
    decoded = _read_array(data, channels)
    if decoded is None:
        loaded = load_image(data, reduction)
        decoded = _deep(loaded)
        if decoded is None:
            if channels not in (None, 1, 3, 4):
                raise DamagedImage(f"it has {len(loaded.image.getbands())} channels, {channels} are expected")
            return convert_image(loaded, channels)
    pixels = _with_channels(decoded, channels)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DamagedImage("it holds NaN or infinite values; replace them before it is packed")
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    return pixels


def array_extension(data: bytes) -> str | None:
    """The extension of a file whose pixels are an array, "png", "tif", "npy" or "dcm"; None for images of Pillow.

    Raises DamagedImage if its pixels would be too large, or its header is broken.
    """
    if data.startswith(npy.MAGIC_PREFIX):
        return "npy"
    if _is_dicom(data):
        return "dcm"
    if data.startswith(PNG_SIGNATURE):
        return "png" if data[24:25] == b"\x10" else None
    if data.startswith(_TIFF_SIGNATURES):
        return "tif" if tiff.is_array(data, None) else None
    return None


def size_of(pixels: Pixels) -> tuple[int, int]:
    """Width and height."""
    return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])


def channels_of(pixels: Pixels) -> int:
    return len(pixels.getbands()) if isinstance(pixels, Image.Image) else pixels.shape[2]


def divisor(dtype: np.dtype) -> float:
    """The value that is 1 on the scale of `data.mean`: 255 or 65535 for unsigned integers of 8 or 16 bits, else 1."""
    return {"u1": 255.0, "u2": 65535.0}.get(dtype.str[1:], 1.0)


def to_rgb(pixels: Pixels) -> Image.Image:
    """An RGB image of 8 bits for people: the first three channels of an array, or the first one where there are two,
    each from its 2nd to its 98th percentile."""
    if isinstance(pixels, Image.Image):
        return pixels.convert("RGB")
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1]
    values = shown[:: max(1, shown.shape[0] // 512), :: max(1, shown.shape[1] // 512)].reshape(-1, shown.shape[2])
    low, high = np.percentile(values.astype(np.float64), (2, 98), axis=0)
    scaled = (shown.astype(np.float32) - low.astype(np.float32)) / np.maximum(high - low, 1e-12).astype(np.float32)
    rounded = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rounded, (*rounded.shape[:2], 3))))


# --- formats ------------------------------------------------------------------------------------------------------


def _read_array(data: bytes, channels: int | None) -> Decoded | None:
    """The pixels of a file; None if Pillow reads it."""
    if data.startswith(npy.MAGIC_PREFIX):
        return Decoded(_read_npy(data, channels))
    if _is_dicom(data):
        return Decoded(dicom.read(data))
    if png.is_array(data):
        return png.read(data)
    if data.startswith(_TIFF_SIGNATURES):
        return tiff.read(data) if tiff.is_array(data, channels) else None
    return None


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def _deep(loaded: Loaded) -> Decoded | None:
    """Grey pixels with more than 8 bits that Pillow has read without rounding."""
    mode, pixels = loaded.image.mode, None
    if mode == "F":
        pixels = np.asarray(loaded.image)
    elif mode.startswith("I"):
        pixels = np.asarray(loaded.image)
        if loaded.white == 65535 or mode != "I":
            pixels = pixels.astype(np.uint16)
        if loaded.white == 4095:
            pixels = pixels.astype(np.float32) / np.float32(4095)
    if pixels is None:
        return None
    check_size(*loaded.image.size, 1, pixels.dtype.itemsize)
    return Decoded(pixels[:, :, None], colour=True)


def _read_npy(data: bytes, channels: int | None) -> np.ndarray:
    with raise_damage():
        file = io.BytesIO(data)
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DamagedImage(f"it has the version {version} of NPY, which only arrays with named fields need")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise DamagedImage(f"it is an array of {dtype}; expected integers or floats of 8 to 64 bits, without pickles")
    if not 2 <= len(shape) <= 3 or min(shape) < 1:
        raise DamagedImage(f"it is an array of the shape {shape}; expected (H, W), (H, W, C) or (C, H, W)")
    last = channels_last(shape, channels)
    height, width = shape[:2] if last else shape[1:]
    check_size(width, height, 1 if len(shape) == 2 else shape[2] if last else shape[0], dtype.itemsize)
    if (found := len(data) - file.tell()) != math.prod(shape) * dtype.itemsize:
        raise DamagedImage(f"it holds {found} bytes of values, {math.prod(shape) * dtype.itemsize} are expected")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    values = values.astype(dtype.newbyteorder("="), copy=False)
    if len(shape) == 2:
        return values[:, :, None]
    return values if last else values.transpose(1, 2, 0)


def channels_last(shape: tuple[int, ...], channels: int | None) -> bool:
    """Whether an array of three axes is (H, W, C), not (C, H, W).

    The last axis is that of the channels if it has the expected number of them, else the first axis if that has it.
    Without an expected number, or if none of the two has it, the shorter one is, and of equal ones the last.
    """
    if len(shape) == 2 or shape[2] == channels:
        return True
    return shape[0] != channels and shape[2] <= shape[0]


# --- channels -----------------------------------------------------------------------------------------------------


def _with_channels(decoded: Decoded, channels: int | None) -> np.ndarray:
    pixels, found = decoded.pixels, decoded.pixels.shape[2]
    if channels is None or found == channels:
        return pixels
    if decoded.colour and channels in (1, 3):
        pixels = pixels[:, :, :-1] if found in (2, 4) else pixels
        if pixels.shape[2] == 3 and channels == 1:
            weights = (_LUMINANCE / divisor(pixels.dtype)).astype(np.float32)
            return sum(pixels[:, :, i : i + 1] * weights[i] for i in range(3))
    if channels == 3 and pixels.shape[2] == 1:
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if pixels.shape[2] != channels:
        raise DamagedImage(f"it has {found} channels, {channels} are expected (model.in_chans)")
    return pixels
