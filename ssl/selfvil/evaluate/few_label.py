"""Few-label probe: the logistic regression of `linear`, fitted on a few labels of each class, many times."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field

from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, shared_classes
from selfvil.evaluate.linear import accuracy, principal_axes, require_probe_labels, solve, standardised, threads_for
from selfvil.evaluate.task import Figure, Score, Task


class Settings(FeatureSettings):
    """Accuracy of a linear probe that is fitted on a few labels of each class, the mean over draws of these labels."""

    labels_per_class: int = Field(5, ge=1)
    """Training images of each class whose labels are used."""
    draws: int = Field(20, ge=1)
    """Random draws of the labels, of whose accuracies the mean and the deviation are reported."""
    strength: float | None = Field(None, gt=0)
    """Strength of the L2 penalty; null: 1 / (number of labels)."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer than two classes, or a class has too few images."""
    warnings = check_classes(task.train, task.test)
    require_probe_labels(torch.as_tensor(task.train.labels), settings.labels_per_class)
    return warnings


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy: mean and deviation over the draws."""
    count, draws = settings.labels_per_class, settings.draws

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        mean, deviation = few_label_probe(train, test, count, draws, task.seed, settings.strength)
        protocol = f"linear probe, {count} labels per class, {draws} draws"
        yield Figure(f"few_label_{count}", protocol, mean, deviation)

    return task.score_features(settings.readout, fit, settings.model_dump(mode="json"))


def few_label_probe(
    train: Features,
    test: Features,
    labels_per_class: int = 5,
    draws: int = 20,
    seed: int = 0,
    strength: float | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation, over `draws`, of the test accuracy in percent with a few labels for each class.

    Each draw takes `labels_per_class` training images of every class at random. Draws depend on `seed` and labels only,
    so all networks are compared on the same draws. There are too few labels to hold any out, so the strength is fixed:
    1 / (number of labels) unless given, which is scikit-learn's C = 1. Features are standardised by the statistics of
    the whole of train, which needs no labels.

    Raises UserError as `linear_probe`, or if a class has too few images.
    """
    if labels_per_class < 1 or draws < 1 or (strength is not None and strength <= 0):
        raise UserError(
            f"labels_per_class, draws and strength must be above 0, got {labels_per_class}, {draws}, {strength}."
        )
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, labels_per_class)
    x, queries = standardised(train, test)
    strength = strength or 1 / (labels_per_class * len(classes))
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    labels = y.cpu()
    starts = F.pad(labels.bincount().cumsum(0), (1, 0))[:-1]
    with threads_for(labels_per_class * len(classes) * x.shape[1]):
        for _ in range(draws):
            order = torch.randperm(len(labels), generator=generator)
            order = order[labels[order].argsort(stable=True)]  # by class; random within a class
            chosen = order[(starts[:, None] + torch.arange(labels_per_class)).flatten()].to(x.device)
            axes, spread = principal_axes(x[chosen])
            weights = solve(x[chosen] @ axes, y[chosen], len(classes), strength, spread)
            accuracies.append(accuracy(weights, queries @ axes, truth.to(queries.device)))
    values = torch.tensor(accuracies, dtype=torch.float64)
    return float(values.mean()), float(values.std()) if draws > 1 else 0.0
