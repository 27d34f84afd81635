"""Bootstrap intervals: equal to plain resampling, and they contain the truth as often as they promise."""

import numpy as np
import pytest
import torch

from selfvil.evaluate.intervals import accuracy, bootstrap_interval, percent


def test_equals_resampling_image_by_image():
    results = np.random.default_rng(0).choice([0.0, 50.0, 100.0], size=200, p=[0.3, 0.2, 0.5])
    generator = np.random.default_rng(1)
    means = [results[generator.integers(0, 200, size=200)].mean() for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(results, resamples=4000) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(("truth", "level"), [(0.5, 0.95), (0.9, 0.95), (0.7, 0.8)])
def test_coverage(truth, level):
    """Of 600 test sets of 300 images, the interval contains the true accuracy in about the promised share."""
    generator = np.random.default_rng(2)
    inside = 0
    for seed in range(600):
        results = 100.0 * (generator.random(300) < truth)
        low, high = bootstrap_interval(results, seed=seed, resamples=500, level=level)
        inside += low <= 100 * truth <= high
    assert inside / 600 == pytest.approx(level, abs=0.035)  # three standard errors, and the bias of 300 images


def test_a_statistic_of_summed_results():
    """Intersection over union of confusion matrices: as resampling image by image; undefined resamples are left out."""
    generator = np.random.default_rng(3)
    matrices = generator.poisson(3.0, size=(60, 2, 2)) + np.array([[9, 0], [0, 9]])

    def iou(mean: np.ndarray) -> float:
        return float(np.mean(np.diag(mean) / (mean.sum(0) + mean.sum(1) - np.diag(mean))))

    values = [iou(matrices[generator.integers(0, 60, size=60)].mean(axis=0)) for _ in range(2000)]
    found = bootstrap_interval(matrices, iou)
    assert found == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.004)
    assert bootstrap_interval(matrices, lambda mean: iou(mean) if mean[0, 0] > 11.9 else float("nan"))[0] > 0


def test_accuracy_of_several_draws():
    correct = torch.rand(5, 400, generator=torch.Generator().manual_seed(4)) < 0.8
    found = accuracy(correct)
    each = [percent(draw) for draw in correct]
    assert found.value == pytest.approx(np.mean(each))
    assert found.deviation == pytest.approx(np.std(each, ddof=1))
    assert found.interval[0] < found.value < found.interval[1]
    one = accuracy(correct[0])
    assert one.deviation is None
    assert one.interval[1] - one.interval[0] > found.interval[1] - found.interval[0]  # the mean of draws varies less
    assert accuracy(correct[0]) == one
    assert accuracy(correct[0], seed=1).interval != one.interval


def test_extremes():
    assert accuracy(torch.ones(7, dtype=torch.bool)) == (100.0, None, (100.0, 100.0))
    assert accuracy(torch.tensor([False])) == (0.0, None, (0.0, 0.0))
    with pytest.raises(ValueError, match="at least one result"):
        bootstrap_interval(np.zeros(0))


def test_many_different_results_are_resampled_in_parts(monkeypatch):
    results = np.random.default_rng(5).random(500)
    whole = bootstrap_interval(results, resamples=400)
    monkeypatch.setattr("selfvil.evaluate.intervals._MOST_WEIGHTS", 500 * 7)
    assert bootstrap_interval(results, resamples=400) == pytest.approx(whole, rel=1e-12)
