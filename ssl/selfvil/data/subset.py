"""A few labelled images of each class, as a data set of its own."""

from collections.abc import Sequence

import numpy as np

from selfvil.data.base import Images
from selfvil.data.remote.urls import Location
from selfvil.errors import UserError


class FewLabels(Images):
    """`labels_per_class` images of each class of `images`, drawn by `seed`, in the order of the images.

    Raises UserError if images have no label, or a class has fewer.
    """

    def __init__(self, images: Images, labels_per_class: int, seed: int) -> None:
        if images.labels is None or (images.labels < 0).any():
            raise UserError(f"{labels_per_class} labels for each class were asked for, and images have no label (.cls)")
        classes, counts = np.unique(images.labels, return_counts=True)
        if counts.min() < labels_per_class:
            raise UserError(
                f"{labels_per_class} labels for each class were asked for, and class {classes[counts.argmin()]} has "
                f"{counts.min()} images"
            )
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(np.flatnonzero(images.labels == each))[:labels_per_class] for each in classes]
        self._all, self.ids = images, np.sort(np.concatenate(drawn))
        ends = np.searchsorted(self.ids, images.ends).tolist()
        sizes, crcs, labels = (column[self.ids] for column in (images.sizes, images.crcs, images.labels))
        super().__init__(images.paths, ends, sizes, crcs, labels, images.image)
        self.classes, self.holder, self.notes = images.classes, images.holder, images.notes
        self.ignored, self.several, self.changed = images.ignored, images.several, images.changed

    def read(self, i: int) -> bytes:
        return self._all.read(self._id(i))

    def key(self, i: int) -> str:
        return self._all.key(self._id(i))

    def shard_of(self, i: int) -> Location:
        return self._all.shard_of(self._id(i))

    def prepare(self, numbers: Sequence[int]) -> None:
        self._all.prepare(numbers)

    def _id(self, i: int) -> int:
        """The number of image i among all images."""
        if not 0 <= i < len(self):
            raise IndexError(f"no sample {i} among {len(self)}")
        return int(self.ids[i])
