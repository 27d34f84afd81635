"""The index of one shard, and its sidecar: the file `SHARD.index.npz` in the folder of the shard or in the user's cache
folder.

A sidecar may come from an untrusted source, together with its shard. Nothing in it is unpickled or decompressed, and
its content is used only if it is possible for a shard of this size.
"""

import errno
import hashlib
import io
import json
import logging
import math
import os
import zipfile
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selfvil.data.columns import cache_folder
from selfvil.data.tar import BLOCK

SIDECAR = ".index.npz"

STATS = ".stats.json"
"""The same for the statistics of channels (`selfvil.data.stats`)."""

LARGEST_LABEL = 1_000_000
"""Larger labels are refused: tables with one row per class would fill the memory."""

_log = logging.getLogger(__name__)
_FORMAT = 2  # of the sidecar; with another number, the index is built again
_EXTRA_BYTES = 1 << 20
_MOST_COMBINATIONS = 1 << 16  # bytes of JSON


@dataclass(frozen=True)
class ShardIndex:
    """One shard of n samples.

    blocks, sizes, crcs (n,) uint32: offset of the image member in blocks of 512 bytes, its size in bytes, its CRC-32.
    labels (n,) int64, -1 for none. keys: the n names, joined by NUL. ignored (): number of samples without an image.
    several: JSON, the number of samples for each combination of several images.
    """

    blocks: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    ignored: np.ndarray
    several: np.ndarray

    def names(self) -> list[str]:
        return self.keys.tobytes().decode("utf-8", "surrogateescape").split("\0")

    def combinations(self) -> Counter[tuple[str, ...]]:
        return Counter({tuple(names): count for names, count in json.loads(self.several.tobytes())})


class Stamp(NamedTuple):
    """Size and time of the shard that an index was built from."""

    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)


def sidecars(path: Path, image: str | None = None) -> list[Path]:
    """Possible paths of the index of a shard: in its folder, or in the cache folder under a hash of its path.

    image: the requested extension for samples with several images; each has an index of its own."""
    beside = path.with_name(path.name + ending(image))
    cached = in_cache(os.fsencode(path.resolve()), image)
    return [beside] if cached is None else [beside, cached]


def in_cache(shard: bytes, image: str | None = None) -> Path | None:
    """Path of the index of a shard in the user's cache folder, under a hash of its path or URL; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / (hashlib.sha256(shard).hexdigest()[:32] + ending(image))


def ending(image: str | None = None) -> str:
    """What follows the name of a shard in the name of its index."""
    return SIDECAR if image is None else f".{image}{SIDECAR}"


def most_bytes(size: int) -> int:
    """Of the index of a shard of `size` bytes: its entry for a member is smaller than the header of the member."""
    return size + _EXTRA_BYTES


def load(sidecar: Path, size: int) -> tuple[ShardIndex, Stamp] | None:
    """The saved index, and the stamp of the shard it was built from. None if it is absent or damaged.

    size: of the present shard, in bytes."""
    if not sidecar.is_file():
        return None
    try:
        columns = _read(sidecar, most_bytes(size))
        format, *of = columns.pop("stamp").tolist()
        if format != _FORMAT:
            _log.info("%s has an older format; building it again", sidecar)
            return None
        index = ShardIndex(**columns)
        if fault := _fault(index, of[0]):
            _log.info("%s is not a valid index (%s); building it again", sidecar, fault)
            return None
        return index, Stamp(*of)
    except Exception as error:  # a damaged zip raises many classes
        _log.info("%s cannot be read (%s); building it again", sidecar, error)
    return None


def save(sidecar: Path, stamp: Stamp, index: ShardIndex) -> None:
    """Write under a temporary name and rename: other processes may write the same index. Raises OSError."""
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    if not sidecar.parent.stat().st_mode & 0o222:  # respect read-only permissions even as root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(sidecar.parent))
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, stamp=np.array([_FORMAT, *stamp], np.int64), **vars(index))
    aside = sidecar.with_name(f".{sidecar.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(aside, "xb") as file:
            file.write(content.getbuffer())
        aside.replace(sidecar)
    finally:
        aside.unlink(missing_ok=True)


def _read(sidecar: Path, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of a file that `numpy.savez` wrote, in memory not much larger than the file.

    `numpy.load` would decompress a member, or allocate the size that its header states, without a check.
    """
    with open(sidecar, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise ValueError(f"its {size} bytes are more than an index of this shard can have")
        file.seek(max(0, size - 42))
        end = file.read()[-42:]
        # The last 22 bytes of a zip file hold the number of its members; a ZIP64 record may stand before them.
        entries = int.from_bytes(end[-12:-10], "little")
        if end[-22:-18] != b"PK\5\6" or entries != len(fields(ShardIndex)) + 1 or end[:4] == b"PK\6\7":
            raise ValueError("no zip file with the members of an index")
        with zipfile.ZipFile(file) as archive:  # its CRC-32 detects flipped bits
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > size:
                raise ValueError("its members are compressed or overlap")
            return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _array(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of an unexpected format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of {dtype} whose header states the shape {shape}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def _fault(index: ShardIndex, size: int) -> str | None:
    """The first property of an index that is impossible for a shard of `size` bytes, or None."""
    columns = {"blocks": np.uint32, "sizes": np.uint32, "crcs": np.uint32, "labels": np.int64}
    count = len(index.sizes)
    if not 0 < count <= size // BLOCK:
        return f"{count} samples in {size} bytes"
    for name, dtype in columns.items():
        column = getattr(index, name)
        if column.dtype != dtype or column.shape != (count,):
            return f"{name}: {column.dtype}{column.shape}"
    if index.keys.dtype != np.uint8 or index.keys.ndim != 1 or np.count_nonzero(index.keys == 0) != count - 1:
        return "not one name for each sample"
    if (index.blocks.astype(np.int64) * BLOCK + index.sizes).max() > size or index.sizes.max() >= 1 << 31:
        return "images beyond the end of the shard"
    if index.labels.min() < -1 or index.labels.max() > LARGEST_LABEL:
        return "labels out of range"
    if index.ignored.dtype != np.int64 or index.ignored.shape or not 0 <= index.ignored <= size // BLOCK:
        return "ignored samples"
    if index.several.dtype != np.uint8 or index.several.ndim != 1 or index.several.size > _MOST_COMBINATIONS:
        return "several images"
    for names, number in index.combinations().items():
        if not (all(isinstance(name, str) for name in names) and isinstance(number, int) and 0 < number <= count):
            return "several images"
    return None
