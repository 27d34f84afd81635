"""The order of samples: a permutation of each epoch that needs no memory.

Position p, counted through all epochs, belongs to epoch p // length. Within an epoch, a Feistel network (Luby and
Rackoff, 1988) keyed by seed and epoch permutes the positions. The network permutes a power of four; an id outside
`length` goes through it again until it is inside (cycle walking: Black and Rogaway, 2002), which keeps the map a
bijection. A run therefore resumes at any position immediately, and each rank or worker computes its own part.
"""

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

    def seeded(self, seed: int) -> "Order":
        """The order of another seed, for replacements of damaged samples."""
        return Order(self.length, seed)

    def ahead(self, position: int) -> list[int]:
        """The shards to prepare at `position`: none, since the next samples may be in any."""
        return []

    def _permute(self, ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half, down = np.uint64(self.half), np.uint64(64 - self.half)
        left, right = ids >> half, ids & np.uint64((1 << self.half) - 1)
        for number in range(_ROUNDS):
            scrambled = _mix(keys + np.uint64(number * _GOLDEN & 0xFFFFFFFFFFFFFFFF) ^ right)
            left, right = right, left ^ (scrambled >> down)
        return left << half | right
