"""Files behind s3://, gs:// and hf://, through fsspec.

Credentials are those of the environment of s3fs, gcsfs and huggingface_hub. fsspec's settings in the environment, such
as FSSPEC_S3_ANON=true, hold too.
"""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from selfvil.data.remote.access import Changed, Denied, Missing, Store, Temporary, Version
from selfvil.data.remote.urls import Url
from selfvil.errors import UserError, redact

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}}
}
_PART = 1 << 24  # bytes of one request of a download
_TAGS = ("ETag", "etag", "generation", "md5Hash", "xet_hash", "blob_id", "LastModified", "mtime")

_T = TypeVar("_T")


class BucketStore(Store):
    """Safe to fork: fsspec's event loop and connections do not survive a fork, so each process makes its own."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._lock, self._process, self._opened = threading.Lock(), os.getpid(), None

    def stat(self, url: Url) -> Version:
        def info() -> dict[str, Any]:
            files = self._files(url)
            files.invalidate_cache()
            return files.info(url.text)

        found = self._try(url, info)
        if found.get("type") == "directory":
            raise UserError(f"{url} is a folder; give its shards, such as {url}/*.tar")
        if not isinstance(found.get("size"), int):
            raise UserError(f"{url} cannot be read: the store does not give its size")
        return Version(found["size"], next((str(found[key]) for key in _TAGS if found.get(key)), ""))

    def stream(self, url: Url, version: Version, start: int, stop: int) -> Iterator[bytes]:
        for first in range(start, stop, _PART):
            last = min(first + _PART, stop)
            data = self._try(url, partial(self._files(url).cat_file, url.text, start=first, end=last))
            if len(data) != last - first:  # the same range of a file that became shorter
                self._require(url, version)
                raise Temporary(f"it sent {len(data):,} of {last - first:,} bytes")
            yield data
        if stop - start == version.size:  # a single image has a CRC-32, a whole file not yet
            self._require(url, version)

    def glob(self, pattern: Url) -> list[Url]:
        found = self._try(pattern, lambda: self._files(pattern).glob(pattern.text))
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
                    import fsspec

                    fsspec.get_filesystem_class(self.protocol)
                except ImportError:
                    raise UserError(
                        f"{url}: {self.protocol}:// needs the package {package}: pip install 'selfvil[remote]'"
                    ) from None
                options = _OPTIONS.get(self.protocol, {})
                self._opened = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
            return self._opened

    def _try(self, url: Url, action: Callable[[], _T]) -> _T:
        """The result of `action`. The libraries raise many classes; what is not known to be final is Temporary."""
        try:
            return action()
        except UserError:
            raise
        except FileNotFoundError:
            raise Missing.of(url) from None
        except PermissionError as error:
            raise Denied.of(url, _describe(error)) from None
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"{url} cannot be read: {_describe(error)}") from None
        except Exception as error:
            if "Credentials" in type(error).__name__ or "RepositoryNotFound" in type(error).__name__:
                raise Denied.of(url, _describe(error)) from None
            raise Temporary(_describe(error)) from None


def _describe(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".split("\n")[0])[:200]
