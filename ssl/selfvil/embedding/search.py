"""Nearest neighbours and near-duplicates among embeddings: exact cosine similarity, at bounded memory.

Shapes: N embeddings, D values, Q queries.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selfvil.data.arrays import decode_pixels
from selfvil.data.read import DamagedImage
from selfvil.embedding.encoder import Encoder, load_encoder
from selfvil.embedding.reader import EmbeddingFile
from selfvil.errors import UserError, shorten

Progress = Callable[[int, int], None]

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Of the similarity of each image to its nearest neighbour, as reported by `duplicates`."""

_TOLERANCE = 1e-6  # rounding of a float32 product: equal images have a similarity of 1 only to this
_TILE = 4096  # rows and columns of similarities at a time: 64 MiB
_STRIP = 256
_OUTER_BYTES = 2**27  # of the rows that are compared with all later ones
_SUGGESTED_FROM = 200_000  # keys that are compared with an unknown one


@dataclass(frozen=True)
class Neighbour:
    """An image near a query: its row in the file, its key, and its cosine similarity."""

    row: int
    key: str
    similarity: float


@dataclass(frozen=True)
class Query:
    """name: a key, or the path of an image. row: of the key in the file, which is no neighbour of itself, or None.
    feature: float32 (D,), of norm 1."""

    name: str
    row: int | None
    feature: np.ndarray


# --- queries ---------------------------------------------------------------------------------------------------------


def find_queries(
    file: EmbeddingFile, names: Sequence[str], model: str | None = None, device: torch.device | str | None = None
) -> list[Query]:
    """A query for each name: a key in the file, or else the path of an image, which is embedded with the same model.

    model: where the model lies now, if it was moved. Raises UserError: a name is neither, with similar keys; a key
    occurs twice; an image cannot be read; the model cannot be loaded, or has other weights.
    """
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, key in file.all_keys():
        if key in rows:
            rows[key].append(row)
    for name, found in rows.items():
        if len(found) > 1:
            raise UserError(
                f"the key {shorten(name, 200)!r} occurs {len(found)} times in {file.path} (rows {found[0]} and "
                f"{found[1]}), so it does not name one image: embed the images again, or give the path of an image"
            )
    images = [name for name, found in rows.items() if not found]
    for name in images:
        if not Path(name).expanduser().is_file():
            raise UserError(_unknown(file, name))
    features = _rows(file, [found[0] for found in rows.values() if found])
    if images:
        encoder = _same_encoder(file, model, device)
        features |= {name: _embed_image(encoder, name) for name in images}
    return [
        Query(name, rows[name][0], features[rows[name][0]]) if rows[name] else Query(name, None, features[name])
        for name in names
    ]


def _unknown(file: EmbeddingFile, name: str) -> str:
    keys = [key for _, key in islice(file.all_keys(), _SUGGESTED_FROM)]
    ends = [key for key in keys if key.endswith(f"/{name}") or key.rpartition(".")[0] == name]
    similar = list(dict.fromkeys([*ends[:3], *difflib.get_close_matches(name, keys, n=3, cutoff=0.6)]))[:3]
    shown = " or ".join(shorten(key, 100) for key in similar)
    meant = (
        f"did you mean {shown}?" if similar else f"its first key is {shorten(keys[0], 100)}" if keys else "it is empty"
    )
    return f"{shorten(name, 200)!r} is no key in {file.path}, and no file of an image; {meant}"


def _rows(file: EmbeddingFile, rows: Sequence[int]) -> dict[Any, np.ndarray]:
    found: dict[Any, np.ndarray] = {}
    for number, span in enumerate(file.spans):
        inside = [row for row in rows if span.first <= row < span.last]
        if inside:
            values = file.unit_features(number)
            found |= {row: values[row - span.first] for row in inside}
    return found


def _same_encoder(file: EmbeddingFile, model: str | None, device: torch.device | str | None) -> Encoder:
    """The encoder that wrote the file."""
    known = file.metadata
    try:
        source, readout, size = model or known["source"], known["readout"], known["normalisation"]["img_size"]
        network, precision, digest = known["network"], known["precision"], known["model"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the metadata of {file.path} lacks {error}: its model is unknown; use a key as the query"
        ) from None
    try:
        encoder = load_encoder(
            source, network=network, readout=readout, img_size=size, precision=precision, device=device
        )
    except UserError as error:
        raise UserError(
            f"the model of {file.path}, which embeds the query, cannot be loaded ({error}); if it was moved, "
            "give its place with --model"
        ) from None
    if (found := encoder.weights_digest()) != digest:
        raise UserError(
            f"{source} has other weights (digest {found}) than the model that wrote {file.path} ({digest}), so their "
            "embeddings cannot be compared: give that model with --model, or embed the images again"
        )
    return encoder


def _embed_image(encoder: Encoder, name: str) -> np.ndarray:
    path = Path(name).expanduser()
    try:
        image = decode_pixels(path.read_bytes(), encoder.normalisation.channels)
    except (OSError, DamagedImage) as error:
        raise UserError(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    feature = encoder.encode(encoder.view(image)[None]).features[0]
    if not np.isfinite(feature).all():
        raise UserError(f"the features of {path} hold NaN or infinity: the weights of the model are broken")
    return feature / max(float(np.linalg.norm(feature)), 1e-12)


# --- neighbours ------------------------------------------------------------------------------------------------------


def neighbours(
    file: EmbeddingFile, queries: Sequence[Query], k: int = 10, progress: Progress | None = None
) -> list[list[Neighbour]]:
    """The k most similar images of each query, the most similar first; of equal ones the earlier row.

    A query that is a row of the file is not its own neighbour. Fewer than k if the file is smaller. Raises UserError.
    """
    if k < 1:
        raise UserError(f"--k {k} is not possible; expected 1 or more")
    if queries and queries[0].feature.shape != (file.dim,):
        raise UserError(
            f"the queries have {queries[0].feature.size} values, the embeddings in {file.path} {file.dim}: they are of "
            "another model"
        )
    asked = torch.from_numpy(np.stack([query.feature for query in queries]))  # (Q, D)
    best, rows = torch.zeros(len(asked), 0), torch.zeros(len(asked), 0, dtype=torch.int64)
    for number, span in enumerate(file.spans):
        similar = asked @ torch.from_numpy(file.unit_features(number)).T
        for i, query in enumerate(queries):
            if query.row is not None and span.first <= query.row < span.last:
                similar[i, query.row - span.first] = -torch.inf
        best = torch.cat([best, similar], dim=1)
        rows = torch.cat([rows, torch.arange(span.first, span.last).expand(len(asked), -1)], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order[:, :k])
        if progress is not None:
            progress(span.last, len(file))
    names = keys_of(file, rows.flatten().tolist())
    return [
        [Neighbour(row, names[row], min(value, 1.0)) for value, row in zip(values, found) if value > -torch.inf]
        for values, found in zip(best.tolist(), rows.tolist())
    ]


def keys_of(file: EmbeddingFile, rows: Sequence[int]) -> dict[int, str]:
    """The keys of these rows."""
    wanted, found = sorted(set(rows)), dict[int, str]()
    for number, span in enumerate(file.spans):
        inside = [row for row in wanted if span.first <= row < span.last]
        if inside:
            keys = file.keys(number)
            found |= {row: keys[row - span.first] for row in inside}
    return found


# --- duplicates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicates:
    """Groups of near-duplicates among N embeddings.

    Attributes:
        threshold: of the cosine similarity.
        images: N.
        pairs: number of pairs of images that are at least as similar as the threshold.
        groups: rows of each group, ascending; the largest group first. Each image of a group is at least as similar as
            the threshold to one other of it, and not necessarily to all.
        nearest: float32 (N,), the similarity of each image to its nearest neighbour; -1 for a single image.
    """

    threshold: float
    images: int
    pairs: int
    groups: list[list[int]]
    nearest: np.ndarray

    @property
    def members(self) -> int:
        """Images that are in a group."""
        return sum(map(len, self.groups))

    @property
    def removable(self) -> int:
        """Images that are left out if one of each group is kept."""
        return self.members - len(self.groups)

    def quantiles(self) -> dict[float, float]:
        """Quantiles of the similarity to the nearest neighbour, which show where a threshold may lie."""
        return {share: float(np.quantile(self.nearest, share)) for share in QUANTILES}

    def above(self, threshold: float) -> int:
        """Images whose nearest neighbour is at least this similar."""
        return int((self.nearest >= threshold - _TOLERANCE).sum())


def duplicates(
    file: EmbeddingFile,
    threshold: float = 0.98,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Groups of near-duplicates: connected components of all pairs whose cosine similarity is at least `threshold`.

    All N² / 2 pairs are compared, in tiles, in float32; a similarity may be 1e-6 below the threshold, since equal
    images reach 1 only up to rounding. Which similarity two nearly equal images have depends on the model.

    device: that computes similarities; None: a GPU if there is one. Raises UserError.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} is not possible; a cosine similarity lies from -1 to 1")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    forest, nearest, pairs = _Forest(len(file)), torch.full((len(file),), -1.0), 0
    for outer in _outer_blocks(file):
        rows = torch.cat([torch.from_numpy(file.unit_features(number)) for number in outer]).to(place)
        first = file.spans[outer[0]].first
        for number in range(outer[0], len(file.spans)):
            columns = torch.from_numpy(file.unit_features(number)).to(place)
            start = file.spans[number].first
            for i in range(0, len(rows), _TILE):
                for j in range(0, len(columns), _TILE):
                    if start + j + _TILE <= first + i:  # below the diagonal
                        continue
                    similar = rows[i : i + _TILE] @ columns[j : j + _TILE].T
                    pairs += _compare(similar, first + i, start + j, threshold - _TOLERANCE, forest, nearest)
            if progress is not None:
                progress(_pairs_before(first, len(file)) + len(rows) * (start + len(columns) - first), len(file) ** 2)
    nearest.clamp_(max=1.0)
    return Duplicates(threshold, len(file), pairs, forest.groups(), nearest.numpy())


def _outer_blocks(file: EmbeddingFile) -> list[list[int]]:
    """Consecutive blocks of the file, together of at most _OUTER_BYTES."""
    outer: list[list[int]] = []
    size = 0
    for number, span in enumerate(file.spans):
        bytes = (span.last - span.first) * file.dim * 4
        if not outer or size + bytes > _OUTER_BYTES:
            outer.append([])
            size = 0
        outer[-1].append(number)
        size += bytes
    return outer


def _pairs_before(first: int, count: int) -> int:
    """For the progress: pairs of rows before `first`, of `count` ** 2 in all."""
    return count**2 - (count - first) ** 2


def _compare(
    similar: Tensor, first_row: int, first_column: int, least: float, forest: "_Forest", nearest: Tensor
) -> int:
    """Account for a tile of similarities (R, C) of rows and later columns; returns the number of pairs in it."""
    height, width = similar.shape
    rows, columns = slice(first_row, first_row + height), slice(first_column, first_column + width)
    if first_column < first_row + height:  # the diagonal, and pairs that occur twice
        earlier = torch.arange(height)[:, None] + first_row < torch.arange(width) + first_column
        similar = similar.masked_fill(~earlier.to(similar.device), -torch.inf)
    nearest[rows] = torch.maximum(nearest[rows], similar.amax(dim=1).cpu())
    nearest[columns] = torch.maximum(nearest[columns], similar.amax(dim=0).cpu())
    found = similar >= least
    count = int(found.sum())
    if count:
        for offset in range(0, height, _STRIP):  # every pair of a tile may be one, which would be 16 million at once
            pairs = found[offset : offset + _STRIP].nonzero().cpu().numpy()
            if len(pairs):
                forest.join(pairs[:, 0] + first_row + offset, pairs[:, 1] + first_column)
    return count


class _Forest:
    """Disjoint sets of rows (union-find). Memory is proportional to the rows, not to the pairs."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def _roots(self, rows: np.ndarray) -> np.ndarray:
        roots = self._parent[rows]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[rows] = roots
        return roots

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Join the sets of one[i] and other[i], for all i; the smallest root becomes the root of all."""
        roots, places = np.unique(self._roots(np.concatenate([one, other])), return_inverse=True)
        ends = places.reshape(2, -1)
        graph = coo_array((np.ones(ends.shape[1], np.int8), (ends[0], ends[1])), shape=(len(roots), len(roots)))
        count, labels = connected_components(graph, directed=False)
        smallest = np.full(count, len(self._parent))
        np.minimum.at(smallest, labels, roots)
        self._parent[roots] = smallest[labels]

    def groups(self) -> list[list[int]]:
        """Rows of each set of two or more, the largest set first."""
        roots = self._roots(np.arange(len(self._parent)))
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        sets = [part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1]
        return sorted(sets, key=lambda rows: (-len(rows), rows[0]))
