"""Small text files that are never half there, and flushing to the disk."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8): after a crash or a power cut it holds the old text or the new one.

    The text goes into `NAME.aside`, is flushed to the disk, and is then renamed. Raises OSError; `path` is then
    unchanged.
    """
    aside = path.with_name(path.name + ".aside")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Write a file's pages to the disk and drop them from the page cache, so that reading it again reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Write a folder's entries to the disk: a rename within it survives a power cut from then on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
