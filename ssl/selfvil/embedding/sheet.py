"""Picture sheets: rows of images with captions, as one PNG file."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from selfvil.data.images import open_images
from selfvil.data.read import DamagedImage, decode_image
from selfvil.embedding.keys import image_keys
from selfvil.embedding.reader import EmbeddingFile
from selfvil.embedding.search import Duplicates, Neighbour, Query, keys_of
from selfvil.errors import UserError

_TILE = 128
_GAP = 10
_LINE = 14  # height of a line of a caption
_HEAD = 30
_INK, _PALE, _PAPER, _EMPTY = (20, 20, 20), (110, 110, 110), (255, 255, 255), (226, 226, 226)
_MOST_ROWS, _MOST_COLUMNS = 400, 60
_SHOWN_GROUPS, _SHOWN_IN_GROUP = 20, 10


@dataclass(frozen=True)
class Cell:
    """An image with a caption of two lines. image: None if it cannot be shown, and then `caption` ends with why."""

    image: Image.Image | None
    bold: str
    caption: str


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
                    found[key] = _thumbnail(self._images.read(i))
                except DamagedImage:
                    continue
                if len(found) == len(wanted):
                    break
        return found


def _thumbnail(data: bytes) -> Image.Image:
    """An image within a tile, its aspect ratio kept; small images are enlarged by a whole factor without smoothing."""
    image = decode_image(data)
    if max(image.size) * 2 <= _TILE:
        factor = _TILE // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


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
            else _thumbnail(Path(query.name).expanduser().read_bytes())
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


def draw(out: Path, title: str, rows: Sequence[Sequence[Cell]], rule: bool = False) -> Path:
    """Draw rows of cells to a PNG file. rule: a line after the first cell of each row. Raises UserError."""
    rows = [row[:_MOST_COLUMNS] for row in rows[:_MOST_ROWS]]
    columns = max([*map(len, rows), 4])
    step, height = _TILE + _GAP, _TILE + 2 * _LINE + _GAP + 6
    sheet = Image.new("RGB", (_GAP + columns * step, _HEAD + max(1, len(rows)) * height + _GAP), _PAPER)
    pen, font, small = ImageDraw.Draw(sheet), _font(13), _font(11)
    pen.text((_GAP, 9), _fit(title, sheet.width - 2 * _GAP, font), _INK, font)
    if not rows:
        pen.text((_GAP, _HEAD + _GAP), "none", _PALE, font)
    for y, row in enumerate(rows):
        top = _HEAD + y * height
        for x, cell in enumerate(row):
            left = _GAP + x * step
            if cell.image is None:
                pen.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), _EMPTY)
                pen.text((left + 8, top + 8), "…" if cell.bold.startswith("and ") else "not readable", _PALE, small)
            else:
                sheet.paste(cell.image, (left + (_TILE - cell.image.width) // 2, top + _TILE - cell.image.height))
            pen.text((left, top + _TILE + 2), _fit(cell.bold, _TILE, font), _INK, font)
            pen.text((left, top + _TILE + 4 + _LINE), _fit(cell.caption, _TILE, small, end=True), _PALE, small)
        if rule:
            middle = _GAP + step - _GAP // 2
            pen.line((middle, top, middle, top + _TILE + 2 * _LINE), _EMPTY, 2)
    aside = out.with_name(out.name + ".aside")
    try:
        sheet.save(aside, "PNG")
        os.replace(aside, out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return out


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and has more alphabets than Pillow's own font."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fit(text: str, width: int, font: Any, end: bool = False) -> str:
    """`text`, shortened to `width` pixels; end: its end is kept, since the end of a path differs."""
    if font.getlength(text) <= width:
        return text
    short: Callable[[int], str] = (lambda n: f"…{text[-n:]}") if end else (lambda n: f"{text[:n]}…")
    low, high = 1, len(text)
    while low < high:  # the largest number of characters that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(short(middle)) <= width else (low, middle - 1)
    return short(low)
