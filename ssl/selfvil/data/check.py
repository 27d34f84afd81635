"""Check an image, for `selfvil pack` and `selfvil inspect`: decode it fully, and collect the warnings of the decoders.

Which damage is detected, by format:

| format | detected | not detected |
|---|---|---|
| PNG | any changed byte of the pixels: every chunk has a CRC-32, which is verified | |
| JPEG | truncated files, broken headers, data that libjpeg warns about | most changes: they give valid codes |
| WebP | truncated files, wrong sizes in the container | most changes: lossy WebP has no checksums |
| TIFF, BMP, PNM | truncated files, broken headers; in TIFF, compression errors | changed pixels: no checksums |

Only a checksum made before the damage can detect the rest.
"""

import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from PIL.ImageFile import ImageFile
from torchvision.io import ImageReadMode

from selfvil.data.array_views import resize
from selfvil.data.arrays import array_extension, decode_pixels, divisor, size_of, to_rgb
from selfvil.data.jpeg import decode_jpeg
from selfvil.data.read import (
    DamagedImage,
    convert_image,
    decode_image,
    load_image,
    open_image,
    png_chunks,
    raw_modes,
    turn_upright,
)
from selfvil.errors import shorten

SEVERAL_PAGES = "it holds several pages or frames, of which only the first is used"

_MEMBERS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class Examined(NamedTuple):
    """A decoded image and what decoding showed. damage, notes, deepest: as of `Checked`.

    image: upright, 8 bits per channel, with its own number of channels; of an array, a picture of it (`to_rgb`).
    kind: its format, by Pillow's name. mode: Pillow's, or number and dtype of the channels of an array. depth: bits of
    a channel as stored. deep_colour: whether it has 16-bit colours, of which 8 bits are read.
    """

    image: Image.Image
    kind: str
    mode: str
    depth: int
    deep_colour: bool
    damage: tuple[str, ...]
    notes: tuple[str, ...]
    deepest: int


class Checked(NamedTuple):
    """A checked image.

    Attributes:
        data: the bytes to store; empty for an image that is left out.
        extension: of its member.
        reason: why it is left out; empty for an image that is packed.
        mask: a PNG of class ids, or empty.
        damage: warnings of decoders that returned pixels nevertheless.
        notes: remarks about the file that do not affect the pixels.
        size: (width, height) as stored.
        origin: 16 hex digits of the SHA-256 of the source file; they stay the same if the image is resized.
        deepest: the largest value of 16-bit grey whose file does not declare its range; 0 for other images.
    """

    data: bytes
    extension: str = ""
    reason: str = ""
    mask: bytes = b""
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    deepest: int = 0
    origin: str = ""


@dataclass(frozen=True)
class Checker:
    """Checks image i of a source; runs in worker processes.

    Attributes:
        read: returns the bytes of image i.
        read_mask: returns the bytes of its mask, or None.
        size: larger images are resized until their shorter side has this many pixels.
        max_value: the value of white in 16-bit grey.
        strict: leave out images with damage.
    """

    read: Callable[[int], bytes]
    read_mask: Callable[[int], bytes | None]
    size: int | None
    max_value: int | None
    strict: bool

    def __call__(self, i: int) -> Checked:
        try:
            checked = self._check(i)
        except DamagedImage as damage:
            return Checked(b"", reason=str(damage))
        if self.strict and checked.damage:
            return Checked(b"", reason="; ".join(checked.damage))
        return checked

    def _check(self, i: int) -> Checked:
        data = original = self.read(i)
        extension = array_extension(data)
        if extension is not None and (self.max_value is None or extension == "npy"):
            return self._check_array(i, data, extension)
        examined = examine(data, self.max_value)
        image, kind, deepest, damage = examined.image, examined.kind, examined.deepest, list(examined.damage)
        if self.max_value is not None and examined.deep_colour:
            raise DamagedImage("16-bit colours cannot be scaled by a maximum value; convert it to 8 bits")
        mask = self.read_mask(i)
        if mask is not None:
            mask, complaints = _check_mask(mask, image.size, self.size)
            damage += complaints
        if self.size is not None and min(image.size) > self.size:
            image = _shrink(image, self.size)
            data, kind = _encode(image, kind)
        elif deepest and self.max_value is not None:
            data, kind = _encode(image, "PNG")
        return Checked(
            data, _MEMBERS[kind], mask=mask or b"", damage=_short(damage), notes=examined.notes, size=image.size,
            deepest=deepest, origin=sha256(original).hexdigest()[:16],
        )  # fmt: skip

    def _check_array(self, i: int, data: bytes, extension: str) -> Checked:
        """An image with other channels than Pillow's, or more than 8 bits: packed as it is, or resized as NPY."""
        original, pixels = data, decode_pixels(data, None)
        damage, notes = _check_container(data, "PNG") if extension == "png" else ([], [])
        grey16 = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint16 and pixels.shape[2] == 1
        deepest = int(pixels.max()) if isinstance(pixels, np.ndarray) and grey16 else 0
        mask = self.read_mask(i)
        if mask is not None:
            mask, complaints = _check_mask(mask, size_of(pixels), self.size)
            damage += complaints
        if self.size is not None and min(size_of(pixels)) > self.size:
            pixels = _shrink_array(np.asarray(pixels), self.size)
            file = io.BytesIO()
            np.save(file, pixels, allow_pickle=False)
            data, extension = file.getvalue(), "npy"
        return Checked(
            data, extension, mask=mask or b"", damage=_short(damage), notes=_short(notes), size=size_of(pixels),
            deepest=deepest, origin=sha256(original).hexdigest()[:16],
        )  # fmt: skip


def examine(data: bytes, max_value: int | None = None) -> Examined:
    """Decode an image file fully, and collect warnings of decoders and containers.

    max_value: as of `convert_image`. Raises DamagedImage: it cannot be decoded.
    """
    extension = array_extension(data)
    if extension is not None and (max_value is None or extension == "npy"):
        return _examine_array(data, extension)
    deepest = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        header = open_image(data)
        kind, mode, deep_colour = str(header.format), header.mode, _is_deep_colour(header)
        damage, notes = _check_container(data, kind)
        if kind in ("JPEG", "MPO"):
            image, complaints = _decode_jpeg(data, header)
            damage += complaints
        else:
            with _standard_error() as written:  # libtiff writes its warnings there
                loaded = load_image(data)
            damage += written
            if loaded.white is None and loaded.image.mode.startswith("I"):
                deepest = int(np.asarray(loaded.image).max())
            image = convert_image(loaded, None, max_value)
    notes += [str(each.message) for each in caught]
    if kind != "MPO" and getattr(header, "is_animated", False):
        notes.append(SEVERAL_PAGES)
    depth = 1 if mode == "1" else 16 if deep_colour or mode.startswith("I;16") else 32 if mode in "IF" else 8
    return Examined(image, kind, mode, depth, deep_colour, _short(damage), _short(notes), deepest)


def _examine_array(data: bytes, extension: str) -> Examined:
    pixels = np.asarray(decode_pixels(data, None))
    damage, notes = _check_container(data, "PNG") if extension == "png" else ([], [])
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    image = to_rgb(pixels if pixels.ndim == 3 else pixels[:, :, None])
    kind = {"tif": "TIFF", "dcm": "DICOM"}.get(extension, extension.upper())
    mode = f"{channels} x {pixels.dtype}"
    return Examined(image, kind, mode, 8 * pixels.dtype.itemsize, False, _short(damage), _short(notes), 0)


def _short(texts: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shorten(" ".join(text.split()), 200) for text in texts))


def _is_deep_colour(header: ImageFile) -> bool:
    """Pillow reads only the upper 8 bits of 16-bit colours."""
    return not header.mode.startswith("I") and any(";16" in mode for mode in raw_modes(header))


# --- warnings of decoders and containers --------------------------------------------------------------------------


def _check_container(data: bytes, kind: str) -> tuple[list[str], list[str]]:
    """Damage and notes from the container format. Pillow does not verify the CRC-32 of a PNG's pixels."""
    damage: list[str] = []
    notes: list[str] = []
    if kind == "PNG":
        last = b""
        for chunk in png_chunks(data):
            last = chunk.kind
            if not chunk.sound:
                text = f"the CRC-32 of its chunk {chunk.kind.decode('latin-1')} differs"
                (damage if chunk.kind in _PIXEL_CHUNKS else notes).append(text)
        if last != b"IEND":
            damage.append("it ends without an IEND chunk")
    elif kind == "WEBP":
        size = int.from_bytes(data[4:8], "little") + 8
        if size not in (len(data), len(data) - 1):  # some writers pad
            damage.append(f"its container declares {size} bytes, the file has {len(data)}")
    return damage, notes


def _decode_jpeg(data: bytes, header: Image.Image) -> tuple[Image.Image, list[str]]:
    """Upright pixels, and libjpeg's warnings: Pillow drops them, torchvision writes them to standard error."""
    if (sound := decode_jpeg(data)) is not None:
        return turn_upright(sound, header), []
    pixels, complaints = None, []
    with _standard_error() as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 announces that its decoders will move to another package
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = torchvision.io.decode_jpeg(encoded, ImageReadMode.UNCHANGED)
        except RuntimeError as error:
            complaints = [str(error).rpartition("] ")[2].splitlines()[0]]
    complaints += [line.strip() for line in written if line.strip()]
    if pixels is None or pixels.shape[0] not in (1, 3):  # CMYK: training uses Pillow's conversion
        return convert_image(load_image(data), None), complaints
    return turn_upright(Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()), header), complaints


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects the lines that C code writes to standard error. No other thread may write there at the same time."""
    lines: list[str] = []
    file = _scratch_file(os.getpid())
    try:
        terminal = os.dup(2)
    except OSError:  # it is closed
        terminal = None
    os.dup2(file.fileno(), 2)
    try:
        yield lines
    finally:
        if terminal is None:
            os.close(2)
        else:
            os.dup2(terminal, 2)
            os.close(terminal)
        if length := os.lseek(file.fileno(), 0, os.SEEK_CUR):
            lines += os.pread(file.fileno(), min(length, 4096), 0).decode("utf-8", "replace").splitlines()
            os.lseek(file.fileno(), 0, os.SEEK_SET)


@cache
def _scratch_file(process: int) -> BinaryIO:
    return tempfile.TemporaryFile(buffering=0)


def decoding_rates(images: Sequence[bytes], size: int) -> tuple[float, float]:
    """Images per second that this process decodes for training: at their own size, and resized to `size` pixels."""
    smaller = [_encode(_shrink(decode_image(data, None), size), str(open_image(data).format))[0] for data in images]
    rates = []
    for group in (images, smaller):
        began = time.perf_counter()
        for data in group:
            decode_image(data)
        rates.append(len(group) / (time.perf_counter() - began))
    return rates[0], rates[1]


# --- masks and smaller copies -------------------------------------------------------------------------------------


def _check_mask(data: bytes, image_size: tuple[int, int], size: int | None) -> tuple[bytes, list[str]]:
    """A mask as PNG, resized by nearest neighbour to the size of its resized image; and the damage in it."""
    try:
        mask = open_image(data)
        kind, mode = str(mask.format), mask.mode
        mask.load()
    except Exception as error:  # on damaged data, Pillow raises many classes
        raise DamagedImage(f"its mask: {error}") from None
    if mode not in ("1", "L", "P"):
        raise DamagedImage(f"its mask has the mode {mode}; expected one channel of 8 bits that holds class ids")
    if mask.size != image_size:
        raise DamagedImage(f"its mask has {_pixels(mask.size)}, the image {_pixels(image_size)}")
    damage = [f"its mask: {text}" for text in _check_container(data, kind)[0]]
    if size is not None and min(image_size) > size:
        return _encode(mask.resize(_shrunk(image_size, size), Image.Resampling.NEAREST), "PNG")[0], damage
    return data if kind == "PNG" else _encode(mask, "PNG")[0], damage


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]} pixels"


def _shrunk(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    factor = shorter / min(size)
    width, height = (max(shorter, round(side * factor)) for side in size)
    return width, height


def _shrink(image: Image.Image, size: int) -> Image.Image:
    return image.resize(_shrunk(image.size, size), Image.Resampling.BICUBIC)


def _shrink_array(pixels: np.ndarray, size: int) -> np.ndarray:
    """An array (H, W, C) with its shorter side resized to `size`, in its own dtype: integers are rounded."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    smaller = np.asarray(resize(pixels, _shrunk((pixels.shape[1], pixels.shape[0]), size))) * divisor(pixels.dtype)
    if pixels.dtype.kind in "ui":
        limits = np.iinfo(pixels.dtype)
        smaller = np.rint(smaller.astype(np.float64)).clip(limits.min, limits.max)
    return smaller.astype(pixels.dtype)


def _encode(image: Image.Image, kind: str) -> tuple[bytes, str]:
    """The encoded image and its format: JPEG for lossy formats, unless there is an alpha channel; else PNG."""
    kind = "JPEG" if kind in ("JPEG", "MPO", "WEBP") and image.mode != "RGBA" else "PNG"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue(), kind
