"""k-NN of patch features without training, as in CAPI (Darcet et al., 2025, arXiv 2502.08769, `eval_segmentation.py`).

Each patch of a test image takes its nearest training patches; at each pixel of the patch, their classes at the same
place vote, with equal weights, and of equal counts the smaller id wins. k of 1, 3, 10 and 30 and the distance, cosine
or Euclidean, are chosen by mean IoU on held-out images.

Shapes: M training patches, Q test patches, D features, P pixels of a patch, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.evaluate.dense.patches import PatchSample

Distance = Literal["cosine", "l2"]
KS = (1, 3, 10, 30)
DISTANCES: tuple[Distance, ...] = ("cosine", "l2")
_CHUNK_ELEMENTS = 2**24  # similarities held at once: 64 MiB; votes are bounded by the same number


@dataclass(frozen=True)
class NearestPatches:
    """bank: float32 (M, D); pixels: uint8 (M, P), the class of each pixel of its patches."""

    bank: Tensor
    pixels: Tensor
    num_classes: int
    k: int
    distance: Distance

    def predict(self, x: Tensor) -> Tensor:
        """Classes uint8 (Q, P) of the pixels of patches with features x (Q, D)."""
        return vote(self.pixels, nearest(self.bank, x, self.k, self.distance), [self.k], self.num_classes)[self.k]

    def to(self, device: torch.device) -> "NearestPatches":
        return NearestPatches(self.bank.to(device), self.pixels.to(device), self.num_classes, self.k, self.distance)


def nearest(bank: Tensor, x: Tensor, k: int, distance: Distance) -> Tensor:
    """Rows int64 (Q, k) of the `bank` (M, D) nearest to each of x (Q, D), the nearest first."""
    if distance == "cosine":
        bank, x = F.normalize(bank, dim=1), F.normalize(x, dim=1)
    # |x - b|² = |x|² - 2 (x·b - |b|²/2): the order needs one product. For unit vectors it is that of the cosine.
    half = 0 if distance == "cosine" else bank.square().sum(dim=1) / 2
    chunk = max(1, _CHUNK_ELEMENTS // len(bank))
    return torch.cat([(part @ bank.T - half).topk(k, dim=1).indices for part in x.split(chunk)])


def vote(pixels: Tensor, neighbours: Tensor, ks: Sequence[int], num_classes: int) -> dict[int, Tensor]:
    """Classes uint8 (Q, P) for each k, by the first k of `neighbours` (Q, most), rows of `pixels` (M, P)."""
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    chunk = max(1, _CHUNK_ELEMENTS // (pixels.shape[1] * (num_classes + neighbours.shape[1])))
    for part in neighbours.split(chunk):
        classes = pixels[part].long()  # (q, most, P)
        votes = torch.zeros(len(part), num_classes, pixels.shape[1], device=pixels.device)
        done = 0
        for k in sorted(ks):
            added = classes[:, done:k]
            votes.scatter_add_(1, added, torch.ones_like(added, dtype=votes.dtype))
            parts[k].append(votes.argmax(dim=1).to(torch.uint8))  # the first of equal counts
            done = k
    return {k: torch.cat(found) for k, found in parts.items()}


def held_out_predictions(
    fitted: PatchSample, held: PatchSample, ks: Sequence[int], distances: Sequence[Distance], num_classes: int
) -> dict[tuple[int, Distance], Tensor]:
    """For each k that `fitted` has patches for, and each distance: the classes (Q, P) of the pixels of `held`."""
    ks = [k for k in ks if k <= len(fitted)]
    found: dict[tuple[int, Distance], Tensor] = {}
    for distance in distances:
        neighbours = nearest(fitted.x, held.x, max(ks), distance)
        for k, classes in vote(fitted.pixels, neighbours, ks, num_classes).items():
            found[k, distance] = classes
    return found
