"""From which files `selfvil pack` made the images of shards, by sources.tsv beside them.

The file has 16 digits of the SHA-256 of the bytes of each source file; its path is not hashed. So two sets hold the
same image where these are equal, also if they were packed with different sizes, and cat/001.jpg of two folders is not
one image.
"""

from hashlib import sha256
from pathlib import Path

import numpy as np

from selfvil.data.base import Images
from selfvil.data.index import Shards

FILE = "sources.tsv"


def origin(data: bytes) -> int:
    """The origin of an image that is made from a file with these bytes."""
    return int(sha256(data).hexdigest()[:16], 16)


def origins(images: Images) -> np.ndarray | None:
    """The origin of each image, uint64; 0 where it is not known, None if no shard has one.

    A table that does not belong to a shard, by the keys of its first and last image, is not used. Those of shards
    behind a URL are not read.
    """
    if not isinstance(images, Shards):
        return None
    found = np.zeros(len(images), np.uint64)
    tables: dict[Path, tuple[str, np.ndarray] | None] = {}
    for start, end, path in zip([0, *images.ends], images.ends, images.paths):
        if not isinstance(path, Path) or end == start:
            continue
        file = path.parent / FILE
        if file not in tables:
            tables[file] = _read(file)
        if (table := tables[file]) is None:
            continue
        name, values = table
        prefix, _, digits = images.key(start).rpartition("-")
        row = int(digits) if digits.isascii() and digits.isdecimal() else len(values)
        last = row + end - start - 1
        if prefix == name and last < len(values) and images.key(end - 1) == f"{name}-{last:08d}":
            found[start:end] = values[row : last + 1]
    return found if found.any() else None


def made_from(images: Images, others: Images) -> np.ndarray:
    """bool for each of `images`: whether it was made from the same file as one of `others`, as far as is known."""
    ours, theirs = origins(images), origins(others)
    if ours is None or theirs is None:
        return np.zeros(len(images), bool)
    return (ours != 0) & np.isin(ours, theirs)


def _read(file: Path) -> tuple[str, np.ndarray] | None:
    """The first part of the keys, and the origins in the order of the keys; None if it is no such file."""
    try:
        lines = file.read_bytes().splitlines()
        name = lines[0].partition(b"\t")[0].rpartition(b"-")[0].decode()
        values = [int(line.rpartition(b"\t")[2], 16) for line in lines]
        ordered = all(line.startswith(f"{name}-{i:08d}\t".encode()) for i, line in enumerate(lines))
        return (name, np.array(values, np.uint64)) if ordered else None
    except (OSError, ValueError, IndexError, OverflowError):
        return None
