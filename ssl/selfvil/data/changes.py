"""Differences between the samples of shards now and earlier: at the last indexing, or at the start of a run."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from selfvil.data.remote.urls import Location


class HasContents(Protocol):
    """An index: uint32 sizes and crcs, and integer labels, each (n,)."""

    @property
    def sizes(self) -> np.ndarray: ...
    @property
    def crcs(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Change:
    """Two indexes of a shard or folder compared: its samples now and before, and how many have other image bytes or
    labels."""

    samples: int
    before: int
    images: int
    labels: int


def compare(before: HasContents, now: HasContents) -> Change | None:
    """None if images and labels are the same in the same order; the names of the samples may differ."""
    old, new = (index.sizes.astype(np.uint64) << np.uint64(32) | index.crcs for index in (before, now))
    if len(old) == len(new):
        images, labels = int((old != new).sum()), int((before.labels != now.labels).sum())
        return Change(len(new), len(old), images, labels) if images or labels else None
    return Change(len(new), len(old), int(np.isin(new, old, invert=True).sum()), 0)


def describe_changes(changes: Mapping[Location, Change]) -> str:
    """A sentence: what differs from the last time that these shards were indexed."""
    samples, before, images, labels = (
        sum(getattr(change, name) for change in changes.values()) for name in ("samples", "before", "images", "labels")
    )
    parts = [f"{images:,} of {samples:,} samples have other bytes"] if images else []
    parts += [f"{labels:,} of {samples:,} samples have other labels"] if labels else []
    parts += [f"there are {samples:,} samples, {before:,} before"] if samples != before else []
    where = f"{next(iter(changes))} changed since it was last indexed"
    if len(changes) > 1:
        where = f"{len(changes):,} shards changed since they were last indexed, the first is {next(iter(changes))}"
    return f"{where}: {', '.join(parts)}"


def digests(ends: Sequence[int], sizes: np.ndarray, crcs: np.ndarray, labels: np.ndarray | None) -> list[str]:
    """For each part i, whose last sample is `ends[i] - 1`: its number of samples and a CRC-32 of these columns."""
    found, first = [], 0
    for end in ends:
        part = slice(first, end)
        numbers = np.full(end - first, -1) if labels is None else labels[part].astype(np.int64)
        crc = 0
        for column in (sizes[part], crcs[part], numbers):
            crc = zlib.crc32(np.ascontiguousarray(column).data, crc)
        found.append(f"{end - first}:{crc:08x}")
        first = end
    return found


def describe_difference(before: Sequence[str], now: Sequence[str], paths: Sequence[Location], holder: str) -> str:
    """A sentence: how images differ from earlier ones, by the `digests` of both.

    paths: of the present images. holder: what a path is called.
    """
    if Counter(before) == Counter(now):
        return f"the {holder}s are the same, in another order"
    if len(before) != len(now):
        return f"there are {len(now):,} {holder}s, {len(before):,} before"
    changed = [path for path, old, new in zip(paths, before, now) if old != new]
    return f"{len(changed):,} of {len(now):,} {holder}s hold other images or labels, the first is {changed[0]}"
