"""The shards of a store, read through the cache.

A shard is downloaded whole when its first image is needed, and before that by a thread that knows the order. Where the
cache cannot hold it (the limit, a full disk, a folder that cannot be written), its images are read one by one from the
store. Reading one image costs a round trip, so a whole shard is faster unless a few of its images are needed.
"""

import io
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, BinaryIO

import numpy as np

from selfvil.data.remote import store
from selfvil.data.remote.cache import Cache, Full
from selfvil.data.remote.store import Version
from selfvil.data.remote.urls import Url
from selfvil.errors import UserError

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Offset, size and CRC-32 of each image of a shard."""

_log = logging.getLogger(__name__)
_READ_AHEAD = 1 << 23  # bytes of one request, where a file is read from its beginning to its end without the cache
_OPEN_FILES = 64  # shards that a process keeps open besides those that are wanted
_TRY_AGAIN = 10.0  # seconds after which a shard that the cache could not hold is tried again


@dataclass(frozen=True)
class Remote:
    """A file of a store, in one version."""

    url: Url
    version: Version

    @property
    def name(self) -> str:
        """In the cache; another version has another name."""
        return sha256(f"{self.url.text}\0{self.version.tag}".encode()).hexdigest()[:32]


class Fetcher:
    """Reads shards of a store. Safe to fork and to pickle; not thread-safe.

    Args:
        files: the shards.
        columns: where the images of shard i are, to verify it when it arrives; None if that is not known yet.
        patience: seconds for which a failing store is asked again.
    """

    def __init__(
        self,
        files: Sequence[Remote],
        cache: Cache,
        columns: Callable[[int], Columns] | None = None,
        patience: float | None = None,
    ) -> None:
        self.files, self.cache, self._columns = list(files), cache, columns
        self._patience = store.PATIENCE if patience is None else patience
        self._reset()

    def _reset(self) -> None:
        self._process, self._lock, self._thread = os.getpid(), threading.Lock(), None
        self._descriptors: dict[int, int] = {}
        self._wanted: tuple[int, ...] = ()
        self._refused: dict[int, float] = {}
        self._failed: dict[int, UserError] = {}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it is shorter.

        Raises UserError if the store fails, denies or has another version, and OSError.
        """
        if (descriptor := self._descriptor(shard)) is not None:
            return os.pread(descriptor, size, offset)
        file = self.files[shard]
        if not file.version.ranges:
            raise UserError(
                f"{file.url} cannot be read: the server does not send parts of files, and the cache "
                f"{self.cache.folder} (data.cache, data.cache_gb) has no space for the whole file"
            )
        return store.read(file.url, file.version, offset, min(offset + size, file.version.size), self._patience)

    def open(self, shard: int) -> BinaryIO:
        """A whole shard as a file to read. Raises as `read`."""
        if (descriptor := self._descriptor(shard)) is not None:
            return open(os.dup(descriptor), "rb", buffering=1 << 20)
        return io.BufferedReader(_RangeFile(self, shard), _READ_AHEAD)

    def ahead(self, shards: Sequence[int]) -> None:
        """Begin to download these shards, in this order, and let go of all others."""
        self._check_process()
        wanted = tuple(shards)
        if wanted == self._wanted and (self._thread is not None or all(map(self._descriptors.__contains__, wanted))):
            return
        with self._lock:
            self._wanted = wanted
            self._close_unwanted()
            if self._thread is None and not all(map(self._descriptors.__contains__, wanted)):
                self._thread = threading.Thread(target=self._download_ahead, name="selfvil-download", daemon=True)
                self._thread.start()

    def _close_unwanted(self) -> bool:
        """Whether there was a shard that was open and is not wanted. Files that are not open can be removed."""
        unwanted = self._descriptors.keys() - self._wanted
        for shard in unwanted:
            os.close(self._descriptors.pop(shard))
        return bool(unwanted)

    def _check_process(self) -> None:
        if self._process != os.getpid():  # a fork: the thread is not there, and its lock may be held forever
            inherited = list(self._descriptors.values())
            self._reset()
            for descriptor in inherited:  # else files that the other process has closed would stay in use
                os.close(descriptor)

    def _download_ahead(self) -> None:
        """The thread: it ends when there is nothing left to do."""
        done: set[int] = set()
        while True:
            with self._lock:
                shard = next((each for each in self._wanted if each not in self._descriptors.keys() | done), None)
                if shard is None:
                    self._thread = None
                    return
            done.add(shard)
            try:
                descriptor = self._obtain(shard, wait=False)
            except UserError as error:
                self._failed[shard] = error  # `read` raises it
                continue
            except OSError:  # `read` tries again, and reports it
                continue
            if descriptor is not None:
                self._keep(shard, descriptor)

    def _keep(self, shard: int, descriptor: int) -> None:
        with self._lock:
            if shard in self._descriptors or (self._wanted and shard not in self._wanted and self._is_thread()):
                os.close(descriptor)
            else:
                if len(self._descriptors) >= len(self._wanted) + _OPEN_FILES:
                    self._close_unwanted()
                self._descriptors[shard] = descriptor

    def _is_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _descriptor(self, shard: int) -> int | None:
        """Of the shard in the cache; None if the cache cannot hold it."""
        self._check_process()
        while (descriptor := self._descriptors.get(shard)) is None:
            if self._refused.get(shard, 0.0) > time.monotonic():
                return None
            try:
                found = self._obtain(shard, wait=True)
            except OSError as error:
                with self._lock:
                    if isinstance(error, Full) and self._close_unwanted():
                        continue
                self._refused[shard] = time.monotonic() + _TRY_AGAIN
                self._report(shard, error)
                return None
            if error := self._failed.pop(shard, None):  # met by the thread, for which this process has waited
                raise error
            if found is not None:
                self._keep(shard, found)
        return descriptor

    def _obtain(self, shard: int, wait: bool) -> int | None:
        """A descriptor of the shard in the cache, where it is downloaded to if needed. Raises OSError, UserError."""
        file = self.files[shard]
        return self.cache.fill(file.name, file.version.size, lambda part: self._download(shard, part), wait)

    def _download(self, shard: int, part: BinaryIO) -> None:
        file = self.files[shard]
        for last in (False, True):
            store.download(file.url, file.version, part, self._patience)
            if not (damaged := self._damaged(shard, part)):
                return
            if not last:
                part.seek(0)
                part.truncate()
        _log.warning("%s: %d images differ from the index of the shard (CRC-32)", file.url, damaged)

    def _damaged(self, shard: int, part: BinaryIO) -> int:
        """How many images have another CRC-32 than the index states."""
        if self._columns is None:
            return 0
        count = 0
        for offset, size, crc in zip(*(column.tolist() for column in self._columns(shard))):
            count += zlib.crc32(os.pread(part.fileno(), size, offset)) != crc
        return count

    def _report(self, shard: int, error: OSError) -> None:
        if type(error) in _reported:  # once in each process
            return
        _reported.add(type(error))
        what = error.strerror if isinstance(error, Full) else f"cannot be written: {error.strerror or error}"
        _log.warning(
            "the cache %s has no space for %s (%s): images are read one by one from the store, which is slow; set "
            "data.cache to another folder, raise data.cache_gb, or lower data.window",
            self.cache.folder, self.files[shard].url, what,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name in ("files", "cache", "_columns", "_patience")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __del__(self) -> None:
        if self.__dict__.get("_process") == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)


_reported: set[type] = set()


class _RangeFile(io.RawIOBase):
    """A remote file that is read by ranges."""

    def __init__(self, fetcher: Fetcher, shard: int) -> None:
        self._fetcher, self._shard, self._position = fetcher, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._fetcher.files[self._shard].version.size)[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._fetcher.read(self._shard, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
