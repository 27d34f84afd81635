"""A few labelled images of each class, as a data set of its own."""

import numpy as np

from selfvil.data.index import Shards
from selfvil.errors import UserError


class FewLabels(Shards):
    """`labels_per_class` images of each class of `shards`, drawn by `seed`, in the order of the shards.

    Raises UserError if images have no label, or a class has fewer.
    """

    def __init__(self, shards: Shards, labels_per_class: int, seed: int) -> None:
        if shards.labels is None or (shards.labels < 0).any():
            raise UserError(f"{labels_per_class} labels for each class were asked for, and images have no label (.cls)")
        classes, counts = np.unique(shards.labels, return_counts=True)
        if counts.min() < labels_per_class:
            raise UserError(
                f"{labels_per_class} labels for each class were asked for, and class {classes[counts.argmin()]} has "
                f"{counts.min()} images"
            )
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(np.flatnonzero(shards.labels == each))[:labels_per_class] for each in classes]
        self.__dict__.update(shards.__getstate__())  # paths, image and what the shards were found to hold
        self._all, self.ids = shards, np.sort(np.concatenate(drawn))
        self.labels = shards.labels[self.ids]
        self._blocks, self._sizes, self._crcs = (
            column[self.ids] for column in (shards._blocks, shards._sizes, shards._crcs)
        )
        self._ends = np.searchsorted(self.ids, shards._ends).tolist()
        for cached in ("fingerprint", "digests"):
            self.__dict__.pop(cached, None)

    def key(self, i: int) -> str:
        return self._all.key(int(self.ids[i]))
