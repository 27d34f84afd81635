"""Embed images and write the embeddings to a file, or return them: `selfvil embed`.

    selfvil.embed("photos/", "exported", "photos.parquet")
    found = selfvil.embed("photos/", "exported")            # found.keys, found.labels, found.features

Images are divided into parts of consecutive batches. Processes share the parts; each finished part is a file in
OUT.partial, so a killed command continues. The main process then writes the parts in order to the output.
"""

import datetime
import logging
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from selfvil.data.base import Pattern
from selfvil.data.images import open_images
from selfvil.data.loader import ordered_batches
from selfvil.embedding.encoder import Encoder, load_encoder
from selfvil.embedding.formats import FORMAT, Layout, Rows, open_writer, publish, require_format, require_lines, targets
from selfvil.embedding.keys import Images, image_keys
from selfvil.embedding.parts import Part, PartFolder
from selfvil.errors import UserError, redact, shorten
from selfvil.evaluate.features import ALONE, Precision
from selfvil.evaluate.processes import Processes
from selfvil.files import require_writable
from selfvil.runtime import commit
from selfvil.version import __version__

log = logging.getLogger(__name__)

_PART_IMAGES = 1024  # at most, so that little is lost by a kill
_PART_BYTES = 2**25
_LISTED = 1000  # images that are left out, in the metadata

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Embeddings:
    """N embeddings in memory.

    Attributes:
        keys: name of each image: its path in the folder, or its key in the shards.
        labels: int64 (N,), -1 for images without one; None if no image has a label.
        features: float32 or float16 (N, D).
        patches: (N, H, W, C), or None.
        left_out: (key, reason) of images that could not be read.
        metadata: model, readout, normalisation, versions.
    """

    keys: list[str]
    labels: np.ndarray | None
    features: np.ndarray
    patches: np.ndarray | None
    left_out: list[tuple[str, str]]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the first image is read."""

    encoder: Encoder
    images: Images
    key: Callable[[int], str]
    dtype: np.dtype
    batch_size: int
    workers: int
    patches: bool

    @property
    def row_bytes(self) -> int:
        height, width = self.encoder.grid or (0, 0)
        values = self.encoder.dim + (height * width * self.encoder.channels if self.patches else 0)
        return values * self.dtype.itemsize

    @property
    def batches(self) -> int:
        return -(-len(self.images) // self.batch_size)

    @property
    def batches_per_part(self) -> int:
        return max(1, min(_PART_IMAGES, _PART_BYTES // self.row_bytes) // self.batch_size)

    @property
    def parts(self) -> int:
        return -(-self.batches // self.batches_per_part)

    def layout(self, count: int) -> Layout:
        shape = (*(self.encoder.grid or (0, 0)), self.encoder.channels) if self.patches else None
        return Layout(count, self.encoder.dim, shape, self.images.labels is not None, self.dtype)


def embed(
    images: Pattern,
    model: str | Path,
    out: str | Path | None = None,
    *,
    patches: bool = False,
    readout: str | None = None,
    network: str | None = None,
    image: str | None = None,
    img_size: int | Sequence[int] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    precision: Precision = "fp32",
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Path | Embeddings:
    """Embeddings of all readable images, in their order: written to `out`, or returned if `out` is None.

    Each image is resized and cropped at its centre to the network's size. Images that cannot be read are left out, with
    a warning that names them. Rows do not depend on the number of processes or workers, nor on a kill and a restart.

    Args:
        images: a folder of image files, at any depth, or shards. Labels are not needed.
        model: an export, a run, a checkpoint: what `load_backbone` accepts.
        out: a file ending in .parquet (needs pyarrow) or .npy; see `selfvil.embedding.formats`.
        patches: also the features of each patch, after the final norm.
        readout: how tokens become one vector: mean, cls, first_last_mean ...; None: the architecture's usual one.
        network: which network of a run that has several.
        image: extension of the image to use where several have the same name.
        img_size: pixels, or height and width; None: as in pretraining.
        dtype: of the values in the file.
        precision: arithmetic of the backbone: float32, or bf16 autocast.
        batch_size: images in a forward pass; None: 64 on a CPU, 256 elsewhere.
        workers: processes that decode images; 0 decodes in this process.
        device: None: a GPU if there is one.
        overwrite: replace an existing `out`, and parts of another embedding beside it.
        progress: called with (done, total) images of this process.
        processes: which share the images; every one calls this with the same arguments, and `out` is required.

    Returns the path `out`, or `Embeddings`.

    Raises UserError for anything wrong with images, model or `out`, before images are embedded; while embedding: a
    feature is NaN or infinite, no image can be read, or the disk is full.
    """
    target = None if out is None else Path(out).expanduser()
    prepare = partial(
        _prepare, images, model, target, patches=patches, readout=readout, network=network, image=image,
        img_size=img_size, dtype=dtype, precision=precision, batch_size=batch_size, workers=workers, device=device,
        overwrite=overwrite, is_main=processes.is_main,
    )  # fmt: skip
    job = processes.together(prepare)
    metadata = _metadata(job, images, model, network)
    if target is None:
        if processes.world_size > 1:
            raise UserError("several processes can embed to a file only: give `out`")
        return _in_memory(job, metadata, progress)
    folder, about = PartFolder(target), _about(job, metadata["model"])
    try:
        found = processes.together(lambda: _claim(folder, about, overwrite, job) if processes.is_main else [])
        finished = set(processes.exchange(found)[0])
        pending = [number for number in range(job.parts) if number not in finished]
        if finished and processes.is_main:
            log.warning(
                "%s: %d of %d parts are finished, the rest is embedded now", folder.path, len(finished), job.parts
            )
        rank, count = processes.rank, len(pending)
        own = pending[count * rank // processes.world_size : count * (rank + 1) // processes.world_size]
        processes.together(lambda: _write_parts(job, folder, own, progress))
        processes.together(lambda: _finish(job, folder, target, metadata) if processes.is_main else None)
    finally:
        folder.release()
    return target


# --- before the first image ------------------------------------------------------------------------------------------


def _prepare(
    images: Pattern,
    model: str | Path,
    out: Path | None,
    *,
    patches: bool,
    readout: str | None,
    network: str | None,
    image: str | None,
    img_size: int | Sequence[int] | None,
    dtype: str,
    precision: Precision,
    batch_size: int | None,
    workers: int,
    device: torch.device | str | None,
    overwrite: bool,
    is_main: bool,
) -> _Job:
    """All checks that need no forward pass over the images, the cheap ones first."""
    if dtype not in ("float32", "float16"):
        raise UserError(f"There is no dtype {dtype!r}; choose one of: float32, float16.")
    if workers < 0 or (batch_size is not None and batch_size < 1):
        raise UserError(f"batch size {batch_size} and {workers} workers are not possible; expected 1 and 0, or more")
    if out is not None:
        require_format(out)
        existing = [file for file in targets(out) if file.exists()]
        if existing and not overwrite:
            raise UserError(f"{existing[0]} exists: add --overwrite to replace it, or choose another --out")
        if is_main:
            require_writable(out)
    opened = open_images(images, image=image)
    key, note = image_keys(opened)
    if out is not None and out.suffix == ".npy":
        require_lines(key(i) for i in range(len(opened)))
    encoder = load_encoder(
        model, network=network, readout=readout, img_size=img_size, precision=precision, device=device
    )
    if patches and encoder.grid is None:
        raise UserError(f"the patches of {type(encoder.backbone).__name__} do not form a grid: leave out --patches")
    if batch_size is None:
        batch_size = 64 if encoder.device.type == "cpu" else 256  # as in `selfvil.evaluate.features`
    job = _Job(encoder, opened, key, np.dtype(dtype), batch_size, workers, patches)
    if is_main:
        for sentence in [*getattr(opened, "notes", []), *[note] * bool(note)]:
            log.warning(sentence)
        _check_space(job, out)
    return job


def _check_space(job: _Job, out: Path | None) -> None:
    """Say the cost of patch features, and refuse a disk that is too small."""
    size = job.row_bytes * len(job.images)
    if job.patches and job.encoder.grid is not None:
        height, width = job.encoder.grid
        where = "on the disk, and as much again in OUT.partial until it is finished" if out else "of memory"
        log.warning(
            "patch features: %d x %d x %d values for each of %s images, %s %s",
            height, width, job.encoder.channels, f"{len(job.images):,}", _gigabytes(size), where,
        )  # fmt: skip
    if out is None:
        return
    parts = sum(file.stat().st_size for file in PartFolder(out).path.glob("part-*.npz"))
    needed, free = 2 * size - parts, shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out.parent} has {_gigabytes(free)} free, but {len(job.images):,} images need {_gigabytes(needed)} "
            "(half of it for a while): free space, choose --dtype float16 or another folder"
            + (", or leave out --patches" if job.patches else "")
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _about(job: _Job, model: str) -> dict[str, Any]:
    """What determines the parts: a folder of parts is continued only if all of this is equal."""
    encoder = job.encoder
    return {
        "format": FORMAT,
        "model": model,
        "readout": encoder.readout,
        "image size": list(encoder.normalisation.img_size),
        "mean": list(encoder.normalisation.mean),
        "std": list(encoder.normalisation.std),
        "precision": encoder.precision,
        "images": job.images.fingerprint,
        "number of images": len(job.images),
        "patches": job.patches,
        "dtype": job.dtype.name,
        "batch size": job.batch_size,
    }


def _metadata(job: _Job, images: Pattern, model: str | Path, network: str | None) -> dict[str, Any]:
    """Facts that every embedding file carries."""
    encoder, shape = job.encoder, job.layout(0).patches
    patterns = [images] if isinstance(images, (str, Path)) or not isinstance(images, Sequence) else list(images)
    return {
        "format": FORMAT,
        "source": str(model),
        "network": network,
        "model": encoder.weights_digest(),
        "readout": encoder.readout,
        "dim": encoder.dim,
        "normalisation": {
            "mean": list(encoder.normalisation.mean),
            "std": list(encoder.normalisation.std),
            "img_size": list(encoder.normalisation.img_size),
        },
        "precision": encoder.precision,
        "patches": None if shape is None else list(shape),
        "dataset": [redact(str(each)) for each in patterns],
        "image": getattr(job.images, "image", None),
        "fingerprint": job.images.fingerprint,
        "classes": getattr(job.images, "classes", []),
        "version": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _claim(folder: PartFolder, about: dict[str, Any], overwrite: bool, job: _Job) -> list[int]:
    try:
        folder.claim(about, overwrite)
        return folder.finished(job.parts)
    except OSError as error:
        raise UserError(f"{folder.path} cannot be used: {error.strerror or error}") from None


# --- embed -----------------------------------------------------------------------------------------------------------


def _parts(job: _Job, numbers: Sequence[int], progress: Progress | None) -> Generator[tuple[int, Part], None, None]:
    """Embed the parts with these numbers, in order. While a batch is in the network, workers decode the next ones."""
    spans = [
        range(number * job.batches_per_part, min((number + 1) * job.batches_per_part, job.batches))
        for number in numbers
    ]
    batches = ordered_batches(
        job.images, job.encoder.view, batch_size=job.batch_size, workers=job.workers,
        channels=job.encoder.normalisation.channels, numbers=[batch for span in spans for batch in span],
        skip_damaged=True,
    )  # fmt: skip
    total = sum(min(span.stop * job.batch_size, len(job.images)) - span.start * job.batch_size for span in spans)
    done, shape = 0, job.layout(0).patches
    with closing(batches):
        for number, span in zip(numbers, spans):
            ids = [np.zeros(0, np.int64)]
            features = [np.zeros((0, job.encoder.dim), job.dtype)]
            patches = [np.zeros((0, *shape), job.dtype)] if shape else []
            left_out: list[tuple[int, str]] = []
            for _ in span:
                batch = next(batches)
                left_out += [(bad.id, bad.reason) for bad in batch.bad]
                if len(batch.ids):
                    encoded = job.encoder.encode(batch.views[0], job.patches)
                    ids.append(batch.ids.numpy())
                    for values, kept in ((encoded.features, features), (encoded.patches, patches)):
                        if values is not None:
                            kept.append(_finite(job, values, batch.ids.tolist()))
                done += len(batch.ids) + len(batch.bad)
                if progress is not None:
                    progress(done, total)
            yield (
                number,
                Part(
                    np.concatenate(ids),
                    np.concatenate(features),
                    np.concatenate(patches) if patches else None,
                    left_out,
                ),
            )


def _finite(job: _Job, values: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Values in the dtype of the output. Raises UserError if one of them is NaN or infinite."""
    with np.errstate(over="ignore"):
        stored = values.astype(job.dtype, copy=False)
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if finite.all():
        return stored
    row = int(np.flatnonzero(~finite)[0])
    if np.isfinite(values[row]).all():
        raise UserError(
            f"the features of {job.key(ids[row])} are up to {np.abs(values[row]).max():.3g}, beyond float16: use "
            "--dtype float32"
        )
    raise UserError(
        f"the features of {job.key(ids[row])} hold NaN or infinity: the weights of the model are broken"
        + (", or bf16 is not enough: try --precision fp32" if job.encoder.precision == "bf16" else "")
    )


def _write_parts(job: _Job, folder: PartFolder, numbers: Sequence[int], progress: Progress | None) -> None:
    with closing(_parts(job, numbers, progress)) as parts:
        for number, part in parts:
            try:
                folder.write(number, part)
            except OSError as error:
                raise _unwritable(folder, error) from None


def _unwritable(folder: PartFolder, error: OSError) -> UserError:
    return UserError(
        f"{folder.path} cannot be written: {error.strerror or error}. Finished parts are kept: free space, and run the "
        "same command again to continue"
    )


# --- the output ------------------------------------------------------------------------------------------------------


def _finish(job: _Job, folder: PartFolder, out: Path, metadata: dict[str, Any]) -> None:
    """Write all parts to the output, and remove them."""
    count, left_out = 0, list[tuple[str, str]]()
    for number in range(job.parts):
        part = folder.read(number, with_values=False)
        count += len(part.ids)
        left_out += [(job.key(id), reason) for id, reason in part.left_out]
    if not count:
        folder.remove()
    _report(job, left_out, count)
    metadata = metadata | {"images": count, "left_out": len(left_out), "left_out_first": left_out[:_LISTED]}
    try:
        writer = open_writer(folder.path, out, job.layout(count), metadata)
        try:
            for number in range(job.parts):
                writer.add(_rows(job, folder.read(number)))
        finally:
            writer.close()
        publish(folder.path, out, job.layout(count))
    except OSError as error:
        for file in targets(folder.path / out.name):
            file.unlink(missing_ok=True)
        raise _unwritable(folder, error) from None
    folder.remove()


def _rows(job: _Job, part: Part) -> Rows:
    labels = None if job.images.labels is None else job.images.labels[part.ids].astype(np.int64)
    return Rows([job.key(id) for id in part.ids.tolist()], labels, part.features, part.patches)


def _report(job: _Job, left_out: Sequence[tuple[str, str]], count: int) -> None:
    """Name images that are left out. Raises UserError if no image is left."""
    if not count:
        key, reason = left_out[0]
        raise UserError(f"none of the {len(job.images)} images can be read; the first is {shorten(key, 300)}: {reason}")
    if left_out:
        shown = "; ".join(shorten(f"{key}: {reason}", 200) for key, reason in left_out[:5])
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.warning(
            "%d of %d images cannot be read and are left out: %s%s", len(left_out), len(job.images), shown, more
        )


def _in_memory(job: _Job, metadata: dict[str, Any], progress: Progress | None) -> Embeddings:
    parts = [part for _, part in _parts(job, range(job.parts), progress)]
    rows = [_rows(job, part) for part in parts]
    left_out = [(job.key(id), reason) for part in parts for id, reason in part.left_out]
    _report(job, left_out, sum(len(part.ids) for part in parts))
    return Embeddings(
        [key for part in rows for key in part.keys],
        None
        if job.images.labels is None
        else np.concatenate([part.labels for part in rows if part.labels is not None]),
        np.concatenate([part.features for part in rows]),
        np.concatenate([part.patches for part in rows if part.patches is not None]) if job.patches else None,
        left_out,
        metadata | {"images": sum(len(part.keys) for part in rows), "left_out": len(left_out)},
    )
