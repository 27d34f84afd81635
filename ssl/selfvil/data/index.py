"""Shards: WebDataset tar files that are read as one list, by byte range.

Opening reads every header once, so a missing or damaged shard is reported before training starts. For each sample it
keeps the position of the image, its CRC-32 and its label in memory: 12 bytes and the label. The index of a shard is
saved in a file `SHARD.index.npz` in the same folder, or in a cache folder if that folder cannot be written. An index
that is older than its shard is built again. From 4 million samples on, the joined index of all shards is saved as well,
and memory-mapped from the second start on.
"""

import difflib
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from braceexpand import braceexpand

from selfvil.data import columns, sidecar
from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.changes import Change, compare, describe_changes
from selfvil.data.files import LocalFiles, ShardFiles
from selfvil.data.read import EXTENSIONS, MAX_BYTES
from selfvil.data.remote.cache import Cache
from selfvil.data.remote.fetch import RemoteFiles
from selfvil.data.remote.shards import find_remote, in_threads, index_remote
from selfvil.data.remote.urls import Location, is_remote
from selfvil.data.sidecar import LARGEST_LABEL, SIDECAR, STATS, ShardIndex, Stamp, sidecars
from selfvil.data.tar import BLOCK, members
from selfvil.errors import UserError, shorten

_log = logging.getLogger(__name__)
_MAPPED = 1 << 22  # samples from which the joined index is saved: 64 MB
_COLUMNS = {"blocks": np.uint32, "sizes": np.uint32, "crcs": np.uint32, "labels": np.int32}
_MOST_SHARDS = 1_000_000
_GZIP = b"\x1f\x8b"
_PREFERENCE = {f"{name}{gz}": rank for rank, name in enumerate(EXTENSIONS) for gz in ("", ".gz")}
_NAMING = (
    "In WebDataset, the part of a file name before its first dot is the key of a sample, the rest is the extension: "
    "a.b.jpg is the member b.jpg of the sample a, which is no image. Use file names with one dot, or pack the folder "
    "with `selfvil pack`, which renames the files"
)


@dataclass(frozen=True)
class IndexReport:
    """Result of `index_shards`. classes: the number of different labels. labels: the smallest and the largest one, None
    if no sample has a label. ignored: samples without an image. several, holder: see `Images`."""

    shards: int
    samples: int
    labelled: int
    classes: int
    labels: tuple[int, int] | None
    bytes: int
    ignored: int
    several: dict[tuple[str, ...], int] = field(default_factory=dict)
    holder: str = "shard"

    def __str__(self) -> str:
        labels = "no labels"
        if self.labels:
            labels = f"{self.labelled} labelled, labels {self.labels[0]} to {self.labels[1]}: {self.classes} classes"
        ignored = f"; {self.ignored} without an image are ignored" if self.ignored else ""
        parts = f"{self.shards} {self.holder}{'s' * (self.shards > 1)}"
        text = f"{self.samples} images in {parts} ({self.bytes / 1e6:.1f} MB; {labels}{ignored})"
        return f"{text}; {describe_several(self.several)}" if self.several else text


def describe_several(several: dict[tuple[str, ...], int]) -> str:
    """A sentence: how many samples have several images, and which one is used."""
    kinds = sorted(several.items(), key=lambda item: -item[1])[:3]
    return "; ".join(
        f"{count} samples have {len(names)} images per key: {names[0]} is used, {' and '.join(names[1:5])} not"
        for names, count in kinds
    )


# --- shard patterns -----------------------------------------------------------------------------------------------


def expand_shards(pattern: Pattern) -> list[Path]:
    """Paths of the shards that match a pattern, or a list of patterns.

    A pattern is a file, a folder (all its *.tar, sorted), a glob (sorted) or a brace pattern such as
    `train-{000000..000009}.tar` or `{a,b}/*.tar` (in the order of the braces); `~` is the home folder.

    Raises:
        UserError: nothing matches, files are missing (all of them are named), or a file is given twice.
    """
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if not patterns or not all(os.fspath(each) for each in patterns):
        raise UserError("no shards given: expected a path, a folder, a glob or a brace pattern of WebDataset tars")
    paths = [path for each in patterns for path in _expand(os.fspath(each))]
    seen: dict[str, Path] = {}
    real = lru_cache(os.path.realpath)  # of folders: thousands of shards lie in a few
    for path in paths:
        resolved = os.path.realpath(path) if path.is_symlink() else os.path.join(real(path.parent), path.name)
        if (twice := seen.setdefault(resolved, path)) is not path:
            raise UserError(f"shard {path} is given twice (also as {twice}); name each shard once")
    return paths


def _expand(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    ranges = re.findall(r"{(-?\d{1,18})\.\.(-?\d{1,18})[.}]", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MOST_SHARDS:
        raise UserError(f"shard pattern {pattern} stands for more than {_MOST_SHARDS:,} files; check its braces")
    try:
        # A file name may contain braces or stars: an existing file of that name is used.
        names = [pattern] if os.path.exists(pattern) else list(braceexpand(pattern))
    except ValueError:
        raise UserError(
            f"shard pattern {pattern} has unbalanced braces; expected e.g. train-{{000000..000009}}.tar"
        ) from None
    paths: list[Path] = []
    missing: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
            if not found:
                raise UserError(f"folder {name} holds no .tar files; expected WebDataset shards (see `selfvil pack`)")
            paths += map(Path, found)
        elif os.path.isfile(name):
            paths.append(Path(name))
        elif os.path.exists(name):  # opening a pipe would block
            raise UserError(f"{name} is no regular file; expected a WebDataset shard (.tar)")
        elif glob.has_magic(name):
            found = sorted(each for each in glob.glob(name, recursive=True) if not each.endswith((SIDECAR, STATS)))
            if not found:
                raise UserError(f"no file matches {name}{_neighbours(name)}")
            paths += map(Path, found)
        else:
            missing.append(name)
    if len(missing) == 1 and not Path(missing[0]).suffix:
        raise UserError(f"there is no folder {missing[0]}{_near_folders(Path(missing[0]))}")
    if missing:
        what = "shard" if len(missing) == 1 else f"{len(missing)} of the {len(names)} shards"
        missing = [*missing[:20], f"and {len(missing) - 20} more"] if len(missing) > 20 else missing
        raise UserError(f"missing {what}: {', '.join(missing)}{_neighbours(missing[0])}")
    return paths


def _neighbours(name: str) -> str:
    """The shards in the folder of a missing one, for a message: they show a mistake in the pattern."""
    folder = Path(name).parent
    if not folder.is_dir():
        return f" (there is no folder {folder})" if not glob.has_magic(str(folder)) else ""
    tars = sorted(path.name for path in folder.glob("*.tar"))
    shown = ", ".join(tars if len(tars) <= 4 else [*tars[:2], "...", tars[-1]])
    return f" (the folder {folder} holds {shown or 'no .tar files'})"


def _near_folders(path: Path) -> str:
    """For a message: folders with a name similar to that of a missing one, or its nearest parent that exists."""
    if not path.parent.is_dir():
        above = next((parent for parent in path.parents if parent.is_dir()), None)
        return "" if above is None else f" (of its parents, {above} exists)"
    folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    near = difflib.get_close_matches(path.name, folders, n=3)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""


# --- the index of one shard ---------------------------------------------------------------------------------------


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


def local_files(paths: Sequence[Path], image: str | None = None) -> LocalFiles:
    """Shards on a local disk, for `Shards`."""
    return LocalFiles(paths, partial(_index, image=image))


def _index(path: Path, image: str | None) -> ShardIndex:
    return load_index(path, image)[0]


# --- all shards as one list ---------------------------------------------------------------------------------------


def open_shards(
    pattern: Pattern, progress: Progress | None = None, image: str | None = None, cache: Cache | None = None
) -> "Shards":
    """Open the shards that match `pattern` (see `expand_shards`); shards without a valid index are indexed.

    A sample may have several images, such as a photograph KEY.jpg and its mask KEY.png. `image` is the extension of
    the one to use; without it, the first of EXTENSIONS is used, with a warning. URLs (https://, s3://, gs://, hf://)
    are read through `cache`, by default a folder in the user's cache folder.

    Raises:
        UserError: as `expand_shards`; or shards are damaged, truncated, no plain tar files, or hold no image; or
            `image` is not one of EXTENSIONS; or a store fails.
    """
    if image is not None and image not in EXTENSIONS:
        raise UserError(f"image extension {image!r} is not known; expected one of {', '.join(EXTENSIONS)}")
    if is_remote(pattern):
        return _open_remote(RemoteFiles(find_remote(pattern, progress), cache or Cache(), image), progress, image)
    paths = expand_shards(pattern)
    files, stamps = local_files(paths, image), _stamps(Stamp.of(path) for path in paths)
    joined = columns.cache_file("shards", image, *map(os.path.abspath, paths))
    if (shards := _load_joined(joined, paths, stamps, files, image)) is not None:
        return shards
    threads = min(os.cpu_count() or 1, 16)  # zlib and file reads run in parallel
    loaded = in_threads(partial(load_index, image=image), paths, threads, progress)
    changed: dict[Location, Change] = {path: change for path, (_, change) in zip(paths, loaded) if change}
    shards = _new(Shards(paths, [index for index, _ in loaded], files, image), changed)
    shards.save(joined, stamps)
    return shards


def _open_remote(files: RemoteFiles, progress: Progress | None, image: str | None) -> "Shards":
    urls, stamps = [file.url for file in files.files], _stamps(file.stamp for file in files.files)
    joined = columns.cache_file("shards", image, *(url.text for url in urls))
    if (shards := _load_joined(joined, urls, stamps, files, image)) is not None:
        return shards
    indexes, changed = index_remote(files.files, build, progress, image, files.cache)
    shards = _new(Shards(urls, indexes, files, image), changed)
    shards.save(joined, stamps)
    return shards


def _new(shards: "Shards", changed: Mapping[Location, Change]) -> "Shards":
    """The shards, with warnings about them."""
    if changed:
        shards.changed = describe_changes(changed)
        _log.warning("%s. If this was not intended, copy the shards again", shards.changed)
    if shards.several and shards.image is None:
        _log.warning("%s; to use another, set data.image, or --image", describe_several(shards.several))
    return shards


def _load_joined(
    file: Path | None, paths: Sequence[Location], stamps: str | None, files: ShardFiles, image: str | None
) -> "Shards | None":
    """The shards by their joined index; None if there is none, or a shard changed since it was made."""
    loaded = columns.load(file)
    return Shards.mapped(paths, *loaded, files, image) if loaded and loaded[0]["stamps"] == stamps else None


def _stamps(stamps: Iterable[Stamp]) -> str | None:
    """A digest of the sizes and times, or versions, of files. None if one cannot be read: its index has the message."""
    try:
        return hashlib.sha256(repr([tuple(stamp) for stamp in stamps]).encode()).hexdigest()
    except OSError:
        return None


def index_shards(pattern: Pattern, progress: Progress | None = None, image: str | None = None) -> IndexReport:
    """Index shards before a run, and report their content. Arguments and errors as `open_shards`."""
    return report_index(open_shards(pattern, progress, image))


def report_index(images: Images) -> IndexReport:
    """The content of images. bytes: of the files or shards, or of the image files of a folder or table."""
    labels = np.zeros(0, np.int32) if images.labels is None else images.labels[images.labels >= 0]
    found = np.unique(labels).tolist()
    if isinstance(images, Shards):
        size = sum(map(images.files.size, range(len(images.paths))))
    else:
        size = int(images.sizes.sum(dtype=np.int64))
    return IndexReport(
        len(images.paths), len(images), len(labels), len(found), (found[0], found[-1]) if found else None,
        size, images.ignored, images.several, images.holder,
    )  # fmt: skip


class Shards(Images):
    """The samples of all shards, in order. Made by `open_shards`."""

    def __init__(
        self, paths: Sequence[Location], indexes: Sequence[ShardIndex], files: ShardFiles, image: str | None = None
    ) -> None:
        facts = {
            "ends": list(itertools.accumulate(len(index.labels) for index in indexes)),
            "several": list(sum((index.combinations() for index in indexes), Counter[tuple[str, ...]]()).items()),
            "ignored": int(sum(index.ignored for index in indexes)),
        }
        joined = {
            name: np.concatenate([getattr(index, name).astype(dtype, copy=False) for index in indexes])
            for name, dtype in _COLUMNS.items()
        }
        self._fill(paths, facts, joined, files, image)

    @classmethod
    def mapped(
        cls, paths: Sequence[Location], facts: Mapping[str, Any], joined: Mapping[str, np.ndarray], files: ShardFiles,
        image: str | None,
    ) -> "Shards":  # fmt: skip
        """The shards by the facts and arrays that `save` wrote."""
        shards = cls.__new__(cls)
        shards._fill(paths, facts, joined, files, image)
        shards.__dict__ |= {name: facts[name] for name in ("fingerprint", "digests")}  # of cached properties
        return shards

    def _fill(
        self, paths: Sequence[Location], facts: Mapping[str, Any], joined: Mapping[str, np.ndarray], files: ShardFiles,
        image: str | None,
    ) -> None:  # fmt: skip
        super().__init__(
            paths, facts["ends"], joined["sizes"], joined["crcs"], joined["labels"], image, facts.get("highest")
        )
        self.several = Counter({tuple(names): count for names, count in facts["several"]})
        self.ignored = facts["ignored"]
        self._blocks = joined["blocks"]
        self.files = files
        self._keys: tuple[int, list[str]] | None = None

    def save(self, file: Path | None, stamps: str | None) -> None:
        """Save the joined index of a large number of samples for the next start."""
        if file is None or stamps is None or len(self) < _MAPPED:
            return
        facts = {
            "stamps": stamps, "ends": self.ends, "several": list(self.several.items()),
            "ignored": self.ignored, "highest": self.num_classes - 1, "fingerprint": self.fingerprint,
            "digests": self.digests,
        }  # fmt: skip
        labels = np.full(len(self), -1, np.int32) if self.labels is None else self.labels
        joined = {"blocks": self._blocks, "sizes": self.sizes, "crcs": self.crcs, "labels": labels}
        columns.save(file, facts, joined)

    def read(self, i: int) -> bytes:
        """The bytes of sample i's image file, decompressed if the member is a .gz file.

        Raises:
            DamagedSample: the bytes cannot be read, or differ from those that were indexed.
            UserError: a store fails, or has another version of the shard.
        """
        shard, size, data = self._number(i), int(self.sizes[i]), b""
        try:
            data = self.files.read(shard, int(self._blocks[i]) * BLOCK, size)
        except OSError as error:
            raise self._damaged(i, f"cannot be read: {error.strerror or error}") from None
        if len(data) != size:
            raise self._damaged(i, f"the shard ends inside it ({len(data)} of {size} bytes)")
        if zlib.crc32(data) != self.crcs[i]:
            raise self._damaged(i, "its bytes have changed since they were indexed (CRC-32 differs)")
        return self._unpack(i, data) if data[:2] == _GZIP else data

    def key(self, i: int) -> str:
        """The sample's name within its shard: the path of its members, up to the first dot of the file name."""
        shard = self._number(i)
        if self._keys is None or self._keys[0] != shard:  # names are read from the disk when needed, to save memory
            try:
                self._keys = shard, self.files.index(shard).names()
            except UserError:  # the shard was damaged after it was opened
                self._keys = shard, []
        number, names = i - (self.ends[shard - 1] if shard else 0), self._keys[1]
        return names[number] if number < len(names) else f"sample {number}"

    def prepare(self, numbers: Sequence[int]) -> None:
        self.files.prepare(numbers)

    def _unpack(self, i: int, data: bytes) -> bytes:
        try:
            unpacker = zlib.decompressobj(wbits=31)
            unpacked = unpacker.decompress(data, MAX_BYTES)
        except zlib.error as error:
            raise self._damaged(i, f"cannot be unpacked: {error}") from None
        if not unpacker.eof:
            raise self._damaged(i, f"cannot be unpacked: truncated, or more than {MAX_BYTES} bytes")
        return unpacked

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_keys": None}
