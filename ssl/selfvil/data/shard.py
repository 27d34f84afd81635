"""The samples of one shard, by WebDataset's convention, and its index: built, or loaded from its sidecar."""

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from selfvil.data import sidecar
from selfvil.data.changes import Change, compare
from selfvil.data.read import EXTENSIONS
from selfvil.data.remote.urls import Location
from selfvil.data.sidecar import LARGEST_LABEL, ShardIndex, Stamp, sidecars
from selfvil.data.tar import BLOCK, members
from selfvil.errors import UserError, shorten

_log = logging.getLogger(__name__)
_PREFERENCE = {f"{name}{gz}": rank for rank, name in enumerate(EXTENSIONS) for gz in ("", ".gz")}
_NAMING = (
    "In WebDataset, the part of a file name before its first dot is the key of a sample, the rest is the extension: "
    "a.b.jpg is the member b.jpg of the sample a, which is no image. Use file names with one dot, or pack the folder "
    "with `selfvil pack`, which renames the files"
)


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension by WebDataset's convention: the file name is split at its first dot. None for no sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not (stem and dot) or re.match(r"__[^/]*__($|/)", name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def group_members(file: BinaryIO, path: Location) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a shard: each key with the (offset, size) of its members by extension.

    As in webdataset, consecutive members with the same key are one sample."""
    key, parts = "", dict[str, tuple[int, int]]()
    for name, offset, size in members(file, path):
        if (split := _split_name(name)) is None:
            continue
        if split[0] != key:
            if parts:
                yield key, parts
            key, parts = split[0], {}
        if split[1] in parts:
            raise UserError(f"{path} holds {name} twice in a sample (at byte {offset}); each sample needs its own key")
        parts[split[1]] = offset, size
    if parts:
        yield key, parts


def _build(path: Path, image: str | None = None) -> ShardIndex:
    with open(path, "rb", buffering=1 << 20) as file:
        return build(file, path, image)


def build(file: BinaryIO, path: Location, image: str | None = None) -> ShardIndex:
    """Index the shard in `file`, reading every image once. Raises UserError if it is damaged or has no image."""
    blocks, sizes, crcs, labels, keys = [], [], [], [], []
    without_image, invalid = [], []
    several = Counter[tuple[str, ...]]()
    for key, parts in group_members(file, path):
        images = order_images(parts, image)
        if not images:
            without_image.append(_describe(key, parts))
            continue
        if len(images) > 1:
            several[tuple(images)] += 1
        offset, size = parts[images[0]]
        if size >= 1 << 31 or offset >= BLOCK << 32:
            raise UserError(f"{path}: image {key} at byte {offset} ({size} bytes) is beyond the limits of an index")
        blocks.append(offset // BLOCK)
        sizes.append(size)
        file.seek(offset)
        crcs.append(zlib.crc32(file.read(size)))
        keys.append(key)
        label = _read_label(file, *parts["cls"]) if "cls" in parts else "-1"  # some writers use -1 for no label
        valid = label.isascii() and label.isdigit() and int(label) <= LARGEST_LABEL
        labels.append(int(label) if valid else -1)
        if not valid and label != "-1":
            invalid.append(f"{key}: {label!r}")
    if not blocks:
        found = f"only {', '.join(without_image[:4])}" if without_image else "no samples at all"
        raise UserError(
            f"{path} holds no image ({found}); expected members named KEY.jpg, KEY.png, KEY.webp ... {_NAMING}"
        )
    if without_image:
        count, first = len(without_image), without_image[0]
        _log.warning("%s: %d samples have no image and are ignored (first: %s). %s", path, count, first, _NAMING)
    if invalid:
        _log.warning(
            "%s: %d labels are no class numbers from 0 to %d and are ignored (first: %s)",
            path, len(invalid), LARGEST_LABEL, invalid[0],
        )  # fmt: skip
    names = "\0".join(keys).encode("utf-8", "surrogateescape")
    return ShardIndex(
        blocks=np.array(blocks, np.uint32),
        sizes=np.array(sizes, np.uint32),
        crcs=np.array(crcs, np.uint32),
        labels=np.array(labels, np.int64),
        keys=np.frombuffer(names, np.uint8),
        ignored=np.array(len(without_image)),
        several=np.frombuffer(json.dumps(list(several.items())).encode(), np.uint8),
    )


def order_images(parts: Iterable[str], image: str | None = None) -> list[str]:
    """The image extensions of a sample; the first one is used: `image` if the sample has it, else by EXTENSIONS."""
    return sorted(_PREFERENCE.keys() & parts, key=lambda name: (name.removesuffix(".gz") != image, _PREFERENCE[name]))


def _describe(key: str, parts: Iterable[str]) -> str:
    """A sample for a message, shortened."""
    names = sorted(parts)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return shorten(f"{key}.{'|'.join(names[:3])}", 120) + more


def _read_label(file: BinaryIO, offset: int, size: int) -> str:
    file.seek(offset)
    return file.read(min(size, 20)).decode("utf-8", "replace").strip()


def load_index(path: Path, image: str | None = None) -> tuple[ShardIndex, Change | None]:
    """The index of a shard, and the changes since it was last indexed (None if there are none)."""
    before: ShardIndex | None = None
    locations = sidecars(path, image)
    try:
        stamp = Stamp.of(path)
        for location in locations:
            if (loaded := sidecar.load(location, stamp.size)) is not None:
                index, built_from = loaded
                if built_from == stamp:
                    return index, None
                before = before or index
        index = _build(path, image)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    change = compare(before, index) if before else None
    for location in locations:
        try:
            sidecar.save(location, stamp, index)
            return index, change
        except OSError as error:
            _log.info("no index at %s: %s", location, error.strerror)
    _log.warning("the index of %s could not be saved and will be built again next time", path)
    return index, change
