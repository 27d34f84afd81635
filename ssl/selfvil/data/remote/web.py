"""Files behind http:// and https://, through `requests`.

fsspec's own access to HTTP hides what exactness needs: it reports a failing server as a missing file, and returns the
whole file where a server ignores the range. Here every response is checked: its status, length, range and version.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from selfvil.data.remote.access import CHUNK, Changed, Denied, Missing, Store, Temporary, Version
from selfvil.data.remote.urls import Url
from selfvil.errors import UserError

TIMEOUT = (10.0, 60.0)
"""Seconds for a connection, and between two parts of a response."""

_TEMPORARY = (408, 425, 429)  # besides all 5xx


class HttpStore(Store):
    """Safe to fork, and to use from several threads: each has connections of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def stat(self, url: Url) -> Version:
        with self._get(url, 0, 1) as response:
            return _version(url, response)

    def stream(self, url: Url, version: Version, start: int, stop: int) -> Iterator[bytes]:
        import requests
        import urllib3

        with self._get(url, start, stop) as response:
            found = _version(url, response)
            if found[:2] != version[:2]:
                raise Changed.of(url, version, found)
            skip = 0 if found.ranges else start
            if found.ranges and not str(response.headers["Content-Range"]).startswith(f"bytes {start}-{stop - 1}/"):
                raise Temporary(f"it sent {response.headers['Content-Range']}, not bytes {start}-{stop - 1}")
            try:
                for chunk in response.iter_content(CHUNK):
                    if len(chunk) > skip:
                        yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                raise Temporary(_describe(error)) from None

    @contextmanager
    def _get(self, url: Url, start: int, stop: int) -> Iterator[Any]:
        """The response to a request for bytes [start, stop)."""
        import requests

        # identity: the bytes of a compressed response would be counted wrongly.
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = self._session(url).get(url.text, headers=headers, stream=True, timeout=TIMEOUT)
        except (requests.exceptions.SSLError, requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
            raise UserError(f"{url} cannot be read: {_describe(error)}") from None
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Temporary(_describe(error)) from None
        except (requests.RequestException, ValueError) as error:
            raise UserError(f"{url} cannot be read: {_describe(error)}") from None
        with response:
            hops = [each.url for each in response.history] + [response.url]
            if any(one.startswith("https:") and not two.startswith("https:") for one, two in pairwise(hops)):
                raise UserError(f"{url} redirects from https to an unencrypted address; this is refused")
            yield response

    def _session(self, url: Url) -> Any:
        session, process = getattr(self._local, "session", (None, 0))
        if process != os.getpid():  # a connection must not be shared with the process that forked this one
            try:
                import requests
            except ImportError:
                raise UserError(f"{url}: https:// needs the package requests: pip install 'selfvil[remote]'") from None
            session = requests.Session()
            self._local.session = session, os.getpid()
        return session


def _version(url: Url, response: Any) -> Version:
    """Size and tag of the whole file, from the headers of a response. Raises what its status means."""
    status, headers = response.status_code, response.headers
    if status in (404, 410):
        raise Missing.of(url)
    if status in (401, 403, 407):
        raise Denied.of(url, f"{status} {response.reason}")
    if status in _TEMPORARY or status >= 500:
        seconds = headers.get("Retry-After", "")
        raise Temporary(f"{status} {response.reason}", float(seconds) if seconds.isdecimal() else None)
    ranged = headers.get("Content-Range", "").rpartition("/")[2]
    size = ranged if status in (206, 416) else headers.get("Content-Length", "")
    if status not in (200, 206, 416) or headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{url} cannot be read: the server answers {status} {response.reason}")
    if not (size.isascii() and size.isdecimal()):
        raise UserError(f"{url} cannot be read: the server does not give its size")
    tag = headers.get("ETag", "").removeprefix("W/") or headers.get("Last-Modified", "")
    return Version(int(size), tag, status != 200)


def _describe(error: BaseException) -> str:
    """The cause of an error of requests, without the URL that its text repeats."""
    cause = error
    while (inner := next((each for each in cause.args if isinstance(each, BaseException)), None)) is not None:
        cause = inner
    cause = getattr(cause, "reason", None) or cause
    text = str(cause).rpartition("): ")[2] or str(cause)
    return f"{type(cause).__name__}: {text}"[:200]
