"""Pack images into WebDataset shards: checked, shuffled once and indexed. The same input gives the same bytes.

OUT/NAME-000000.tar ...   members KEY.jpg (or png ...); with labels, KEY.cls; with masks, KEY.mask.png
OUT/NAME-000000.tar.index.npz ...
OUT/classes.txt           the classes in the order of their labels
OUT/sources.tsv           KEY, the file it was made from, and 16 hex digits of the SHA-256 of that file
OUT/skipped.txt           files that were not packed, and why
OUT/warnings.txt          images that were packed although their files have a problem

Until it is complete, the output is in a hidden folder beside OUT. The same command continues there after a crash, from
the last complete shard (`selfvil.data.unfinished`).
"""

import itertools
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter

from selfvil.data.base import Pattern, Progress
from selfvil.data.check import SEVERAL_PAGES, Checked, Checker, decoding_rates
from selfvil.data.classes import CLASSES
from selfvil.data.index import index_shards
from selfvil.data.order import Order
from selfvil.data.pack_sources import open_source
from selfvil.data.processes import map_processes
from selfvil.data.sources import MASK, Source
from selfvil.data.unfinished import Unfinished, identify, unfinished_shards
from selfvil.errors import UserError, shorten

_CHUNK = 32  # images in one task of a worker
_LARGE = 640  # pixels of the shorter side, well above what training at 224 needs
_TRIED = 8  # images whose decoding is timed


@dataclass(frozen=True)
class PackReport:
    """Result of `pack`, in the folder `out`.

    Attributes:
        shards, samples: their numbers.
        classes: number of names in classes.txt, or of different labels if there are no names.
        bytes: size of the shards.
        skipped: (source, reason) of images that could not be read.
        warnings: (source, problem) of images that were packed nevertheless.
        notes: sentences about the whole data set.
    """

    out: Path
    shards: int
    samples: int
    classes: int
    bytes: int
    skipped: list[tuple[str, str]]
    warnings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        labels = f"{self.classes} classes" if self.classes else "no labels"
        skipped = f"; {len(self.skipped)} unreadable files are listed in {self.out / 'skipped.txt'}"
        first = (
            f"{self.samples} images in {self.shards} shards ({self.bytes / 1e6:.1f} MB; {labels}) in {self.out}"
            f"{skipped if self.skipped else ''}"
        )
        return shorten("\n".join([shorten(first, 500), *(f"  {shorten(note, 400)}" for note in self.notes)]))


def pack(
    source: Pattern,
    out: str | os.PathLike[str],
    *,
    name: str = "shard",
    samples_per_shard: int = 5000,
    shard_bytes: int = 1 << 30,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    labels: bool = True,
    image: str | None = None,
    mask: str | None = None,
    max_value: int | None = None,
    strict: bool = False,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack an image folder, or existing shards, into new shards OUT/NAME-000000.tar.

    The bytes of the files are kept; the member's extension is that of the real format. Each image is decoded fully:
    `selfvil.data.check` lists which damage this detects. The result does not depend on the number of workers. `out`
    appears when it is complete. After an interruption, the same call continues from the last complete shard, and its
    result is the same as without the interruption.

    Args:
        source: a folder of images (its rules: `selfvil.data.sources`), or any other source of `open_images`; the image
            and the label of each sample are kept, and its mask in a folder or in shards.
        out: a new or empty folder.
        samples_per_shard, shard_bytes: limits of a shard.
        size: resize larger images until their shorter side has this many pixels (bicubic; JPEG and opaque WebP become
            JPEG of quality 95, other formats PNG; masks by nearest neighbour).
        classes: the classes in the order of their labels, so that several folders (train, test) agree.
        labels: whether to store labels.
        image: the extension of the image if several files or members have the same name.
        mask: the extension of the mask in that case; it becomes KEY.mask.png. Files KEY.mask.png are always masks.
        max_value: the value of white in 16-bit grey whose files do not declare their range, such as 4095 for 12 bits;
            these images are stored with 8 bits. Without it, white is 65535.
        strict: leave out images for which decoders give warnings.
        seed: of the shuffle, which distributes classes and folders over the shards.
        workers: processes; None for all cores.

    Raises:
        UserError: no images, none readable, a class missing from `classes`, shards damaged, `out` in use or not
            writable.
    """
    out = Path(out).expanduser()
    if not name or "/" in name or "." in name:
        raise UserError(f"shard name {name!r} must be a plain word without dots and slashes, such as train")
    if min(samples_per_shard, shard_bytes, 1 if size is None else size, 1 if workers is None else workers) < 1:
        raise UserError("samples_per_shard, shard_bytes, size and workers must be at least 1")
    if max_value is not None and not 255 < max_value <= 65535:
        raise UserError(f"a maximum value of {max_value} is not possible; 16-bit grey has one from 256 to 65535")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files; give a new folder to pack into (nothing was changed)")
    images = open_source(source, classes, labels, image, mask)
    check = Checker(images.read, images.read_mask, size, max_value, strict)
    found = _Findings(images)
    aside = out.absolute().with_name(f".{out.absolute().name}.packing")
    identity = identify(
        source, images,
        [name, samples_per_shard, shard_bytes, size, list(classes or []), labels, image, mask, max_value, strict, seed],
    )  # fmt: skip
    keep = True
    try:
        ids = Order(images.size, seed).ids(np.arange(images.size)).tolist()
        with Unfinished(aside, identity) as unfinished:
            done = unfinished.records
            with (
                _ShardFiles(unfinished, name, samples_per_shard, shard_bytes) as shards,
                closing(_check_all(check, ids, len(done), workers, progress)) as checked,
            ):
                _write(images, itertools.chain(zip(ids, done), checked), shards, found)
        if not found.samples:
            keep = False
            raise UserError(
                f"none of the {images.size} images of {source} can be read; the first: {': '.join(min(found.skipped))}"
            )
        if images.classes:
            _write_lines(aside / CLASSES, images.classes)
        for file, lines in (("skipped.txt", found.skipped + images.left_out), ("warnings.txt", found.warnings)):
            if lines:
                _write_lines(aside / file, (f"{path}: {reason}" for path, reason in sorted(lines)))
        unfinished.finish()
        report = index_shards(aside)
        aside.rename(out)
    except BrokenProcessPool:
        raise UserError("a packing worker died, most often because memory ran out; pack with fewer workers") from None
    except OSError as error:
        raise UserError(f"cannot pack into {out}: {error}") from None
    finally:
        if not keep or not unfinished_shards(aside):
            shutil.rmtree(aside, ignore_errors=True)
    return PackReport(
        out, report.shards, found.samples, len(images.classes) or len(found.labels), report.bytes,
        sorted(found.skipped), sorted(found.warnings), found.describe(size, max_value),
    )  # fmt: skip


def _write(images: Source, checked: Iterable[tuple[int, Checked]], shards: "_ShardFiles", found: "_Findings") -> None:
    """Fill the shards and sources.tsv."""
    with open(shards.folder / "sources.tsv", "w", encoding="utf-8", errors="backslashreplace") as sources:
        for i, image in checked:
            key = f"{shards.name}-{found.samples:08d}"
            if not found.add(i, image):
                shards.note(image)
                continue
            sources.write(f"{key}\t{_one_line(images.name(i))}\t{image.origin}\n")
            if not image.data:  # it is in a shard of the interrupted call
                shards.note(image)
                continue
            members = {image.extension: image.data}
            if image.mask:
                members[MASK] = image.mask
            if images.labels[i] >= 0:
                members["cls"] = str(images.labels[i]).encode()
            shards.add(key, members)
            shards.note(image)


class _ShardFiles:
    """Consecutive tar files; a sample that would exceed a limit of the current one starts the next."""

    def __init__(self, unfinished: Unfinished, name: str, most_samples: int, most_bytes: int) -> None:
        self.unfinished, self.folder = unfinished, unfinished.folder
        self.name, self.most_samples, self.most_bytes = name, most_samples, most_bytes
        self.number, self.samples, self.bytes = unfinished.shards, 0, 0
        self.notes: list[Checked] = []
        self._known = len(unfinished.records)
        self.file: BinaryIO | None = None

    def __enter__(self) -> "_ShardFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._close(complete=error[0] is None)

    def note(self, image: Checked) -> None:
        """Remember an image, packed or left out, for the record of the current shard."""
        if self._known:
            self._known -= 1  # it is on record
        else:
            self.notes.append(image)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        size = sum(map(len, members.values()))
        if self.file is None or self.samples == self.most_samples or self.bytes + size > self.most_bytes:
            self._close()
            self.file = open(self.folder / f"{self.name}-{self.number:06d}.tar", "xb")  # noqa: SIM115 - closed below
            # Fixed owner and time, so that the same images give the same file. The default encoder would pickle.
            self.tar = TarWriter(self.file, user="", group="", mode=0o644, mtime=0, encoder=False)
            self.number, self.samples, self.bytes = self.number + 1, 0, 0
        self.tar.write({"__key__": key, **members})
        self.samples, self.bytes = self.samples + 1, self.bytes + size

    def _close(self, complete: bool = True) -> None:
        if self.file is not None:
            self.tar.close()
            self.file.close()
            if complete:
                self.unfinished.record(Path(self.file.name), self.notes)
            self.file, self.notes = None, []


# --- checking images, in parallel ---------------------------------------------------------------------------------

_Check = Callable[[int], Checked]


def _check_all(
    check: _Check, ids: list[int], done: int, workers: int | None, progress: Progress | None
) -> Generator[tuple[int, Checked], None, None]:
    """Each id with its checked image, in the order of `ids`, without the first `done`."""
    chunks = [ids[start : start + _CHUNK] for start in range(done, len(ids), _CHUNK)]
    for chunk, checked in zip(chunks, map_processes(check, chunks, workers)):
        yield from zip(chunk, checked)
        done += len(chunk)
        if progress is not None:
            progress(done, len(ids))


# --- the report ---------------------------------------------------------------------------------------------------


class _Findings:
    """Statistics of the images that were checked so far, for the report."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.samples = self.damaged = self.several_pages = self.masks = self.deep = self.deepest = 0
        self.labels = Counter[int]()
        self.skipped: list[tuple[str, str]] = []
        self.warnings: list[tuple[str, str]] = []
        self.sides = array("i")  # width, height, width ...
        self.tried: list[bytes] = []

    def add(self, i: int, image: Checked) -> bool:
        """Add an image to the statistics; whether it is packed."""
        if image.reason:
            self.skipped.append((self.source.name(i), image.reason))
            return False
        self.samples += 1
        if self.source.labels[i] >= 0:
            self.labels[int(self.source.labels[i])] += 1
        self.warnings += [(self.source.name(i), text) for text in (*image.damage, *image.notes)]
        self.damaged += bool(image.damage)
        self.several_pages += SEVERAL_PAGES in image.notes
        self.masks += bool(image.mask)
        self.deep += image.deepest > 0
        self.deepest = max(self.deepest, image.deepest)
        self.sides.extend(image.size)
        if image.data and len(self.tried) < _TRIED:  # the order is shuffled, so these are a random sample
            self.tried.append(image.data)
        return True

    def describe(self, size: int | None, max_value: int | None) -> list[str]:
        notes = [*self.source.notes]
        if self.masks:
            notes.append(f"{self.masks} samples have a mask, KEY.{MASK}")
        if self.damaged:
            notes.append(
                f"{self.damaged} images are probably damaged: a decoder gave warnings and pixels; they are listed in "
                "warnings.txt, and --strict leaves them out"
            )
        if self.several_pages:
            notes.append(f"{self.several_pages} files hold several pages or frames; only the first is packed")
        if other := len({name for name, _ in self.warnings}) - self.damaged - self.several_pages:
            notes += [f"{other} images have other problems, listed in warnings.txt"] * (other > 0)
        return notes + self._describe_classes() + self._describe_depth(max_value) + self._describe_size(size)

    def _describe_classes(self) -> list[str]:
        empty = [f"{name} ({i})" for i, name in enumerate(self.source.classes) if i not in self.labels]
        if empty:
            shown = ", ".join(shorten(name, 60) for name in empty[:5]) + (" ..." if len(empty) > 5 else "")
            return [
                f"{len(empty)} of {len(self.source.classes)} classes have no image: {shown}; they keep their labels, "
                "so that the other classes keep theirs"
            ]
        if self.labels and not self.source.classes:
            return [f"labels {min(self.labels)} to {max(self.labels)}, without names: the source has no classes.txt"]
        return []

    def _describe_depth(self, max_value: int | None) -> list[str]:
        if max_value is not None or not 0 < self.deepest < 1 << 14:
            return []
        likely = (1 << max(9, self.deepest.bit_length())) - 1
        return [
            f"{self.deep} images of 16-bit grey have values up to only {self.deepest}, and white is 65535: set "
            f"data.mean and data.std accordingly (selfvil index SHARDS --stats); or, if they hold "
            f"{likely.bit_length()} bits, convert them to 8 bits with --max-value {likely}"
        ]

    def _describe_size(self, size: int | None) -> list[str]:
        sides = np.frombuffer(self.sides, np.int32).reshape(-1, 2).astype(np.int64)
        if np.median(sides.min(axis=1)) <= _LARGE or (size or 0) > _LARGE:
            return []
        if not self.tried:  # a call that only finished an interrupted one
            return []
        now, then = decoding_rates(self.tried, 320)
        return [
            f"the images are larger than training needs: their median is {np.median(sides.prod(axis=1)) / 1e6:.1f} "
            f"megapixels, and one core of this machine decodes {_rate(now)} images per second; packed with --size 320, "
            f"it would decode {_rate(then)}"
        ]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{_one_line(line)}\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("\t", " ")
