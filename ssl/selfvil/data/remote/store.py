"""Access to remote files: size and version, ranges of bytes, and whole files, with retries.

A store may fail for a while: it answers 503, closes connections, or does not answer. Such requests are repeated, after
pauses that double and have a random part, until PATIENCE seconds have passed without a new byte. What cannot become
better (a missing file, a refusal, another version) is an error at once.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import BinaryIO, TypeVar

from selfvil.data.remote.access import Denied, Missing, Store, Temporary, Version
from selfvil.data.remote.urls import Url
from selfvil.errors import UserError

PATIENCE = 120.0
"""Seconds for which a failing store is asked again during a run."""

PATIENCE_AT_START = 20.0
"""The same before the run has begun: a wrong host name should not take minutes."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds

_T = TypeVar("_T")


class StoreFailed(UserError):
    """A store failed for longer than the patience."""


@cache
def store_of(protocol: str) -> Store:
    """The store of a protocol; one for the process."""
    if protocol in ("http", "https"):
        from selfvil.data.remote.web import HttpStore

        return HttpStore()
    if protocol == "hf":
        from selfvil.data.remote.hub import HubStore

        return HubStore()
    from selfvil.data.remote.buckets import BucketStore

    return BucketStore(protocol)


def stat(url: Url) -> Version:
    """The present version of a file. Raises UserError: Missing, Denied, StoreFailed ..."""
    return retried(lambda: store_of(url.protocol).stat(url), url, PATIENCE_AT_START)


def exists(url: Url) -> bool:
    try:
        stat(url)
    except (Missing, Denied):  # some stores deny what does not exist
        return False
    return True


def read_small(url: Url) -> str:
    """The text of a file of at most 1 MB. Raises UserError."""
    version = stat(url)
    if version.size > 1 << 20:
        raise UserError(f"{url} has {version.size:,} bytes; expected a text of at most 1 MB")
    return read(url, version, 0, version.size).decode("utf-8-sig", "backslashreplace")


def glob(pattern: Url) -> list[Url]:
    return retried(lambda: store_of(pattern.protocol).glob(pattern), pattern, PATIENCE_AT_START)


def read(url: Url, version: Version, start: int, stop: int, patience: float | None = None) -> bytes:
    """Bytes [start, stop) of this version of a file. Raises UserError as `stat`, and Changed."""

    def once() -> bytes:
        data = b"".join(_exactly(store_of(url.protocol).stream(url, version, start, stop), stop - start))
        if len(data) != stop - start:
            raise Temporary(f"it sent {len(data):,} of {stop - start:,} bytes")
        return data

    return retried(once, url, PATIENCE if patience is None else patience) if stop > start else b""


def download(url: Url, version: Version, file: BinaryIO, patience: float | None = None) -> None:
    """Append the rest of this version of a file to `file`, which holds its beginning.

    After a failure it continues with the first byte that is missing. Raises UserError as `read`, and OSError if `file`
    cannot be written.
    """
    pauses = Pauses(PATIENCE if patience is None else patience)
    have = file.seek(0, 2)
    while have < version.size:
        try:
            for chunk in _exactly(store_of(url.protocol).stream(url, version, have, version.size), version.size - have):
                file.write(chunk)
                have += len(chunk)
                pauses.reset()
            if have < version.size:
                raise Temporary(f"it sent {have:,} of {version.size:,} bytes")
        except Temporary as failure:
            pauses.after(failure, url)
    file.flush()


def retried(action: Callable[[], _T], url: Url, patience: float) -> _T:
    """The result of `action`, which is repeated while it raises Temporary. Raises StoreFailed after `patience` s."""
    pauses = Pauses(patience)
    while True:
        try:
            return action()
        except Temporary as failure:
            pauses.after(failure, url)


class Pauses:
    """Pauses between tries: 0.5 s, 1 s, 2 s ... at most 30 s, of which a random half to whole is waited, so that many
    processes do not ask again at the same moment."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        self._began, self._tries = time.monotonic(), 0

    def after(self, failure: Temporary, url: Url) -> None:
        """Wait before the next try. Raises StoreFailed if the patience is over."""
        self._tries += 1
        pause = min(_FIRST_PAUSE * 2 ** min(self._tries - 1, 10), _LONGEST_PAUSE) * _random.uniform(0.5, 1.0)
        pause = max(pause, min(failure.wait or 0.0, _LONGEST_PAUSE))
        passed = time.monotonic() - self._began
        if passed + pause > self._patience:
            tries = "1 try" if self._tries == 1 else f"{self._tries} tries"
            raise StoreFailed(
                f"{url} could not be read: {tries} in {passed:.0f} s, the last one: {failure}. Run the "
                "same command again when the store answers"
            ) from None
        _sleep(pause)


_random = random.SystemRandom()  # neither reads nor changes the random numbers of the run


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


def _exactly(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The chunks, of which more than `size` bytes together are an error."""
    for chunk in chunks:
        size -= len(chunk)
        if size < 0:
            raise Temporary("it sent more bytes than were asked for")
        yield chunk
