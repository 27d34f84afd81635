"""Image files that lie on the disk as they are: the common part of a folder of images and of a table of paths.

The first opening reads every file once, for its CRC-32. Names, sizes, times and CRC-32 of all files are saved in the
user's cache folder. The next opening asks the system only for sizes and times, and reads only the files that changed.
"""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from selfvil.data import columns
from selfvil.data.base import Images, Progress
from selfvil.data.changes import compare, describe_changes, describe_difference, digests
from selfvil.data.read import DamagedImage
from selfvil.data.sources import read_file

_MANY = 10_000  # files; reading as many for the first time is announced
_AT_ONCE = 512  # files that a thread handles before it reports
_THREADS = 16  # file systems of a network answer many requests at once

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Index:
    """Of n files: sizes, crcs uint32 (n,), labels int32 (n,), times int64 (n,), of the last change, in nanoseconds
    since 1970, or -1 for a file that could not be read. Names as by `columns.join_names`."""

    names: np.ndarray
    name_ends: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    labels: np.ndarray
    times: np.ndarray

    def positions(self, names: Sequence[str], joined: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """For each of these names, its position in this index, or -1."""
        if np.array_equal(self.name_ends, ends) and np.array_equal(self.names, joined):
            return np.arange(len(names))
        known = {columns.name_at(self.names, self.name_ends, i): i for i in range(len(self.name_ends))}
        return np.array([known.get(name, -1) for name in names], np.int64)


class ImageFiles(Images):
    """Files in the order of a list. The key of an image is its path as in the list, which must be unique.

    A file that cannot be read stays in the list; reading it raises DamagedSample.
    """

    holder = "folder"

    def __init__(
        self, source: Path, folder: Path, names: Sequence[str], labels: np.ndarray, classes: Sequence[str],
        image: str | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Index the files.

        Args:
            source: what the user named: a folder, or a table.
            folder: the folder that `names` are relative to.
            labels: int32 (n,), -1 for none.
        """
        index, changed = _open(source, folder, names, labels, image, progress)
        super().__init__([source], [len(names)], index.sizes, index.crcs, index.labels, image)
        self.folder, self.classes, self.changed = folder, list(classes), changed
        self._names, self._name_ends = index.names, index.name_ends

    def read(self, i: int) -> bytes:
        try:
            data = read_file(os.path.join(self.folder, self.key(i)))
        except DamagedImage as error:
            raise self._damaged(i, str(error)) from None
        if len(data) != self.sizes[i] or zlib.crc32(data) != self.crcs[i]:
            raise self._damaged(i, "its bytes have changed since they were indexed (CRC-32 differs)")
        return data

    def key(self, i: int) -> str:
        self._number(i)
        return columns.name_at(self._names, self._name_ends, i)

    @cached_property
    def digests(self) -> list[str]:
        """As of `Images`, for each run of images in one folder."""
        return digests(self._groups[1], self.sizes, self.crcs, self.labels)

    def describe_change(self, num_samples: int, before: Sequence[str] | None) -> str:
        parts = [f"there are {len(self):,} images, {num_samples:,} before"] if len(self) != num_samples else []
        parts += [describe_difference(before, self.digests, self._groups[0], self.holder)] if before else []
        return "; ".join([*parts, *filter(None, [self.changed])]) or "images or labels differ"

    @cached_property
    def _groups(self) -> tuple[list[Path], list[int]]:
        """The folders of the images in their order, and for each the end of its images."""
        paths: list[Path] = []
        ends: list[int] = []
        last = None
        for i in range(len(self)):
            if (within := os.path.dirname(self.key(i))) != last:
                last = within
                paths.append(self.folder / within)
                ends.append(i)
        return paths, [*ends[1:], len(self)]


def _open(
    source: Path, folder: Path, names: Sequence[str], labels: np.ndarray, image: str | None, progress: Progress | None
) -> tuple[_Index, str]:
    """The index of the files, and a sentence on what changed since it was saved."""
    n = len(names)
    now = _Index(*columns.join_names(names), np.zeros(n, np.uint32), np.zeros(n, np.uint32), labels, np.full(n, -1))
    _in_threads(lambda i: _stat(os.path.join(folder, names[i]), i, now), range(n), None)
    saved = columns.cache_file("files", os.path.abspath(source), image)
    loaded = columns.load(saved)
    before = _Index(**loaded[1]) if loaded else None
    unread = now.times >= 0
    if before is not None:
        positions = before.positions(names, now.names, now.name_ends)
        listed = np.flatnonzero(positions >= 0)
        old = positions[listed]
        same = (before.sizes[old] == now.sizes[listed]) & (before.times[old] == now.times[listed])
        now.crcs[listed[same]] = before.crcs[old[same]]
        unread[listed[same]] = False
    ids = np.flatnonzero(unread).tolist()
    if len(ids) >= _MANY:
        _log.warning("%s: %s files are read once, to index them", source, f"{len(ids):,}")
    _in_threads(lambda i: _check(os.path.join(folder, names[i]), i, now), ids, progress)
    change = compare(before, now) if before is not None else None
    if saved is not None and not (before and all(np.array_equal(vars(before)[key], x) for key, x in vars(now).items())):
        columns.save(saved, {}, vars(now))
    return now, describe_changes({source: change}) if change else ""


def _stat(path: str, i: int, index: _Index) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return
    index.sizes[i], index.times[i] = min(status.st_size, 0xFFFFFFFF), max(status.st_mtime_ns, 0)


def _check(path: str, i: int, index: _Index) -> None:
    try:
        data = read_file(path)
    except DamagedImage:
        index.times[i] = -1  # to be read again by the next opening
        return
    index.sizes[i], index.crcs[i] = len(data), zlib.crc32(data)


def _in_threads(work: Callable[[int], None], ids: Sequence[int], progress: Progress | None) -> None:
    """Call `work` for each id."""

    def some(first: int) -> None:
        for i in ids[first : first + _AT_ONCE]:
            work(i)

    with ThreadPoolExecutor(_THREADS) as pool:
        for number, _ in enumerate(pool.map(some, range(0, len(ids), _AT_ONCE))):
            if progress is not None:
                progress(min((number + 1) * _AT_ONCE, len(ids)), len(ids))
