"""Linear probe: multinomial logistic regression on frozen features, the penalty chosen on held-out training images.

This is the one home of logistic regression. `c=dinov3 standardise=false` is the protocol of DINOv3's
`eval/log_regression.py`: 45 values of scikit-learn's C, chosen on 10 % of the training images, then a fit on all.

    minimise over W (D, K), b (K,):   mean_n CE(x_n W + b, y_n) + strength/2 · ‖W‖²

The problem is convex: the solver changes the time, not the optimum. L-BFGS runs in coordinates in which the curvature
at W = 0 is one. The Hessian there is (XᵀX/N) ⊗ (I - 1/K)/K + strength, so features are rotated to the principal axes
of X, where the penalty keeps its form, and each axis is divided by the root of its curvature. This takes a third to a
fifth of the steps. With fewer images than features, the rotation also removes the directions in which no image has a
component; there the optimum is zero.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, shared_classes
from selfvil.evaluate.intervals import percent
from selfvil.evaluate.task import Figure, Score, Task

log = logging.getLogger(__name__)

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(0, -11, -1))  # 1, 10^-0.5, ... 1e-5
DINOV3_CS = tuple(10.0 ** (-6 + power / 4) for power in range(45))  # 1e-6 ... 1e5
_TOLERANCE = 1e-5  # on the largest gradient entry, in the solver's coordinates
_TOLERANCE_OF_CHOICE = 1e-4  # enough to rank strengths
_MAX_STEPS = 500
_SMALL = 2**23  # entries of a matrix; below this, synchronising threads takes longer than the arithmetic


class Settings(FeatureSettings):
    """Accuracy of a logistic regression on frozen features, its penalty chosen on held-out training images."""

    probe_seeds: int = Field(1, ge=1)
    """Number of probes, whose mean and deviation are reported; each holds out other images."""
    strengths: list[Annotated[float, Field(gt=0)]] = Field(list(STRENGTHS), min_length=1)
    """Strengths of the L2 penalty to choose from."""
    c: Annotated[
        Literal["dinov3"] | Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None,
        BeforeValidator(lambda value: value if value in (None, "dinov3") or isinstance(value, list) else [value]),
    ] = None
    """Instead of strengths: values of scikit-learn's C = 1 / (strength · images); dinov3: its 45, 1e-6 to 1e5."""
    standardise: bool = True
    """Divide each feature by its standard deviation over the training images; DINOv3 does not."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images of each class on which the strength is chosen."""

    @model_validator(mode="after")
    def _one_grid(self) -> "Settings":
        if self.c is not None and "strengths" in self.model_fields_set:
            raise ValueError("give strengths or c, not both: c = 1 / (strength · number of training images)")
        return self


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer than two classes, or no images to hold out."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), None)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [settings.readout]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy, the mean over `probe_seeds`."""
    cs = DINOV3_CS if settings.c == "dinov3" else settings.c

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        probes = [
            linear_probe(
                train, test, strengths=settings.strengths, cs=cs, standardise=settings.standardise,
                holdout=settings.holdout, seed=seed,
            )
            for seed in range(task.seed, task.seed + settings.probe_seeds)
        ]  # fmt: skip
        chosen = [{"strength": probe.strength, "c": 1 / (probe.strength * len(train))} for probe in probes]
        correct = torch.stack([probe.correct for probe in probes])
        yield task.top1("linear", "linear probe", correct, test.y, chosen=chosen)

    return task.score_features(settings.readout, fit, settings.model_dump(mode="json"))


@dataclass(frozen=True)
class LinearResult:
    """accuracy: top-1 on test in percent; strength: of the scored fit; held_out: percent on the held-out part, by
    strength; correct: bool (N,), whether each test image is classified correctly."""

    accuracy: float
    strength: float
    held_out: dict[float, float]
    correct: Tensor = field(compare=False, repr=False)


def linear_probe(
    train: Features,
    test: Features,
    *,
    strengths: Sequence[float] = STRENGTHS,
    cs: Sequence[float] | None = None,
    standardise: bool = True,
    holdout: float = 0.1,
    seed: int = 0,
) -> LinearResult:
    """Fit on `train`, score on `test`.

    The chosen strength is the best on a held-out part of train (drawn by `seed`, the same fraction of every class; of
    equals, the stronger). The scored fit is on all of train. Computed in float32 on the device of `train.x`.

    Args:
        cs: replaces strengths by 1 / (C · number of images of a fit), so the strength of the scored fit is a little
            weaker than the chosen one, as in scikit-learn.
        standardise: divide features by their standard deviation over train. The mean is always subtracted, which
            changes no optimum, since biases have no penalty.

    Raises UserError for strengths or a holdout out of range, features that do not fit each other, test labels absent
    from train, fewer than two classes, or too few images to hold any out.
    """
    given = strengths if cs is None else cs
    if not given or min(given) <= 0 or not 0 < holdout < 1:
        raise UserError(f"A probe needs strengths above 0 and 0 < holdout < 1, got {list(given)} and {holdout}.")
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, None)
    x, queries = standardised(train, test) if standardise else centred(train, test)
    with threads_for(x.numel()):
        axes, spread = principal_axes(x)
        x, queries = x @ axes, queries @ axes
        fitted, held = stratified_split(y, holdout, seed)
        x_fitted, y_fitted, x_held, y_held = x[fitted], y[fitted], x[held], y[held]
        if cs is not None:
            strengths = [1 / (c * len(fitted)) for c in cs]
        start, path, held_out = None, {}, {}
        for strength in sorted(set(strengths), reverse=True):  # each fit starts from the one before
            start = solve(x_fitted, y_fitted, len(classes), strength, spread, start, _TOLERANCE_OF_CHOICE)
            path[strength], held_out[strength] = start, accuracy(start, x_held, y_held)
        best = max(held_out, key=lambda strength: (held_out[strength], strength))
        final = best if cs is None else best * len(fitted) / len(y)
        weights = solve(x, y, len(classes), final, spread, path[best])
    if len(held_out) > 2 and best == min(held_out):
        log.warning("The linear probe chose its weakest strength, %g: a weaker one may do better.", best)
    correct = is_correct(weights, queries, truth.to(queries.device)).cpu()
    return LinearResult(percent(correct), final, held_out, correct)


def require_probe_labels(labels: Tensor, labels_per_class: int | None) -> None:
    """Raises UserError if training labels (N,) are too few for a probe on all, or on some of each class."""
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


def solve(
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
        # The sum is in float64: the rounding of a float32 sum would stop the line search too early.
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
def threads_for(entries: int) -> Iterator[None]:
    """One thread within, if matrices are small: over ten times faster on a busy machine, as fast on an idle one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if entries < _SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes (D, R), R = min(N, D), that span the rows of x (N, D), and the mean squares along them."""
    wide = x.double()
    if len(x) < x.shape[1]:
        _, singular, axes = torch.linalg.svd(wide, full_matrices=False)
        return axes.mT.to(x.dtype), (singular.square() / len(x)).to(x.dtype)
    spread, axes = torch.linalg.eigh(wide.mT @ wide / len(x))
    return axes.to(x.dtype), spread.clamp_min(0).to(x.dtype)


def standardised(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    """Both, minus the mean of train, divided by its standard deviation; a constant feature becomes zero."""
    x = train.x.float()
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), std, torch.inf)
    return (x - mean) / std, (test.x.to(x) - mean) / std


def centred(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    """Both, minus the mean of train."""
    mean = train.x.float().mean(dim=0)
    return train.x.float() - mean, test.x.to(mean) - mean


def is_correct(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """bool (N,): whether the class of the largest score is that of y."""
    return (x @ weights[0] + weights[1]).argmax(dim=1) == y


def accuracy(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    return percent(is_correct(weights, x, y))


def stratified_split(y: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out: of each class about the fraction `holdout`, at least one row, but never all."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(y), dtype=torch.bool)
    labels = y.cpu()
    for label in range(int(labels.max()) + 1):
        rows = order[labels[order] == label]
        held[rows[: min(max(1, round(holdout * len(rows))), len(rows) - 1)]] = True
    return (~held).nonzero()[:, 0].to(y.device), held.nonzero()[:, 0].to(y.device)
