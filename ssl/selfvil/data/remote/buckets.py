"""Files behind s3:// and gs://, through fsspec.

Credentials are those of the environment of s3fs and gcsfs. fsspec's settings in the environment, such as
FSSPEC_S3_ANON=true, hold too.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from selfvil.data.remote.access import Changed, Denied, Missing, Store, Temporary, Version
from selfvil.data.remote.urls import Url
from selfvil.errors import UserError, redact

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}}
_GS_SECONDS = 20  # without an answer; gcsfs itself then tries 5 times more
_PART = 1 << 24  # bytes of one request of a download
_TAGS = ("ETag", "generation", "etag", "md5Hash", "LastModified", "mtime")  # an etag of GCS is also that of labels

_T = TypeVar("_T")


class BucketStore(Store):
    """Safe to fork: fsspec's event loop and connections do not survive a fork, so each process makes its own."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._lock, self._process, self._opened = threading.Lock(), os.getpid(), None

    def stat(self, url: Url) -> Version:
        found = self._try(url, lambda: self._info(url))
        if found.get("type") == "directory":
            raise UserError(f"{url} is a folder; give its shards, such as {url}/*.tar")
        if not isinstance(found.get("size"), int):
            raise UserError(f"{url} cannot be read: the store does not give its size")
        return Version(found["size"], next((str(found[key]) for key in _TAGS if found.get(key)), ""))

    def _info(self, url: Url) -> dict[str, Any]:
        """Size, type and tags of a file, in the words of fsspec."""
        files = self._files(url)
        files.invalidate_cache()
        return files.info(url.text)

    def stream(self, url: Url, version: Version, start: int, stop: int) -> Iterator[bytes]:
        for first in range(start, stop, _PART):
            last = min(first + _PART, stop)
            data = self._try(url, partial(self._part, url, first, last))
            if len(data) != last - first:  # the same range of a file that became shorter
                self._require(url, version)
                raise Temporary(f"it sent {len(data):,} of {last - first:,} bytes")
            yield data
        if stop == version.size:  # the end of a whole file, which has no CRC-32 yet; a single image has one
            self._require(url, version)

    def _part(self, url: Url, first: int, last: int) -> bytes:
        return self._files(url).cat_file(url.text, start=first, end=last)

    def glob(self, pattern: Url) -> list[Url]:
        def found_now() -> list[str]:
            files = self._files(pattern)
            files.invalidate_cache()
            return files.glob(pattern.text)

        found = self._try(pattern, found_now)
        if not found:
            raise UserError(f"no file matches {pattern}")
        return [Url(f"{self.protocol}://{str(name).removeprefix(f'{self.protocol}://')}") for name in sorted(found)]

    def _require(self, url: Url, version: Version) -> None:
        if (now := self.stat(url)) != version:
            raise Changed.of(url, version, now)

    def _files(self, url: Url) -> Any:
        """This process's file system."""
        if self._process != os.getpid():
            self._lock, self._process, self._opened = threading.Lock(), os.getpid(), None
        with self._lock:
            if self._opened is None:
                package = _PACKAGES[self.protocol]
                try:
                    self._opened = _open(self.protocol)
                except ImportError:
                    raise UserError(
                        f"{url}: {self.protocol}:// needs the package {package}: pip install 'selfvil[remote]'"
                    ) from None
            return self._opened

    def _try(self, url: Url, action: Callable[[], _T]) -> _T:
        """The result of `action`. The libraries raise many classes; what is not known to be final is Temporary."""
        try:
            return action()
        except UserError:
            raise
        except FileNotFoundError as error:
            if "RepositoryNotFound" in type(error.__cause__).__name__:  # the hub hides private ones like this
                raise Denied.of(url, "no such repository") from None
            raise Missing.of(url) from None
        except PermissionError as error:
            raise Denied.of(url, _describe(error)) from None
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"{url} cannot be read: {_describe(error)}") from None
        except Exception as error:
            if _is_denial(error):
                raise Denied.of(url, _describe(error)) from None
            if _status(error) in (404, 410):
                raise Missing.of(url) from None
            raise Temporary(_describe(error), _wait(error)) from None


def _open(protocol: str) -> Any:
    """The file system of a protocol, without the instances and listings of others. Raises ImportError."""
    import fsspec

    if protocol == "gs":
        # The class that fsspec registers asks gRPC for the kind of the bucket, before each request if that is denied.
        import aiohttp
        from gcsfs.core import GCSFileSystem

        log = logging.getLogger("gcsfs")
        if log.level == logging.NOTSET:
            log.setLevel(logging.CRITICAL)  # it logs tracebacks of errors that are reported in one sentence here
        timeouts = aiohttp.ClientTimeout(sock_connect=10, sock_read=_GS_SECONDS)
        return GCSFileSystem(requests_timeout=timeouts, skip_instance_cache=True)
    fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, skip_instance_cache=True, **(_S3 if protocol == "s3" else {}))


def _status(error: Exception) -> int:
    """The status of the response that an error is about, else 0. Each library has another attribute for it."""
    status = str(getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", ""))
    return int(status) if status.isdecimal() else 0


def _wait(error: Exception) -> float | None:
    """The seconds that the store asks to wait, if the error has its response."""
    seconds = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
    return float(seconds) if seconds.isdecimal() else None


def _is_denial(error: Exception) -> bool:
    """Whether the same request would be denied again."""
    kind, status = type(error), _status(error)
    if kind.__module__.startswith("google.auth"):
        return not getattr(error, "retryable", False)
    return (
        status in (401, 403)
        or "Credentials" in kind.__name__
        or "RepositoryNotFound" in kind.__name__
        or (isinstance(error, OSError) and str(error).startswith("Forbidden"))  # gcsfs, for 403
    )


def _describe(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".split("\n")[0])[:200]
