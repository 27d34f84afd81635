"""Bootstrap confidence intervals over test images (Efron, "Bootstrap methods: another look at the jackknife", 1979).

A resample draws N of the N test images with replacement. Only how often each image is drawn matters, so a resample is
one multinomial draw, and images with equal results are drawn together: for accuracies, which have few different results
for an image, thousands of resamples of any number of images take milliseconds.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

RESAMPLES = 2_000
LEVEL = 0.95
_MOST_WEIGHTS = 2**24  # counts held at once: 128 MiB


class Accuracy(NamedTuple):
    """value: percent, the mean over draws. deviation: the standard deviation over draws; None for one draw. interval:
    95 % confidence interval of value over test images, by bootstrap."""

    value: float
    deviation: float | None
    interval: tuple[float, float]


def accuracy(correct: Tensor, seed: int = 0) -> Accuracy:
    """Accuracy of predictions that are right or wrong: bool (N,), or (S, N) for S draws of labels or of a seed.

    The interval is that of the mean over the S draws on resampled test images: it does not include the deviation over
    draws, which is given beside it.
    """
    outcomes = np.atleast_2d(correct.detach().cpu().numpy())
    values = [100 * int(draw.sum()) / len(draw) for draw in outcomes]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Accuracy(statistics.mean(values), deviation, bootstrap_interval(100.0 * outcomes.mean(axis=0), seed=seed))


def percent(correct: Tensor) -> float:
    """The share of true values in `correct`, bool (N,), in percent."""
    return 100 * int(correct.sum()) / len(correct)


def bootstrap_interval(
    results: np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile interval of a statistic of the mean result of N images.

    Args:
        results: (N, ...), what each image contributes: its accuracy, or its confusion matrix (K, K).
        statistic: from the mean result (...) of a resample to a number, such as the mIoU of a mean confusion matrix;
            None for results (N,), whose mean is the statistic. A resample whose statistic is NaN is left out.
        seed: of the resamples.
        level: the share of resamples within the interval.

    Raises ValueError if there are no results.
    """
    count = len(results)
    if count == 0:
        raise ValueError("a confidence interval needs at least one result")
    rows, times = np.unique(results.reshape(count, -1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    found: list[float] = []
    at_once = max(1, _MOST_WEIGHTS // len(rows))
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        means = generator.multinomial(count, times / count, size=size) @ rows / count
        if statistic is None:
            found += means[:, 0].tolist()
        else:
            found += [statistic(mean.reshape(results.shape[1:])) for mean in means]
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
