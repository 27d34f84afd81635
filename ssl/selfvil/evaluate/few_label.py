"""Few-label probe: the logistic regression of `linear`, fitted on a few labels of each class, many times.

`labels_per_class=[1%,10%]` are the shares of ImageNet that SimCLR and its successors report (Chen et al., 2020, arXiv
2002.05709), drawn from each class, so that every draw has all classes.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, shared_classes
from selfvil.evaluate.linear import is_correct, principal_axes, require_probe_labels, solve, standardised, threads_for
from selfvil.evaluate.task import Figure, Score, Task


def _known(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    share = str(value).removesuffix("%")
    numeric = isinstance(value, str) and value.endswith("%") and share.replace(".", "", 1).isdecimal()
    if numeric and 0 < float(share) <= 100:
        return value
    raise ValueError(f"{value!r} is neither a number of labels from 1 on nor a share such as 1% or 10%")


class Settings(FeatureSettings):
    """Accuracy of a linear probe that is fitted on a few labels of each class, the mean over draws of these labels."""

    labels_per_class: Annotated[
        list[Annotated[int | str, BeforeValidator(_known)]],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
        Field(min_length=1),
    ] = [5]  # noqa: RUF012
    """Training images of each class whose labels are used: a number, a share such as 1%, or a list of these."""
    draws: int = Field(20, ge=1)
    """Random draws of the labels, of whose accuracies the mean and the deviation are reported."""
    strength: float | None = Field(None, gt=0)
    """Strength of the L2 penalty; null: 1 / (number of labels)."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer than two classes, or a class has too few images."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    labels = torch.as_tensor(task.train.labels)
    for count in settings.labels_per_class:
        require_probe_labels(labels, 1 if isinstance(count, str) else count)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [settings.readout]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy for each number of labels: mean and deviation over the draws."""
    draws = settings.draws

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        for count in settings.labels_per_class:
            correct = few_label_draws(train, test, count, draws, task.seed, settings.strength)
            how = f"{count} of the labels of each class" if isinstance(count, str) else f"{count} labels per class"
            yield task.top1(f"few_label_{count}", f"linear probe, {how}, {draws} draws", correct, test.y)

    return task.score_features(settings.readout, fit, settings.model_dump(mode="json"))


def few_label_draws(
    train: Features,
    test: Features,
    labels_per_class: int | str = 5,
    draws: int = 20,
    seed: int = 0,
    strength: float | None = None,
) -> Tensor:
    """Whether each test image is classified correctly with a few labels for each class, bool (draws, N).

    Each draw takes `labels_per_class` training images of every class at random; "1%" takes this share of each class,
    rounded, but at least one. Draws depend on `seed` and labels only, so all networks are compared on the same draws.
    There are too few labels to hold any out, so the strength is fixed: 1 / (number of labels) unless given, which is
    scikit-learn's C = 1. Features are standardised by the statistics of the whole of train, which needs no labels.

    Raises UserError as `linear_probe`, or if a class has too few images.
    """
    try:
        _known(labels_per_class)
    except ValueError as error:
        raise UserError(f"labels_per_class: {error}") from None
    if draws < 1 or (strength is not None and strength <= 0):
        raise UserError(f"draws and strength must be above 0, got {draws} and {strength}.")
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, labels_per_class if isinstance(labels_per_class, int) else 1)
    x, queries = standardised(train, test)
    labels = y.cpu()
    sizes = labels.bincount().tolist()
    counts = [_count(labels_per_class, size) for size in sizes]
    strength = strength or 1 / sum(counts)
    generator = torch.Generator().manual_seed(seed)
    correct = []
    with threads_for(sum(counts) * x.shape[1]):
        for _ in range(draws):
            order = torch.randperm(len(labels), generator=generator)
            by_class = order[labels[order].argsort(stable=True)].split(sizes)  # random within a class
            chosen = torch.cat([rows[:count] for rows, count in zip(by_class, counts)]).to(x.device)
            axes, spread = principal_axes(x[chosen])
            weights = solve(x[chosen] @ axes, y[chosen], len(classes), strength, spread)
            correct.append(is_correct(weights, queries @ axes, truth.to(queries.device)).cpu())
    return torch.stack(correct)


def _count(labels_per_class: int | str, size: int) -> int:
    """Labels to draw from a class of `size` images."""
    if isinstance(labels_per_class, int):
        return labels_per_class
    return max(1, round(float(labels_per_class.removesuffix("%")) / 100 * size))
