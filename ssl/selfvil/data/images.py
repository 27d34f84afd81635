"""Open images, whatever they are: WebDataset shards, a folder, a table of paths, or a Hugging Face data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.folder import FolderImages
from selfvil.data.index import open_shards
from selfvil.data.mixture import Mixture
from selfvil.data.read import EXTENSIONS
from selfvil.data.remote.cache import Cache
from selfvil.data.sources import image_files
from selfvil.errors import UserError


def open_images(
    images: Pattern, progress: Progress | None = None, image: str | None = None, cache: Cache | None = None
) -> Images:
    """Open a folder of image files in place, or shards by `open_shards`, whose arguments it has.

    Raises:
        UserError: as `open_shards`; or a folder holds neither images nor shards, or both; or a file is no shard.
    """
    if image is not None and image not in EXTENSIONS:
        raise UserError(f"image extension {image!r} is not known; expected one of {', '.join(EXTENSIONS)}")
    if (path := _one_path(images)) is not None:
        if path.is_dir() and (files := image_files(path)) is not None:
            return FolderImages(files, image, progress)
        if path.is_file() and path.suffix.lower()[1:] in EXTENSIONS:
            raise UserError(f"{path} is one image; expected a folder of images, or WebDataset shards (.tar)")
    return open_shards(images, progress, image, cache)


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
