"""An HTTP server of files for tests, with ranges and ETags, which can be made to fail."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class HttpStore:
    """Serves `folder` at `url`.

    Attributes:
        faults: names of faults of the next responses of a file, first to last: "503", "403", "short" (the connection
            is closed in the middle), "long" (a wrong Content-Range and more bytes), "hang" (no answer for 30 s),
            "redirect URL". A name that ends in * stays.
        ranges: whether ranges are honoured. etags: whether ETags are sent. latency: seconds before each response.
        fail_after: number of shards that are sent whole before every answer is 503. requests: number of requests by
            file name. sent: bytes sent by file name.
    """

    folder: Path
    faults: dict[str, list[str]] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    latency: float = 0.0
    rate: float | None = None
    fail_after: int | None = None
    requests: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)
    url: str = ""

    def fault(self, name: str) -> str:
        if self.fail_after is not None:
            whole = [each for each in list(self.sent) if each.endswith(".tar") and self.sent[each] > self.size(each)]
            if len(whole) >= self.fail_after:
                return "503"
        names = self.faults.get(name, [])
        return "" if not names else names[0][:-1] if names[0].endswith("*") else names.pop(0)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size


class QuietHandler(BaseHTTPRequestHandler):
    """Keeps connections open and writes no log."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *address: Any) -> None:
        """Prints an error of the handler. A client that closes its connection is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*address)


@contextmanager
def serve_requests(handler: type[QuietHandler]) -> Iterator[str]:
    """The URL of a server on this machine, which ends with the context."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(folder: Path, **settings: object) -> Iterator[HttpStore]:
    store = HttpStore(Path(folder), **settings)  # type: ignore[arg-type]
    ended = threading.Event()

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.send_error(405)

        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/")
            store.requests[name] += 1
            if store.latency:
                time.sleep(store.latency)
            fault = store.fault(name)
            if fault == "hang":
                ended.wait(30)
                self.close_connection = True
                return
            if fault.startswith("redirect"):
                self.send_response(302)
                self.send_header("Location", fault.split(" ", 1)[1])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path = store.folder / name
            if fault.isdecimal() or not path.is_file():
                self._answer(int(fault or 404), b"", {})
                return
            data = path.read_bytes()
            headers = {"ETag": f'"{md5(data).hexdigest()}"'} if store.etags else {}
            status, wanted = 200, self.headers.get("Range", "")
            whole = len(data)
            if wanted and store.ranges:
                first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                if first >= whole:
                    self._answer(416, b"", {"Content-Range": f"bytes */{whole}"})
                    return
                last = min(last, whole - 1)
                status, data = 206, data[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
            if fault == "long":
                data += b"extra"
            self._answer(status, data, headers, cut=fault == "short", name=name)

        def _answer(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False, name: str = "") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            sent = data[: len(data) // 2] if cut else data
            try:
                for first in range(0, len(sent), 1 << 16):
                    self.wfile.write(sent[first : first + (1 << 16)])
                    if store.rate:
                        time.sleep((1 << 16) / store.rate)
                store.sent[name] += len(sent)
            except OSError:
                self.close_connection = True
            if cut:
                self.close_connection = True

    with serve_requests(Handler) as store.url:
        try:
            yield store
        finally:
            ended.set()
