"""An order of two levels: a permutation of the shards of each epoch, then of the samples of a few shards at a time.

A store is read fast in long sequential reads. The plain `Order` needs a random shard for every image. Here, an epoch
permutes its shards, and cuts them into windows of at most `window` shards, as equal in number as possible. Within a
window, the samples of all its shards are permuted. So an epoch has each sample exactly once, whatever the sizes of the
shards, and only the shards of one window are in use at a time. As in `Order`, a sample depends only on its position,
the seed and the sizes of the shards: a run resumes at any position immediately, for any number of processes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from selfvil.data.order import Order


class _Epoch(NamedTuple):
    """shards (S,): in the order of the epoch. first (K + 1,): number of the first shard of each window in it, and S.
    starts (K + 1,): number of samples before each window, and N."""

    shards: np.ndarray
    first: np.ndarray
    starts: np.ndarray


class WindowOrder:
    """The order of N samples in S shards.

    Args:
        ends: number of samples in the first shard, in the first two, and so on; the last is N.
        window: shards in a window, at most.
        within: seed of the permutations within windows; None: `seed`, which otherwise permutes only the shards.
    """

    def __init__(self, ends: Sequence[int], seed: int, window: int, within: int | None = None) -> None:
        self._ends = np.asarray(ends, np.int64)
        self._sizes = np.diff(self._ends, prepend=0)
        self.length = int(self._ends[-1])
        if self.length < 1 or window < 1:
            raise ValueError(
                f"an order needs at least one sample and a window of one shard, not {self.length}, {window}"
            )
        self._seed, self._window, self._within_seed = seed, window, seed if within is None else within
        self._order = Order(len(self._ends), ~seed)
        self._windows = -(-len(self._ends) // window)
        self._epochs: dict[int, _Epoch] = {}

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (N,) int64 at global positions (N,) int64 >= 0, which may span epochs."""
        positions = np.asarray(positions, np.int64)
        ids = np.empty_like(positions)
        epochs, within = np.divmod(positions, self.length)
        for number in np.unique(epochs).tolist():
            epoch = self._epoch(number)
            windows = np.searchsorted(epoch.starts, within, side="right") - 1
            for window in np.unique(windows[epochs == number]).tolist():
                rows = np.flatnonzero((epochs == number) & (windows == window))
                ids[rows] = self._within(epoch, number, window, within[rows] - epoch.starts[window])
        return ids

    def seeded(self, seed: int) -> "WindowOrder":
        """Other permutations of the same windows: a replacement of a damaged sample needs no other shard."""
        return WindowOrder(self._ends.tolist(), self._seed, self._window, seed)

    def shards(self, position: int) -> tuple[list[int], list[int]]:
        """The shards of the window of `position`, and those of the next window."""
        number, within = divmod(int(position), self.length)
        epoch = self._epoch(number)
        window = int(np.searchsorted(epoch.starts, within, side="right")) - 1
        now = epoch.shards[epoch.first[window] : epoch.first[window + 1]]
        if window + 1 == self._windows:
            epoch, window = self._epoch(number + 1), -1
        return now.tolist(), epoch.shards[epoch.first[window + 1] : epoch.first[window + 2]].tolist()

    def ahead(self, position: int) -> list[int]:
        """The shards to prepare at `position`: those of its window and the next one."""
        now, following = self.shards(position)
        return list(dict.fromkeys(now + following))

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            count = len(self._ends)
            shards = self._order.ids(np.arange(number * count, (number + 1) * count))
            first = np.arange(self._windows + 1) * count // self._windows
            starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])[first]
            self._epochs = {each: self._epochs[each] for each in (number - 1, number + 1) if each in self._epochs}
            self._epochs[number] = _Epoch(shards, first, starts)
        return self._epochs[number]

    def _within(self, epoch: _Epoch, number: int, window: int, places: np.ndarray) -> np.ndarray:
        """Ids of the samples at `places` of a window."""
        shards = epoch.shards[epoch.first[window] : epoch.first[window + 1]]
        size = int(epoch.starts[window + 1] - epoch.starts[window])
        # The seed of the run gives each window its own permutation: as if it were an epoch of its own.
        order = Order(size, self._within_seed)
        places = order.ids(places + (number * self._windows + window) * size)
        ends = np.cumsum(self._sizes[shards])
        which = np.searchsorted(ends, places, side="right")
        return self._ends[shards[which]] - ends[which] + places
