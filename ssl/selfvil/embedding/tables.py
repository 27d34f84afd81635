"""What `selfvil neighbours` and `selfvil duplicates` print, and write as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from selfvil.embedding.reader import EmbeddingFile
from selfvil.embedding.search import Duplicates, Neighbour, Query, keys_of
from selfvil.errors import UserError
from selfvil.files import require_writable, write_text

_LEVELS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


def require_outputs(file: Path, picture: Path | None, json_file: Path | None) -> None:
    """Check, before any work, that outputs can be written. Raises UserError."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"--out {picture} is the picture; expected a file ending in .png")
    given = [each for each in (picture, json_file) if each is not None]
    for each in given:
        if each.resolve() == file.resolve() or given.count(each) > 1:
            raise UserError(f"{each} is given twice; choose another file")
        require_writable(each)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. Raises UserError."""
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(text, encoding="utf-8")
        else:
            write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _origin(file: EmbeddingFile) -> dict[str, Any]:
    known = {key: file.metadata.get(key) for key in ("source", "readout", "dataset", "version", "commit")}
    return {"file": str(file.path), "embeddings": len(file)} | known


# --- neighbours ------------------------------------------------------------------------------------------------------


def neighbours_table(queries: Sequence[Query], found: Sequence[Sequence[Neighbour]]) -> Table:
    """One line for each neighbour."""
    table = Table(title="Nearest neighbours")
    table.add_column("query", overflow="fold")
    table.add_column("similarity", justify="right")
    table.add_column("neighbour", overflow="fold")
    for query, row in zip(queries, found):
        for i, each in enumerate(row):
            table.add_row("" if i else query.name, f"{each.similarity:.4f}", each.key, end_section=each is row[-1])
    return table


def neighbours_json(
    file: EmbeddingFile, queries: Sequence[Query], found: Sequence[Sequence[Neighbour]]
) -> dict[str, Any]:
    """The neighbours of each query, the most similar first."""
    return _origin(file) | {
        "queries": [
            {"query": query.name, "row": query.row, "neighbours": [vars(each) for each in row]}
            for query, row in zip(queries, found)
        ]
    }


# --- duplicates ------------------------------------------------------------------------------------------------------


def similarities_table(found: Duplicates) -> Table:
    """How many images have a neighbour above several thresholds, beside quantiles of that similarity."""
    table = Table(title="Similarity of each image to its nearest neighbour")
    for name in ("quantile", "similarity", "threshold", "images above it"):
        table.add_column(name, justify="right")
    levels = sorted({*_LEVELS, found.threshold})
    quantiles = list(found.quantiles().items())
    for i in range(max(len(levels), len(quantiles))):
        left = (f"{quantiles[i][0]:.0%}", f"{quantiles[i][1]:.4f}") if i < len(quantiles) else ("", "")
        right = (f"{levels[i]:g}", f"{found.above(levels[i]):,}") if i < len(levels) else ("", "")
        table.add_row(*left, *right)
    return table


def duplicates_sentence(found: Duplicates) -> str:
    """The counts, in one or two sentences."""
    if not found.groups:
        return f"no near-duplicates among {found.images:,} images at a similarity of {found.threshold:g} or more"
    return (
        f"{found.members:,} of {found.images:,} images are in {len(found.groups):,} groups of near-duplicates "
        f"({found.pairs:,} pairs with a similarity of {found.threshold:g} or more); the largest has "
        f"{len(found.groups[0]):,}. Keeping one of each group leaves {found.images - found.removable:,} images"
    )


def duplicates_json(file: EmbeddingFile, found: Duplicates) -> dict[str, Any]:
    """All groups as lists of keys, the largest first, and the quantiles."""
    keys = keys_of(file, [row for group in found.groups for row in group])
    return _origin(file) | {
        "threshold": found.threshold,
        "pairs": found.pairs,
        "images_in_groups": found.members,
        "images_left_if_one_of_each_is_kept": found.images - found.removable,
        "nearest_similarity_quantiles": {f"{share:g}": value for share, value in found.quantiles().items()},
        "groups": [[keys[row] for row in group] for group in found.groups],
    }
