"""A table of paths: a CSV or Parquet file with the columns path, and optionally label and group.

Paths are relative to the folder of the table. Labels are whole numbers from 0, or names, which are numbered in
alphabetical order. The column group is kept for other tools, and not used. Rows keep their order.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.data.base import Progress
from selfvil.data.imagefiles import ImageFiles
from selfvil.data.sidecar import LARGEST_LABEL
from selfvil.errors import UserError, shorten

COLUMNS = "path", "label", "group"
_SHOWN = 5  # names in a message


class TableImages(ImageFiles):
    """The image files that a table lists, with its labels. Made by `open_images`.

    Raises UserError if the table is malformed, or names a file twice or one that does not exist.
    """

    def __init__(self, table: Path, progress: Progress | None = None) -> None:
        names, texts = _rows(table)
        folder = table.parent
        _require_different(table, folder, names)
        labels, classes = _number(table, texts)
        if missing := [name for name in names if not os.path.exists(os.path.join(folder, name))]:
            shown = ", ".join(shorten(name, 100) for name in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise UserError(
                f"{table}: {len(missing):,} of the {len(names):,} files do not exist: {shown}{more}; paths are relative"
                f" to {folder.absolute()}"
            )
        super().__init__(table, folder, names, labels, classes, progress=progress)


def _rows(table: Path) -> tuple[list[str], list[Any]]:
    """The paths, and the label of each: text, a whole number, or None for none."""
    columns = dict(zip(COLUMNS, _parquet(table) if table.suffix.lower() == ".parquet" else _csv(table)))
    names, labels = columns["path"], columns["label"]
    if not names:
        raise UserError(f"{table} lists no images; expected one row for each image")
    if wrong := [
        number for number, name in enumerate(names, 1) if not isinstance(name, str) or not name.strip() or "\0" in name
    ]:
        raise UserError(f"{table}: row {wrong[0]:,} has no path; expected the path of an image in each row")
    return names, labels


def _csv(table: Path) -> Iterator[list[Any]]:
    names: list[str] = []
    labels: list[str | None] = []
    try:
        with open(table, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            if header.count("path") != 1 or header.count("label") > 1:
                raise UserError(
                    f"{table}: its first line is {shorten(','.join(header), 100)!r}; expected the names of columns, "
                    "with one column path, and optionally label and group"
                )
            place, labelled = header.index("path"), header.index("label") if "label" in header else None
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{table}: line {reader.line_num:,} has {len(row)} values, and the first line {len(header)} "
                        "columns; put a path with commas in double quotes"
                    )
                names.append(row[place])
                labels.append(row[labelled].strip() or None if labelled is not None else None)
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror or error}") from None
    except csv.Error as error:
        raise UserError(f"{table} is no valid CSV file: {error}") from None
    yield names
    yield labels


def _parquet(table: Path) -> Iterator[list[Any]]:
    from selfvil.data.parquet import read_columns

    found = read_columns(table, COLUMNS[:2])
    yield found["path"]
    yield found.get("label") or [None] * len(found["path"])


def _require_different(table: Path, folder: Path, names: Sequence[str]) -> None:
    normal = [os.path.normpath(os.path.join(folder, name)) for name in names]
    if twice := [name for name, count in Counter(normal).items() if count > 1]:
        rows = [str(number + 1) for number, name in enumerate(normal) if name == twice[0]][:_SHOWN]
        raise UserError(
            f"{table}: {len(twice):,} files are listed more than once, the first is {shorten(twice[0], 200)} in rows "
            f"{' and '.join(rows)}; list each file once"
        )


def _number(table: Path, texts: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """int32 (n,) labels, -1 for none, and the names of the classes if the labels are names."""
    given = {text for text in texts if text is not None}
    whole = all(
        isinstance(text, int) or (isinstance(text, str) and text.isascii() and text.isdigit()) for text in given
    )
    if not whole and any(not isinstance(text, str) for text in given):
        kinds = sorted({type(text).__name__ for text in given})
        raise UserError(
            f"{table}: its labels are of the type {', '.join(kinds)}; expected whole numbers from 0, or names"
        )
    if not whole:
        classes = sorted(given)
        numbers = {name: number for number, name in enumerate(classes)}
        return np.array([-1 if text is None else numbers[text] for text in texts], np.int32), classes
    for text in given:
        if len(str(text)) > len(str(LARGEST_LABEL)) or not -1 <= int(text) <= LARGEST_LABEL:
            shown = shorten(str(text), 30)
            raise UserError(f"{table}: the label {shown} is no class number from 0 to {LARGEST_LABEL:,}")
    return np.array([-1 if text is None else int(text) for text in texts], np.int32), []
