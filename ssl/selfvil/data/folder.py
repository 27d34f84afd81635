"""A folder of image files, read in place: the same interface as `Shards`, without packing.

The rules for files, masks and class subfolders are those of `selfvil pack` (`selfvil.data.sources`). The key of an
image is its path relative to the folder, with its extension, so keys are unique.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from selfvil.data.base import Images, Pattern, Progress
from selfvil.data.index import open_shards
from selfvil.data.read import EXTENSIONS
from selfvil.data.sources import Files, image_files, open_folder
from selfvil.errors import UserError


class FolderImages:
    """The images of a folder, at any depth, sorted by folder and name. Made by `open_images`. Safe to fork.

    Attributes:
        paths: the folder, as the only entry.
        labels: int64 (len,), the class subfolder of each image; None if the folder has no class subfolders.
        num_classes: the largest label + 1; 0 without labels.
        classes: names of the class subfolders, in the order of the labels.
        notes: sentences about files that are left out.
    """

    def __init__(self, files: Files, image: str | None = None) -> None:
        """image: extension of the image to use where files differ only in their extension."""
        source = open_folder(files, None, labels=True, image=image, mask=None)
        self.paths, self.classes = [files.folder], source.classes
        self.labels: np.ndarray | None = source.labels if (source.labels >= 0).any() else None
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.notes: list[str] = []
        if source.left_out:
            name, reason = source.left_out[0]
            reason = reason.removeprefix("not packed: ")
            self.notes.append(
                f"files of {files.folder} left out: {len(source.left_out)}, the first is {name}: {reason}"
            )
        self._source = source
        self.ends = [source.size]

    def ahead(self, numbers: Sequence[int]) -> None:
        """As in `Images`."""

    def __len__(self) -> int:
        return self._source.size

    def read(self, i: int) -> bytes:
        """The bytes of image file i. Raises DamagedImage if it cannot be read or is too large."""
        return self._source.read(i)

    def key(self, i: int) -> str:
        """The path of image i relative to the folder."""
        return self._source.name(i)

    def shard_of(self, i: int) -> Path:
        """The folder, which holds every image."""
        return self.paths[0]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the names, sizes, modification times and labels of all images.

        Contents are not read: an image that changed has another modification time.
        """
        digest = hashlib.sha256()
        for i in range(len(self)):
            key = self.key(i)
            try:
                status = os.stat(self.paths[0] / key)
                stamp = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                stamp = "unreadable"
            digest.update(f"{key}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        digest.update(b"-" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()[:16]


def open_images(images: Pattern, progress: Progress | None = None, image: str | None = None) -> Images:
    """Open a folder of image files in place, or shards by `open_shards`, whose arguments it has.

    Raises:
        UserError: as `open_shards`; or a folder holds neither images nor shards, or both; or a file is no shard.
    """
    if image is not None and image not in EXTENSIONS:
        raise UserError(f"image extension {image!r} is not known; expected one of {', '.join(EXTENSIONS)}")
    path = Path(images).expanduser() if isinstance(images, (str, os.PathLike)) and os.fspath(images) else None
    if path is not None and path.is_dir() and (files := image_files(path)) is not None:
        return FolderImages(files, image)  # type: ignore[return-value]  # it has the interface
    if path is not None and path.is_file() and path.suffix.lower()[1:] in EXTENSIONS:
        raise UserError(f"{path} is one image; expected a folder of images, or WebDataset shards (.tar)")
    return open_shards(images, progress, image)
