"""A folder of downloaded files with a limited size, which all processes of a machine share.

`NAME-SIZE.tar` is a complete file and `NAME-SIZE.part` one that is being downloaded; SIZE is that of the complete file.
Locks (flock) end with the process that holds them, however it ends:

- who downloads holds an exclusive lock on the .part file, so each file is downloaded once, and renames it at the end;
  after the death of that process, the next one continues with the bytes that are there;
- who reads holds a shared lock on the file. Files are removed, least recently used first, only under an exclusive lock;
- a lock on the file `.space` is held while the sizes are added up and files removed, and while a complete file gets
  its name: a sum never misses a file because its name changes.
"""

import errno
import fcntl
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from selfvil.errors import UserError, shorten
from selfvil.files import user_cache

LIMIT = 50 * 10**9
"""Bytes of the cache, unless another limit is given."""

FOLDER_VARIABLE, GIGABYTES_VARIABLE = "SELFVIL_REMOTE_CACHE", "SELFVIL_REMOTE_CACHE_GB"
"""Variables of the environment: folder and size of the cache where nothing else is given."""

_COMPLETE, _PARTIAL = ".tar", ".part"


class Full(OSError):
    """There is no space for a file: all others are in use, or it is larger than the cache."""


class Cache:
    """Args: folder; limit: of all its files together, in bytes. None: as the environment states, else a folder in the
    user's cache folder, and LIMIT. Raises UserError for a size in the environment that is no number."""

    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        self.given = folder if folder is not None else os.environ.get(FOLDER_VARIABLE) or None
        if limit is None:
            stated = os.environ.get(GIGABYTES_VARIABLE)
            limit = LIMIT if not stated else round(gigabytes(stated, GIGABYTES_VARIABLE) * 1e9)
        self.limit = limit

    @cached_property
    def folder(self) -> Path:
        """Fixed at its first use; made when the first file is written. Raises UserError if there is no home folder."""
        if self.given is not None:
            return Path(self.given).expanduser().absolute()
        if (cache := user_cache("remote")) is None:
            raise UserError(
                f"there is no home folder for downloaded shards: set data.cache, or {FOLDER_VARIABLE}, to a folder"
            )
        return cache

    def open(self, name: str, size: int) -> int | None:
        """A descriptor of a complete file, or None if it is not there. Until it is closed, the file is in use."""
        path = self._path(name, size, _COMPLETE)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_size != size:
                    raise OSError(errno.EIO, f"{path} has {os.fstat(descriptor).st_size:,} bytes: remove it")
                with suppress(OSError):  # another user's folder
                    os.utime(descriptor)  # the time of the last use
            except BaseException:
                os.close(descriptor)
                raise
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)  # it was removed after it had been opened

    def fill(self, name: str, size: int, write: Callable[[BinaryIO], None], wait: bool = True) -> int | None:
        """Download a file if it is not there; return a descriptor as `open`.

        write: writes the rest of a file whose beginning is given; nothing is kept if it raises OSError. wait: whether
        to wait for a process that downloads the file; otherwise the result is None.

        Raises:
            OSError: the folder cannot be written, or the disk is full; `Full` if the limit leaves no space.
            Exception: what `write` raises; what it wrote is kept for the next try.
        """
        path = self._path(name, size, _COMPLETE)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.folder.stat().st_mode & 0o222:  # respect read-only permissions even as root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))
        while (descriptor := self.open(name, size)) is None:
            if size > self.limit:
                raise Full(errno.EFBIG, f"it has {size:,} bytes, and the whole cache {self.limit:,}")
            part = self._path(name, size, _PARTIAL)
            locked = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(locked, "r+b") as file:
                try:
                    fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        return None
                    # Shared: this may be the complete file by then, which others read as long as they want.
                    fcntl.flock(locked, fcntl.LOCK_SH)
                    continue
                try:
                    if not _is(part, locked):
                        continue  # its download has ended, or it was removed
                    if (descriptor := self.open(name, size)) is not None:
                        part.unlink()  # a new part: the download ended after the complete file was not found
                        return descriptor
                    try:
                        self._make_space(part, size)
                        if os.fstat(locked).st_size > size:
                            os.truncate(locked, 0)
                        write(file)
                        file.flush()
                    except OSError:
                        part.unlink(missing_ok=True)
                        raise
                    with self._space():
                        part.replace(path)
                finally:
                    fcntl.flock(locked, fcntl.LOCK_UN)  # a child that was forked meanwhile has this descriptor, too
        return descriptor

    def _path(self, name: str, size: int, suffix: str) -> Path:
        return self.folder / f"{name}-{size}{suffix}"

    def _make_space(self, part: Path, size: int) -> None:
        """Remove files until the limit holds, that of `part` included. Raises Full, and OSError."""
        with self._space():
            found = []
            for entry in os.scandir(self.folder):
                with suppress(OSError):
                    if (bytes := _size(entry.name)) is not None and stat.S_ISREG(
                        entry.stat(follow_symlinks=False).st_mode
                    ):
                        found.append((entry.stat().st_mtime_ns, Path(entry.path), bytes))
            used = sum(bytes for _, _, bytes in found)
            for _, path, bytes in sorted(found):
                if used <= self.limit:
                    return
                if path != part and _remove_unused(path):
                    used -= bytes
            if used > self.limit:
                raise Full(errno.ENOSPC, f"{used:,} bytes are in use, and the limit is {self.limit:,}")

    @contextmanager
    def _space(self) -> Iterator[None]:
        """Hold the lock on `.space`."""
        space = os.open(self.folder / ".space", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(space, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(space, fcntl.LOCK_UN)
            os.close(space)


def gigabytes(text: str, name: str) -> float:
    """The number in a text. name: of the option or variable, for the message. Raises UserError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name} is {shorten(text, 50)!r}; expected the size of the cache in GB, such as 200")
    return number


def _size(name: str) -> int | None:
    """The size in the name of a file of the cache; None for other files."""
    stem, dot, suffix = name.rpartition(".")
    digits = stem.rpartition("-")[2]
    return int(digits) if dot + suffix in (_COMPLETE, _PARTIAL) and digits.isdecimal() and len(digits) < 19 else None


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process reads or downloads it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
