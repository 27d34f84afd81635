"""A server for tests that speaks the calls of the Hugging Face hub which reading a data set needs.

A folder is the data set `me/photos`, and the bucket of this name. Files are stored elsewhere, as those of the hub:
`resolve` answers with their size and ETag, and redirects to another host.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

from http_store import QuietHandler, serve_requests

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubStore:
    """Serves the files of `folder` at `url`, in the revisions `main` and `v1`.

    Attributes:
        faults: of the next downloads of a file, first to last: a status, "short" (half of the bytes) or "whole" (all
            bytes, with status 200). token: what requests need, if it is given. requests: methods and kinds of the
            requests. sent: bytes sent by file name. leaked: whether the token reached the storage.
    """

    folder: Path
    faults: dict[str, list[str]] = field(default_factory=dict)
    token: str = ""
    requests: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)
    leaked: bool = False
    url: str = ""
    storage: str = ""


@contextmanager
def serve_hub(folder: Path) -> Iterator[HubStore]:
    hub = HubStore(Path(folder))

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            kind = next((kind for kind in ("resolve", "tree", "storage") if f"/{kind}/" in path), "info")
            hub.requests[f"{self.command} {kind}"] += 1
            authorized = self.headers.get("Authorization", "")
            if kind == "storage":
                hub.leaked |= bool(authorized)
                self._storage(path.rpartition("/")[2])
            elif hub.token and authorized != f"Bearer {hub.token}":
                self._fail(401, "", "Invalid username or password.")
            elif "/me/photos" not in path:
                self._fail(404, "RepoNotFound", "Repository not found")
            elif kind == "info":
                revision = path.partition("/revision/")[2] or "main"
                if revision in ("main", "v1"):
                    about = {"id": "me/photos", "private": False, "createdAt": "2026-01-01T00:00:00.000Z", "size": 0}
                    self._answer(200, _json({**about, "sha": COMMIT, "siblings": [], "tags": [], "totalFiles": 0}))
                else:
                    self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                revision, _, name = path.partition(f"/{kind}/")[2].partition("/")
                if path.startswith("/buckets/"):  # they have no revisions
                    name = f"{revision}/{name}"
                (self._tree if kind == "tree" else self._resolve)(revision, name)

        def _tree(self, revision: str, name: str) -> None:
            folder = hub.folder / name
            if not folder.is_dir():
                self._fail(404, "EntryNotFound", f"{name} does not exist on {revision!r}")
                return
            entries = []
            for path in sorted(folder.iterdir()):
                entry = {"type": "directory" if path.is_dir() else "file", "oid": "0" * 40, "size": path.stat().st_size}
                entries.append({**entry, "path": path.relative_to(hub.folder).as_posix()})
            self._answer(200, _json(entries))

        def _resolve(self, revision: str, name: str) -> None:
            path = hub.folder / name
            if not path.is_file():
                self._fail(404, "EntryNotFound", f"{name} does not exist on {revision!r}")
                return
            data = path.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}
            headers |= {"X-Linked-Etag": f'"{sha256(data).hexdigest()}"', "Location": f"{hub.storage}/storage/{name}"}
            self._answer(302, b"", headers)

        def _storage(self, name: str) -> None:
            data = next(hub.folder.rglob(name)).read_bytes()
            fault = hub.faults[name].pop(0) if hub.faults.get(name) else ""
            if fault.isdecimal():
                self._answer(int(fault), b"", {"Retry-After": "0"})
                return
            first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            status, headers = (200, {}) if fault == "whole" else (206, {})
            if status == 206:
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data = data[first : last + 1]
            hub.sent[name] += len(data)
            self._answer(status, data, headers, cut=fault == "short")

        def _fail(self, status: int, code: str, message: str) -> None:
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

        def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection |= cut

    with serve_requests(Handler) as hub.url:
        hub.storage = hub.url.replace("127.0.0.1", "localhost")
        yield hub


def _json(content: object) -> bytes:
    return json.dumps(content).encode()
