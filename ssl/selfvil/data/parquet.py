"""A Hugging Face data set on the disk: Parquet files with the bytes of images, or a folder of `Dataset.save_to_disk`.

The column `image` holds the bytes of an image file, or a struct with a field `bytes`, as `datasets` writes it. The
column `label` holds class numbers, whose names are in the metadata of the file, or names. Other columns are not used.

A Parquet file is read by row groups, of which one image needs the whole: 1.5 to 2.5 ms an image for groups of 100
photos, against 0.02 ms from a shard. So each file is converted once, by one sequential pass, to a shard in the user's
cache folder, which takes as much space as the data set (XDG_CACHE_HOME names another disk).
"""

import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfvil.data.base import Progress
from selfvil.data.columns import cache_folder
from selfvil.data.index import Shards, local_files
from selfvil.data.shard import load_index
from selfvil.data.sidecar import LARGEST_LABEL, Stamp
from selfvil.errors import UserError, shorten

_BATCH = 64  # rows in memory at once
_LARGEST_GROUP = 8 << 30  # bytes of a row group, unpacked
_MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"II*\0": "tif", b"MM\0*": "tif", b"BM": "bmp"}

_log = logging.getLogger(__name__)


class ParquetImages(Shards):
    """The images of a Hugging Face data set, in the order of the files and their rows. Made by `open_images`.

    The key of an image is the number of its row, from 0.
    """

    holder = "file"

    def __init__(self, files: Sequence[Path], progress: Progress | None = None) -> None:
        """files: Parquet files, or Arrow files of `save_to_disk`. Raises UserError."""
        names = _class_names(files)
        tars = []
        for number, file in enumerate(files):
            tars.append(_convert(file, names))
            if progress is not None:
                progress(number + 1, len(files))
        super().__init__(files, [load_index(tar)[0] for tar in tars], local_files(tars))
        self.classes = names


def data_files(folder: Path) -> list[Path]:
    """The files of a data set in a folder: those of `save_to_disk`, or *.parquet; empty if it is none.

    Raises UserError if the folder holds several splits, or a selection of rows that was not written.
    """
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{folder} holds several splits ({', '.join(splits)[:200]}); give one, such as {folder}/train")
    if not state.is_file():
        return sorted(folder.glob("*.parquet"))
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in content["_data_files"]]
        if content.get("_indices_files"):
            raise UserError(f"{folder} holds a selection of rows; save it again after `dataset.flatten_indices()`")
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{state} is no description of a saved data set: {error}") from None
    return [folder / name for name in names]


def holds_images(file: Path) -> bool:
    """Whether a Parquet file has a column image; without one, it may be a table of paths. Raises UserError."""
    return "image" in _open(file)[0].names


def read_columns(file: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """These columns of a Parquet file as Python values, those that exist; the first one must. Raises UserError."""
    schema, _ = _open(file)
    found = [name for name in names if name in schema.names]
    if names[0] not in found:
        raise UserError(
            f"{file} has the columns {shorten(', '.join(schema.names), 200)}; expected image with the bytes of images, "
            "or path with their paths"
        )
    try:
        table = _pyarrow("pyarrow.parquet").read_table(file, columns=found)
        return {name: table.column(name).to_pylist() for name in found}
    except Exception as error:  # damaged files raise many classes
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from None


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("Parquet and Arrow files need pyarrow: pip install 'selfvil[parquet]'") from None


def _open(file: Path) -> tuple[Any, Any]:
    """The schema of a file, and the open Parquet file, or None for an Arrow file. Raises UserError."""
    parquet, ipc = _pyarrow("pyarrow.parquet"), _pyarrow("pyarrow.ipc")
    try:
        if file.suffix.lower() == ".arrow":
            with open(file, "rb") as source, ipc.open_stream(source) as stream:
                return stream.schema, None
        opened = parquet.ParquetFile(file)
        sizes = [opened.metadata.row_group(i).total_byte_size for i in range(opened.metadata.num_row_groups)]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or _first_line(error)}") from None
    except Exception as error:  # damaged files raise many classes
        raise UserError(f"{file} is damaged, or no {file.suffix[1:]} file: {_first_line(error)}") from None
    if max(sizes, default=0) > _LARGEST_GROUP:
        raise UserError(f"{file} has a row group of {max(sizes):,} bytes; at most {_LARGEST_GROUP:,} are read")
    return opened.schema_arrow, opened


def _batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Record batches with these columns. Raises UserError."""
    _, opened = _open(file)
    try:
        if opened is not None:
            yield from opened.iter_batches(batch_size=_BATCH, columns=list(columns))
            return
        with open(file, "rb") as source, _pyarrow("pyarrow.ipc").open_stream(source) as stream:
            for batch in stream:
                yield batch.select(list(columns))
    except UserError:
        raise
    except Exception as error:  # damaged files raise many classes
        raise UserError(f"{file} is damaged: {_first_line(error)}") from None


def _class_names(files: Sequence[Path]) -> list[str]:
    """The names of the labels: of the metadata, or the different names in the column, in alphabetical order."""
    names: set[str] = set()
    declared: list[str] | None = None
    for file in files:
        schema, _ = _open(file)
        if "image" not in schema.names:
            raise UserError(
                f"{file} has the columns {shorten(', '.join(schema.names), 200)}; expected a column image with the "
                "bytes of images"
            )
        if "label" not in schema.names:
            continue
        found = _declared_names(schema.metadata)
        if declared is not None and found != declared:
            raise UserError(f"{file} names other classes than {files[0]}; give files of one data set")
        declared = found
        if not found and str(schema.field("label").type) in ("string", "large_string"):
            for batch in _batches(file, ["label"]):
                names.update(filter(None, batch.column(0).to_pylist()))
    return declared or sorted(names)


def _declared_names(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The names of a ClassLabel in the metadata that `datasets` writes; empty if there are none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _convert(file: Path, classes: Sequence[str]) -> Path:
    """The shard of a file in the cache folder, which is made where it is missing or older. Raises UserError."""
    if (cache := cache_folder()) is None:
        raise UserError(f"{file} is converted to a shard in a cache folder, and there is none: set XDG_CACHE_HOME")
    try:
        stamp = Stamp.of(file)
        folder = cache.parent / "parquet" / hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:32]
        version = hashlib.sha256(repr((tuple(stamp), list(classes))).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        tar = folder / f"{version}.tar"
        if tar.is_file():
            return tar
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < 1.1 * stamp.size:
            raise UserError(
                f"{file} is converted to a shard, and {folder} has {free / 1e9:.1f} GB free, less than its "
                f"{stamp.size / 1e9:.1f} GB: set XDG_CACHE_HOME to a folder on a larger disk"
            )
        _log.warning("%s is converted to a shard in %s, once", file, folder)
        old = list(folder.iterdir())
        aside = folder / f".{tar.name}.{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with tarfile.open(aside, "x", format=tarfile.USTAR_FORMAT) as archive:
                for name, data in _members(file, classes):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            aside.replace(tar)
        finally:
            aside.unlink(missing_ok=True)
        for each in old:  # of an earlier version of the file
            each.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be converted to a shard: {error.strerror or error}") from None
    return tar


def _members(file: Path, classes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the members of the shard of a file. Raises UserError."""
    schema, _ = _open(file)
    columns = [name for name in ("image", "label") if name in schema.names]
    numbers = {name: number for number, name in enumerate(classes)}
    row = 0
    for batch in _batches(file, columns):
        labels = batch.column("label").to_pylist() if "label" in columns else [None] * len(batch)
        for image, label in zip(batch.column("image").to_pylist(), labels):
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                found = "only the path of an image" if isinstance(image, dict) and image.get("path") else "no image"
                raise UserError(
                    f"{file}: row {row} holds {found}; expected its bytes (`datasets` embeds them by push_to_hub or "
                    "to_parquet), or a table with a column path"
                )
            yield f"{row:09d}.{_extension(data)}", data
            if label is not None and (number := _label(file, row, label, numbers)) >= 0:
                yield f"{row:09d}.cls", str(number).encode()
            row += 1
    if not row:
        raise UserError(f"{file} has no rows; expected one for each image")


def _label(file: Path, row: int, label: Any, numbers: Mapping[str, int]) -> int:
    number = numbers.get(label, -2) if isinstance(label, str) else label
    if isinstance(number, bool) or not isinstance(number, int) or not -1 <= number <= LARGEST_LABEL:
        raise UserError(
            f"{file}: the label of row {row} is {shorten(repr(label), 60)}; expected a class number from 0 to "
            f"{LARGEST_LABEL:,}, or a name"
        )
    return number


def _extension(data: bytes) -> str:
    """Of the member: WebDataset names the format. An unknown one is decoded, and found damaged, as jpg."""
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "jpg")


def _first_line(error: Exception) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200)
