"""Errors in labelled shards that can be found before any feature is computed.

`selfvil eval` makes these checks before it computes features, and a run with evaluations makes them before its first
step. The images of pretraining are not compared with the test images: pretraining uses no labels.
"""

import numpy as np
import torch

from selfvil.data.classes import class_names
from selfvil.data.index import Shards
from selfvil.errors import UserError
from selfvil.evaluate.features import Features, names, require_labels, shared_classes


def check_classes(train: Shards, test: Shards) -> list[str]:
    """Check labels, classes and contents of two parts of a data set; returns warnings, a sentence each.

    Raises UserError if images have no label, a label means different classes in two folders, the test images have a
    class that training lacks, or all test images are training images.
    """
    require_labels(train)
    require_labels(test)
    class_names(train, test)
    warnings = _compare_contents(train, test)
    named, unnamed = sorted((train, test), key=lambda part: class_names(part) is None)
    if class_names(named) and not class_names(unnamed):
        warnings.append(
            f"there is no classes.txt beside {names(unnamed)}, so whether its labels mean the same classes as those of "
            f"{names(named)} is not known"
        )
    shared_classes(*(Features(torch.zeros(len(part), 1), torch.as_tensor(part.labels)) for part in (train, test)))
    return warnings


def _compare_contents(train: Shards, test: Shards) -> list[str]:
    shared = int(np.isin(test.contents, train.contents).sum())
    if shared == len(test):
        raise UserError(
            f"all {shared:,} test images in {names(test)} are also training images in {names(train)} (equal CRC-32 and "
            f"size), so a score would not measure how new images are classified: give test images that are not in train"
        )
    if shared:
        return [
            f"{shared:,} of the {len(test):,} test images in {names(test)} are also training images in {names(train)} "
            f"(equal CRC-32 and size): accuracies may be up to {100 * shared / len(test):.2g} points too high"
        ]
    return []
