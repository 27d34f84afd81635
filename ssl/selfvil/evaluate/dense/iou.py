"""Mean intersection over union of predicted masks.

    IoU_c = |truth = c and prediction = c| / |truth = c or prediction = c|

over the labelled pixels of the whole test set, as on Pascal VOC and ADE20K: not the mean of the images' IoUs. The mean
is over the classes that the truth or the prediction holds; a class that neither holds has no IoU.

Shapes: N images, K classes.
"""

from dataclasses import dataclass, field

import numpy as np


def confusion(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (K, K): pixels by [truth, prediction], two arrays of equal shape; those of truth below 0 are left out."""
    valid = truth >= 0
    pairs = truth[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(hits: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """IoU (..., K) in percent from counts of pixels (..., K); NaN for a class that has none."""
    union = truth + predicted - hits
    return np.where(union > 0, 100 * hits / np.maximum(union, 1), np.nan)


def mean_iou(matrix: np.ndarray) -> float:
    """Mean IoU in percent of a confusion matrix (K, K); NaN if it is empty."""
    found = class_iou(matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


@dataclass
class Tally:
    """What is counted over test images.

    matrix: int64 (K, K). rows: for each image its index and 3 K counts: hits, pixels in truth, pixels predicted.
    """

    num_classes: int
    matrix: np.ndarray = field(init=False)
    rows: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matrix = np.zeros((self.num_classes, self.num_classes), np.int64)

    def add(self, index: int, truth: np.ndarray, prediction: np.ndarray) -> None:
        """truth: int64 (H, W), -1 where ignored; prediction: (H, W)."""
        one = confusion(truth, prediction, self.num_classes)
        self.matrix += one
        self.rows.append(np.concatenate([[index], one.diagonal(), one.sum(axis=1), one.sum(axis=0)]))

    def merge(self, others: list["Tally"]) -> "Tally":
        """One tally of the images of all, in the order of their indices."""
        merged = Tally(self.num_classes)
        merged.matrix = sum((other.matrix for other in others), np.zeros_like(self.matrix))
        merged.rows = sorted((row for other in others for row in other.rows), key=lambda row: int(row[0]))
        return merged

    @property
    def mean(self) -> float:
        """Mean IoU in percent."""
        return mean_iou(self.matrix)

    @property
    def ious(self) -> np.ndarray:
        """IoU (K,) in percent, NaN for a class that neither truth nor prediction has."""
        return class_iou(self.matrix.diagonal(), self.matrix.sum(axis=1), self.matrix.sum(axis=0))

    @property
    def pixel_accuracy(self) -> float:
        """Labelled pixels with the right class, in percent."""
        return float(100 * self.matrix.trace() / max(1, self.matrix.sum()))

    def interval(self, draws: int, seed: int) -> tuple[float, float] | None:
        """95 % interval of the mean IoU over `draws` bootstrap samples of the test images; None for under two images.

        Each sample draws as many images as there are, with repetition (Efron, 1979), and counts their pixels.
        """
        if len(self.rows) < 2 or draws < 2:
            return None
        counts = np.stack(self.rows)[:, 1:].astype(np.float64)
        n = len(counts)
        times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
        hits, truth, predicted = np.split(times @ counts, 3, axis=1)
        with np.errstate(invalid="ignore"):
            means = np.nanmean(class_iou(hits, truth, predicted), axis=1)
        low, high = np.nanpercentile(means, [2.5, 97.5])
        return float(low), float(high)
