"""What a list of shards asks of the files that hold them, wherever they are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import BinaryIO

from selfvil.data.sidecar import ShardIndex


class ShardFiles(ABC):
    """Tar files, by number. Safe to fork and to pickle; not thread-safe."""

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

    def ahead(self, numbers: Sequence[int]) -> None:  # noqa: B027 - most sources have nothing to prepare
        """These files are read now and next; others are not for a while. Local files need no preparation."""
