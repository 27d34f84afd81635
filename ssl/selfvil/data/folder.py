"""A folder of image files, read in place, without packing.

The rules for files, masks and class subfolders are those of `selfvil pack` (`selfvil.data.sources`). The key of an
image is its path relative to the folder, with its extension.
"""

import numpy as np

from selfvil.data.base import Progress
from selfvil.data.imagefiles import ImageFiles
from selfvil.data.sources import Files, open_folder


class FolderImages(ImageFiles):
    """The images of a folder, at any depth, sorted by folder and name. Made by `open_images`.

    If all images are in two or more subfolders, the labels are the numbers of these subfolders, which name the classes.
    """

    def __init__(self, files: Files, image: str | None = None, progress: Progress | None = None) -> None:
        """image: extension of the image to use where files differ only in their extension."""
        source = open_folder(files, None, labels=True, image=image, mask=None)
        names = [source.name(i) for i in range(source.size)]
        super().__init__(
            files.folder, files.folder, names, source.labels.astype(np.int32), source.classes, image, progress
        )
        if source.left_out:
            name, reason = source.left_out[0]
            reason = reason.removeprefix("not packed: ")
            self.notes.append(
                f"files of {files.folder} left out: {len(source.left_out)}, the first is {name}: {reason}"
            )
