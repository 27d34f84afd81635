"""Fine-tune a backbone with a linear head, and compare it with a linear probe on the same tokens, frozen.

The head of a Vision-LSTM gets its first and last token, concatenated (Bilateral Concat: Alkin et al., "Vision-LSTM",
2024), that of a ViT the class token; a second head gets the mean of all patch tokens. The network after the last step
is scored: nothing is chosen on the test images. One process fine-tunes on one device. On a CPU, the same seed and
number of threads give the same weights bit for bit, unless memory is too short for the same micro-batches.
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from selfvil.data.index import Shards
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.classifier import TrainingSettings, plan_micro_batch, train_classifier
from selfvil.evaluate.features import Features
from selfvil.evaluate.few_label import few_label_probe
from selfvil.evaluate.linear import linear_probe, require_probe_labels
from selfvil.evaluate.saved import add_score, export_classifier
from selfvil.evaluate.task import Score, Task
from selfvil.models.adapter import adapt
from selfvil.settings import PathText, Size
from selfvil.timm_folder import require_new_folder
from selfvil.weights import Network

# Readouts of two heads -> the readout that has the tokens of both.
_TOGETHER: dict[tuple[str, ...], str] = {
    ("bilateral_concat", "mean"): "first_last_mean",
    ("cls", "mean"): "cls_mean",
    ("registers", "mean"): "registers_mean",
}
_FEW_STEPS = 100


class Settings(TrainingSettings):
    """Accuracy after fine-tuning the whole network, and of a linear probe on the same tokens, frozen."""

    readout: Literal["bilateral_concat", "cls", "registers", "mean"] | None = None
    """The only head; null takes the one that the architecture is made for, and one on the mean of the patch tokens."""
    labels_per_class: int | None = Field(None, ge=1)
    """Images of each class to learn from, drawn by the seed; null uses all."""
    img_size: Size | None = None
    """Height and width of the images in pixels; null takes those of pretraining. Learned positions are resampled."""
    out: PathText | None = None
    """New folder for the fine-tuned network with the first head, which timm loads; written before it is scored."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError for too few labels, a readout or size the network does not allow, too little memory, or a folder
    that cannot be written; warns of few steps."""
    if settings.out is not None:
        require_new_folder(settings.out)
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), settings.labels_per_class)
    batch_size, steps = settings.length(len(_training_images(task, settings)))
    if task.network is not None:
        choose_heads(task.network.backbone, settings.readout)
        network = resize(copy.deepcopy(task.network), settings.img_size)
        model = network.backbone.to(task.device)
        plan_micro_batch(model, network.normalisation, batch_size, task.device, task.precision)
    if steps < _FEW_STEPS:
        warnings.append(f"Fine-tuning takes only {steps} steps of {batch_size} images: smaller batches give more.")
    return warnings


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy for each head: of linear probes on the frozen network, then of the fine-tuned networks.

    Every process extracts features; the main process alone fits and fine-tunes. Raw pixels have no score.
    """
    if task.network is None:
        return
    train = _training_images(task, settings)
    heads = choose_heads(task.network.backbone, settings.readout)
    began = time.monotonic()
    frozen = task.processes.together(lambda: _new_network(task, settings))
    joint = _TOGETHER.get(tuple(heads), heads[0])
    parts = [task.extract(frozen, shards, joint, part) for part, shards in (("train", train), ("test", task.test))]
    if parts[0] is None or parts[1] is None:
        return
    extracted = time.monotonic() - began
    tuning = settings.model_dump(mode="json", include=set(TrainingSettings.model_fields))
    tuning |= {"precision": task.precision, "img_size": list(frozen.normalisation.img_size)}
    few = "" if settings.labels_per_class is None else f", {settings.labels_per_class} labels per class"
    epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"

    def score(kind: str, protocol: str, head: str, value: float, seconds: float, how: dict[str, Any]) -> Score:
        return Score(
            metric=f"{kind}_{head}", protocol=protocol + few, value=value, readout=head, train_images=len(train),
            test_images=len(task.test), seconds=seconds, settings=how,
        )  # fmt: skip

    for head, (train_features, test_features) in _split(frozen, heads, parts[0], parts[1], task.device).items():
        began = time.monotonic()
        with task.processes.interrupts():
            if settings.labels_per_class is None:
                value = linear_probe(train_features, test_features, seed=task.seed).accuracy
            else:
                value, _ = few_label_probe(train_features, test_features, settings.labels_per_class, draws=1)
        yield score("frozen", "linear probe", head, value, extracted + time.monotonic() - began, {})
    for head in heads:
        began = time.monotonic()
        with task.processes.interrupts():
            value = _fine_tune(task, settings, train, head, tuning, save=head == heads[0])
        yield score("finetune", f"fine-tuning, {epochs}", head, value, time.monotonic() - began, tuning)


def _fine_tune(task: Task, settings: Settings, train: Shards, head: str, tuning: dict[str, Any], save: bool) -> float:
    """Accuracy of a new copy of the network, fine-tuned with `head`, and written to `settings.out` if `save`."""
    network, title = _new_network(task, settings), f"{task.name}, {head}"
    classifier = train_classifier(
        network, head, train, settings, seed=task.seed, workers=task.workers, device=task.device,
        precision=task.precision, title=title,
    )  # fmt: skip
    out = Path(settings.out) if settings.out is not None and save and task.name == "pretrained" else None
    if out is not None:
        export_classifier(
            classifier, out, source=task.source, network=network, readout=head, train=train, settings=tuning
        )
    accuracy = classifier.accuracy(task.test, workers=task.workers, title=f"{title}, test images")
    if out is not None:
        add_score(out, accuracy, task.test)
    return accuracy


def _new_network(task: Task, settings: Settings) -> Network:
    return resize(task.create(drop_path_rate=settings.drop_path), settings.img_size)


def _training_images(task: Task, settings: Settings) -> Shards:
    if settings.labels_per_class is None:
        return task.train
    return _FewLabels(task.train, settings.labels_per_class, task.seed)


def _split(
    network: Network, heads: list[str], train: Features, test: Features, device: torch.device
) -> dict[str, tuple[Features, Features]]:
    """The features of each head, from those of all heads together."""
    widths = [adapt(network.backbone).readout_dim(head) for head in heads]
    columns = zip(*(features.x.split(widths, dim=1) for features in (train, test)))
    return {
        head: (Features(train_x, train.y).to(device), Features(test_x, test.y).to(device))
        for head, (train_x, test_x) in zip(heads, columns)
    }


def choose_heads(backbone: nn.Module, readout: str | None = None) -> list[str]:
    """The readout that `backbone` is made for, and the mean of its patch tokens; or `readout` alone.

    Raises UserError for a readout that no head can be put on, or one whose token the backbone lacks.
    """
    own = adapt(backbone).default_readout
    usable = list(dict.fromkeys([own, "mean"]))
    if readout is None:
        return usable
    if readout not in usable:
        raise UserError(
            f"{type(backbone).__name__} cannot be fine-tuned with a head on {readout!r}; choose of: "
            f"{', '.join(usable)}."
        )
    return [readout]


def resize(network: Network, img_size: int | tuple[int, int] | None) -> Network:
    """`network` for images of another side, or height and width, in pixels; None changes nothing.

    Its backbone is changed in place: learned positions are resampled. Raises UserError if it cannot take such images.
    """
    if img_size is None:
        return network
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    backbone: Any = network.backbone
    channels = network.normalisation.channels
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(img_size=(height, width))
        with torch.no_grad():
            device = next(backbone.parameters()).device
            backbone.eval().forward_features(torch.zeros(1, channels, height, width, device=device))
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(backbone).__name__} cannot take images of {height} x {width} pixels (img_size): {reason}"
        ) from None
    return network._replace(normalisation=replace(network.normalisation, img_size=(height, width)))


class _FewLabels(Shards):
    """`labels_per_class` images of each class of `shards`, drawn by `seed`, as shards of their own."""

    def __init__(self, shards: Shards, labels_per_class: int, seed: int) -> None:
        self.all, self.paths = shards, shards.paths
        labels, generator = np.asarray(shards.labels), np.random.default_rng(seed)
        drawn = [
            generator.permutation(np.flatnonzero(labels == label))[:labels_per_class] for label in np.unique(labels)
        ]
        self.ids = np.sort(np.concatenate(drawn))
        self.labels = labels[self.ids]
        self._descriptors = OrderedDict()  # it opens no file

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        return self.all.read(int(self.ids[i]))

    def key(self, i: int) -> str:
        return self.all.key(int(self.ids[i]))

    def shard_of(self, i: int) -> Path:
        return self.all.shard_of(int(self.ids[i]))
