"""A folder of finished parts beside the output, from which a killed embedding continues.

A part has the rows of a fixed range of batches and is written at once: under another name, flushed, and renamed. The
folder belongs to one embedding: `about.json` says of which weights, images and settings.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.errors import UserError
from selfvil.files import flush_folder, write_text
from selfvil.lease import Lease

ABOUT = "about.json"


@dataclass
class Part:
    """Rows of consecutive images; images that cannot be read have none.

    ids: int64 (n,), numbers of the images, ascending. features: (n, D). patches: (n, H, W, C), or None. left_out: (id,
    reason) of each image without a row.
    """

    ids: np.ndarray
    features: np.ndarray
    patches: np.ndarray | None = None
    left_out: list[tuple[int, str]] = field(default_factory=list)


class PartFolder:
    """The folder OUT.partial. One process at a time owns it; the processes of one launch write different parts."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self._lease: Lease | None = None

    def claim(self, about: Mapping[str, Any], discard: bool) -> None:
        """Make the folder, or continue in it. discard: start anew if its parts are of another embedding.

        Raises UserError if another process uses it, or, without `discard`, if its parts are of another embedding.
        """
        about = json.loads(json.dumps(about))
        if self.path.is_dir() and not (self.path / ABOUT).is_file() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not a folder of `selfvil embed`: rename it, or choose another --out")
        self.path.mkdir(exist_ok=True)
        self._lease = Lease.take(self.path, str(self.path))
        try:
            found = json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found != about:
            different = sorted(key for key in about.keys() | found.keys() if about.get(key) != found.get(key))
            if not discard and any(self.path.glob("part-*.npz")):
                raise UserError(
                    f"{self.path} holds parts of another embedding; different: {', '.join(different)}. Run its own "
                    "command again to finish it, add --overwrite to start anew, or choose another --out"
                )
            found = None
        if found is None:
            for file in self.path.glob("part-*"):
                file.unlink()
            write_text(self.path / ABOUT, json.dumps(about, indent=1) + "\n")

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def remove(self) -> None:
        """Remove the folder with all parts."""
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def file(self, number: int) -> Path:
        return self.path / f"part-{number:08d}.npz"

    def finished(self, count: int) -> list[int]:
        """Numbers of the undamaged parts among `count`; damaged ones are removed. Reads all parts."""
        found = []
        for number in range(count):
            if self.file(number).exists():
                if self._load(number) is not None:
                    found.append(number)
                else:
                    self.file(number).unlink()
        return found

    def write(self, number: int, part: Part) -> None:
        """Write a part; after a crash it is complete or absent. Raises OSError."""
        aside = self.file(number).with_suffix(".aside")
        arrays = {"ids": part.ids, "features": part.features}
        if part.patches is not None:
            arrays["patches"] = part.patches
        arrays["left_out"] = np.frombuffer(json.dumps(part.left_out).encode(), np.uint8)
        try:
            with open(aside, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.file(number))
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        flush_folder(self.path)

    def read(self, number: int, with_values: bool = True) -> Part:
        """Read a part; without values, features are (n, 0) and patches None.

        Raises UserError, after removing the part, if it is damaged.
        """
        part = self._load(number, with_values)
        if part is None:
            self.file(number).unlink(missing_ok=True)
            raise UserError(f"{self.file(number)} is damaged and was removed: run the same command again")
        return part

    def _load(self, number: int, with_values: bool = True) -> Part | None:
        """None if a part is missing or damaged: each array in the file has a CRC-32."""
        try:
            with np.load(self.file(number)) as arrays:
                left_out = [(int(i), str(reason)) for i, reason in json.loads(arrays["left_out"].tobytes())]
                ids = arrays["ids"]
                if not with_values:
                    return Part(ids, np.zeros((len(ids), 0)), None, left_out)
                patches = arrays.get("patches")
                return Part(ids, arrays["features"], patches, left_out)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
