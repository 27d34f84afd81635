"""Errors in labelled shards that can be found before any feature is computed.

`selfvil eval` makes these checks before it computes features, and a run with evaluations makes them before its first
step. The images of pretraining are not compared with the test images: pretraining uses no labels.
"""

import numpy as np
import torch

from selfvil.data.base import Images
from selfvil.data.classes import class_names
from selfvil.data.origins import made_from
from selfvil.errors import UserError
from selfvil.evaluate.features import Features, names, require_labels, shared_classes


def check_classes(train: Images, test: Images, allow_shared: bool = False) -> list[str]:
    """Check labels, classes and contents of two parts of a data set; returns warnings, a sentence each.

    Raises UserError if images have no label, a label means different classes in two folders, the test images have a
    class that training lacks, or test images are also training images. With `allow_shared`, the last is a warning,
    unless all test images are.
    """
    require_labels(train)
    require_labels(test)
    class_names(train, test)
    warnings = _compare_contents(train, test, allow_shared)
    named, unnamed = sorted((train, test), key=lambda part: class_names(part) is None)
    if class_names(named) and not class_names(unnamed):
        warnings.append(
            f"there is no classes.txt beside {names(unnamed)}, so whether its labels mean the same classes as those of "
            f"{names(named)} is not known"
        )
    shared_classes(*(Features(torch.zeros(len(part), 1), torch.as_tensor(part.labels)) for part in (train, test)))
    trained, tested = (sorted({*np.asarray(part.labels).tolist()}) for part in (train, test))
    if untested := [label for label in trained if label not in tested]:
        warnings.append(
            f"no test image in {names(test)} has the label {', '.join(map(str, untested[:5]))}"
            f"{' ...' if len(untested) > 5 else ''}, which training images in {names(train)} have: the score is "
            f"that of {len(tested)} of {len(trained)} classes"
        )
    return warnings


def shared_images(train: Images, test: Images) -> int:
    """The number of test images whose files are also training images, by CRC-32 and size, or which `selfvil pack` made
    from the same files, as with another --size.

    Files are compared, not pixels: another copy that was encoded again is not found. Its pixels differ slightly if the
    format is a lossy one, so a digest of pixels would not find it either; near-duplicates are found by their features.
    """
    return int((np.isin(test.contents, train.contents) | made_from(test, train)).sum())


def _compare_contents(train: Images, test: Images, allowed: bool) -> list[str]:
    shared = shared_images(train, test)
    if not shared:
        return []
    found = (
        f"{'all ' if shared == len(test) else ''}{shared:,} {'' if shared == len(test) else f'of the {len(test):,} '}"
        f"test images in {names(test)} are also training images in {names(train)} (equal CRC-32 and size, or "
        f"packed from the same files)"
    )
    if shared == len(test):
        raise UserError(
            f"{found}, so a score would not measure how new images are classified: give test images that are not in "
            f"train"
        )
    bound = f"accuracies may be up to {100 * shared / len(test):.2g} points too high"
    if not allowed:
        raise UserError(
            f"{found}: {bound}. Remove them from train, or accept this with --allow-shared (allow_shared: true in a "
            f"recipe), which writes their number into the results"
        )
    return [f"{found}: {bound}"]
