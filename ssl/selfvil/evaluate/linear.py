"""Linear probe: multinomial logistic regression on frozen, standardised features.

    minimise over W (D, K), b (K,):   mean_n CE(x_n W + b, y_n) + strength/2 · ‖W‖²

The problem is convex, so its optimum is the answer and the solver only a matter of time. L-BFGS runs in coordinates in
which the curvature at W = 0 is one: the Hessian there is (XᵀX/N) ⊗ (I - 1/K)/K + strength, so features are rotated to
the principal axes of X, where the penalty keeps its form, and each axis is divided by the root of its curvature. That
takes a third to a fifth of the steps. With fewer images than features the rotation also leaves out the directions
that no image has, where the optimum is zero.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.errors import UserError
from selfvil.evaluate.features import Features, shared_classes

log = logging.getLogger(__name__)

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(0, -11, -1))  # 1, 10^-0.5, ... 1e-5
_TOLERANCE = 1e-5  # on the largest gradient entry, in the solver's coordinates
_TOLERANCE_OF_CHOICE = 1e-4  # enough to rank strengths
_MAX_STEPS = 500
_SMALL = 2**23  # entries of a matrix on which threads wait for each other longer than they work


@dataclass(frozen=True)
class LinearResult:
    """accuracy: top-1 on test in percent; strength: the chosen one; held_out: percent on the held-out part, by
    strength."""

    accuracy: float
    strength: float
    held_out: dict[float, float]


def linear_probe(
    train: Features,
    test: Features,
    *,
    strengths: Sequence[float] = STRENGTHS,
    holdout: float = 0.1,
    seed: int = 0,
) -> LinearResult:
    """Fit on `train`, score on `test`.

    Features are standardised by train's statistics. The strength is the best on a held-out share of train (drawn by
    `seed`, the same share of every class; the stronger one of equals); the fit that is scored is on all of train.
    Computed in float32 where `train.x` lies.

    Raises UserError for strengths or shares out of range, features that do not fit each other, test labels that train
    lacks, fewer than two classes, or too few images to hold any out.
    """
    if not strengths or min(strengths) <= 0 or not 0 < holdout < 1:
        raise UserError(f"A probe needs strengths above 0 and 0 < holdout < 1, got {list(strengths)} and {holdout}.")
    classes, y, truth = shared_classes(train, test)
    need_for_probe(train.y, None)
    x, queries = _standardised(train, test)
    with _threads_for(x.numel()):
        axes, spread = _principal_axes(x)
        x, queries = x @ axes, queries @ axes
        fitted, held = _stratified_split(y, holdout, seed)
        x_fitted, y_fitted, x_held, y_held = x[fitted], y[fitted], x[held], y[held]
        start, path, held_out = None, {}, {}
        for strength in sorted(set(strengths), reverse=True):  # each fit starts from the one before
            start = _fit(x_fitted, y_fitted, len(classes), strength, spread, start, _TOLERANCE_OF_CHOICE)
            path[strength], held_out[strength] = start, _accuracy(start, x_held, y_held)
        best = max(held_out, key=lambda strength: (held_out[strength], strength))
        weights = _fit(x, y, len(classes), best, spread, path[best])
    if len(held_out) > 2 and best == min(held_out):
        log.warning("The linear probe chose its weakest strength, %g: a weaker one may do better.", best)
    return LinearResult(_accuracy(weights, queries, truth.to(queries.device)), best, held_out)


def few_label_probe(
    train: Features,
    test: Features,
    labels_per_class: int = 5,
    draws: int = 20,
    seed: int = 0,
    strength: float | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation, over `draws`, of the test accuracy in percent with a few labels for each class.

    Each draw takes `labels_per_class` training images of every class at random; draws depend on `seed` and labels
    alone, so networks are compared on the same ones. So few labels leave nothing to choose a strength on: it is fixed,
    1 / (number of labels) unless given, which is scikit-learn's C = 1. Standardised by the statistics of the whole of
    train, which needs no labels.

    Raises UserError as `linear_probe`, or if a class has too few images.
    """
    if labels_per_class < 1 or draws < 1 or (strength is not None and strength <= 0):
        raise UserError(
            f"labels_per_class, draws and strength must be above 0, got {labels_per_class}, {draws}, {strength}."
        )
    classes, y, truth = shared_classes(train, test)
    need_for_probe(train.y, labels_per_class)
    x, queries = _standardised(train, test)
    strength = strength or 1 / (labels_per_class * len(classes))
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    labels = y.cpu()
    starts = F.pad(labels.bincount().cumsum(0), (1, 0))[:-1]
    with _threads_for(labels_per_class * len(classes) * x.shape[1]):
        for _ in range(draws):
            order = torch.randperm(len(labels), generator=generator)
            order = order[labels[order].argsort(stable=True)]  # by class, at random within
            chosen = order[(starts[:, None] + torch.arange(labels_per_class)).flatten()].to(x.device)
            axes, spread = _principal_axes(x[chosen])
            weights = _fit(x[chosen] @ axes, y[chosen], len(classes), strength, spread)
            accuracies.append(_accuracy(weights, queries @ axes, truth.to(queries.device)))
    values = torch.tensor(accuracies, dtype=torch.float64)
    return float(values.mean()), float(values.std()) if draws > 1 else 0.0


def need_for_probe(labels: Tensor, labels_per_class: int | None) -> None:
    """Raises UserError if training labels (N,) are too few: for a probe on all of them, or on some of each class."""
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise UserError(f"All training images have the label {int(classes[0])}; a probe needs at least two classes.")
    rarest = int(counts.argmin())
    if labels_per_class is None:
        if int(counts.max()) < 2:
            raise UserError("No class has two training images, so none can be held out to choose the strength on.")
    elif int(counts[rarest]) < labels_per_class:
        raise UserError(
            f"Class {int(classes[rarest])} has {int(counts[rarest])} training images, fewer than the "
            f"{labels_per_class} labels for each class asked for."
        )


# --- the solver ------------------------------------------------------------------------------------------------------


def _fit(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    strength: float,
    spread: Tensor,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = _TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Weights (R, K) and biases (K,) of the optimum, for x (N, R) on principal axes with mean squares `spread` (R,)."""
    scale = (spread / num_classes + strength).rsqrt()[:, None]
    bias_scale = num_classes**0.5
    if start is None:
        start = x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes)
    weight, bias = start[0] / scale, start[1] / bias_scale
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_STEPS,
        max_eval=2 * _MAX_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def objective() -> Tensor:
        w = weight * scale
        log_p = F.log_softmax(x @ w + bias * bias_scale, dim=1)
        # Summed in float64: the rounding of a float32 sum is what would stop the line search too early.
        loss = F.nll_loss(log_p, y, reduction="none").double().mean() + strength / 2 * w.double().square().sum()
        residual = log_p.exp_()
        residual[torch.arange(len(y), device=y.device), y] -= 1
        residual /= len(y)
        slope = (residual.T @ x).T  # several times faster than x.T @ residual
        weight.grad = ((slope + strength * w) * scale).contiguous()
        bias.grad = residual.sum(dim=0) * bias_scale
        return loss

    solver.step(objective)
    objective()
    largest = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))  # type: ignore[union-attr]
    if largest > 10 * tolerance:
        log.warning("The linear probe at strength %g did not converge: largest gradient %.1e.", strength, largest)
    return weight * scale, bias * bias_scale


@contextmanager
def _threads_for(entries: int) -> Iterator[None]:
    """One thread within, if matrices are small: over ten times faster on a busy machine, no slower on an idle one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if entries < _SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes (D, R), R = min(N, D), whose span holds every row of x (N, D), and the mean squares on them."""
    wide = x.double()
    if len(x) < x.shape[1]:
        _, singular, axes = torch.linalg.svd(wide, full_matrices=False)
        return axes.mT.to(x.dtype), (singular.square() / len(x)).to(x.dtype)
    spread, axes = torch.linalg.eigh(wide.mT @ wide / len(x))
    return axes.to(x.dtype), spread.clamp_min(0).to(x.dtype)


def _standardised(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    """Both, less train's mean and divided by its standard deviation; a feature that never changes becomes zero."""
    x = train.x.float()
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), std, torch.inf)
    return (x - mean) / std, (test.x.to(x) - mean) / std


def _accuracy(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    return 100 * float(((x @ weights[0] + weights[1]).argmax(dim=1) == y).double().mean())


def _stratified_split(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out: of each class about `share` of its images, at least one, but never all."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(y), dtype=torch.bool)
    labels = y.cpu()
    for label in range(int(labels.max()) + 1):
        rows = order[labels[order] == label]
        held[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return (~held).nonzero()[:, 0].to(y.device), held.nonzero()[:, 0].to(y.device)
