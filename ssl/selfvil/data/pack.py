"""Pack images into WebDataset shards: checked, shuffled once, indexed, and the same bytes every time.

OUT/NAME-000000.tar ...   members KEY.jpg (or png ...) and, with labels, KEY.cls
OUT/NAME-000000.tar.index.npz ...
OUT/classes.txt           the classes in the order of their labels
OUT/sources.tsv           KEY and the file it was made from
OUT/skipped.txt           files that could not be read as images, and why
"""

import io
import itertools
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from webdataset import TarWriter

from selfvil.data.classes import CLASSES, class_names
from selfvil.data.index import Pattern, Progress, Shards, index_shards, open_shards
from selfvil.data.order import Order
from selfvil.data.read import EXTENSIONS, MAX_BYTES, DamagedImage, decode_image, open_image
from selfvil.errors import UserError

_CHUNK = 32  # images a worker takes at once
_SUFFIXES = tuple(f".{name}" for name in EXTENSIONS)
_MEMBERS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm"}


@dataclass(frozen=True)
class PackReport:
    """What was packed into the folder `out`. `bytes` counts the shards; `skipped` holds (source, reason)."""

    out: Path
    shards: int
    samples: int
    classes: int
    bytes: int
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        labels = f"{self.classes} classes" if self.classes else "no labels"
        skipped = f"; {len(self.skipped)} unreadable files are listed in {self.out / 'skipped.txt'}"
        return (
            f"{self.samples} images in {self.shards} shards ({self.bytes / 1e6:.1f} MB; {labels}) in {self.out}"
            f"{skipped if self.skipped else ''}"
        )


class _Image(NamedTuple):
    """A checked image: the bytes to store, and the extension of its member; or, with no bytes, why it is skipped."""

    data: bytes
    extension: str = ""
    reason: str = ""


class _Source(NamedTuple):
    """Where images come from: `read(i)` gives bytes, `name(i)` what to call them; `labels` (N,) int64, -1 for none."""

    size: int
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    labels: np.ndarray
    classes: list[str]


def pack(
    source: Pattern,
    out: str | os.PathLike[str],
    *,
    name: str = "shard",
    samples_per_shard: int = 5000,
    shard_bytes: int = 1 << 30,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack an image folder, or existing shards, into new shards OUT/NAME-000000.tar.

    Files are kept as they are, but for the name of their member, which tells their real format. The result does not
    depend on the number of workers. Whatever fails, `out` appears whole or not at all.

    Args:
        source: a folder of images, at any depth; or a pattern of shards (see `expand_shards`), of which the image and
            the label of each sample are kept. Where all images of a folder lie in two or more subfolders, these are the
            classes, in alphabetical order; hidden files are left out.
        out: a new or empty folder.
        samples_per_shard, shard_bytes: a shard is closed when either would be exceeded.
        size: shrink larger images until their shorter side has this many pixels (bicubic; JPEG and opaque WebP become
            JPEG of quality 95, all else PNG).
        classes: the classes in the order of their labels, so that several folders (train, test) agree.
        seed: of the shuffle, which mixes classes and folders over the shards.
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files; give a new folder to pack into (nothing was changed)")
    images = _open_source(source, classes)
    aside = out.absolute().with_name(f".{out.absolute().name}.packing-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        ids = Order(images.size, seed).ids(np.arange(images.size)).tolist()
        with (
            _ShardFiles(aside, name, samples_per_shard, shard_bytes) as shards,
            closing(_check_all(images, ids, size, workers, progress)) as checked,
        ):
            samples, skipped = _write(images, checked, shards)
        if not samples:
            raise UserError(
                f"none of the {images.size} images of {source} can be read; the first: {': '.join(skipped[0])}"
            )
        if images.classes:
            _write_lines(aside / CLASSES, images.classes)
        if skipped:
            _write_lines(aside / "skipped.txt", (f"{path}: {reason}" for path, reason in skipped))
        report = index_shards(aside)
        aside.rename(out)
    except BrokenProcessPool:
        raise UserError("a packing worker died, most often for want of memory; pack with fewer workers") from None
    except OSError as error:
        raise UserError(f"cannot pack into {out}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return PackReport(out, report.shards, samples, len(images.classes), report.bytes, skipped)


def _write(
    images: _Source, checked: Iterable[tuple[int, _Image]], shards: "_ShardFiles"
) -> tuple[int, list[tuple[str, str]]]:
    """Fill the shards and sources.tsv; returns the number of samples, and (source, reason) of what was skipped."""
    samples, skipped = 0, []
    with open(shards.folder / "sources.tsv", "w", encoding="utf-8", errors="backslashreplace") as sources:
        for i, image in checked:
            if image.reason:
                skipped.append((images.name(i), image.reason))
                continue
            key = f"{shards.name}-{samples:08d}"
            members = {image.extension: image.data}
            if images.labels[i] >= 0:
                members["cls"] = str(images.labels[i]).encode()
            shards.add(key, members)
            sources.write(f"{key}\t{_one_line(images.name(i))}\n")
            samples += 1
    return samples, sorted(skipped)


class _ShardFiles:
    """Consecutive tar files; each sample goes into the current one, or begins the next."""

    def __init__(self, folder: Path, name: str, most_samples: int, most_bytes: int) -> None:
        self.folder, self.name, self.most_samples, self.most_bytes = folder, name, most_samples, most_bytes
        self.number = self.samples = self.bytes = 0
        self.file: BinaryIO | None = None

    def __enter__(self) -> "_ShardFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        size = sum(map(len, members.values()))
        if self.file is None or self.samples == self.most_samples or self.bytes + size > self.most_bytes:
            self._close()
            self.file = open(self.folder / f"{self.name}-{self.number:06d}.tar", "xb")  # noqa: SIM115 - closed below
            # Fixed owner and time: the same images give the same file. The encoder would pickle; bytes need none.
            self.tar = TarWriter(self.file, user="", group="", mode=0o644, mtime=0, encoder=False)
            self.number, self.samples, self.bytes = self.number + 1, 0, 0
        self.tar.write({"__key__": key, **members})
        self.samples, self.bytes = self.samples + 1, self.bytes + size

    def _close(self) -> None:
        if self.file is not None:
            self.tar.close()
            self.file.close()
            self.file = None


# --- checking images, in parallel ---------------------------------------------------------------------------------

_Check = Callable[[list[int]], list[_Image]]


def _check_all(
    images: _Source, ids: list[int], size: int | None, workers: int | None, progress: Progress | None
) -> Generator[tuple[int, _Image], None, None]:
    """Each id with its checked image, in the order of `ids`."""
    chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    check = partial(_check, images.read, size)
    done = 0
    for chunk, checked in zip(chunks, map(check, chunks) if workers == 1 else _map_processes(check, chunks, workers)):
        yield from zip(chunk, checked)
        done += len(chunk)
        if progress is not None:
            progress(done, len(ids))


def _map_processes(check: _Check, chunks: Iterable[list[int]], workers: int) -> Iterator[list[_Image]]:
    """`map` over processes, in order, with a bounded number of results in memory."""
    # Forked workers inherit the list of files instead of receiving it.
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin_worker, initargs=(check,))
    waiting = iter(chunks)
    try:
        pending = deque(pool.submit(_call_worker, chunk) for chunk in itertools.islice(waiting, 4 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_call_worker, chunk) for chunk in itertools.islice(waiting, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_worker_check: _Check  # set in worker processes only


def _begin_worker(check: _Check) -> None:
    global _worker_check
    _worker_check = check
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others


def _call_worker(chunk: list[int]) -> list[_Image]:
    return _worker_check(chunk)


def _check(read: Callable[[int], bytes], size: int | None, ids: list[int]) -> list[_Image]:
    checked = []
    for i in ids:
        try:
            data = read(i)
            kind = open_image(data).format
            image = decode_image(data, channels=None)
            if size is not None and min(image.size) > size:
                data, kind = _shrink(image, size, str(kind))
            checked.append(_Image(data, _MEMBERS[str(kind)]))
        except DamagedImage as damage:
            checked.append(_Image(b"", reason=str(damage)))
    return checked


def _shrink(image: Image.Image, size: int, kind: str) -> tuple[bytes, str]:
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    kind = "JPEG" if kind in ("JPEG", "MPO", "WEBP") and image.mode != "RGBA" else "PNG"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue(), kind


# --- where images come from ---------------------------------------------------------------------------------------


def _open_source(source: Pattern, classes: Sequence[str] | None) -> _Source:
    folder = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and folder.is_dir():
        files = list(_list_images(folder, ()))
        tars = any(folder.glob("*.tar"))
        if files and tars:
            raise UserError(f"{folder} holds both images and .tar files; give the images' folder, or {folder}/*.tar")
        if not files and not tars:
            raise UserError(f"{folder} holds no images; expected files ending in {', '.join(_SUFFIXES)}, or shards")
        if files:
            return _open_folder(folder, files, classes)
    elif folder is not None and folder.is_file() and folder.suffix != ".tar":
        raise UserError(f"{folder} is a file; expected a folder of images, or WebDataset shards (.tar)")
    if classes is not None:
        raise UserError(f"classes are for a folder of images; the labels of the shards {source} are kept as they are")
    return _open_shards(open_shards(source))


def _list_images(folder: Path, within: tuple[str, ...]) -> Iterator[str]:
    """Image files at any depth, sorted, links followed but not in circles; hidden ones are left out."""
    real = os.path.realpath(folder)
    if real in within:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _list_images(Path(entry.path), (*within, real))
        elif entry.name.lower().endswith(_SUFFIXES):
            yield entry.path


def _open_folder(folder: Path, files: list[str], classes: Sequence[str] | None) -> _Source:
    names = [os.path.relpath(file, folder) for file in files]
    tops = [name.split(os.sep)[0] if os.sep in name else None for name in names]
    found = sorted({top for top in tops if top is not None})
    if classes is None:
        classes = found if None not in tops and len(found) > 1 else []
    elif unknown := sorted({str(top) for top in tops if top not in classes}):
        raise UserError(
            f"{folder}: every image must lie in a subfolder named after one of the {len(classes)} given classes, but "
            f"there is {', '.join(unknown[:5]).replace('None', 'an image outside of any')}"
        )
    labels = {top: label for label, top in enumerate(classes)}
    numbers = np.array([labels.get(str(top), -1) for top in tops], np.int64)
    return _Source(len(files), partial(_read_file, files), names.__getitem__, numbers, list(classes))


def _read_file(files: list[str], i: int) -> bytes:
    try:
        with open(files[i], "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise DamagedImage(f"its {size} bytes are more than the limit of {MAX_BYTES}")
            return file.read()
    except OSError as error:
        raise DamagedImage(f"cannot be read: {error.strerror}") from None


def _open_shards(shards: Shards) -> _Source:
    labels = np.full(len(shards), -1) if shards.labels is None else shards.labels
    given = class_names(shards) if shards.num_classes else None
    # Without names the numbers are the names, unless most of them would be of classes without images.
    numbers = range(shards.num_classes if shards.num_classes <= 1000 + 10 * len(shards) else 0)
    classes = given.names if given else [str(label) for label in numbers]
    return _Source(len(shards), shards.read, lambda i: f"{shards.shard_of(i)}:{shards.key(i)}", labels, classes)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{_one_line(line)}\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("\t", " ")
