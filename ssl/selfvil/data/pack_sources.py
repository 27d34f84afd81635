"""The images to pack: a folder of files, whose rules are in `selfvil.data.sources`, or any other source of images."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeGuard

import numpy as np

from selfvil.data.base import Images, Pattern
from selfvil.data.classes import class_names
from selfvil.data.images import open_images
from selfvil.data.index import Shards, describe_several
from selfvil.data.parquet import ParquetImages, data_files
from selfvil.data.read import EXTENSIONS, DamagedImage
from selfvil.data.shard import group_members, order_images
from selfvil.data.sources import MASK, Source, image_files, open_folder
from selfvil.errors import UserError, shorten


def open_source(
    source: Pattern, classes: Sequence[str] | None, labels: bool, image: str | None, mask: str | None
) -> Source:
    """Open a folder of images, shards, a table or a Hugging Face data set; arguments and errors as `pack`."""
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
    if folder is not None and folder.is_file() and folder.suffix.lower() not in (".tar", ".csv", ".parquet", ".arrow"):
        raise UserError(f"{folder} is a file; expected a folder of images, shards (.tar), a table or a data set")
    if folder is not None and folder.is_dir() and not data_files(folder) and (files := image_files(folder)) is not None:
        return open_folder(files, classes, labels, image, mask)
    if classes is not None:
        raise UserError(f"classes are for a folder of images; the labels of {source} are kept as they are")
    opened = open_images(source, image=image)
    if mask is not None and not _has_members(opened):
        raise UserError(f"--mask is for a folder of images, or shards; {source} has no masks")
    return _of_images(opened, labels, mask)


def _check_classes(classes: Sequence[str], labels: bool) -> None:
    if not labels:
        raise UserError("--classes and --no-labels exclude each other")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not all(classes):
        what = f"{shorten(twice[0], 100)!r} is there twice" if twice else "one is empty"
        raise UserError(f"the list of classes must have one different name in each line, but {what}")


def _has_members(images: Images) -> TypeGuard[Shards]:
    """Whether samples are members of tar files that the user made, which may be masks."""
    return isinstance(images, Shards) and not isinstance(images, ParquetImages)


def _of_images(images: Images, labels: bool, mask: str | None) -> Source:
    numbers = np.full(len(images), -1) if images.labels is None or not labels else images.labels
    given = class_names(images) if labels and images.labels is not None else None
    classes = [] if given is None else given.names
    if given is not None and len(classes) <= (highest := int(numbers.max())):
        raise UserError(
            f"{given.file} names {len(classes)} classes, but there is a label {highest}; labels count from 0, so the "
            f"file needs {highest + 1} lines"
        )
    notes = list(images.notes) + [f"{images.ignored} samples have no image, and are left out"] * bool(images.ignored)
    if images.several:
        kept = f"; .{mask} is kept as {MASK}" if mask else "; --mask png would keep a png as the mask"
        notes.append(describe_several(images.several) + kept)
    read_mask = partial(_read_member, images, _find_masks(images, mask)) if _has_members(images) else _no_mask
    return Source(
        len(images), images.read, read_mask, lambda i: f"{images.shard_of(i)}:{images.key(i)}", numbers, classes, [],
        notes, fingerprint=images.fingerprint,
    )  # fmt: skip


def _no_mask(i: int) -> bytes | None:
    return None


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
