"""Picture sheets: rows of images with captions, as one PNG file."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from selfvil.data.arrays import decode_pixels, to_rgb
from selfvil.data.read import DamagedImage
from selfvil.errors import UserError

if TYPE_CHECKING:
    from selfvil.data.inspect import Findings

_TILE = 128
_GAP = 10
_LINE = 14  # height of a line of a caption
_HEAD = 30
_INK, _PALE, _PAPER, _EMPTY = (20, 20, 20), (110, 110, 110), (255, 255, 255), (226, 226, 226)
_MOST_ROWS, _MOST_COLUMNS = 400, 60
_GROUPS, _IN_ROW = 12, 10  # of the sheet of an inspection


@dataclass(frozen=True)
class Cell:
    """An image with a caption of two lines. image: None if it cannot be shown, and then `caption` ends with why."""

    image: Image.Image | None
    bold: str
    caption: str


def thumbnail(data: bytes) -> Image.Image:
    """An image within a tile, its aspect ratio kept; small images are enlarged by a whole factor without smoothing."""
    image = to_rgb(decode_pixels(data, None))
    if max(image.size) * 2 <= _TILE:
        factor = _TILE // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def inspection_sheet(out: Path, found: "Findings") -> Path:
    """Random images, damaged ones, and groups of equal and similar ones, a row each. Raises UserError."""
    reasons = dict(found.report.damaged + found.report.repaired)

    def cell(i: int, bold: str) -> Cell:
        key = found.name(i)
        try:
            image = thumbnail(found.images.read(i))
        except DamagedImage:
            image = None
        return Cell(image, bold, reasons.get(key, key) if bold == "damaged" else key)

    rows = [[cell(i, "random") for i in found.random[start : start + _IN_ROW]] for start in (0, _IN_ROW)]
    broken = found.damaged + found.repaired
    for start in range(0, min(len(broken), 3 * _IN_ROW), _IN_ROW):
        rows.append([cell(i, "damaged") for i in broken[start : start + _IN_ROW]])
    for title, groups in (("equal", found.duplicates), ("near", found.near)):
        for number, group in enumerate(groups[:_GROUPS]):
            rows.append([cell(i, f"{title} {number}") for i in group[:_IN_ROW]])
    return draw(out, f"{found.report.source}: {found.report.images:,} images", [row for row in rows if row])


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
