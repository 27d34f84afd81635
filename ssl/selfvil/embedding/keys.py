"""Keys: the name of each image in an embedding file, different for every image."""

from collections.abc import Callable

import numpy as np

from selfvil.data.base import Images
from selfvil.data.imagefiles import ImageFiles
from selfvil.errors import UserError, shorten


def image_keys(images: Images) -> tuple[Callable[[int], str], str]:
    """A function from the number of an image to its key, and a sentence for the user, which may be empty.

    The key is the path in the folder, or the key in the shards. If a key occurs in several shards, all keys become
    SHARD/KEY, where SHARD is the shard's file name without .tar, or its whole path where file names repeat.

    Raises UserError if a key occurs twice in one shard.
    """
    if isinstance(images, ImageFiles):
        return lambda i: text(images.key(i)), ""
    plain = lambda i: text(images.key(i))  # noqa: E731
    twice = _first_repeated(plain, len(images))
    if twice is None:
        return plain, ""
    stems = [path.name.removesuffix(".tar") for path in images.paths]
    names = dict(zip(images.paths, stems if len(set(stems)) == len(stems) else map(str, images.paths)))
    full = lambda i: f"{text(str(names[images.shard_of(i)]))}/{text(images.key(i))}"  # noqa: E731
    if (repeated := _first_repeated(full, len(images))) is not None:
        one, other = repeated
        raise UserError(
            f"the key {shorten(plain(one), 200)!r} occurs twice in {images.shard_of(one)} (images {one} and {other}), "
            "so it does not name one image; pack the images again with `selfvil pack`, which gives each its own key"
        )
    one, other = twice
    return full, (
        f"the key {shorten(plain(one), 200)!r} and perhaps others occur in several shards "
        f"({images.shard_of(one).name} and {images.shard_of(other).name}), so all keys are written as SHARD/KEY"
    )


def _first_repeated(key: Callable[[int], str], count: int) -> tuple[int, int] | None:
    """Two images with the same key, or None. Needs 16 bytes of memory for each image."""
    hashes = np.fromiter((hash(key(i)) for i in range(count)), np.int64, count)
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(np.diff(hashes[order]) == 0).tolist():
        one, other = int(order[place]), int(order[place + 1])
        if key(one) == key(other):
            return one, other
    return None


def text(key: str) -> str:
    """A key as valid Unicode: bytes of a file name that are no UTF-8 are written as \\xNN."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
