"""Names of classes: of shards, a file `classes.txt` in their folder, one name per line, in the order of the labels; of
other sources, their own.

Labels are numbers. Only the names show whether a number means the same class in two sets of shards. `selfvil pack`
numbers the subfolders of each source in alphabetical order. Two sources with different subfolders therefore need
`--classes`; otherwise every class after the first missing one gets another number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfvil.data.base import Images
from selfvil.data.remote import store
from selfvil.data.remote.urls import Location, Url
from selfvil.errors import UserError

CLASSES = "classes.txt"


@dataclass(frozen=True)
class Classes:
    """names: the class of each label, from 0. file: the file that they were read from, or the folder that has them."""

    names: list[str]
    file: Location


def read_classes(file: Location) -> list[str]:
    """The lines of `file`, without blank lines at its end. Raises UserError if it cannot be read."""
    if isinstance(file, Url):
        return _lines(store.read_small(file))
    try:
        text = file.read_text(encoding="utf-8-sig", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    return _lines(text)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def class_names(*parts: Images) -> Classes | None:
    """The classes of all images in `parts`, whose lists must agree; None if there is no list.

    Two lists agree if the shorter one is the beginning of the longer one. Sources without a list are ignored.

    Raises UserError if two lists differ, naming both files and their first difference, or if one cannot be read.
    """
    longest: Classes | None = None
    for found in _lists(parts):
        if longest is None:
            longest = found
            continue
        for label, (name, other) in enumerate(zip(longest.names, found.names)):
            if name != other:
                raise UserError(
                    f"the labels of two folders mean different classes: label {label} is {name!r} by {longest.file} "
                    f"and {other!r} by {found.file}. Pack the images of one of them again with the other's classes: "
                    f"selfvil pack SOURCE OUT --classes {longest.file}"
                )
        if len(found.names) > len(longest.names):
            longest = found
    return longest


def _lists(parts: Sequence[Images]) -> Iterator[Classes]:
    """The classes that the sources name themselves, or the classes.txt of each folder that holds a shard."""
    for source in (source for part in parts for source in part.parts()):
        if source.classes:
            yield Classes(source.classes, source.paths[0])
            continue
        shards = {path.parent: path for path in source.paths}
        for folder, shard in shards.items():
            for file in _places(folder, shard):
                if store.exists(file) if isinstance(file, Url) else file.exists():
                    yield Classes(read_classes(file), file)
                    break


def _places(folder: Location, shard: Location) -> list[Location]:
    """Where the classes.txt of a shard may be: shards may be links into another folder."""
    return [folder / CLASSES, *([shard.resolve().parent / CLASSES] if isinstance(shard, Path) else [])]
