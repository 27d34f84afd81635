"""Near-duplicates among many images, by small fingerprints: copies that were resized, re-encoded or slightly edited.

The fingerprint of an image is its picture of 9 × 8 pixels. From its grey values follows a hash of 64 bits: whether each
pixel is brighter than its left neighbour (difference hash). Two images are near-duplicates if their hashes differ in at
most BITS bits, and their small pictures by at most LEVELS of 255 on average.

The first condition finds candidates without comparing all pairs: of the four quarters of two such hashes, one differs
in at most one bit. The second condition rejects different images with similar hashes, such as plain ones. Mirrored and
cropped copies are not found; `selfvil duplicates` compares embeddings of a network, which may find them.
"""

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

WIDTH, HEIGHT = 9, 8
"""Pixels of the small picture."""

BITS = 7
LEVELS = 8.0

_QUARTER = 16  # bits
_WINDOW = 32  # hashes with the same quarter that are compared, the nearest in the order of the whole hash
_PAIRS = 1 << 18  # compared at a time


def small_picture(image: Image.Image) -> bytes:
    """The small picture of an 8-bit image: HEIGHT * WIDTH RGB pixels. Transparent parts count as they are stored."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BOX, reducing_gap=4.0).tobytes()


def near_groups(pictures: np.ndarray) -> list[list[int]]:
    """Groups of near-duplicates, each ascending: images that are connected by pairs.

    pictures: uint8 (N, HEIGHT * WIDTH * 3), from `small_picture`.
    """
    first, second = _candidates(_hashes(pictures))
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


_BITS_OF = np.unpackbits(np.arange(1 << _QUARTER, dtype=">u2").view(np.uint8)).reshape(-1, _QUARTER).sum(axis=1)


def _count_bits(values: np.ndarray) -> np.ndarray:
    return sum(_BITS_OF[values >> np.uint64(shift) & np.uint64(0xFFFF)] for shift in range(0, 64, _QUARTER))


def _candidates(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j, each once, whose hashes differ in at most BITS bits.

    Where many images have one quarter in common, such as thousands of plain ones, only a window of them is compared
    with each image, so that the number of pairs stays linear.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for quarter in range(4):
        # The quarter becomes the highest bits, so that sorting also orders the rest of the hash.
        shift = np.uint64(quarter * _QUARTER)
        turned = hashes << shift | hashes >> (np.uint64(64) - shift) if quarter else hashes
        order = np.argsort(turned, kind="stable")
        ascending = turned[order]
        keys = (ascending >> np.uint64(64 - _QUARTER)).astype(np.int64)
        starts = np.searchsorted(keys, np.arange((1 << _QUARTER) + 1))
        for bit in (0, *(1 << place for place in range(_QUARTER))):
            rows = np.flatnonzero(keys & bit == 0)  # each pair once: from the key without the bit to the one with it
            target = keys[rows] | bit
            low, high = starts[target], starts[target + 1]
            if bit:
                place = np.searchsorted(ascending, ascending[rows] | np.uint64(bit << 64 - _QUARTER))
                low = np.clip(place - _WINDOW // 2, low, np.maximum(low, high - _WINDOW))
            else:
                low = rows + 1
            reach = np.minimum(high - low, _WINDOW)
            for step in range(int(reach.max(initial=0))):
                inside = reach > step
                rows, low, reach = rows[inside], low[inside], reach[inside]
                i, j = order[rows], order[low + step]
                close = _count_bits(hashes[i] ^ hashes[j]) <= BITS
                pairs.append(np.stack([i[close], j[close]], 1))
    unique = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)
    return unique[:, 0], unique[:, 1]
