"""The order of samples: a permutation of each epoch that needs no memory.

Position p, counted through all epochs, belongs to epoch p // length. Within an epoch, a Feistel network (Luby and
Rackoff, 1988) keyed by seed and epoch permutes the positions. The network permutes a power of four; an id outside
`length` goes through it again until it is inside (cycle walking: Black and Rogaway, 2002), which keeps the map a
bijection. A run therefore resumes at any position immediately, and each rank or worker computes its own part.

`ClassOrder` visits all classes equally often, and `MixtureOrder` several sources by their shares; both consist of such
permutations, and are functions of the position as well.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_ROUNDS = 6
_SMALLEST_HALF = 3  # bits; with fewer, the network gives too few permutations to be pseudo-random
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """Elementwise bijection of uint64 values: SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """A pseudo-random permutation of `range(length)` for each epoch of a run with this seed."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"an order needs at least one sample, not {length}")
        self.length = length
        self.half = max(_SMALLEST_HALF, -(-(length - 1).bit_length() // 2))
        self.key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + np.uint64(_GOLDEN))

    def seeded(self, seed: int) -> "Order":
        """The order of the same images with another seed."""
        return Order(self.length, seed)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (N,) int64 at global positions (N,) int64 >= 0, which may span epochs."""
        epochs, ids = np.divmod(np.asarray(positions, np.int64).astype(np.uint64), np.uint64(self.length))
        keys = _mix((epochs + np.uint64(1)) * np.uint64(_GOLDEN) ^ self.key)
        ids = self._permute(ids, keys)
        outside = np.flatnonzero(ids >= self.length)
        while outside.size:
            ids[outside] = self._permute(ids[outside], keys[outside])
            outside = outside[ids[outside] >= self.length]
        return ids.astype(np.int64)

    def _permute(self, ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half, down = np.uint64(self.half), np.uint64(64 - self.half)
        left, right = ids >> half, ids & np.uint64((1 << self.half) - 1)
        for number in range(_ROUNDS):
            scrambled = _mix(keys + np.uint64(number * _GOLDEN & 0xFFFFFFFFFFFFFFFF) ^ right)
            left, right = right, left ^ (scrambled >> down)
        return left << half | right


class ClassOrder:
    """Visits all classes equally often: in each round of C positions, every one of C classes once, in another order.

    The images of a class have an `Order` of their own, so a class with few images begins a new epoch sooner. Memory: 4
    bytes for each image. A pure function of the position, as `Order`.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        """labels: integers (length,) >= 0."""
        self.length = len(labels)
        self._ids = np.argsort(labels, kind="stable").astype(np.int32 if self.length < 1 << 31 else np.int64)
        _, self._firsts, counts = np.unique(labels[self._ids], return_index=True, return_counts=True)
        self._counts: list[int] = counts.tolist()
        self._seed(seed)

    def _seed(self, seed: int) -> None:
        self._classes = Order(len(self._counts), seed)
        self._images = [Order(count, other_seed(seed, 1 + number)) for number, count in enumerate(self._counts)]

    def seeded(self, seed: int) -> "ClassOrder":
        """As `Order.seeded`."""
        other = copy.copy(self)
        other._seed(seed)
        return other

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.ids`."""
        positions = np.asarray(positions, np.int64)
        rounds, classes = positions // len(self._images), self._classes.ids(positions)
        ids = np.empty_like(positions)
        for number in np.unique(classes).tolist():
            rows = np.flatnonzero(classes == number)
            ids[rows] = self._ids[self._firsts[number] + self._images[number].ids(rounds[rows])]
        return ids


class MixtureOrder:
    """Takes images from several sources by exact shares: after n positions, source i was visited n · share_i times,
    rounded up or down; within a source, in the order of that source.

    The sequence of the sources is periodic, and that of Tijdeman's chairman assignment (1980), which keeps every source
    within 1 - 1 / (2k - 2) of its share, k the number of sources. A pure function of the position, as `Order`.
    """

    def __init__(self, orders: "Sequence[AnyOrder]", weights: Sequence[int]) -> None:
        """orders: of the sources, made with `other_seed(seed, i)`. weights: positive integers, their sum the period."""
        self.orders = list(orders)
        lengths: list[int] = [order.length for order in orders]
        self.length: int = sum(lengths)
        self._first_ids = np.cumsum([0, *lengths])[:-1]
        self._sources, self._before = _chairmen(tuple(weights))
        self._weights = np.array(weights, np.int64)

    def seeded(self, seed: int) -> "MixtureOrder":
        """As `Order.seeded`."""
        orders = [order.seeded(other_seed(seed, number)) for number, order in enumerate(self.orders)]
        return MixtureOrder(orders, self._weights.tolist())

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.ids`; the ids of source i come after those of the sources before it."""
        positions = np.asarray(positions, np.int64)
        periods, places = np.divmod(positions, len(self._sources))
        sources = self._sources[places]
        visits = periods * self._weights[sources] + self._before[places]
        ids = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            ids[rows] = self._first_ids[source] + self.orders[source].ids(visits[rows])
        return ids


def visits(weights: Sequence[int], count: int) -> list[int]:
    """How many of the first `count` positions of a mixture each source has."""
    sources, _ = _chairmen(tuple(weights))
    periods, rest = divmod(count, len(sources))
    return (periods * np.array(weights) + np.bincount(sources[:rest], minlength=len(weights))).tolist()


class _Epoch(NamedTuple):
    """shards (S,): in the order of the epoch. first (K + 1,): number of the first shard of each window in it, and S.
    starts (K + 1,): number of samples before each window, and N."""

    shards: np.ndarray
    first: np.ndarray
    starts: np.ndarray


class WindowOrder:
    """The order of N samples in S shards, on two levels: a permutation of the shards of each epoch, then of the samples
    of a few shards at a time.

    A store is fast in long sequential reads, and `Order` needs a random shard for every image. An epoch permutes its
    shards, and cuts them into windows of at most `window` shards, as equal in number as possible. Within a window, the
    samples of all its shards are permuted. An epoch has each sample exactly once, whatever the sizes of the shards, and
    only the shards of one window are in use at a time. A pure function of the position, as `Order`.

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


AnyOrder = Order | ClassOrder | MixtureOrder | WindowOrder


def other_seed(seed: int, number: int) -> int:
    """A seed for part `number` of what `seed` belongs to; part 0 has the seed itself."""
    return seed + number * _GOLDEN & 0xFFFFFFFFFFFFFFFF


@lru_cache(maxsize=8)
def _chairmen(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each position of a period: its source, and how often that source came before; int64 (sum of weights,).

    Of the sources that may be next without exceeding their share by more than the bound, the one is next that would
    otherwise fall below its share first. Integers throughout: everything is multiplied by the period and by 2k - 2.
    """
    period, scale = sum(weights), max(2 * len(weights) - 2, 1)
    share = np.array(weights, np.int64)
    taken = np.zeros(len(weights), np.int64)
    sources, before = np.zeros(period, np.int64), np.zeros(period, np.int64)
    for place in range(period):
        lead = scale * (share * (place + 1) - taken * period)  # by how much the source is behind its share
        slack = ((scale - 1) * period - lead) / share  # time until it must be chosen
        source = int(np.where(lead >= period, slack, np.inf).argmin())
        sources[place], before[place] = source, taken[source]
        taken[source] += 1
    return sources, before
