"""The shards of a store, read through the cache.

A shard is downloaded whole when its first image is needed, and before that by a thread that knows the order. Where the
cache cannot hold it (the limit, a full disk, a folder that cannot be written), its images are read one by one from the
store. Reading one image costs a round trip, so a whole shard is faster unless only a few of its images are needed.
"""

import io
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from selfvil.data.files import ShardFiles
from selfvil.data.remote import indexes, store
from selfvil.data.remote.cache import Cache, Full
from selfvil.data.remote.indexes import Remote
from selfvil.data.sidecar import ShardIndex
from selfvil.errors import UserError

_log = logging.getLogger(__name__)
_READ_AHEAD = 1 << 23  # bytes of one request, where a file is read from its beginning to its end without the cache
_OPEN_FILES = 64  # shards that a process keeps open besides those that are wanted
_TRY_AGAIN = 10.0  # seconds after which a shard that the cache could not hold is tried again
_TRY_AHEAD_AGAIN = 1.0  # the same for the thread

_reported: set[type] = set()


def open_whole(file: Remote, cache: Cache) -> BinaryIO:
    """A shard as a file, downloaded into the cache if that can hold it. Raises UserError if the store fails."""
    try:
        descriptor = cache.fill(file.name, file.version.size, lambda part: store.download(*file, part))
    except OSError as error:
        _report(file, cache, error)
        return io.BufferedReader(_RangeFile(file, cache), _READ_AHEAD)
    assert descriptor is not None, "only without waiting"
    return open(descriptor, "rb", buffering=1 << 20)


class RemoteFiles(ShardFiles):
    """Shards of a store. image: extension of the images that are used, as in `open_shards`."""

    def __init__(self, files: Sequence[Remote], cache: Cache, image: str | None = None) -> None:
        self.files, self.cache, self._image = list(files), cache, image
        self._reset()

    def _reset(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._descriptors: dict[int, int] = {}
        self._wanted: tuple[int, ...] = ()
        self._refused: dict[int, float] = {}  # shards that the cache could not hold, until this time
        self._postponed: dict[int, float] = {}  # shards that the thread leaves out until this time

    def read(self, number: int, offset: int, size: int) -> bytes:
        if (descriptor := self._descriptor(number)) is not None:
            return os.pread(descriptor, size, offset)
        return _read_range(self.files[number], self.cache, offset, size)

    def open(self, number: int) -> BinaryIO:
        return open_whole(self.files[number], self.cache)

    def size(self, number: int) -> int:
        return self.files[number].version.size

    def index(self, number: int) -> ShardIndex:
        loaded = indexes.load(self.files[number], self._image)
        if loaded is None or not loaded[1]:
            raise UserError(f"the index of {self.files[number].url} was removed from the cache folder")
        return loaded[0]

    def prepare(self, numbers: Sequence[int]) -> None:
        """Begin to download these shards, in this order, and close all others."""
        self._check_process()
        wanted = tuple(numbers)
        with self._lock:
            if wanted != self._wanted:
                self._wanted = wanted
                self._close_unwanted()
            if self._thread is None and any(map(self._is_missing, wanted)):
                self._thread = threading.Thread(target=self._download_ahead, name="selfvil-download", daemon=True)
                self._thread.start()

    def _is_missing(self, number: int) -> bool:
        return number not in self._descriptors and self._postponed.get(number, 0.0) < time.monotonic()

    def _check_process(self) -> None:
        if self._process != os.getpid():  # a fork: the thread is not there, and its lock may be held forever
            inherited = list(self._descriptors.values())
            self._reset()
            for descriptor in inherited:  # else files that the other process has closed would stay in use
                os.close(descriptor)

    def _close_unwanted(self) -> bool:
        """Whether there was a shard that was open and is not wanted. Files that are not open can be removed."""
        unwanted = self._descriptors.keys() - self._wanted
        for number in unwanted:
            os.close(self._descriptors.pop(number))
        return bool(unwanted)

    def _download_ahead(self) -> None:
        """The thread: it ends when each wanted shard has been tried."""
        while True:
            with self._lock:
                number = next(filter(self._is_missing, self._wanted), None)
                if number is None:
                    self._thread = None
                    return
            try:
                descriptor = self._obtain(number, wait=False)
            except (OSError, UserError):  # `read` tries again, and reports it
                descriptor = None
            if descriptor is None:  # or another process downloads it
                self._postponed[number] = time.monotonic() + _TRY_AHEAD_AGAIN
            else:
                self._keep(number, descriptor, wanted_only=True)

    def _descriptor(self, number: int) -> int | None:
        """Of the shard in the cache; None if the cache cannot hold it."""
        self._check_process()
        while (descriptor := self._descriptors.get(number)) is None:
            if self._refused.get(number, 0.0) > time.monotonic():
                return None
            try:
                found = self._obtain(number, wait=True)
            except OSError as error:
                with self._lock:
                    freed = isinstance(error, Full) and self._close_unwanted()
                if not freed:
                    self._refused[number] = time.monotonic() + _TRY_AGAIN
                    _report(self.files[number], self.cache, error)
            else:
                assert found is not None, "only without waiting"
                self._keep(number, found)
        return descriptor

    def _keep(self, number: int, descriptor: int, wanted_only: bool = False) -> None:
        with self._lock:
            if number in self._descriptors or (wanted_only and number not in self._wanted):
                os.close(descriptor)
                return
            if len(self._descriptors) >= len(self._wanted) + _OPEN_FILES:
                self._close_unwanted()
            self._descriptors[number] = descriptor

    def _obtain(self, number: int, wait: bool) -> int | None:
        """A descriptor of the shard in the cache, where it is downloaded to if needed. Raises OSError, UserError."""
        file = self.files[number]
        return self.cache.fill(file.name, file.version.size, lambda part: self._download(number, part), wait)

    def _download(self, number: int, part: BinaryIO) -> None:
        """Append the rest of a shard; if images differ from the index, download it once again from its beginning."""
        file, loaded = self.files[number], indexes.load(self.files[number], self._image)
        for last in (False, True):
            store.download(file.url, file.version, part)
            damaged = indexes.damaged(loaded[0], part.fileno()) if loaded and loaded[1] else 0
            if not damaged:
                return
            if not last:
                part.seek(0)
                part.truncate()
        _log.warning("%s: %d images differ from the index of the shard (CRC-32)", file.url, damaged)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "cache": self.cache, "_image": self._image}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


class _RangeFile(io.RawIOBase):
    """A shard that is read by ranges, for io.BufferedReader."""

    def __init__(self, file: Remote, cache: Cache) -> None:
        self._file, self._cache, self._position = file, cache, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.version.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = _read_range(self._file, self._cache, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _read_range(file: Remote, cache: Cache, offset: int, size: int) -> bytes:
    if not file.version.ranges:
        raise UserError(
            f"{file.url} cannot be read: the server does not send parts of a file, and the cache {cache.folder} cannot "
            "hold the whole file: set data.cache (--cache) to another folder, or raise data.cache_gb (--cache-gb)"
        )
    return store.read(*file, min(offset, file.version.size), min(offset + size, file.version.size))


def _report(file: Remote, cache: Cache, error: OSError) -> None:
    if type(error) in _reported:  # once in each process
        return
    _reported.add(type(error))
    _log.warning(
        "the cache %s cannot hold %s (%s): images are read one by one from the store, which is slow; set data.cache "
        "(--cache) to another folder, raise data.cache_gb (--cache-gb), or lower data.window",
        cache.folder, file.url, error.strerror or error,
    )  # fmt: skip
