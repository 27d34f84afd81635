"""The images of a folder, and what `selfvil pack` knows about its source.

Rules for a folder:

- Files with one of EXTENSIONS are images. Other files are reported; hidden files are ignored.
- KEY.mask.png is the mask of the image KEY.jpg (or png ...) in the same folder.
- If all images are in two or more subfolders, every visible subfolder is a class, in alphabetical order. A subfolder
  without images is a class too, so that the other classes keep their numbers.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from selfvil.data.read import EXTENSIONS, MAX_BYTES, DamagedImage
from selfvil.errors import UserError, shorten

MASK = "mask.png"
"""Extension of a mask: class ids, 255 for pixels without a label."""

_SUFFIXES = tuple(f".{name}" for name in EXTENSIONS)


@dataclass(frozen=True)
class Source:
    """N images.

    Attributes:
        size: N.
        read: returns the bytes of image i; raises DamagedImage.
        read_mask: returns the bytes of its mask, or None.
        name: returns the name of image i for messages.
        labels: int64 (N,), -1 for none.
        classes: the names of the labels; empty if they are unknown.
        left_out: (file, reason) of files that are not packed.
        notes: sentences for the report.
        folder: what the names are relative to, if they are those of files.
        fingerprint: that of the images (`Images.fingerprint`); "" for a folder, whose files are not read to open it.
    """

    size: int
    read: Callable[[int], bytes]
    read_mask: Callable[[int], bytes | None]
    name: Callable[[int], str]
    labels: np.ndarray
    classes: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    fingerprint: str = ""


def image_files(folder: Path) -> "Files | None":
    """The files of a folder of images; None for a folder of shards. Raises UserError for neither, or both together."""
    files = Files(folder)
    tars = any(folder.glob("*.tar"))
    if files.images and tars:
        raise UserError(f"{folder} holds both images and .tar files; give the images' folder, or {folder}/*.tar")
    if not files.images and not tars:
        found = f" ({_by_extension(files.others)})" if files.others else ""
        raise UserError(f"{folder} holds no images{found}; expected files ending in {', '.join(_SUFFIXES)}, or shards")
    return files if files.images else None


# --- a folder -----------------------------------------------------------------------------------------------------


class Files:
    """The visible files of a folder at any depth. Links are followed, except to a folder that contains them.

    Attributes:
        folder: the folder.
        images, others: paths relative to the folder, sorted by folder.
        masks: KEY -> path of KEY.mask.png.
        tops: its visible subfolders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[str] = []
        self.others: list[str] = []
        self.masks: dict[str, str] = {}
        self.tops: list[str] = []
        for path in self._walk("", ()):
            lower = path.lower()
            if lower.endswith(f".{MASK}"):
                self.masks[path[: -len(MASK) - 1]] = path
            else:
                (self.images if lower.endswith(_SUFFIXES) else self.others).append(path)

    def _walk(self, inner: str, within: tuple[str, ...]) -> Iterator[str]:
        folder = os.path.join(self.folder, inner)
        real = os.path.realpath(folder)
        if real in within:
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(inner, entry.name)
            if not entry.is_dir():
                yield path
                continue
            if not inner:
                self.tops.append(entry.name)
            yield from self._walk(path, (*within, real))


def open_folder(
    files: Files, classes: Sequence[str] | None, labels: bool, image: str | None, mask: str | None
) -> Source:
    """The images of a folder; arguments and errors as `pack`."""
    left_out = [(name, f"not packed: its extension is not one of {', '.join(EXTENSIONS)}") for name in files.others]
    notes = [f"{len(files.others)} files are not images that can be packed: {_by_extension(files.others)}"] * bool(
        left_out
    )
    images, masks = _choose(files, image, mask, left_out, notes)
    tops = [name.split(os.sep)[0] if os.sep in name else None for name in images]
    used = {top for top in tops if top is not None}
    if not labels:
        classes = []
    elif classes is None:
        classes = files.tops if None not in tops and len(used) > 1 else []
    elif unknown := sorted({top or "" for top in tops if top not in classes}):
        shown = ", ".join(shorten(top, 100) if top else "an image outside of any" for top in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{files.folder}: every image must lie in a subfolder named after one of the {len(classes)} given classes, "
            f"but there is {shown}{more}"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    numbers = np.array([-1 if top is None else label_of.get(top, -1) for top in tops], np.int64)
    read = partial(_read_file, files.folder, images)
    return Source(
        len(images), read, partial(_read_beside, files.folder, masks), images.__getitem__, numbers, list(classes),
        left_out, notes, files.folder,
    )  # fmt: skip


def _choose(
    files: Files, image: str | None, mask: str | None, left_out: list[tuple[str, str]], notes: list[str]
) -> tuple[list[str], list[str | None]]:
    """The images to pack, and the mask of each; adds notes on files with one name and several extensions."""
    names = [(path, *_split(path)) for path in files.images]
    extensions: dict[str, set[str]] = {}
    for _, key, extension in names:
        extensions.setdefault(key, set()).add(extension)
    masks, together = dict(files.masks), Counter[tuple[str, ...]]()
    images: list[str] = []
    for path, key, extension in names:
        others = extensions[key] - {extension}
        if extension == mask and others:
            masks.setdefault(key, path)
        elif extension != image and image in others:
            left_out.append((path, f"not packed: of this name the .{image} file is the image"))
        else:
            images.append(path)
            if image not in extensions[key] and others - {mask}:
                together[tuple(sorted(extensions[key]))] += 1
    for kinds, count in together.most_common(3):
        notes.append(
            f"{count} images share their name with another ({', '.join(f'.{kind}' for kind in kinds)}), and all "
            "are packed; if one is the mask of the other, give its extension, as in --mask png"
        )
    found = [masks.get(_split(path)[0]) for path in images]
    unused = sorted(set(masks.values()) - set(found))
    left_out += [(path, "not packed: a mask without an image of its name") for path in unused]
    if unused:
        notes.append(f"{len(unused)} masks have no image of their name, and are not packed")
    return images, found


def _split(path: str) -> tuple[str, str]:
    """The path without its extension, and the extension in lower case."""
    key, _, extension = path.rpartition(".")
    return key, extension.lower()


def _by_extension(names: Sequence[str]) -> str:
    """For a message: the number of files of each extension, the most frequent first."""
    extensions = Counter(shorten(os.path.splitext(name)[1].lower(), 30) or "without an extension" for name in names)
    shown = ", ".join(f"{count} {extension}" for extension, count in extensions.most_common(10))
    return shown + (f" and {len(extensions) - 10} other extensions" if len(extensions) > 10 else "")


def read_file(path: str) -> bytes:
    """The bytes of an image file. Raises DamagedImage if it cannot be read or is too large."""
    try:
        # Opening a named pipe would block until another process writes into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedImage("is no regular file")
            if status.st_size > MAX_BYTES:
                raise DamagedImage(f"its {status.st_size} bytes are more than the limit of {MAX_BYTES}")
            return file.read()
    except (OSError, ValueError) as error:
        raise DamagedImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_file(folder: Path, names: Sequence[str], i: int) -> bytes:
    return read_file(os.path.join(folder, names[i]))


def _read_beside(folder: Path, masks: Sequence[str | None], i: int) -> bytes | None:
    return None if (name := masks[i]) is None else _read_file(folder, [name], 0)
