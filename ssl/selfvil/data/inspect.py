"""Inspect a data set before training: what it holds, what is damaged, and which images occur more than once.

Every image is decoded fully, by worker processes. `selfvil.data.check` lists which damage this detects, and
`selfvil.data.near` what near-duplicates are.
"""

import itertools
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.check import examine
from selfvil.data.classes import class_names
from selfvil.data.images import open_images
from selfvil.data.near import HEIGHT, WIDTH, near_groups, small_picture
from selfvil.data.origins import origin, origins
from selfvil.data.processes import map_processes
from selfvil.data.read import DamagedImage
from selfvil.errors import UserError, shorten

_CHUNK = 64  # images in one task of a worker
_SHOWN = 5  # names in the text of a report


class _Seen(NamedTuple):
    """What a worker found in one image. picture: of `small_picture`; empty if it cannot be decoded."""

    size: int
    crc: int
    reason: str
    kind: str = ""
    mode: str = ""
    depth: int = 0
    width: int = 0
    height: int = 0
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    picture: bytes = b""
    origin: int = 0


@dataclass
class Inspection:
    """Result of `inspect`; names are keys, with their shard or folder where there are several.

    Attributes:
        source, against: as given.
        images, bytes: number of images, and the size of their files together.
        formats, modes, depths: number of images by format; by Pillow's mode, or for arrays by number and dtype of their
            channels, such as "12 x uint16"; and by bits of a channel.
        sizes: the most frequent "width x height", and how many images have them.
        shorter_side: number of images by the length of the shorter side, in ranges such as "256-511".
        width, height: smallest, median and largest, in pixels.
        classes: (label, name or "", images) of each label, and of each class without images.
        labelled: images with a label.
        damaged: (name, reason) of images that cannot be decoded.
        repaired: (name, warning) of images that a decoder returned although their file is damaged.
        notes: (name, remark) that does not affect the pixels; and ("", remark) about the whole source.
        duplicates: groups of names of equal files.
        conflicts: those of these groups whose labels differ.
        near: groups of near-duplicates; one image stands for its equal files.
        shared: (name, name in `against`) of equal files.
        same_source: the same for other files that were made from the same file, as by `selfvil pack` with another
            size.
        near_shared: the same for near-duplicates.
        seconds: time taken.
    """

    source: str
    against: str | None
    images: int
    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    depths: dict[int, int]
    sizes: dict[str, int]
    shorter_side: dict[str, int]
    width: tuple[int, float, int]
    height: tuple[int, float, int]
    classes: list[tuple[int, str, int]]
    labelled: int
    damaged: list[tuple[str, str]] = field(default_factory=list)
    repaired: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    near: list[list[str]] = field(default_factory=list)
    shared: list[tuple[str, str]] = field(default_factory=list)
    same_source: list[tuple[str, str]] = field(default_factory=list)
    near_shared: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What should be mended before training, as short sentences; empty if nothing is wrong.

        Near-duplicates and notes are no problems: whether they matter depends on the data set.
        """
        found: list[tuple[Sequence[Any], str]] = [
            (self.damaged, "images cannot be decoded"),
            (self.repaired, "images are probably damaged: a decoder gave warnings and pixels"),
            (self.duplicates, "groups of equal files"),
            (self.conflicts, "groups of equal files with different labels"),
            (self.shared, f"images are also in {self.against}"),
            (self.same_source, f"images were made from the same files as images in {self.against}"),
        ]
        return [f"{len(items):,} {text}" for items, text in found if items]

    def to_json(self) -> dict[str, Any]:
        """All attributes and `problems`, for `json.dumps`."""
        return asdict(self) | {"problems": self.problems}

    def __str__(self) -> str:
        return _describe(self)


@dataclass
class Findings:
    """An inspection, and what a picture sheet needs: the source, and the numbers of images in it.

    name: returns the name of image i. random, damaged, repaired: numbers of images. duplicates, near: groups of them.
    """

    report: Inspection
    images: Images
    name: Callable[[int], str]
    random: list[int]
    damaged: list[int]
    repaired: list[int]
    duplicates: list[list[int]]
    near: list[list[int]]


def inspect(
    source: Pattern,
    *,
    against: Pattern | None = None,
    image: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Inspect a folder of images, or shards.

    Args:
        source: as of `open_images`.
        against: another source, whose images are compared with those of `source`: test images, for example.
        image: the extension of the image, if samples have several.
        workers: processes; None for all cores.

    Raises:
        UserError: as `open_images`; or a worker died.
    """
    began = time.perf_counter()
    opened = open_images(source, image=image)
    other = None if against is None else open_images(against, image=image)
    total = len(opened) + (0 if other is None else len(other))
    seen = _examine_all(opened, workers, progress, 0, total)
    seen_other = [] if other is None else _examine_all(other, workers, progress, len(opened), total)
    name = _names(opened)
    report = _summary(source, against, opened, seen, name)
    both = seen + seen_other

    def read(i: int) -> bytes:
        return opened.read(i) if i < len(seen) else other.read(i - len(seen))  # type: ignore[union-attr]

    equal = _equal_files(both, read)
    duplicates = [own for group in equal if len(own := [i for i in group if i < len(seen)]) > 1]
    near = _near(both, equal)
    near_own = [own for group in near if len(own := [i for i in group if i < len(seen)]) > 1]
    if other is not None:
        names_other = _names(other)
        report.shared = _across(equal, len(seen), name, names_other)
        report.same_source = _across(_same_source(opened, seen, other, seen_other, equal), len(seen), name, names_other)
        report.near_shared = _across(near, len(seen), name, names_other)
    report.duplicates = [[name(i) for i in group] for group in duplicates]
    if opened.labels is not None:
        differing = [group for group in duplicates if len({int(opened.labels[i]) for i in group}) > 1]
        report.conflicts = [[name(i) for i in group] for group in differing]
    report.near = [[name(i) for i in group] for group in near_own]
    report.seconds = round(time.perf_counter() - began, 2)
    sound = [i for i, each in enumerate(seen) if not each.reason]
    random = np.random.default_rng(0).permutation(sound)[:20].tolist() if sound else []
    return Findings(
        report, opened, name, random, [i for i, each in enumerate(seen) if each.reason],
        [i for i, each in enumerate(seen) if each.damage], duplicates, near_own,
    )  # fmt: skip


# --- examining images, in parallel --------------------------------------------------------------------------------


def _examine_all(images: Images, workers: int | None, progress: Progress | None, done: int, total: int) -> list[_Seen]:
    def look(i: int) -> _Seen:
        return _examine(images, i)

    chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    seen: list[_Seen] = []
    try:
        for part in map_processes(look, chunks, workers):
            seen += part
            if progress is not None:
                progress(done + len(seen), total)
    except BrokenProcessPool:
        raise UserError(
            f"a worker died while it examined one of the images from number {len(seen):,} on, most often because "
            "memory ran out; inspect with fewer workers (--workers 1)"
        ) from None
    return seen


def _examine(images: Images, i: int) -> _Seen:
    data = b""
    try:
        data = images.read(i)
        found = examine(data)
    except DamagedImage as damage:
        reason = shorten(" ".join(str(damage).split()), 300)
        return _Seen(len(data), zlib.crc32(data), reason, origin=origin(data) if data else 0)
    return _Seen(
        len(data), zlib.crc32(data), "", found.kind, found.mode, found.depth, *found.image.size, found.damage,
        found.notes, small_picture(found.image), origin(data),
    )  # fmt: skip


# --- images that occur more than once -----------------------------------------------------------------------------


def _equal_files(seen: Sequence[_Seen], read: Callable[[int], bytes]) -> list[list[int]]:
    """Groups of images whose files are equal byte by byte. Sizes and CRCs find candidates, which are read again."""
    candidates: dict[tuple[int, int], list[int]] = {}
    for i, each in enumerate(seen):
        if each.size:
            candidates.setdefault((each.size, each.crc), []).append(i)
    groups = []
    for members in candidates.values():
        if len(members) < 2:
            continue
        by_content: dict[bytes, list[int]] = {}
        for i in members:
            try:
                by_content.setdefault(read(i), []).append(i)
            except DamagedImage:  # it was readable before
                continue
        groups += [group for group in by_content.values() if len(group) > 1]
    return groups


def _same_source(
    images: Images, seen: Sequence[_Seen], others: Images, seen_others: Sequence[_Seen], equal: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Groups of images that were made from one file, without those whose files are equal.

    A file that was not packed, as in a folder, is its own source.
    """
    groups: dict[int, list[int]] = {}
    same = {i for group in equal if group[0] < len(seen) <= group[-1] for i in group}
    for first, part, found in ((0, images, seen), (len(seen), others, seen_others)):
        packed = origins(part)
        for i, each in enumerate(found):
            if first + i not in same and (made := int(packed[i]) if packed is not None else each.origin):
                groups.setdefault(made, []).append(first + i)
    return [group for group in groups.values() if len(group) > 1]


def _near(seen: Sequence[_Seen], equal: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of near-duplicates; of equal files only the first is a member."""
    repeated = {i for group in equal for i in group[1:]}
    members = [i for i, each in enumerate(seen) if each.picture and i not in repeated]
    if not members:
        return []
    joined = b"".join(seen[i].picture for i in members)
    pictures = np.frombuffer(joined, np.uint8).reshape(len(members), HEIGHT * WIDTH * 3)
    return [[members[i] for i in group] for group in near_groups(pictures)]


def _across(
    groups: Sequence[Sequence[int]], own: int, name: Callable[[int], str], names_other: Callable[[int], str]
) -> list[tuple[str, str]]:
    """Each image of the source (numbers below `own`) in a group with an image of the other source, and that image."""
    pairs = []
    for group in groups:
        if theirs := next((i for i in group if i >= own), None):
            pairs += [(name(i), names_other(theirs - own)) for i in group if i < own]
    return pairs


# --- the report ---------------------------------------------------------------------------------------------------


def _names(images: Images) -> Callable[[int], str]:
    """The name of image i: its key, with its shard if there are several."""
    if len(images.paths) == 1:
        return images.key
    return lambda i: f"{images.shard_of(i).name}:{images.key(i)}"


def _summary(
    source: Pattern, against: Pattern | None, images: Images, seen: Sequence[_Seen], name: Callable[[int], str]
) -> Inspection:
    sound = [each for each in seen if not each.reason]
    shorter = Counter(_range_of(min(each.width, each.height)) for each in sound)
    sizes = Counter(f"{each.width} x {each.height}" for each in sound)
    report = Inspection(
        str(source), None if against is None else str(against), len(seen), sum(each.size for each in seen),
        formats=dict(Counter(each.kind for each in sound).most_common()),
        modes=dict(Counter(each.mode for each in sound).most_common()),
        depths=dict(Counter(each.depth for each in sound).most_common()),
        sizes=dict(sizes.most_common(20)),
        shorter_side={f"{low}-{high}": shorter[low, high] for low, high in sorted(shorter)},
        width=_extent([each.width for each in sound]),
        height=_extent([each.height for each in sound]),
        classes=_classes(images),
        labelled=0 if images.labels is None else int((images.labels >= 0).sum()),
    )  # fmt: skip
    for i, each in enumerate(seen):
        if each.reason:
            report.damaged.append((name(i), each.reason))
        report.repaired += [(name(i), "; ".join(each.damage))] if each.damage else []
        report.notes += [(name(i), text) for text in each.notes]
    remarks = list(images.notes)
    if images.ignored:
        remarks.append(f"{images.ignored:,} samples have no image")
    empty = [text or str(label) for label, text, count in report.classes if not count]
    if empty:
        remarks.append(f"{len(empty):,} classes have no image: {', '.join(empty[:_SHOWN])}")
    report.notes += [("", remark) for remark in remarks]
    return report


def _range_of(side: int) -> tuple[int, int]:
    """The power of two up to the side, and the last number below the next one."""
    low = 1 << side.bit_length() - 1
    return low, 2 * low - 1


def _extent(values: Sequence[int]) -> tuple[int, float, int]:
    return (min(values), float(statistics.median(values)), max(values)) if values else (0, 0.0, 0)


def _classes(images: Images) -> list[tuple[int, str, int]]:
    if images.labels is None:
        return []
    counts = Counter(images.labels[images.labels >= 0].tolist())
    known = class_names(images)
    names = [] if known is None else known.names
    labels = range(max([len(names) - 1, *counts]) + 1) if names else sorted(counts)
    return [(label, names[label] if label < len(names) else "", counts[label]) for label in labels]


def _describe(report: Inspection) -> str:
    def counted(counts: dict[Any, int], unit: str = "") -> str:
        items = itertools.islice(counts.items(), _SHOWN)
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        return ", ".join(f"{key}{unit}: {count:,}" for key, count in items) + more

    lines = [
        f"{report.images:,} images, {report.bytes / 1e6:.1f} MB, in {report.seconds:.1f} s: {report.source}",
        f"  formats         {counted(report.formats)}",
        f"  modes           {counted(report.modes)}; {counted(report.depths, ' bits')}",
        f"  sizes           {counted(report.sizes)}",
        f"  shorter side    {counted(report.shorter_side)} pixels",
    ]
    if report.classes:
        counts = [count for _, _, count in report.classes]
        shown = ", ".join(f"{name or label}: {count:,}" for label, name, count in report.classes[:_SHOWN])
        more = f" and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else ""
        lines.append(
            f"  classes         {len(counts):,}, from {min(counts):,} to {max(counts):,} images ({shown}{more}); "
            f"{report.images - report.labelled:,} images without a label"
        )
    lists: list[tuple[str, list[str]]] = [
        ("damaged", [f"{name}: {reason}" for name, reason in report.damaged]),
        ("repaired by a decoder", [f"{name}: {text}" for name, text in report.repaired]),
        ("groups of equal files", [" = ".join(group[:4]) for group in report.duplicates]),
        ("equal files, different labels", [" = ".join(group[:4]) for group in report.conflicts]),
        ("groups of near-duplicates", [" ~ ".join(group[:4]) for group in report.near]),
    ]
    if report.against is not None:
        lists.append((f"also in {report.against}", [f"{a} = {b}" for a, b in report.shared]))
        lists.append((f"from the same files as in {report.against}", [f"{a} = {b}" for a, b in report.same_source]))
        lists.append((f"near-duplicates in {report.against}", [f"{a} ~ {b}" for a, b in report.near_shared]))
    lists.append(("notes", [f"{name}: {text}" if name else text for name, text in report.notes]))
    for title, items in lists:
        if items or title != "notes":
            lines.append(f"  {title}: {len(items):,}")
        lines += [f"    {shorten(item, 300)}" for item in items[:_SHOWN]]
    wrong = "; ".join(report.problems)
    return "\n".join([*lines, f"problems: {wrong}" if wrong else "no problems"])
