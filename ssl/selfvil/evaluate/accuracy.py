"""Accuracy of a network's own classifier: of a supervised run, of a fine-tuned network, or of a timm folder.

Nothing is fitted. The training shards are those that the classifier learnt from: test images must not be among them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from selfvil import runtime
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate import intervals
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import labelled_rows
from selfvil.evaluate.task import Score, Task
from selfvil.settings import Section
from selfvil.weights import Network, class_labels


class Settings(Section):
    """Accuracy of the network's own classifier on the test images; nothing is fitted."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError for a network without a classifier, or test images of a class that it does not have."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    if task.network is not None or task.labels:
        _labels(task)
    else:
        raise UserError("the objective of this run trains no classifier: only the objective supervised does")
    return warnings


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 and, with more than 5 classes, top-5 accuracy. Raw pixels have no score."""
    if task.network is None:
        return
    labels = task.processes.together(lambda: _labels(task))
    began = time.monotonic()
    ranks = rank_of_truth(task, task.network, labels)
    if ranks is None:
        return
    for best in (1, 5) if len(labels) > 5 else (1,):
        found = intervals.accuracy(ranks < best, task.seed)
        yield Score(
            metric="accuracy" if best == 1 else "accuracy_top5",
            protocol=f"its own classifier{'' if best == 1 else ', top-5'}",
            value=found.value, interval=found.interval, measure=f"top-{best}", readout="classifier",
            train_images=len(task.train), test_images=len(ranks), seconds=time.monotonic() - began, settings={},
        )  # fmt: skip


def rank_of_truth(task: Task, network: Network, labels: Sequence[int], title: str | None = None) -> Tensor | None:
    """How many classes the classifier prefers to the true one: int64 (N,) for the readable images of task.test.

    0 is a correct answer. Each image is cropped at its centre. All processes share the images; None but on the main
    process. Collective. Raises UserError for scores that are not finite.
    """
    model: Any = network.backbone.to(task.device).eval()
    shown = network.normalisation

    def scores(images: Tensor) -> Tensor:
        with runtime.autocast(task.device, task.precision):
            return model(images.to(task.device))

    view = CenterCrop(shown.img_size, shown.mean, shown.std)
    batch_size = task.batch_size or (64 if task.device.type == "cpu" else 256)
    title = title or f"{task.name}, test images"
    with task.processes.same_buffers(model):
        rows = labelled_rows(scores, task.test, view, shown.channels, batch_size, task.workers, title, task.processes)
    if rows is None:
        return None
    if not torch.isfinite(rows.x).all():
        raise UserError(f"{task.source}: the classifier gives NaN or infinity for some test images: it is broken")
    classes = torch.as_tensor(labels)
    truth = (rows.y[:, None] == classes).long().argmax(dim=1, keepdim=True)
    known = torch.isin(rows.y, classes)
    preferred = (rows.x > rows.x.gather(1, truth)).sum(dim=1)
    # Of equal scores the first counts, as argmax has it.
    equal = (rows.x == rows.x.gather(1, truth)) & (torch.arange(len(classes)) < truth)
    return torch.where(known, preferred + equal.sum(dim=1), len(classes))


def _labels(task: Task) -> list[int]:
    """The label of each output of the classifier of task.network. Raises UserError if it has none, or others."""
    labels = list(task.labels)
    if task.network is not None:
        outputs = int(getattr(task.network.backbone, "num_classes", 0))
        if not outputs:
            raise UserError(
                f"{task.source or 'the network'} has no classifier: fine-tune it (selfvil eval finetune SOURCE ... "
                "out=FOLDER) or train one by the objective supervised"
            )
        labels = labels or class_labels(task.source) or list(range(outputs))
    if unknown := sorted(set(task.test.labels.tolist()) - set(labels)):  # type: ignore[union-attr]  # all have one
        raise UserError(
            f"the test images have the label {unknown[0]}, and the classifier knows {len(labels)} classes without it: "
            "give test images of its classes"
        )
    return labels
