"""The images to pack: a folder of files, or existing shards.

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

from selfvil.data.base import Pattern
from selfvil.data.classes import class_names
from selfvil.data.index import Shards, describe_several, group_members, open_shards, order_images
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
    """

    size: int
    read: Callable[[int], bytes]
    read_mask: Callable[[int], bytes | None]
    name: Callable[[int], str]
    labels: np.ndarray
    classes: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_source(
    source: Pattern, classes: Sequence[str] | None, labels: bool, image: str | None, mask: str | None
) -> Source:
    """Open a folder of images, or a pattern of shards; arguments and errors as `pack`."""
    for option, value in (("image", image), ("mask", mask)):
        if value is not None and value not in EXTENSIONS:
            raise UserError(
                f"--{option} {shorten(value, 50)} is no extension of images; choose from {', '.join(EXTENSIONS)}"
            )
    if image is not None and image == mask:
        raise UserError(f"--image and --mask are both {image}; expected two different extensions")
    if classes is not None:
        _check_classes(classes, labels)
    folder = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and folder.is_dir():
        if (files := image_files(folder)) is not None:
            return open_folder(files, classes, labels, image, mask)
    elif folder is not None and folder.is_file() and folder.suffix != ".tar":
        raise UserError(f"{folder} is a file; expected a folder of images, or WebDataset shards (.tar)")
    if classes is not None:
        raise UserError(f"classes are for a folder of images; the labels of the shards {source} are kept as they are")
    return _open_shards(open_shards(source, image=image), labels, mask)


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


def _check_classes(classes: Sequence[str], labels: bool) -> None:
    if not labels:
        raise UserError("--classes and --no-labels exclude each other")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not all(classes):
        what = f"{shorten(twice[0], 100)!r} is there twice" if twice else "one is empty"
        raise UserError(f"the list of classes must have one different name in each line, but {what}")


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
        left_out, notes,
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


# --- shards -------------------------------------------------------------------------------------------------------


def _open_shards(shards: Shards, labels: bool, mask: str | None) -> Source:
    numbers = np.full(len(shards), -1) if shards.labels is None or not labels else shards.labels
    given = class_names(shards) if labels and shards.labels is not None else None
    classes = [] if given is None else given.names
    if given is not None and len(classes) <= (highest := int(numbers.max())):
        raise UserError(
            f"{given.file} names {len(classes)} classes, but there is a label {highest}; labels count from 0, so the "
            f"file needs {highest + 1} lines"
        )
    masks = _find_masks(shards, mask)
    notes = [f"{shards.ignored} samples have no image, and are left out"] * bool(shards.ignored)
    if shards.several:
        kept = f"; .{mask} is kept as {MASK}" if mask else "; --mask png would keep a png as the mask"
        notes.append(describe_several(shards.several) + kept)
    return Source(
        len(shards), shards.read, partial(_read_member, shards, masks),
        lambda i: f"{shards.shard_of(i)}:{shards.key(i)}", numbers, classes, [], notes,
    )  # fmt: skip


def _find_masks(shards: Shards, mask: str | None) -> list[tuple[int, int, int] | None]:
    """Shard, offset and size of each sample's mask: the member `mask` unless it is the image, else mask.png."""
    found: list[tuple[int, int, int] | None] = []
    for number, path in enumerate(shards.paths):
        with shards.files.open(number) as file:
            for _, parts in group_members(file, path):
                if images := order_images(parts, shards.image):
                    name = mask if mask in parts and mask != images[0] else MASK
                    found.append((number, *parts[name]) if name in parts else None)
    return found


def _read_member(shards: Shards, masks: Sequence[tuple[int, int, int] | None], i: int) -> bytes | None:
    if (place := masks[i]) is None:
        return None
    number, offset, size = place
    try:
        with shards.files.open(number) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DamagedImage(f"its mask cannot be read: {error.strerror}") from None
