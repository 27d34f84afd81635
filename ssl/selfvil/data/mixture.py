"""Several sources of images, mixed by weights: every window of the run has exact shares of them.

Each source keeps its own order and epochs. The id of an image is its number in its source, plus the lengths of the
sources before it.
"""

import bisect
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from selfvil.data.base import Images, SourceShare
from selfvil.data.order import AnyOrder, MixtureOrder, other_seed
from selfvil.data.order import visits as count_visits
from selfvil.data.remote.urls import Location
from selfvil.errors import UserError, redact

_LONGEST_PERIOD = 100_000  # positions; the sequence of the sources repeats after the sum of the reduced weights


class Mixture(Images):
    """The images of all sources, one source after the other. Arguments are sources, their weights, and their names.

    Raises UserError if the weights have too many digits.
    """

    def __init__(self, sources: Sequence[Images], weights: Sequence[float], names: Sequence[str]) -> None:
        self.sources, self.weights = list(sources), reduce_weights(weights)
        self.names = _different(names)
        self._firsts = [0, *itertools.accumulate(map(len, sources))]
        sizes, crcs = (np.concatenate([getattr(each, key) for each in sources]) for key in ("sizes", "crcs"))
        unlabelled = [np.full(len(each), -1, np.int32) if each.labels is None else each.labels for each in sources]
        labels = np.concatenate(unlabelled)
        paths = [path for each in sources for path in each.paths]
        ends = [first + end for first, each in zip(self._firsts, sources) for end in each.ends]
        super().__init__(paths, ends, sizes, crcs, labels)
        for first, each in zip(self._firsts, sources):  # the sources share these arrays: they are not there twice
            part = slice(first, first + len(each))
            each.sizes, each.crcs = self.sizes[part], self.crcs[part]
            each.labels = None if each.labels is None else labels[part]
        self.changed = "; ".join(each.changed for each in sources if each.changed)
        self.notes = [note for each in sources for note in each.notes]

    def read(self, i: int) -> bytes:
        source, inner = self._inner(i)
        return source.read(inner)

    def key(self, i: int) -> str:
        source, inner = self._inner(i)
        return source.key(inner)

    def shard_of(self, i: int) -> Location:
        source, inner = self._inner(i)
        return source.shard_of(inner)

    def source_of(self, i: int) -> str:
        return self.names[self._source(i)]

    def parts(self) -> list[Images]:
        return self.sources

    def order(self, seed: int, balanced: bool = False, window: int | None = None) -> MixtureOrder:
        orders: list[AnyOrder] = [
            each.order(other_seed(seed, number), balanced, window) for number, each in enumerate(self.sources)
        ]
        return MixtureOrder(orders, self.weights)

    def ahead(self, order: AnyOrder | None, position: int) -> None:
        if isinstance(order, MixtureOrder):
            for source, inner, count in zip(self.sources, order.orders, count_visits(self.weights, position)):
                source.ahead(inner, count)

    def shares(self, visits: int) -> list[SourceShare]:
        counts = count_visits(self.weights, visits)
        total = sum(self.weights)
        return [
            SourceShare(name, len(source), weight / total, count / len(source))
            for name, source, weight, count in zip(self.names, self.sources, self.weights, counts)
        ]

    def check_step(self, batch_size: int) -> None:
        """Raise UserError if a step of this many images would contain an image of a source more than once."""
        for name, source, weight in zip(self.names, self.sources, self.weights):
            share = math.ceil(batch_size * weight / sum(self.weights))
            if share > len(source):
                raise UserError(
                    f"data.train: a step of {batch_size:,} images takes {share:,} of {name}, which has {len(source):,} "
                    "images, so that it would hold images more than once: lower its weight or optim.batch_size"
                )

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the fingerprints of the sources, their order and their weights."""
        facts = [(each.fingerprint, weight) for each, weight in zip(self.sources, self.weights)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @cached_property
    def digests(self) -> list[str]:
        """For each source: weight, length and fingerprint."""
        return [f"{weight}:{len(each)}:{each.fingerprint}" for each, weight in zip(self.sources, self.weights)]

    def describe_change(self, num_samples: int, before: Sequence[str] | None) -> str:
        parts = []
        if before is not None and len(before) != len(self.digests):
            parts.append(f"there are {len(self.digests)} sources, {len(before)} before")
        elif before is not None:
            old, new = ([text.split(":") for text in digests] for digests in (before, self.digests))
            weights = [" : ".join(each[0] for each in digests) for digests in (new, old)]
            parts += [f"the weights are {weights[0]}, {weights[1]} before"] * (weights[0] != weights[1])
            parts += [
                f"{name} has {len(source):,} images, {was[1]} before" if str(len(source)) != was[1]
                else f"{name} holds other images or labels"
                for name, source, was, now in zip(self.names, self.sources, old, new) if was[1:] != now[1:]
            ]  # fmt: skip
        return "; ".join([*parts, *filter(None, [self.changed])]) or "sources, weights, images or labels differ"

    def _source(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"no sample {i} among {len(self)}")
        return bisect.bisect_right(self._firsts, i) - 1

    def _inner(self, i: int) -> tuple[Images, int]:
        """The source of image i, and its number there."""
        source = self._source(i)
        return self.sources[source], i - self._firsts[source]


def reduce_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers with the same ratios. Raises UserError if their sum is too large."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * scale) for each in exact]
    divisor = math.gcd(*whole)
    reduced = tuple(each // divisor for each in whole)
    if sum(reduced) > _LONGEST_PERIOD:
        raise UserError(
            f"data.train: the weights {', '.join(f'{each:g}' for each in weights)} repeat only after {sum(reduced):,} "
            f"images, and at most {_LONGEST_PERIOD:,} are possible: give weights with fewer digits, such as 0.7 and 0.3"
        )
    return reduced


def _different(names: Sequence[str]) -> list[str]:
    """Short names of the sources for metrics and reports, each different."""
    short = [re.sub(r"[^\w.-]+", "_", Path(redact(name)).name).strip("_") or "source" for name in names]
    return [name if short.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(short)]
