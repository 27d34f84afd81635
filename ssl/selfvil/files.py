"""The user's cache folder, atomic writes of small text files, flushing to the disk, and outputs that may fail."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfvil.errors import UserError


def user_cache(name: str) -> Path | None:
    """The folder `name` of selfvil in the user's cache folder; None where there is no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "selfvil", name) if os.path.isabs(cache) else None  # XDG ignores relative paths


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8). After a crash or a power failure it has the old text or the new one.

    The text is written to `NAME.aside`, flushed to the disk, and renamed. Raises OSError and leaves `path` unchanged
    if it cannot be written.
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


def require_writable(path: Path) -> None:
    """Make the folder of `path` and check that the file can be written, before its content is computed.

    Raises UserError if `path` is a folder, or if it or its folder cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if any(parent.exists() and not parent.is_dir() for parent in path.parents):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with open(path, "ab"):
                pass
        if path.is_file() or not path.exists():
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:50]}."):
                pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; give another file") from None


def flush_file(path: Path) -> None:
    """Write a file's pages to the disk and drop them from the page cache, so that a later read reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Write a folder's entries to the disk, so that renames in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Outputs:
    """Records failed writes of a run's outputs other than checkpoints and ledger: metrics, pictures, text.

    Such a failure must not lose the weights. The run therefore does not end at the failed write: `failure` describes
    the first one, and the loop saves and stops.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    @contextmanager
    def writing(self, what: object) -> Iterator[None]:
        """In this context, an OSError (a full disk, a closed pipe) is recorded in `failure`, with the name `what`."""
        try:
            yield
        except OSError as error:
            if self.failure is None:
                self.failure = f"{what} cannot be written ({error.strerror or error})"


def require_chart(chart: str | Path) -> Path:
    """The file of a chart; raises UserError if it cannot be written, or is neither PNG, SVG nor PDF."""
    file = Path(chart).expanduser()
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"chart {chart}: name a file that ends in .png, .svg or .pdf")
    require_writable(file)
    return file
