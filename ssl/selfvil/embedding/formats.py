"""The two formats of embedding files, written in order and at bounded memory.

Parquet: columns key (string), label (int64, null for none; absent if no image has one), feature (list of D values of
fixed size), and patches (list of H · W · C values of fixed size); the metadata is JSON under the key "selfvil".

NumPy: NAME.npy (N, D), and beside it NAME.keys.txt with one key in each line, NAME.meta.json, NAME.labels.npy (N,)
with -1 for none, and NAME.patches.npy (N, H, W, C).
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from selfvil.errors import UserError
from selfvil.files import flush_file

METADATA = b"selfvil"
FORMAT = 1
SUFFIXES = (".parquet", ".npy")

_GROUP_ROWS = 8192  # of a row group in Parquet
_GROUP_BYTES = 2**24


class Rows(NamedTuple):
    """Consecutive rows. features (n, D), patches (n, H, W, C) or None, labels int64 (n,) or None."""

    keys: list[str]
    labels: np.ndarray | None
    features: np.ndarray
    patches: np.ndarray | None


class Layout(NamedTuple):
    """What is the same for all rows: their number, D, the shape (H, W, C) of patches or None, whether there are
    labels, and the type of the values."""

    rows: int
    dim: int
    patches: tuple[int, int, int] | None
    labels: bool
    dtype: np.dtype


class Writer(Protocol):
    """Writes rows in order to files in a folder; `close` completes them."""

    def add(self, rows: Rows) -> None: ...
    def close(self) -> None: ...


def targets(out: Path, labels: bool = True, patches: bool = True) -> list[Path]:
    """The files of an embedding, `out` as the last one."""
    if out.suffix != ".npy":
        return [out]
    more = [".keys.txt", ".meta.json", *[".labels.npy"] * labels, *[".patches.npy"] * patches]
    return [*(out.with_suffix(suffix) for suffix in more), out]


def require_format(out: Path) -> None:
    """Raise UserError for an unknown extension, or for .parquet without pyarrow."""
    if out.suffix not in SUFFIXES:
        found = f"ends in {out.suffix!r}" if out.suffix else "has no extension"
        raise UserError(f"--out {out} {found}; expected a file ending in {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet":
        require_pyarrow(out)


def require_lines(keys: Iterable[str]) -> None:
    """Raise UserError if a key has a line break, for formats with one key in each line."""
    if (broken := next((key for key in keys if "\n" in key), None)) is not None:
        raise UserError(
            f"the key {broken!r} has a line break, which a list of keys beside a .npy file cannot hold: write to a "
            ".parquet file, or rename the image"
        )


def require_pyarrow(file: Path) -> None:
    """Raise UserError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(f"{file}: Parquet needs pyarrow: pip install 'selfvil[embed]', or use a .npy file") from None


def open_writer(folder: Path, out: Path, layout: Layout, metadata: Mapping[str, Any]) -> Writer:
    """A writer of the format of `out`, whose files are made in `folder` under their final names."""
    write: Callable[..., Writer] = ParquetWriter if out.suffix == ".parquet" else NumpyWriter
    return write(folder / out.name, layout, metadata)


def publish(folder: Path, out: Path, layout: Layout) -> None:
    """Flush the files of an embedding to the disk and move them from `folder` to their place, `out` last."""
    files = targets(out, layout.labels, layout.patches is not None)
    for file in files:
        flush_file(folder / file.name)
    if out.suffix == ".npy":  # until its other files are new, there is no complete embedding
        for old in targets(out)[::-1]:
            old.unlink(missing_ok=True)
    for file in files:
        os.replace(folder / file.name, file)


class ParquetWriter:
    """One Parquet file; rows are collected into row groups."""

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, Any]) -> None:
        import pyarrow
        from pyarrow import parquet

        self._arrow, self._layout = pyarrow, layout
        value = pyarrow.float16() if layout.dtype == np.float16 else pyarrow.float32()
        fields = [pyarrow.field("key", pyarrow.string(), nullable=False)]
        if layout.labels:
            fields.append(pyarrow.field("label", pyarrow.int64()))
        fields.append(pyarrow.field("feature", pyarrow.list_(value, layout.dim), nullable=False))
        if layout.patches is not None:
            fields.append(pyarrow.field("patches", pyarrow.list_(value, int(np.prod(layout.patches))), nullable=False))
        self._schema = pyarrow.schema(fields, {METADATA: json.dumps(metadata).encode()})
        # Neither compression nor statistics pay for random floating-point values.
        self._writer = parquet.ParquetWriter(
            path, self._schema, compression="none", use_dictionary=False, write_statistics=False
        )
        self._waiting: list[Any] = []

    def add(self, rows: Rows) -> None:
        arrow = self._arrow
        columns = [arrow.array(rows.keys, arrow.string())]
        if rows.labels is not None:
            columns.append(arrow.array(rows.labels, arrow.int64(), mask=rows.labels < 0))
        for values in (rows.features, rows.patches):
            if values is not None:
                flat = np.ascontiguousarray(values, self._layout.dtype).reshape(-1)
                columns.append(arrow.FixedSizeListArray.from_arrays(arrow.array(flat), values[0].size))
        self._waiting.append(arrow.Table.from_arrays(columns, schema=self._schema))
        waiting = arrow.concat_tables(self._waiting)
        if waiting.num_rows >= _GROUP_ROWS or waiting.nbytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = self._arrow.concat_tables(self._waiting)
            self._writer.write_table(table, row_group_size=table.num_rows)
            self._waiting = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


class NumpyWriter:
    """Files of .npy format, and text files of keys and metadata.

    Rows are appended by plain writes. A write to a memory map would end the process with SIGBUS on a full disk.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, Any]) -> None:
        keys, meta, labels, patches = targets(path)[:-1]
        meta.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        self._keys = open(keys, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 - closed in `close`
        self._features = _create(path, (layout.rows, layout.dim), layout.dtype)
        self._labels = _create(labels, (layout.rows,), np.dtype(np.int64)) if layout.labels else None
        self._patches = _create(patches, (layout.rows, *layout.patches), layout.dtype) if layout.patches else None
        self._dtype = layout.dtype

    def add(self, rows: Rows) -> None:
        self._keys.write("".join(f"{key}\n" for key in rows.keys))
        self._features.write(np.ascontiguousarray(rows.features, self._dtype).data)
        if self._labels is not None and rows.labels is not None:
            self._labels.write(np.ascontiguousarray(rows.labels, np.int64).data)
        if self._patches is not None and rows.patches is not None:
            self._patches.write(np.ascontiguousarray(rows.patches, self._dtype).data)

    def close(self) -> None:
        for file in (self._keys, self._features, self._labels, self._patches):
            if file is not None:
                file.close()


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> BinaryIO:
    """A .npy file whose values are appended in row-major order."""
    file = open(path, "wb")  # noqa: SIM115 - closed by the writer
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file
