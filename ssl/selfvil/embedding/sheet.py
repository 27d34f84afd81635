"""Picture sheets of neighbours and duplicates among embeddings."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from selfvil.data.images import open_images
from selfvil.data.read import DamagedImage
from selfvil.data.sheet import Cell, draw, thumbnail
from selfvil.embedding.keys import image_keys
from selfvil.embedding.reader import EmbeddingFile
from selfvil.embedding.search import Duplicates, Neighbour, Query, keys_of
from selfvil.errors import UserError

_SHOWN_GROUPS, _SHOWN_IN_GROUP = 20, 10


class Pictures:
    """The images of an embedding file, by their keys. They are read from where they were embedded, or from `images`.

    Raises UserError if they cannot be opened.
    """

    def __init__(self, file: EmbeddingFile, images: str | None = None) -> None:
        dataset = images or file.metadata.get("dataset")
        if not dataset:
            raise UserError(f"{file.path} does not say where its images are: give them with --images")
        try:
            where = dataset[0] if isinstance(dataset, list) and len(dataset) == 1 else dataset
            self._images: Any = open_images(where, image=file.metadata.get("image"))
        except UserError as error:
            raise UserError(
                f"the images for the picture cannot be opened ({error}); give their place with --images, or leave out "
                "--out"
            ) from None
        self._key, _ = image_keys(self._images)

    def thumbnails(self, keys: Iterable[str]) -> dict[str, Image.Image]:
        """Small images of these keys; those that are missing or damaged are left out."""
        wanted = set(keys)
        found = {}
        for i in range(len(self._images)):
            if (key := self._key(i)) in wanted:
                try:
                    found[key] = thumbnail(self._images.read(i))
                except DamagedImage:
                    continue
                if len(found) == len(wanted):
                    break
        return found


def neighbours_sheet(
    out: Path, file: EmbeddingFile, pictures: Pictures, queries: Sequence[Query], found: Sequence[Sequence[Neighbour]]
) -> Path:
    """One row for each query: the query, then its neighbours with their similarity and key. Raises UserError."""
    keys = {neighbour.key for row in found for neighbour in row}
    thumbnails = pictures.thumbnails(keys | {query.name for query in queries if query.row is not None})
    rows = []
    for query, row in zip(queries, found):
        image = (
            thumbnails.get(query.name)
            if query.row is not None
            else thumbnail(Path(query.name).expanduser().read_bytes())
        )
        cells = [Cell(image, "query", query.name)]
        rows.append(cells + [Cell(thumbnails.get(each.key), f"{each.similarity:.4f}", each.key) for each in row])
    return draw(out, f"nearest neighbours in {file.path.name} · {_model(file)}", rows, rule=True)


def duplicates_sheet(out: Path, file: EmbeddingFile, pictures: Pictures, found: Duplicates) -> Path:
    """The largest groups, one row for each: their first images and keys, and how many more there are."""
    shown = found.groups[:_SHOWN_GROUPS]
    keys = keys_of(file, [row for group in shown for row in group[:_SHOWN_IN_GROUP]])
    thumbnails = pictures.thumbnails(keys.values())
    rows = []
    for group in shown:
        cells = [Cell(thumbnails.get(keys[row]), f"row {row}", keys[row]) for row in group[:_SHOWN_IN_GROUP]]
        if len(group) > _SHOWN_IN_GROUP:
            cells.append(Cell(None, f"and {len(group) - _SHOWN_IN_GROUP:,} more", f"group of {len(group):,}"))
        rows.append(cells)
    title = (
        f"{len(shown):,} of {len(found.groups):,} groups with a similarity of {found.threshold:g} or more in "
        f"{file.path.name} · {_model(file)}"
    )
    return draw(out, title, rows)


def _model(file: EmbeddingFile) -> str:
    return f"{file.metadata.get('source')}, {file.metadata.get('readout')}"
