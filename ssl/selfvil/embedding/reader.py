"""Read an embedding file of either format in blocks, at bounded memory."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selfvil.embedding.formats import FORMAT, METADATA, require_pyarrow, targets
from selfvil.errors import UserError, shorten

_BLOCK_ROWS = 8192  # of a .npy file; a Parquet file has the row groups it was written with


class Span(NamedTuple):
    """Rows [first, last) of a block."""

    first: int
    last: int


class EmbeddingFile(ABC):
    """N embeddings in a .parquet or .npy file. Made by `open_embeddings`.

    Attributes:
        path: the file.
        metadata: what `selfvil embed` recorded: source, readout, normalisation, dataset ...
        dim: D.
        spans: the rows of each block.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], dim: int, spans: list[Span]) -> None:
        self.path, self.metadata, self.dim, self.spans = path, metadata, dim, spans

    def __len__(self) -> int:
        return self.spans[-1].last if self.spans else 0

    @abstractmethod
    def keys(self, block: int) -> list[str]:
        """The keys of a block."""

    @abstractmethod
    def stored(self, block: int) -> np.ndarray:
        """The features of a block as they are stored, (n, D)."""

    def features(self, block: int) -> np.ndarray:
        """The features of a block, float32 (n, D). Raises UserError for NaN or infinity, naming the image."""
        values = self.stored(block).astype(np.float32)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"{self.path}: the features of {shorten(self.keys(block)[row], 200)} hold NaN or infinity; embed the "
                "images again"
            )
        return values

    def unit_features(self, block: int) -> np.ndarray:
        """The features of a block, divided by their norm, so that products are cosine similarities; zeros stay zero."""
        values = self.features(block)
        largest = np.abs(values).max(axis=1, keepdims=True)  # first, so that squares do not overflow
        values /= np.maximum(largest, np.finfo(np.float32).tiny)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    def all_keys(self) -> Iterator[tuple[int, str]]:
        """(row, key) of all rows, in order."""
        for number, span in enumerate(self.spans):
            yield from enumerate(self.keys(number), span.first)


def open_embeddings(path: str | Path) -> EmbeddingFile:
    """Open a file that `selfvil embed` wrote. Raises UserError if it is missing, damaged or no such file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a .parquet or .npy file that `selfvil embed` wrote")
    return _Parquet(path) if path.suffix != ".npy" else _Numpy(path)


class _Parquet(EmbeddingFile):
    def __init__(self, path: Path) -> None:
        require_pyarrow(path)
        import pyarrow
        from pyarrow import parquet

        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = parquet.ParquetFile(path)
            schema = self._file.schema_arrow
        except self._errors as error:
            raise UserError(f"{path} is no Parquet file, or damaged ({_first_line(error)}); {_EXPECTED}") from None
        metadata = _parse((schema.metadata or {}).get(METADATA, b""), path)
        kind = schema.field("feature").type if "feature" in schema.names else None
        if "key" not in schema.names or kind is None or not pyarrow.types.is_fixed_size_list(kind):
            raise UserError(f"{path} lacks the column key, or feature as a list of fixed size; {_EXPECTED}")
        spans, first = [], 0
        for group in range(self._file.num_row_groups):
            spans.append(Span(first, first := first + self._file.metadata.row_group(group).num_rows))
        super().__init__(path, metadata, kind.list_size, spans)

    def _column(self, block: int, name: str) -> Any:
        try:
            return self._file.read_row_group(block, columns=[name]).column(name)
        except self._errors as error:
            raise UserError(f"{self.path} is damaged ({_first_line(error)}): embed the images again") from None

    def keys(self, block: int) -> list[str]:
        return [str(key) for key in self._column(block, "key").to_pylist()]

    def stored(self, block: int) -> np.ndarray:
        values = self._column(block, "feature").combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)


class _Numpy(EmbeddingFile):
    def __init__(self, path: Path) -> None:
        keys, meta = targets(path)[:2]
        try:
            self._values = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no .npy file, or damaged ({_first_line(error)}); {_EXPECTED}") from None
        try:
            metadata = _parse(meta.read_bytes(), path)
            self._keys = keys.read_bytes().decode("utf-8").split("\n")[:-1]
        except (OSError, ValueError) as error:
            missing = getattr(error, "filename", None) or keys
            raise UserError(
                f"{missing} cannot be read ({getattr(error, 'strerror', None) or error}): keep {keys.name} and "
                f"{meta.name} beside {path}"
            ) from None
        shape = self._values.shape
        if len(shape) != 2 or self._values.dtype not in (np.float32, np.float16) or shape[0] != len(self._keys):
            raise UserError(
                f"{path} has shape {list(shape)} and type {self._values.dtype}, and {keys.name} {len(self._keys)} "
                "keys; expected a row of float32 or float16 for each key: embed the images again"
            )
        spans = [Span(i, min(i + _BLOCK_ROWS, shape[0])) for i in range(0, shape[0], _BLOCK_ROWS)]
        super().__init__(path, metadata, shape[1], spans)

    def keys(self, block: int) -> list[str]:
        return self._keys[slice(*self.spans[block])]

    def stored(self, block: int) -> np.ndarray:
        return np.asarray(self._values[slice(*self.spans[block])])


_EXPECTED = "expected a .parquet or .npy file that `selfvil embed` wrote"


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise UserError(f"{path} has no metadata of selfvil; {_EXPECTED}")
    if found["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer selfvil ({found.get('version')}): update selfvil to read it")
    return found


def _first_line(error: BaseException) -> str:
    return shorten((str(error).splitlines() or [type(error).__name__])[0], 200)
