"""The tar files behind a list of shards, on a local disk or elsewhere."""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from selfvil.data.sidecar import ShardIndex

_OPEN_FILES = 128  # that a process keeps open; the usual limit is 1,024 files


class ShardFiles(ABC):
    """Tar files, by number. Safe to fork and to pickle; `read` is not thread-safe."""

    @abstractmethod
    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a file; fewer where it ends. Raises OSError; UserError if its store fails or it has changed."""

    @abstractmethod
    def open(self, number: int) -> BinaryIO:
        """A whole file. Raises as `read`."""

    @abstractmethod
    def size(self, number: int) -> int:
        """Bytes of a file. Raises OSError."""

    @abstractmethod
    def index(self, number: int) -> ShardIndex:
        """The index of a file, once more: names are not kept in memory. Raises UserError."""

    def prepare(self, numbers: Sequence[int]) -> None:  # noqa: B027 - local files need no preparation
        """These files are read now and next; others are not for a while."""


class LocalFiles(ShardFiles):
    """Files on a local disk. index: makes or loads the index of a file."""

    def __init__(self, paths: Sequence[Path], index: Callable[[Path], ShardIndex]) -> None:
        self._paths, self._index = list(paths), index
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            descriptor = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[number] = descriptor
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(number)
        return os.pread(descriptor, size, offset)

    def open(self, number: int) -> BinaryIO:
        return open(self._paths[number], "rb", buffering=1 << 20)

    def size(self, number: int) -> int:
        return self._paths[number].stat().st_size

    def index(self, number: int) -> ShardIndex:
        return self._index(self._paths[number])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)
