"""What can be known to be wrong with labelled shards before any feature is computed.

`selfvil eval` makes these checks before it computes features, and a run that scores its backbone before the first step.
The images a backbone was pretrained on are not compared with the test images: pretraining uses no labels.
"""

from collections.abc import Sequence

import numpy as np
import torch

from selfvil.data.classes import class_names
from selfvil.data.index import Shards
from selfvil.errors import UserError
from selfvil.evaluate.features import Features, names, need_labels, shared_classes
from selfvil.evaluate.knn import need_neighbours
from selfvil.evaluate.linear import need_for_probe


def check_parts(
    train: Shards, test: Shards, *, protocols: Sequence[str], labels_per_class: int | None = None
) -> list[str]:
    """Check labels, classes, numbers of images and contents of two parts of a data set; returns warnings, a sentence
    each.

    protocols: of "knn" and "linear". labels_per_class: labels that the linear probe is fitted on; None for all.

    Raises UserError if images have no label, a label means different classes in two folders, the test images have a
    class that training lacks, there are too few training images for a protocol, or all test images are training images.
    """
    need_labels(train)
    need_labels(test)
    class_names(train, test)
    warnings = _compare_contents(train, test)
    named, unnamed = sorted((train, test), key=lambda part: class_names(part) is None)
    if class_names(named) and not class_names(unnamed):
        warnings.append(
            f"there is no classes.txt beside {names(unnamed)}, so whether its labels mean the same classes as those of "
            f"{names(named)} is not known"
        )
    parts = [Features(torch.zeros(len(part), 1), torch.as_tensor(part.labels)) for part in (train, test)]
    shared_classes(*parts)
    if "knn" in protocols:
        need_neighbours(len(train))
    if "linear" in protocols:
        need_for_probe(parts[0].y, labels_per_class)
    return warnings


def _compare_contents(train: Shards, test: Shards) -> list[str]:
    shared = int(np.isin(test.contents, train.contents).sum())
    if shared == len(test):
        raise UserError(
            f"all {shared:,} test images in {names(test)} are also training images in {names(train)} (equal CRC-32 and "
            f"size), so a score would not tell how new images are classified: give a test part with images of its own"
        )
    if shared:
        return [
            f"{shared:,} of the {len(test):,} test images in {names(test)} are also training images in {names(train)} "
            f"(equal CRC-32 and size): accuracies may be up to {100 * shared / len(test):.2g} points too high"
        ]
    return []
