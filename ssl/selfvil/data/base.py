"""What every list of images has, whatever holds them: `Images`.

A source of images (shards, a folder, a table of paths, several of them) is a subclass. The order of samples, the
loader, the ledger, the checks of labels and the comparison of a source with its state at the start of a run know only
this class. A sample needs at most 20 bytes of memory: its size and CRC-32, its label, and up to 8 bytes of the source.
"""

import bisect
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from selfvil.data.changes import describe_difference, digests
from selfvil.data.order import Order
from selfvil.data.read import DamagedImage
from selfvil.data.remote.urls import Location, Url
from selfvil.data.remote.window import WindowOrder

Pattern = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path or a shard pattern, or a list of them."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after each part of the work."""

_CHUNK = 1 << 20  # samples whose labels are converted at once


class DamagedSample(DamagedImage):
    """A sample whose bytes cannot be read, or differ from those that were indexed."""

    def __init__(self, shard: Location, key: str, reason: str) -> None:
        super().__init__(reason)
        self.shard, self.key, self.reason = shard, key, reason


class Images(ABC):
    """A list of n image files. Safe to fork and to pickle; not thread-safe.

    Attributes:
        paths: the files or folders that hold the images, or their URLs, in the order of the images.
        ends: for each path, the number of images in it and in those before it.
        sizes, crcs: uint32 (n,), bytes and CRC-32 of each image file.
        labels: int32 (n,), -1 for images without one; None if no image has a label.
        num_classes: the largest label + 1; 0 without labels.
        classes: the name of each label where the source itself names them, else empty.
        image: the requested extension where samples have several images, or None.
        ignored: samples left out because they have no image.
        several: number of samples with more than one image, by their extensions; the first extension is used.
        changed: how images and labels differ from the last indexing; "" if they are the same.
        notes: sentences for the user about the source.
    """

    holder = "shard"
    """What an entry of `paths` is called in messages."""

    def __init__(
        self, paths: Sequence[Location], ends: Sequence[int], sizes: np.ndarray, crcs: np.ndarray, labels: np.ndarray,
        image: str | None = None,
    ) -> None:  # fmt: skip
        """labels: int32 (n,), -1 for none."""
        self.paths, self.ends, self.image = list(paths), list(ends), image
        self.sizes, self.crcs = sizes, crcs
        highest = int(labels.max(initial=-1))
        self.labels: np.ndarray | None = labels if highest >= 0 else None
        self.num_classes = highest + 1
        self.classes: list[str] = []
        self.ignored, self.several, self.changed = 0, Counter[tuple[str, ...]](), ""
        self.notes: list[str] = []

    def __len__(self) -> int:
        return self.ends[-1]

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The bytes of image file i. Raises DamagedImage: they cannot be read, or differ from the indexed ones."""

    @abstractmethod
    def key(self, i: int) -> str:
        """The name of image i within `shard_of(i)`."""

    def shard_of(self, i: int) -> Location:
        """The file or folder that holds image i."""
        return self.paths[self._number(i)]

    def parts(self) -> "list[Images]":
        """The sources it is made of: itself, unless it is a mixture."""
        return [self]

    @property
    def remote(self) -> bool:
        """Whether the images are in a store, and not on a local disk."""
        return any(isinstance(path, Url) for path in self.paths)

    def order(self, seed: int, window: int | None = None) -> Order | WindowOrder:
        """The order of a run with this seed: of all images, or of those in `window` paths at a time."""
        return Order(len(self), seed) if window is None else WindowOrder(self.ends, seed, window)

    def ahead(self, numbers: Sequence[int]) -> None:  # noqa: B027 - most sources have nothing to prepare
        """Images in these paths are read now and next, in this order. A source that is slow to open prepares them."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend only on all images and labels and their order, not on paths or times."""
        digest = hashlib.sha256()
        for column in (self.sizes, self.crcs):
            digest.update(np.ascontiguousarray(column).data)
        labels = self.labels
        if labels is None:
            digest.update(b"-")
        else:
            for first in range(0, len(self), _CHUNK):
                digest.update(labels[first : first + _CHUNK].astype(np.int64).data)
        return digest.hexdigest()[:16]

    @property
    def contents(self) -> np.ndarray:
        """uint64 (n,): CRC-32 and size of each image file. Equal files have equal values; collisions are rare."""
        return self.crcs.astype(np.uint64) << np.uint64(32) | self.sizes

    @cached_property
    def digests(self) -> list[str]:
        """For each path: its number of samples and 8 hex digits that depend on its images and labels."""
        return digests(self.ends, self.sizes, self.crcs, self.labels)

    def describe_change(self, num_samples: int, before: Sequence[str] | None) -> str:
        """A sentence: how these images differ from earlier ones, which had another fingerprint.

        num_samples: of the earlier images. before: the earlier `digests`, if they are known.
        """
        parts = [f"there are {len(self):,} images, {num_samples:,} before"] if len(self) != num_samples else []
        parts += [describe_difference(before, self.digests, self.paths, self.holder)] if before else []
        return "; ".join([*parts, *filter(None, [self.changed])]) or "images or labels differ"

    def _number(self, i: int) -> int:
        """The index of the path that holds image i."""
        if not 0 <= i < len(self):
            raise IndexError(f"no sample {i} among {len(self)}")
        return bisect.bisect_right(self.ends, i)

    def _damaged(self, i: int, reason: str) -> DamagedSample:
        return DamagedSample(self.shard_of(i), self.key(i), reason)
