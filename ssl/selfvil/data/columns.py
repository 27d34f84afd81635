"""The saved index of a large source: arrays in one file of the user's cache folder, which are memory-mapped.

Mapped arrays need no time to load, the system reads only the parts that are used, and all processes of a machine share
one copy of them. The file is: 8 bytes of magic, the length of a header and its CRC-32 (4 bytes each), the header as
JSON (facts, and name, type, length, offset and CRC-32 of each array), and the arrays. It is written aside and renamed.
"""

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.files import user_cache

_MAGIC = b"selfvil3"  # the digit is the version of the format
_START = struct.Struct("<8sII")
_ALIGNMENT = 64  # bytes
_TYPES = ("|u1", "<u4", "<i4", "<i8")
_MOST_HEADER = 64 << 20  # bytes
_CHECKED = 256 << 20  # bytes; the CRC-32 of larger files is not checked at each start: a second for each gigabyte

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """The folder for indexes in the user's cache; None where there is no home folder."""
    return user_cache("index")


def cache_file(kind: str, *identity: object) -> Path | None:
    """The file of a source in the cache folder, named by a hash of what identifies the source, such as its path."""
    folder = cache_folder()
    digest = hashlib.sha256("\0".join(map(str, (kind, *identity))).encode("utf-8", "surrogateescape")).hexdigest()
    return None if folder is None else folder / f"{digest[:32]}.{kind}"


def save(path: Path, facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> bool:
    """Write facts (JSON values) and one-dimensional arrays; False, with a warning, where that is not possible."""
    described: dict[str, tuple[str, int, int, int]] = {}
    offset = 0
    for name, column in columns.items():
        assert column.ndim == 1
        assert column.dtype.str in _TYPES
        described[name] = column.dtype.str, len(column), offset, zlib.crc32(np.ascontiguousarray(column).data)
        offset += -(-column.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"facts": facts, "columns": described}).encode()
    start = _START.pack(_MAGIC, len(header), zlib.crc32(header))
    aside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write((start + header).ljust(_first(len(header)), b"\0"))
                for column in columns.values():
                    file.write(np.ascontiguousarray(column).data)
                    file.write(bytes(-column.nbytes % _ALIGNMENT))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("the index %s cannot be saved (%s) and will be built again", path, error.strerror or error)
        return False
    return True


def load(path: Path | None) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The facts and the mapped arrays of a file; None if it is absent or damaged. Changes of an array are not saved."""
    if path is None or not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, length, crc = _START.unpack(file.read(_START.size))
            if magic != _MAGIC or length > min(size, _MOST_HEADER):
                raise ValueError("another format")
            if zlib.crc32(header := file.read(length)) != crc:
                raise ValueError("its header is damaged")
            content = json.loads(header)
            columns = {}
            for name, (kind, count, offset, crc) in content["columns"].items():
                begin = _first(length) + offset
                if kind not in _TYPES or begin + count * np.dtype(kind).itemsize > size:
                    raise ValueError(f"{name} is not in it")
                shape = (count,)
                # "c": writable for torch.as_tensor, but nothing is written to the file.
                column = np.memmap(file, kind, "c", begin, shape) if count else np.zeros(shape, kind)
                if size <= _CHECKED and zlib.crc32(column.data) != crc:
                    raise ValueError(f"{name} is damaged")
                columns[name] = column.view(np.ndarray)  # the base class is faster, and pickles as an array
        return content["facts"], columns
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        _log.info("%s cannot be used (%s); building it again", path, error)
        return None


def _first(header: int) -> int:
    """The offset of the first array in the file, for a header of this length."""
    return -(-(_START.size + header) // _ALIGNMENT) * _ALIGNMENT


def join_names(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all names, uint8, and the end of each name in them, int64 (n,)."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def name_at(names: np.ndarray, ends: np.ndarray, i: int) -> str:
    """Name i of `join_names`."""
    return names[ends[i - 1] if i else 0 : ends[i]].tobytes().decode("utf-8", "surrogateescape")
