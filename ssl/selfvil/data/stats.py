"""Mean and standard deviation of each channel: `selfvil index SHARDS --stats`, and `data.stats: auto`.

All pixels of all images count, at the size in which they are stored. The sums of integers are exact; means and squared
deviations of images are merged in the order of the images (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances", 1979), in float64: the result does not depend on the number of processes.

They are saved in `SOURCE.stats.json` beside the first shard, or beside the folder, or in the user's cache folder if
that folder cannot be written, under the fingerprint of the images: those of other images are never used. A mixture
has those of its sources, in their shares.
"""

import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.data.arrays import channels_of, decode_pixels, divisor
from selfvil.data.base import Images, Progress
from selfvil.data.columns import cache_folder
from selfvil.data.read import MAX_CHANNELS, DamagedImage
from selfvil.data.sidecar import STATS
from selfvil.errors import UserError, shorten
from selfvil.files import write_text

_log = logging.getLogger(__name__)
_FORMAT = 1
_MOST_BYTES = 1 << 20  # of a sidecar
_MOST_SOURCES = 32  # whose statistics one sidecar holds
_CHUNK = 16  # images that a worker measures at a time
_BLOCK = 1 << 20  # values of a channel that are summed at a time


@dataclass(frozen=True)
class ChannelStats:
    """mean, std: of each channel over all pixels, on the scale of `data.mean`. images, pixels: how many were counted.
    damaged: images that could not be read. first_damaged: a sentence about the first of them, or ""."""

    images: int
    pixels: int
    mean: list[float]
    std: list[float]
    damaged: int = 0
    first_damaged: str = ""

    def __str__(self) -> str:
        lines = [f"{self.images:,} images, {self.pixels:,} pixels, {len(self.mean)} channels:"]
        for name in ("mean", "std"):
            values = ", ".join(f"{value:.6g}" for value in getattr(self, name))
            lines.append(f"  data.{name}: [{values}]")
        if self.damaged:
            lines.append(f"  {self.damaged:,} images could not be read and are not counted: {self.first_damaged}")
        return "\n".join(lines)


@dataclass
class Moments:
    """Of n pixels, or of a share n of them: mean and sum of squared deviations of each channel, float64 (C,)."""

    n: float
    mean: np.ndarray
    squares: np.ndarray

    def merge(self, other: "Moments") -> None:
        n = self.n + other.n
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.n / n)
        self.squares = self.squares + other.squares + difference**2 * (self.n * other.n / n)
        self.n = n


def moments(pixels: np.ndarray) -> Moments:
    """Moments of an image (H, W, C), on the scale of `data.mean`."""
    scale, count = divisor(pixels.dtype), pixels.shape[0] * pixels.shape[1]
    found = [
        _of_integers(pixels[:, :, channel])
        if pixels.dtype.kind in "ui" and pixels.dtype.itemsize <= 2
        else _of_floats(pixels[:, :, channel])
        for channel in range(pixels.shape[2])
    ]
    mean, squares = (np.array(column, np.float64) for column in zip(*found))
    return Moments(count, mean / scale, squares / scale**2)


def _blocks(plane: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // plane.shape[1])
    return (plane[first : first + rows] for first in range(0, len(plane), rows))


def _of_integers(plane: np.ndarray) -> tuple[float, float]:
    total = squares = 0
    for block in _blocks(plane):
        wide = block.astype(np.int64)
        total += int(wide.sum())
        squares += int((wide * wide).sum())
    return total / plane.size, (plane.size * squares - total * total) / plane.size


def _of_floats(plane: np.ndarray) -> tuple[float, float]:
    mean = math.fsum(float(block.sum(dtype=np.float64)) for block in _blocks(plane)) / plane.size
    return mean, math.fsum(float(np.square(block.astype(np.float64) - mean).sum()) for block in _blocks(plane))


# --- all images ---------------------------------------------------------------------------------------------------


def measure(
    images: Images, channels: int | None = None, workers: int = 1, progress: Progress | None = None
) -> ChannelStats:
    """Decode all images, and measure their channels.

    channels: None takes the number of the first image that can be read. workers: processes.

    Raises UserError if no image can be read.
    """
    channels = channels or _channels_of_first(images)
    total: Moments | None = None
    done, damaged = 0, list[tuple[int, str]]()
    spans = [(images, channels, first, min(first + _CHUNK, len(images))) for first in range(0, len(images), _CHUNK)]
    with _measured(spans, workers) as parts:
        for part in parts:
            for i, found in part:
                done += 1
                if isinstance(found, str):
                    damaged.append((i, found))
                elif total is None:
                    total = found
                else:
                    total.merge(found)
            if progress is not None:
                progress(done, len(images))
    first = ""
    if damaged:
        i, reason = damaged[0]
        first = f"{shorten(images.key(i), 100)} in {images.shard_of(i)}: {reason}"
    if total is None:
        raise UserError(f"none of the {len(images):,} images can be read as {channels} channels, the first is {first}")
    std = np.sqrt(total.squares / total.n)
    return ChannelStats(done - len(damaged), int(total.n), total.mean.tolist(), std.tolist(), len(damaged), first)


def _channels_of_first(images: Images) -> int:
    reason = "there is none"
    for i in range(min(len(images), 100)):
        try:
            return channels_of(decode_pixels(images.read(i), None))
        except DamagedImage as error:
            reason = str(error)
    raise UserError(f"none of the first images of {images.shard_of(0)} can be read: {reason}")


_Span = tuple[Images, int, int, int]


@contextmanager
def _measured(spans: list[_Span], workers: int) -> Iterator[Iterable[list[tuple[int, Moments | str]]]]:
    if workers <= 1 or len(spans) == 1:
        yield map(_measure_span, spans)
        return
    with multiprocessing.get_context("fork").Pool(min(workers, len(spans)), _inherit, (spans,)) as pool:
        yield pool.imap(_measure_inherited, range(len(spans)))


_inherited: list[_Span] = []


def _inherit(spans: list[_Span]) -> None:
    """The images are inherited by fork, not sent with each span."""
    _inherited[:] = spans


def _measure_inherited(number: int) -> list[tuple[int, Moments | str]]:
    return _measure_span(_inherited[number])


def _measure_span(span: _Span) -> list[tuple[int, Moments | str]]:
    images, channels, first, last = span
    found: list[tuple[int, Moments | str]] = []
    for i in range(first, last):
        try:
            pixels = np.asarray(decode_pixels(images.read(i), channels))
            found.append((i, moments(pixels[:, :, None] if pixels.ndim == 2 else pixels)))
        except DamagedImage as error:
            found.append((i, str(error)))
    return found


# --- the sidecar --------------------------------------------------------------------------------------------------


def save(images: Images, stats: ChannelStats) -> Path:
    """Save statistics where `load` finds them; returns the file. Raises UserError if none can be written."""
    failure = ""
    for path in _places(images):
        try:
            kept = _read(path) if path.is_file() else {}
            kept.pop(images.fingerprint, None)
            kept = dict(list(kept.items())[-(_MOST_SOURCES - 1) :]) | {images.fingerprint: asdict(stats)}
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.parent.stat().st_mode & 0o222:  # respect read-only permissions even as root
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
            write_text(path, json.dumps({"format": _FORMAT, "sources": kept}, indent=1) + "\n")
            return path
        except OSError as error:
            failure = f"{path}: {error.strerror or error}"
    raise UserError(f"the statistics cannot be saved ({failure}): set data.mean and data.std to the printed values")


def load(images: Images, channels: int) -> ChannelStats:
    """The saved statistics of exactly these images; of a mixture, those of its sources, by their shares.

    Raises UserError if there are none, or they cannot be used.
    """
    parts = [_load(part, channels) for part in images.parts()]
    found = parts[0] if len(parts) == 1 else _mixed(parts, [source.share for source in images.shares(0)])
    if constant := [number for number, value in enumerate(found.std) if not value]:
        raise UserError(
            f"data.stats = auto: channel {constant[0]} of {images.shard_of(0)} has the same value in all pixels, so it "
            "cannot be normalised: leave it out, or give data.mean and data.std"
        )
    return found


def _mixed(parts: Sequence[ChannelStats], shares: Sequence[float]) -> ChannelStats:
    """The statistics of images that are drawn from several sources by these shares."""
    first, *others = [
        Moments(share, np.array(part.mean), np.square(part.std) * share) for part, share in zip(parts, shares)
    ]
    for other in others:
        first.merge(other)
    images, pixels, damaged = (sum(getattr(part, name) for part in parts) for name in ("images", "pixels", "damaged"))
    return ChannelStats(images, pixels, first.mean.tolist(), np.sqrt(first.squares / first.n).tolist(), damaged)


def _load(images: Images, channels: int) -> ChannelStats:
    source = images.shard_of(0)
    stale = []
    for path in _places(images):
        if not path.is_file():
            continue
        saved = _read(path)
        if (entry := saved.get(images.fingerprint)) is None:
            stale.append(str(path))
            continue
        stats = ChannelStats(**entry)
        if len(stats.mean) != channels:
            raise UserError(
                f"data.stats = auto: {path} is for {len(stats.mean)} channels, and model.in_chans is {channels}: set "
                f"model.in_chans to {len(stats.mean)}, or measure again with `selfvil index SHARDS --stats --channels "
                f"{channels}`"
            )
        return stats
    if stale:
        raise UserError(
            f"data.stats = auto: {stale[0]} was measured on other images than those of data.train, which have the "
            f"fingerprint {images.fingerprint}: measure again with `selfvil index SHARDS --stats`"
        )
    raise UserError(
        f"data.stats = auto: the channels of {source} have not been measured: run `selfvil index SHARDS --stats` with "
        "the value of data.train first, or with each source of a mixture"
    )


def _places(images: Images) -> list[Path]:
    """Where statistics may be: beside the first shard, and in the cache folder. Those of shards behind a URL: there."""
    source, cache = images.paths[0], cache_folder()
    if isinstance(source, Path):
        whole = Path(os.path.abspath(source))  # the name of "." is empty
        beside, identity = [whole.with_name(whole.name + STATS)], os.fsencode(source.resolve())
    else:
        beside, identity = [], str(source).encode()
    name = hashlib.sha256(identity).hexdigest()[:32]
    return [*beside, *([] if cache is None else [cache / (name + STATS)])]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a sidecar by fingerprint; none if it is damaged, which is logged."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != _FORMAT:
            raise ValueError(f"format {tree['format']}")
        return {str(key): entry for key, entry in tree["sources"].items() if _is_valid(entry)}
    except Exception as error:  # a file from elsewhere may hold anything
        _log.warning("%s cannot be read (%s): measure again with `selfvil index SHARDS --stats`", path, error)
        return {}


def _is_valid(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != set(ChannelStats.__dataclass_fields__):
        return False
    mean, std = entry["mean"], entry["std"]
    if not (isinstance(mean, list) and isinstance(std, list) and 0 < len(mean) == len(std) <= MAX_CHANNELS):
        return False
    return all(isinstance(each, float) and math.isfinite(each) for each in mean + std) and min(std) >= 0
