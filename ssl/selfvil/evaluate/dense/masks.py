"""Images of shards with their masks, and the classes that the masks hold.

A mask is a PNG of one channel of 8 bits, as large as its image: class ids in grey values, or the indices of a palette,
whose colours are not used. The member KEY.mask.png is the mask of KEY.jpg (what `selfvil pack --mask` writes); without
one, the image member of the sample that is not its image, such as KEY.png beside KEY.jpg.

Shapes: N images, K classes, H and W the height and width of an image in pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from selfvil.data.arrays import Pixels, array_extension, decode_pixels, size_of
from selfvil.data.base import DamagedSample, Images
from selfvil.data.classes import class_names
from selfvil.data.index import Shards
from selfvil.data.origins import made_from
from selfvil.data.read import MAX_BYTES, DamagedImage, open_image
from selfvil.data.shard import group_members, order_images
from selfvil.data.sources import MASK
from selfvil.errors import UserError, shorten

SMALLEST, LARGEST = 8, 8192
"""Sides of an image in pixels: below, there is nothing to segment; above, a prediction does not fit into memory."""
_VOID = {"void", "unlabelled", "unlabeled", "ignore", "ignored", "unknown", "unclassified"}
_AHEAD = 8  # samples that are decoded before they are needed
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Masked:
    """The images of shards, each with a mask. Made by `open_masked`.

    places: shard number, offset and size of each mask. counts: int64 (N, 256), pixels of each id in each mask.
    sizes: (N, 2), H and W of each image.
    """

    shards: Shards
    places: Sequence[tuple[int, int, int]]
    counts: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, i: int) -> tuple[bytes, bytes]:
        """The files of image and mask i. Raises DamagedImage if they cannot be read."""
        return self.shards.read(i), _read_mask(self.shards, self.places[i])

    def decode(self, data: tuple[bytes, bytes], channels: int) -> tuple[Pixels, np.ndarray]:
        """Image and mask, uint8 (H, W), of what `read` returns. Raises DamagedImage."""
        image, mask = decode_pixels(data[0], channels), decode_mask(data[1])
        if size_of(image) != mask.shape[::-1]:
            raise DamagedImage(f"its mask has {_pixels(mask.shape[::-1])}, the image {_pixels(size_of(image))}")
        return image, mask


@dataclass(frozen=True)
class Classes:
    """The classes of masks. names: (K,), by id, "class 3" where there are no names. ignore: ids that are left out."""

    names: list[str]
    ignore: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def counted(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (..., 256), without those of ignored ids."""
        return np.where(np.isin(np.arange(256), self.ignore), 0, counts)

    def without_ignored(self, mask: np.ndarray) -> np.ndarray:
        """int64 ids with -1 where a pixel is ignored, or holds no class."""
        return np.where(np.isin(mask, self.ignore) | (mask >= len(self)), -1, mask.astype(np.int64))


# --- reading ---------------------------------------------------------------------------------------------------------


def open_masked(shards: Images, mask: str | None = None) -> Masked:
    """The images of `shards` with their masks; every mask is decoded once, and the header of every image read.

    mask: extension of the masks; None chooses for each sample, as above.

    Raises UserError if the images are not in shards, an image has no mask or one of another size, a mask is no PNG-like
    image of one channel of 8 bits, or an image is smaller than SMALLEST or larger than LARGEST.
    """
    if not isinstance(shards, Shards):
        raise UserError(
            f"{shards.paths[0]} is no WebDataset shard, and masks are read from shards: pack images and masks with "
            "`selfvil pack`"
        )
    places = _find(shards, mask)

    def inspect(item: tuple[int, bytes, bytes]) -> tuple[np.ndarray, tuple[int, int]]:
        i, image, ids = item
        try:
            width, height = _upright_size(image)
            for side, words in ((min(width, height), "at least"), (max(width, height), "at most")):
                limit = SMALLEST if words == "at least" else LARGEST
                if (side < limit) if words == "at least" else (side > limit):
                    raise DamagedImage(
                        f"the image has {_pixels((width, height))}, but segmentation needs {words} {limit:,} on a "
                        f"side: leave it out, or pack the images again with `selfvil pack --size`"
                    )
            decoded = decode_mask(ids)
            if decoded.shape != (height, width):
                raise DamagedImage(
                    f"its mask has {_pixels(decoded.shape[::-1])}, the image {_pixels((width, height))}: a mask needs "
                    f"one id for each pixel of its image"
                )
        except DamagedImage as error:
            raise UserError(f"{shards.shard_of(i)}: {shorten(shards.key(i), 100)}: {error}") from None
        return np.bincount(decoded.ravel(), minlength=256), (height, width)

    def files() -> Iterator[tuple[int, bytes, bytes]]:
        for i, place in enumerate(places):
            try:
                yield i, shards.read(i), _read_mask(shards, place)
            except DamagedImage as error:
                raise UserError(f"{shards.shard_of(i)}: {shorten(shards.key(i), 100)}: {error}") from None

    found = list(ahead(inspect, files()))
    return Masked(shards, places, np.stack([count for count, _ in found]), np.array([size for _, size in found]))


def decode_mask(data: bytes) -> np.ndarray:
    """Class ids, uint8 (H, W): grey values, or indices of a palette. Raises DamagedImage."""
    mask = open_image(data)
    if mask.mode not in ("1", "L", "P"):
        raise DamagedImage(
            f"its mask has the mode {mask.mode}; expected one channel of 8 bits (grey or a palette) that holds class "
            f"ids: colours must be turned into ids first"
        )
    try:
        return np.asarray(mask).astype(np.uint8)
    except Exception as error:  # on damaged data, Pillow raises many classes
        raise DamagedImage(f"its mask cannot be decoded: {error}") from None


def ahead(function: Callable[[S], T], items: Iterable[S], threads: int = 2) -> Iterator[T]:
    """`map(function, items)` in threads, a few items ahead; `items` are made in the calling thread."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: list[Future[T]] = []
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _find(shards: Shards, mask: str | None) -> list[tuple[int, int, int]]:
    places: list[tuple[int, int, int]] = []
    missing: list[str] = []
    kinds = Counter[str]()
    for number, path in enumerate(shards.paths):
        with shards.files.open(number) as file:
            for key, parts in group_members(file, path):
                if not (images := order_images(parts, shards.image)):
                    continue
                wanted = [mask] if mask else [MASK, *(name for name in images[1:] if name.startswith("png"))]
                name = next((name for name in wanted if name in parts and name != images[0]), None)
                kinds.update(list(parts))  # a mapping would add its values
                if name is None:
                    missing.append(key)
                else:
                    places.append((number, *parts[name]))
    if missing:
        expected = f"KEY.{mask}" if mask else f"KEY.{MASK}, or KEY.png beside an image of another extension"
        raise UserError(
            f"{len(missing):,} of the {len(shards):,} images in {shards.paths[0]}"
            f"{' and other shards' if len(shards.paths) > 1 else ''} have no mask (first: {shorten(missing[0], 100)}); "
            f"expected {expected}; the members are {', '.join(f'.{kind}' for kind, _ in kinds.most_common(6))}: set "
            f"mask=EXTENSION, or pack images and masks with `selfvil pack --mask`"
        )
    return places


def _read_mask(shards: Shards, place: tuple[int, int, int]) -> bytes:
    number, offset, size = place
    if size > MAX_BYTES:
        raise DamagedImage(f"its mask has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    try:
        with shards.files.open(number) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DamagedImage(f"its mask cannot be read: {error.strerror or error}") from None


def _upright_size(data: bytes) -> tuple[int, int]:
    if array_extension(data) is not None:
        return size_of(decode_pixels(data, None))
    image = open_image(data)
    try:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception:  # broken EXIF raises many classes, and is ignored by `decode_image` too
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]:,} × {size[1]:,} pixels"


# --- classes ---------------------------------------------------------------------------------------------------------


def read_classes(train: Masked, test: Masked, ignore: Sequence[int]) -> tuple[Classes, list[str]]:
    """The classes of two parts of a data set, and warnings, a sentence each.

    There are as many classes as lines in classes.txt beside the shards; without the file, the largest id of train + 1.

    Raises UserError if an id is neither a class nor ignored, only ignored pixels are left, there are fewer than two
    classes, the test masks have a class that train lacks, or a test image is also a training image.
    """
    named = class_names(train.shards, test.shards)
    bare = Classes([], tuple(ignore))
    totals = {name: bare.counted(part.counts) for name, part in (("training", train), ("test", test))}
    for name, counts in totals.items():
        if not counts.sum():
            raise UserError(
                f"the masks of the {name} images hold only ignored pixels (ignore = {list(ignore)}): give masks with "
                f"class ids, or another ignore"
            )
    found = {name: np.flatnonzero(counts.sum(axis=0)) for name, counts in totals.items()}
    if named is None:
        names = [f"class {i}" for i in range(int(found["training"][-1]) + 1)]
    else:
        names = named.names
        for name, part in (("training", train), ("test", test)):
            if (beyond := found[name][found[name] >= len(names)]).size:
                i = int(np.flatnonzero(part.counts[:, beyond[0]])[0])
                raise UserError(
                    f"{part.shards.shard_of(i)}: the mask of {shorten(part.shards.key(i), 100)} holds the class id "
                    f"{beyond[0]}, but {named.file} names {len(names)} classes, ids 0 to {len(names) - 1}: complete "
                    f"the file, or leave such pixels out with ignore=[{','.join(map(str, [*ignore, *beyond[:5]]))}]"
                )
    if len(found["training"]) < 2:
        raise UserError(
            f"the training masks hold one class only, id {found['training'][0]}: segmentation needs at least two"
        )
    if lacking := sorted({*found["test"].tolist()} - {*found["training"].tolist()}):
        shown = ", ".join(f"{i} ({names[i]})" if i < len(names) else str(i) for i in lacking[:10])
        raise UserError(
            f"the test masks hold classes that no training mask has: {shown}{' ...' if len(lacking) > 10 else ''}. "
            f"Give both parts of the same data set, or leave these out with "
            f"ignore=[{','.join(map(str, [*ignore, *lacking[:10]]))}]"
        )
    _require_new_images(train.shards, test.shards)
    void = [i for i in found["training"] if names[i].lower() in _VOID] if named is not None else []
    return Classes(names, tuple(ignore)), [
        f"class {i} is named {names[i]!r} and is scored like every class; to leave its pixels out, set "
        f"ignore=[{','.join(map(str, [*void, *ignore]))}]"
        for i in void[:1]
    ]


def _require_new_images(train: Images, test: Images) -> None:
    shared = np.flatnonzero(np.isin(test.contents, train.contents) | made_from(test, train))
    if shared.size:
        raise UserError(
            f"{shared.size:,} of the {len(test):,} test images are also training images (equal CRC-32 and size, or "
            f"packed from the same files; first: {shorten(test.key(int(shared[0])), 100)} in "
            f"{test.shard_of(int(shared[0]))}), so a score would not "
            f"measure how new images are segmented: give test images that are not in train"
        )


def readable(
    part: Masked, indices: Iterable[int], channels: int, bad: list[DamagedSample], threads: int = 2
) -> Iterator[tuple[int, Pixels, np.ndarray]]:
    """Index, image and mask of each readable image of `indices`, decoded in threads; the others are added to `bad`."""

    def decode(item: tuple[int, tuple[bytes, bytes] | str]) -> tuple[int, tuple[Pixels, np.ndarray] | str]:
        i, data = item
        if isinstance(data, str):
            return i, data
        try:
            return i, part.decode(data, channels)
        except DamagedImage as error:
            return i, str(error)

    def files() -> Iterator[tuple[int, tuple[bytes, bytes] | str]]:
        for i in indices:
            try:
                yield i, part.read(i)
            except DamagedImage as error:
                yield i, str(error)

    for i, decoded in ahead(decode, files(), threads):
        if isinstance(decoded, str):
            bad.append(DamagedSample(part.shards.shard_of(i), part.shards.key(i), decoded))
        else:
            yield i, *decoded
