"""Near-duplicates among many images, by small fingerprints: copies that were resized, re-encoded or slightly edited.

The fingerprint of an image is its picture of 9 × 8 pixels. From its grey values follows a hash of 64 bits: whether each
pixel is brighter than its left neighbour (difference hash). Two images are near-duplicates if their hashes differ in at
most BITS bits, and their small pictures by at most LEVELS of 255 on average.

The first condition finds candidates without comparing all pairs: the hash is divided into BITS + 1 parts, of which one
must then be equal. The second one rejects different images with the same hash, such as plain ones. Mirrored and cropped
copies are not found; `selfvil duplicates` compares embeddings of a network, which may find them.
"""

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

WIDTH, HEIGHT = 9, 8
"""Pixels of the small picture."""

BITS = 3
LEVELS = 6.0

_PART = 64 // (BITS + 1)
_SMALL_BUCKET = 256  # images whose pairs are all compared
_NEIGHBOURS = 16  # of an image in a larger bucket, in the order of the whole hash
_PAIRS = 1 << 18  # compared at a time


def small_picture(image: Image.Image) -> bytes:
    """The small picture of an 8-bit image: HEIGHT * WIDTH RGB pixels. Transparent parts count as they are stored."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BOX, reducing_gap=4.0).tobytes()


def near_groups(pictures: np.ndarray, apart: np.ndarray) -> list[list[int]]:
    """Groups of near-duplicates, each ascending: images that are connected by pairs.

    Args:
        pictures: uint8 (N, HEIGHT * WIDTH * 3), from `small_picture`.
        apart: integers (N,): images of equal value are one image already, such as exact duplicates, and make no pair.
    """
    first, second = _candidates(_hashes(pictures))
    keep = apart[first] != apart[second]
    first, second = first[keep], second[keep]
    near = np.zeros(len(first), bool)
    for start in range(0, len(first), _PAIRS):
        part = slice(start, start + _PAIRS)
        difference = pictures[first[part]].astype(np.int16) - pictures[second[part]]
        near[part] = np.abs(difference).mean(axis=1) <= LEVELS
    graph = coo_array((np.ones(near.sum(), bool), (first[near], second[near])), shape=(len(pictures),) * 2)
    _, group = connected_components(graph, directed=False)
    members = np.flatnonzero(np.bincount(group)[group] > 1)
    found: dict[int, list[int]] = {}
    for i in members.tolist():
        found.setdefault(int(group[i]), []).append(i)
    return list(found.values())


def _hashes(pictures: np.ndarray) -> np.ndarray:
    """uint64 (N,)."""
    colours = pictures.reshape(-1, HEIGHT, WIDTH, 3)
    found = np.zeros(len(pictures), np.uint64)
    for start in range(0, len(pictures), _PAIRS):
        grey = colours[start : start + _PAIRS] @ np.array([299, 587, 114])
        bits = (grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(grey), 64)
        found[start : start + _PAIRS] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return found


def _count_bits(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values.view(np.uint8)).reshape(-1, 64).sum(axis=1)


def _candidates(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j), i != j, each once, whose hashes differ in at most BITS bits.

    In a bucket of many images with one part in common, such as thousands of plain ones, an image is compared only with
    the next ones in the order of the whole hash, so that the number of pairs stays linear.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for part in range(BITS + 1):
        # The part becomes the highest bits, so that sorting also orders the rest of the hash within a bucket.
        shift = np.uint64(part * _PART)
        turned = hashes << shift | hashes >> (np.uint64(64) - shift) if part else hashes
        order = np.argsort(turned, kind="stable")
        keys = turned[order] >> np.uint64(64 - _PART)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(np.append(starts, len(keys)))
        reach = np.repeat(np.where(sizes <= _SMALL_BUCKET, sizes, _NEIGHBOURS + 1), sizes)
        end = np.repeat(starts + sizes, sizes)
        for step in range(1, int(reach.max(initial=1))):
            here = np.flatnonzero((reach > step) & (np.arange(len(keys)) + step < end))
            if not len(here):
                continue
            i, j = order[here], order[here + step]
            close = _count_bits(hashes[i] ^ hashes[j]) <= BITS
            pairs.append(np.stack([i[close], j[close]], 1))
    unique = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)
    return unique[:, 0], unique[:, 1]
