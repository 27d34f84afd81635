"""Small tar shards for tests, and which of them are open."""

import io
import os
import tarfile
from pathlib import Path

from PIL import Image


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        pair for i in range(first, first + count) for pair in ((f"k{i}.cls", b"%d" % (i % 3)), (f"k{i}.png", png(i)))
    ]


def open_files(folder: Path) -> list[Path]:
    """Files below folder that this process has open. Counting all descriptors would also count other tests' files."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            path = Path(os.readlink(descriptor))
        except FileNotFoundError:  # closed since it was listed
            continue
        found += [path] if path.is_relative_to(folder.resolve()) else []
    return found
