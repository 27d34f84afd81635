"""The order of samples: a permutation of each epoch that needs no memory.

Position p of a run that never ends belongs to epoch p // length; within an epoch the positions are permuted by a
Feistel network (Luby and Rackoff, 1988) keyed by seed and epoch. The network permutes a power of four; ids that fall
outside `length` are sent through it again until they fall inside (cycle walking: Black and Rogaway, 2002), which keeps
it a bijection. So a run resumes at any position at once, and any rank or worker can compute its own part.
"""

import numpy as np

_ROUNDS = 6
_SMALLEST_HALF = 3  # bits; a network on fewer reaches too few permutations to look random
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values, elementwise and bijectively: SplitMix64's finaliser (Steele, Lea and Flood, 2014)."""
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

    def _permute(self, ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half, down = np.uint64(self.half), np.uint64(64 - self.half)
        left, right = ids >> half, ids & np.uint64((1 << self.half) - 1)
        for number in range(_ROUNDS):
            scrambled = _mix(keys + np.uint64(number * _GOLDEN & 0xFFFFFFFFFFFFFFFF) ^ right)
            left, right = right, left ^ (scrambled >> down)
        return left << half | right
