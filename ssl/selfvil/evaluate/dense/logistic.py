"""Logistic regression on patch features, as in CAPI (Darcet et al., 2025, arXiv 2502.08769, `eval_segmentation.py`).

    minimise over W (D, K), b (K,):   C · sum_m CE(x_m W + b, y_m) + ‖W‖² / 2

The class of a training patch is its most frequent one, and the class of a test patch is that of all its pixels. C is
one of eight from 1e-6 to 1e5, chosen by mean IoU on held-out images. The problem is convex: the solver, that of the
linear probe, changes the time, not the optimum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfvil.evaluate.linear import principal_axes, solve, threads_for

CS = tuple(10.0 ** (-6 + 11 * i / 7) for i in range(8))


@dataclass(frozen=True)
class Logistic:
    """weight: (D, R), bias: (R,), of the R classes that training patches have; classes: int64 (R,), their ids."""

    weight: Tensor
    bias: Tensor
    classes: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Classes uint8 (Q, 1) of patches with features x (Q, D)."""
        return self.classes[(x @ self.weight + self.bias).argmax(dim=1)].to(torch.uint8)[:, None]

    def to(self, device: torch.device) -> "Logistic":
        return Logistic(self.weight.to(device), self.bias.to(device), self.classes.to(device))


def fit_logistic(
    x: Tensor, y: Tensor, cs: Sequence[float] = CS, tolerance: float = 1e-5
) -> Iterator[tuple[float, Logistic]]:
    """The optimum for each C, the smallest first, on patches x float32 (M, D) of classes y int64 (M,).

    tolerance: on the largest gradient entry, in the solver's coordinates; 1e-4 is enough to rank.
    """
    classes, y = y.unique(return_inverse=True)
    start = None
    with threads_for(x.numel()):
        axes, spread = principal_axes(x)
        rotated = x @ axes
        for c in sorted(set(cs)):
            start = solve(rotated, y, len(classes), 1 / (c * len(x)), spread, start, tolerance)
            yield c, Logistic(axes @ start[0], start[1], classes)
