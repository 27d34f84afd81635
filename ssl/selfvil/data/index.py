"""Shards: WebDataset tar files that are read as one list, by byte range.

Opening reads every header once, so a missing or damaged shard is reported before training starts. For each sample it
keeps the position of the image, its CRC-32 and its label in memory: 12 bytes and the label. The index of a shard is
saved in a file `SHARD.index.npz` in the same folder, or in a cache folder if that folder cannot be written. An index
that is older than its shard is built again. From 4 million samples on, the joined index of all shards is saved as well,
and memory-mapped from the second start on.
"""

import hashlib
import itertools
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.data import columns
from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.changes import Change, describe_changes
from selfvil.data.files import LocalFiles, ShardFiles
from selfvil.data.patterns import expand_shards
from selfvil.data.read import EXTENSIONS, MAX_BYTES
from selfvil.data.remote.cache import Cache
from selfvil.data.remote.fetch import RemoteFiles
from selfvil.data.remote.shards import find_remote, in_threads, index_remote
from selfvil.data.remote.urls import Location, is_remote
from selfvil.data.shard import build, load_index
from selfvil.data.sidecar import ShardIndex, Stamp
from selfvil.data.tar import BLOCK
from selfvil.errors import UserError
from selfvil.machine import usable_cores

_log = logging.getLogger(__name__)
_MAPPED = 1 << 22  # samples from which the joined index is saved: 64 MB
_COLUMNS = {"blocks": np.uint32, "sizes": np.uint32, "crcs": np.uint32, "labels": np.int32}
_GZIP = b"\x1f\x8b"


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


def local_files(paths: Sequence[Path], image: str | None = None) -> LocalFiles:
    """Shards on a local disk, for `Shards`."""
    return LocalFiles(paths, partial(_index, image=image))


def _index(path: Path, image: str | None) -> ShardIndex:
    return load_index(path, image)[0]


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
        cache = cache or Cache()  # first: a wrong size in the environment is refused before the store is asked
        return _open_remote(RemoteFiles(find_remote(pattern, progress), cache, image), progress, image)
    paths = expand_shards(pattern)
    files, stamps = local_files(paths, image), _stamps(Stamp.of(path) for path in paths)
    joined = columns.cache_file("shards", image, *map(os.path.abspath, paths))
    if (shards := _load_joined(joined, paths, stamps, files, image)) is not None:
        return shards
    threads = min(usable_cores(), 16)  # zlib and file reads run in parallel
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
