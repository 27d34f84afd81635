"""Open images, whatever they are: WebDataset shards, a folder, a table of paths, or a Hugging Face data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.folder import FolderImages
from selfvil.data.index import open_shards
from selfvil.data.mixture import Mixture
from selfvil.data.parquet import ParquetImages, data_files, holds_images
from selfvil.data.patterns import expand_shards
from selfvil.data.read import EXTENSIONS
from selfvil.data.remote.cache import Cache
from selfvil.data.remote.urls import is_remote
from selfvil.data.sources import image_files
from selfvil.data.table import TableImages
from selfvil.errors import UserError, redact, shorten


def open_images(
    images: Pattern, progress: Progress | None = None, image: str | None = None, cache: Cache | None = None
) -> Images:
    """Open images by what they are.

    - a folder of image files, at any depth, which are read in place;
    - a CSV or Parquet file with a column path (`selfvil.data.table`);
    - Parquet files with the bytes of images: a file, a folder, a glob or a brace pattern; or a folder of
      `Dataset.save_to_disk` (`selfvil.data.parquet`);
    - else shards, by `open_shards`, whose arguments it has.

    Raises:
        UserError: as `open_shards`; or a folder holds images of two kinds, or none; or a file is none of these.
    """
    if image is not None and image not in EXTENSIONS:
        raise UserError(f"image extension {image!r} is not known; expected one of {', '.join(EXTENSIONS)}")
    path = _one_path(images)
    if path is not None and path.is_dir():
        if files := data_files(path):
            _require_one_kind(path)
            return ParquetImages(files, progress)
        if (found := image_files(path)) is not None:
            return FolderImages(found, image, progress)
    elif path is not None and path.is_file():
        suffix = path.suffix.lower()
        if suffix[1:] in EXTENSIONS:
            raise UserError(f"{path} is one image; expected a folder of images, or WebDataset shards (.tar)")
        if suffix == ".csv" or (suffix == ".parquet" and not holds_images(path)):
            return TableImages(path, progress)
    patterns = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    names = [redact(os.fspath(each)).removesuffix("?…").lower() for each in patterns]
    if is_remote(images) and any(name.endswith((".parquet", ".arrow", ".csv")) for name in names):
        raise UserError(
            f"{shorten(redact(os.fspath(patterns[0])), 200)} cannot be read from a store, only shards (.tar) can: "
            "download it, or pack the images into shards"
        )
    if names and all(name.endswith((".parquet", ".arrow")) for name in names):
        return ParquetImages(expand_shards(images), progress)
    return open_shards(images, progress, image, cache)


def _require_one_kind(folder: Path) -> None:
    """Raise UserError if a folder of Parquet files also holds shards or image files."""
    for entry in os.scandir(folder):
        if entry.name.lower().endswith((".tar", *(f".{name}" for name in EXTENSIONS))):
            raise UserError(
                f"{folder} holds a data set in Parquet or Arrow files, and {shorten(entry.name, 100)}; give {folder}/"
                "*.parquet, or the images' folder"
            )


def open_mixture(
    sources: Sequence[tuple[Pattern, float]], image: str | None = None, cache: Cache | None = None
) -> Images:
    """Open several sources with their weights, as one list.

    Raises:
        UserError: as `open_images` for each source; or the weights have too many digits.
    """
    opened = [open_images(source, image=image, cache=cache) for source, _ in sources]
    if len(opened) == 1:
        return opened[0]
    names = [
        os.fspath(source) if isinstance(source, (str, os.PathLike)) else os.fspath(source[0]) for source, _ in sources
    ]
    return Mixture(opened, [weight for _, weight in sources], names)


def _one_path(images: Pattern) -> Path | None:
    """The path, if there is only one."""
    if not isinstance(images, (str, os.PathLike)):
        if len(images) != 1:
            return None
        images = images[0]
    return Path(images).expanduser() if os.fspath(images) else None
