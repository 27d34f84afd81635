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
from typing import NamedTuple

import numpy as np

from selfvil.data.changes import describe_difference, digests
from selfvil.data.order import AnyOrder, ClassOrder, Order, WindowOrder
from selfvil.data.read import DamagedImage
from selfvil.data.remote.urls import Location, Url
from selfvil.errors import UserError

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


class SourceShare(NamedTuple):
    """One source of a mixture: its name, number of images, share of a run's images, and epochs so far."""

    name: str
    images: int
    share: float
    epochs: float


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
        image: str | None = None, highest: int | None = None,
    ) -> None:  # fmt: skip
        """labels: int32 (n,), -1 for none. highest: the largest label, if it is known."""
        self.paths, self.ends, self.image = list(paths), list(ends), image
        self.sizes, self.crcs = sizes, crcs
        highest = int(labels.max(initial=-1)) if highest is None else highest
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

    def source_of(self, i: int) -> str:
        """The name of the source of image i in a mixture; "" for a single source."""
        return ""

    def parts(self) -> "list[Images]":
        """The sources it is made of: itself, unless it is a mixture."""
        return [self]

    @property
    def remote(self) -> bool:
        """Whether images are in a store, and not on a local disk."""
        return any(isinstance(path, Url) for path in self.paths)

    def order(self, seed: int, balanced: bool = False, window: int | None = None) -> AnyOrder:
        """The order of a run. balanced: visit all classes equally often. window: shuffle only the images in this many
        entries of `paths` at a time.

        Raises UserError if that needs labels, and images have none.
        """
        if not balanced:
            return Order(len(self), seed) if window is None else WindowOrder(self.ends, seed, window)
        unlabelled = len(self) if self.labels is None else int((self.labels < 0).sum())
        if self.labels is None or unlabelled:
            raise UserError(
                f"data.order = class_balanced needs a label for each image, and {unlabelled:,} of the {len(self):,} "
                f"images in {self.paths[0]} have none"
            )
        return ClassOrder(self.labels, seed)

    def ahead(self, order: AnyOrder | None, position: int) -> None:
        """The images from `position` on are read next, in this order, or in that of the list."""
        if isinstance(order, WindowOrder):
            self.prepare(order.ahead(position))
        elif order is None:
            number = self._number(position)
            self.prepare(range(number, min(number + 2, len(self.paths))))

    def prepare(self, numbers: Sequence[int]) -> None:  # noqa: B027 - most sources have nothing to do
        """Images in these entries of `paths` are read now and next; others are not for a while."""

    def shares(self, visits: int) -> list[SourceShare]:
        """The sources of a mixture after the first `visits` images of a run; empty for a single source."""
        return []

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
