"""What is asked of a store, one request at a time, and how it fails. `selfvil.data.remote.store` repeats requests."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from selfvil.data.remote.urls import Url
from selfvil.errors import UserError

CHUNK = 1 << 17
"""Bytes that a stream yields at a time, at most, where the library allows it. They are lost where it breaks."""


class Version(NamedTuple):
    """size: bytes. tag: ETag, or what else the store gives to tell versions apart; may be empty. ranges: whether parts
    of the file can be requested."""

    size: int
    tag: str
    ranges: bool = True

    def __str__(self) -> str:
        return f"{self.size:,} bytes, {self.tag or 'no ETag'}"


class Temporary(Exception):
    """A request failed and may succeed later. wait: seconds that the store asks to wait, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Missing(UserError):
    """A file does not exist."""

    @classmethod
    def of(cls, url: Url) -> "Missing":  # no __init__: an error must survive being pickled by a worker
        return cls(f"{url} does not exist; check the URL")


class Denied(UserError):
    """The store does not allow it."""

    @classmethod
    def of(cls, url: Url, reason: str) -> "Denied":
        return cls(
            f"{url} cannot be read ({reason}): the file does not exist, or the credentials in the environment do not "
            "allow it (docs/howto/remote.md)"
        )


class Changed(UserError):
    """A file has another version than before."""

    @classmethod
    def of(cls, url: Url, before: Version, now: Version) -> "Changed":
        return cls(
            f"{url} changed while it was used: {before} before, {now} now. Restore it; or begin a new run, which will "
            "use the new version"
        )


class Store(ABC):
    """The files of one protocol. `stat` and `stream` try once."""

    @abstractmethod
    def stat(self, url: Url) -> Version:
        """Raises Temporary, Missing or Denied."""

    @abstractmethod
    def stream(self, url: Url, version: Version, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file. Raises as `stat`; or Changed where the file has another version."""

    def glob(self, pattern: Url) -> list[Url]:
        """The files that match a pattern with stars, sorted."""
        raise UserError(
            f"{pattern}: {pattern.protocol}:// has no lists of files; name them by braces such as {{000000..000009}}"
        )
