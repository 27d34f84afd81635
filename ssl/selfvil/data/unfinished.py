"""The folder of an unfinished `pack`, which the same call continues after a crash.

    .OUT.packing/NAME-000000.tar ...   complete shards, and perhaps the beginning of one more
    .OUT.packing/progress.jsonl        first line: what is packed, and how; then a line for each complete shard

The line of a shard follows when the shard is on the disk. It holds its size in bytes, and what was found in each image
up to its end, packed or left out, without the bytes of the image.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.data.base import Pattern
from selfvil.data.check import Checked
from selfvil.data.sources import Source
from selfvil.errors import UserError
from selfvil.files import flush_folder

PROGRESS = "progress.jsonl"
_FORMAT = 1


def identify(source: Pattern, images: Source, options: Sequence[Any]) -> str:
    """A hash of the options and of the source: its images and labels, by names, sizes and times of the files of a
    folder, and by their CRC-32 elsewhere.

    An unfinished folder with another one is not continued.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, str(source), images.fingerprint, *options]).encode())
    digest.update(np.ascontiguousarray(images.labels).tobytes())
    if images.folder is not None:
        for name in map(images.name, range(images.size)):
            digest.update(os.fsencode(name) + b"\0")
            with contextlib.suppress(OSError):
                status = (images.folder / name).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def unfinished_shards(folder: Path) -> int:
    """The number of complete shards on record in a folder, 0 without a record."""
    try:
        return max(0, (folder / PROGRESS).read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


class Unfinished:
    """The folder of one call of `pack`, as a context, in which no other call can use it.

    Attributes:
        folder: as given; made if it is missing, emptied if it belongs to another source or other options.
        shards: the number of complete shards.
        records: what was found in the images up to the end of the last complete shard, in the order of packing; `data`
            is empty, and `mask` is b"?" if there is one.

    Raises UserError if another process packs there.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.shards = 0
        self.records: list[Checked] = []

    def __enter__(self) -> "Unfinished":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another process packs in {self.folder} now; wait until it is finished") from None
        except OSError:  # some network file systems have no locks
            pass
        end = self._read()
        for path in self.folder.iterdir():
            if path.name != PROGRESS and (path.suffix != ".tar" or path.name not in self._complete):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._file = open(self.folder / PROGRESS, "r+b" if end else "wb")
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._append({"identity": self.identity})
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        os.close(self._lock)

    def record(self, shard: Path, images: Sequence[Checked]) -> None:
        """Add a complete shard, and what was found in the images since the one before. Raises OSError."""
        with open(shard, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        flush_folder(self.folder)
        found = [image._replace(data=b"", mask=b"")._asdict() | {"mask": bool(image.mask)} for image in images]
        for each in found:
            del each["data"]
        self._append({"shard": shard.name, "bytes": size, "images": found})

    def finish(self) -> None:
        """Remove the record: the output is complete."""
        (self.folder / PROGRESS).unlink()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Read the record, and return the length of its valid part."""
        self._complete: set[str] = set()
        end = 0
        try:
            lines = (self.folder / PROGRESS).read_bytes().splitlines(keepends=True)
        except OSError:
            return 0
        for number, line in enumerate(lines):
            try:
                content = json.loads(line) if line.endswith(b"\n") else {}
                if number == 0:
                    if content["identity"] != self.identity:
                        return 0
                else:
                    if (self.folder / content["shard"]).stat().st_size != content["bytes"]:
                        break
                    self.records += [_restored(image) for image in content["images"]]
                    self._complete.add(content["shard"])
                    self.shards += 1
            except (ValueError, KeyError, TypeError, OSError):  # cut by a crash
                break
            end += len(line)
        return end


def _restored(image: dict[str, Any]) -> Checked:
    fields = dict(image) | {"data": b"", "mask": b"?" if image["mask"] else b""}
    for name in ("damage", "notes", "size"):
        fields[name] = tuple(fields[name])
    return Checked(**fields)
