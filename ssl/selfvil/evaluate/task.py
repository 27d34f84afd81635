"""The input of every evaluation, a `Task`, and its results, `Score`s.

Shapes: N images of a data set, D features.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from selfvil import machine
from selfvil.data.base import Images
from selfvil.data.classes import class_names
from selfvil.evaluate import intervals
from selfvil.evaluate.features import TOKENS, Features, Precision, choose_readout, extract_all, raw_pixels
from selfvil.evaluate.processes import Processes
from selfvil.records import Summary
from selfvil.weights import Network, Normalisation

_RAW_SIDE = 32  # pixels; the longer side of the images whose raw pixels are scored
_ROOM_TO_FIT = 4  # memory that a fit needs, in sizes of its features


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of an evaluation.

    metric: its name in the metrics of a run, such as knn_20; protocol: its name in tables. value: in percent, or its
    mean over draws or seeds; measure: what is measured, top-1 accuracy or mIoU. deviation: standard deviation over
    draws or seeds, if any. interval: 95 % confidence interval of value over test images, by bootstrap
    (`evaluate.intervals`), if known. seconds: wall time, features included. settings: of the evaluation. details:
    further results, such as the accuracy or IoU of each class, as JSON.
    """

    metric: str
    protocol: str
    value: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    measure: str = "top-1"
    readout: str
    train_images: int
    test_images: int
    seconds: float
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


class Figure(NamedTuple):
    """A result of fitting on features: the entries of a `Score` that depend on the fit."""

    metric: str
    protocol: str
    value: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    measure: str = "top-1"
    details: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Parts(NamedTuple):
    """Features of the training and the test images, and the seconds of the pass that computed them."""

    train: Features
    test: Features
    seconds: float


class Trainer(Protocol):
    """The training loop: `selfvil.trainer.Trainer`. recipe: sections of plain values."""

    def begin(self, recipe: Mapping[str, Any], device: torch.device, processes: int = 1) -> nn.Module: ...

    def run(self, recipe: Mapping[str, Any], device: torch.device, processes: int = 1) -> Summary: ...


@dataclass
class Task:
    """A network, labelled images, and where to compute.

    Evaluations get their features from `features`. What several of them need is computed in one pass over the images
    if it is named to `want` before.

    Args:
        name: of the network in tables: pretrained, untrained or raw pixels.
        network: None for raw pixels, and before training, when there is no network yet.
        normalisation: how images are presented to the network.
        create: a new copy of the network, with arguments of `timm.create_model` that change no weight's shape. For
            evaluations that train it.
        batch_size: images in a forward pass; None: 64 on a CPU, 256 elsewhere.
        workers: processes that decode images, for each process.
        seed: of held-out parts, draws and fine-tuning.
        source: where the network comes from, for model cards.
        allow_shared: whether test images may be among the training images (`evaluate.checks`).
        labels: the label of each output of the network's classifier, where `source` does not tell.
        trainer: for evaluations that train the network; None inside a training run.
    """

    name: str
    network: Network | None
    normalisation: Normalisation
    train: Images
    test: Images
    create: Callable[..., Network]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    batch_size: int | None = None
    workers: int = 2
    seed: int = 0
    source: str = ""
    labels: tuple[int, ...] = ()
    trainer: Trainer | None = None
    processes: Processes = field(default_factory=Processes)
    allow_shared: bool = False
    _wanted: dict[str, None] = field(default_factory=dict)
    _parts: dict[str, Parts | None] = field(default_factory=dict)

    def want(self, readouts: Iterable[str | None]) -> None:
        """The next call of `features` computes these too, in its pass over the images.

        Raises UserError for a readout that the network does not have.
        """
        self._wanted |= dict.fromkeys(self.describe(readout) for readout in readouts)

    def features(self, readout: str | None = None) -> Parts | None:
        """Features of both parts under a readout (None: the architecture's usual one); None but on the main process.

        They are on `device` if there is room to fit on them, else on the CPU; `TOKENS` are in a file. A collective.
        Raises UserError for a readout that the network does not have.
        """
        how = self.describe(readout)
        if how not in self._parts:
            began = time.monotonic()
            missing = [name for name in {**self._wanted, how: None} if name not in self._parts]
            self._wanted.clear()  # after an error, each evaluation computes only its own features
            train, test = (
                self.extract_all(self.network, shards, missing, part) for part, shards in self.shards().items()
            )
            seconds = time.monotonic() - began
            for name in missing:
                whole = None if train is None or test is None else Parts(train[name], test[name], seconds)
                self._parts[name] = None if whole is None else self._placed(name, whole)
        return self._parts[how]

    def _placed(self, name: str, parts: Parts) -> Parts:
        size = parts.train.x.nbytes + parts.test.x.nbytes
        on_cpu = self.device.type != "cpu" and _ROOM_TO_FIT * size > machine.free_bytes(self.device)
        device = torch.device("cpu") if on_cpu or name == TOKENS else self.device
        return Parts(parts.train.to(device), parts.test.to(device), parts.seconds)

    def shards(self) -> dict[str, Images]:
        return {"train": self.train, "test": self.test}

    def extract(self, network: Network | None, shards: Images, readout: str, part: str) -> Features | None:
        """Features of `network` (None: raw pixels) on `shards`, on the CPU; None but on the main process. A collective.

        part: train or test, for the progress bar.
        """
        found = self.extract_all(network, shards, [readout], part)
        return None if found is None else found[readout]

    def extract_all(
        self, network: Network | None, shards: Images, readouts: list[str], part: str
    ) -> dict[str, Features] | None:
        """As `extract`, under each of several readouts, in one pass over the images."""
        title = f"{self.name}, {part} images"
        if network is None:
            pixels = raw_pixels(
                shards, self.raw_size(), channels=self.normalisation.channels, workers=self.workers, title=title,
                processes=self.processes,
            )  # fmt: skip
            return None if pixels is None else dict.fromkeys(readouts, pixels)
        shown = network.normalisation
        return extract_all(
            network.backbone, shards, readouts, img_size=shown.img_size, mean=shown.mean, std=shown.std,
            batch_size=self.batch_size, workers=self.workers, device=self.device, precision=self.precision,
            title=title, processes=self.processes,
        )  # fmt: skip

    def score_features(
        self, readout: str | None, fit: Callable[[Features, Features], Iterable[Figure]], settings: dict[str, Any]
    ) -> Iterator[Score]:
        """Scores of what `fit` measures on the features of the training and the test images.

        Every process extracts features; the main process alone fits and yields scores.
        """
        parts = self.features(readout)
        if parts is None:
            return
        began = time.monotonic()
        with self.processes.interrupts():
            figures = list(fit(parts.train, parts.test))
        seconds = parts.seconds + time.monotonic() - began
        for figure in figures:
            yield Score(
                **figure._asdict(), readout=self.describe(readout), train_images=len(parts.train),
                test_images=len(parts.test), seconds=seconds, settings=settings,
            )  # fmt: skip

    def top1(self, metric: str, protocol: str, correct: Tensor, labels: Tensor, **details: Any) -> Figure:
        """The accuracy of predictions, with its interval, and that of each class by its name among the details.

        correct: bool (N,) for each test image, or (S, N) for S draws or seeds. labels: (N,) of the test images.
        details: further results, as JSON.
        """
        found = intervals.accuracy(correct, self.seed)
        per_image, labels = correct.double().reshape(-1, len(labels)).mean(dim=0).cpu(), labels.cpu()
        given = class_names(self.train, self.test)
        names = given.names if given else []
        classes = {
            names[label] if label < len(names) else str(label): round(100 * float(per_image[labels == label].mean()), 2)
            for label in labels.unique().tolist()
        }
        return Figure(metric, protocol, *found, details={**details, "classes": classes})

    def describe(self, readout: str | None) -> str:
        """The name of a readout of the network, or the size of raw pixels."""
        if self.network is None:
            height, width = self.raw_size()
            return f"{height} x {width} pixels"
        return choose_readout(self.network.backbone, readout)

    def raw_size(self) -> tuple[int, int]:
        shrink = min(1.0, _RAW_SIDE / max(self.normalisation.img_size))
        height, width = (max(1, round(side * shrink)) for side in self.normalisation.img_size)
        return height, width
