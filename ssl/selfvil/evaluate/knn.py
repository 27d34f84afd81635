"""Weighted k-nearest-neighbour classification of frozen features.

The protocol of instance discrimination (Wu et al., 2018, arXiv 1805.01978, section 3.4) in DINO's settings (Caron et
al., 2021, arXiv 2104.14294): cosine similarity s, votes weighted by exp(s / T) with T = 0.07, and k of 10, 20, 100
and 200.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, shared_classes
from selfvil.evaluate.intervals import percent
from selfvil.evaluate.task import Figure, Score, Task

log = logging.getLogger(__name__)

KS = (10, 20, 100, 200)
_CHUNK_ELEMENTS = 2**26  # similarities held at once: 256 MiB


def _list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class Settings(FeatureSettings):
    """Accuracy of weighted k-nearest-neighbour classification of frozen features."""

    k: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_list), Field(min_length=1)] = list(KS)  # noqa: RUF012
    """Numbers of neighbours that vote, one accuracy each; a number, or a list of them."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour of cosine similarity s has the weight exp(s / temperature)."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer training images than neighbours."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_neighbours(len(task.train), settings.k)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [settings.readout]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy for each k."""

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        for k, correct in classify(train, test, settings.k, settings.temperature).items():
            yield task.top1(f"knn_{k}", f"k-NN, k = {k}", correct, test.y)

    return task.score_features(settings.readout, fit, settings.model_dump(mode="json"))


def knn(train: Features, test: Features, ks: Sequence[int] = KS, temperature: float = 0.07) -> dict[int, float]:
    """Top-1 accuracy on `test` in percent, for each k; arguments and errors as `classify`."""
    return {k: percent(correct) for k, correct in classify(train, test, ks, temperature).items()}


def classify(train: Features, test: Features, ks: Sequence[int] = KS, temperature: float = 0.07) -> dict[int, Tensor]:
    """Whether each image of `test` is classified correctly, bool (N,), for each k, with `train` as the neighbours.

    Computed in float32 on the device of `train.x`. Of classes with equal votes, the smallest label wins, as in
    scikit-learn; of neighbours with equal similarity at the end of the k nearest, torch chooses. Any k beyond the
    number of training images is left out, with a note.

    Raises UserError if none is left, the features do not fit each other, or a test label is not among train's.
    """
    require_neighbours(len(train), ks)
    fitting = sorted({k for k in ks if 1 <= k <= len(train)})
    if len(fitting) < len(set(ks)):
        log.warning("k-NN leaves out k = %s: there are %d training images", sorted({*ks} - {*fitting}), len(train))
    classes, bank_labels, test_labels = shared_classes(train, test)
    bank = F.normalize(train.x.float(), dim=1)
    queries = F.normalize(test.x.to(bank), dim=1)
    correct: dict[int, list[Tensor]] = {k: [] for k in fitting}
    chunk = max(1, _CHUNK_ELEMENTS // len(bank))
    for part, truth in zip(queries.split(chunk), test_labels.to(bank.device).split(chunk)):
        similarity, neighbours = (part @ bank.T).topk(fitting[-1], dim=1)
        # Only ratios of votes matter; relative to the nearest neighbour, no temperature can overflow.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        labels = bank_labels.to(bank.device)[neighbours]
        for k in fitting:
            scores = votes.new_zeros(len(part), len(classes)).scatter_add_(1, labels[:, :k], votes[:, :k])
            correct[k].append((scores.argmax(dim=1) == truth).cpu())
    return {k: torch.cat(parts) for k, parts in correct.items()}


def require_neighbours(num_train: int, ks: Sequence[int] = KS) -> None:
    """Raises UserError if no k is possible with so few training images."""
    if not any(1 <= k <= num_train for k in ks):
        raise UserError(f"k-NN with k in {sorted(ks)} needs at least {min(ks)} training images, found {num_train}.")
