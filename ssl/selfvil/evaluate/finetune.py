"""Fine-tune a backbone with a linear head, and compare it with a linear probe on the same tokens, frozen.

    rows = finetune("exported", "train-{000..009}.tar", "test-000.tar", settings=Settings(epochs=5), baselines=True)

A Vision-LSTM's head sees its first and last token side by side (Bilateral Concat: Alkin et al., "Vision-LSTM", 2024), a
ViT's the class token; beside it stands the mean of all patch tokens. What is scored is the network after its last
step: the test images choose nothing.
"""

import logging
import math
import sys
import time
from collections import OrderedDict
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from selfvil import optim, runtime, terminal
from selfvil.data.index import Pattern, Shards, open_shards
from selfvil.data.loader import train_batches
from selfvil.data.views import CenterCrop, RandomCropFlip
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_parts
from selfvil.evaluate.features import Features, Precision, extract, labelled_rows, load_backbone
from selfvil.evaluate.linear import few_label_probe, linear_probe
from selfvil.evaluate.score import Row
from selfvil.models.heads import choose_readout
from selfvil.version import __version__
from selfvil.weights import Network, Normalisation

log = logging.getLogger(__name__)

# What a head can be put on: its name among the readouts -> timm's `global_pool`.
HEADS = {"bilateral_concat": "bilateral_concat", "cls": "token", "registers": "registers", "mean": "avg"}

# Two heads' tokens, read in one pass.
_TOGETHER: dict[tuple[str, ...], str] = {
    ("bilateral_concat", "mean"): "first_last_mean",
    ("cls", "mean"): "cls_mean",
    ("registers", "mean"): "registers_mean",
}
_BETAS = (0.9, 0.999)
_FEW_STEPS = 100
_LOOK_EVERY = 10  # steps; the loss is looked at, which on a GPU means waiting for it


@dataclass(frozen=True)
class Settings:
    """How a network is fine-tuned.

    The defaults are the published ones of MAE's fine-tuning of ViT-B (He et al., "Masked Autoencoders", 2021, and its
    code), but for its RandAugment, mixup, cutmix and erasing, which are left out, and the clipping, which Vision-LSTM's
    authors advise. They are meant for 100,000 steps: a run of some hundred wants a higher base_lr, a layer_decay nearer
    1 and smaller batches.

    epochs: passes over the training images. batch_size: images in a step, at most all. base_lr: for 256 images a step;
    the peak is base_lr · batch_size / 256, reached after the share `warmup` of all steps, and falls by a cosine to
    min_lr. layer_decay: the head learns at that rate, each layer below it at `layer_decay` times that of the one above
    (Bao et al., "BEiT", 2021); a block pair of a Vision-LSTM is one layer. drop_path: stochastic depth, as the
    architecture distributes it. min_crop: smallest share of an image's area that a crop shows.

    Raises UserError for a value out of range.
    """

    epochs: int = 100
    batch_size: int = 1024
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    warmup: float = 0.05
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    min_crop: float = 0.08
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("base_lr", 0 < self.base_lr < math.inf, "above 0"),
            ("min_lr", 0 <= self.min_lr < math.inf, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, from 0 to less than 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, and 1 at most"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("drop_path", 0 <= self.drop_path < 1, "a probability, from 0 to less than 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to less than 1"),
            ("min_crop", 0 < self.min_crop <= 1, "a share of the area, above 0, and 1 at most"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0"),
        ):
            if not fits:
                raise UserError(
                    f"Fine-tuning with {name} = {getattr(self, name)} is not possible: it must be {expected}."
                )

    def length(self, num_images: int) -> tuple[int, int]:
        """Images in a step, and steps, when there are so many training images."""
        batch_size = min(self.batch_size, num_images)
        return batch_size, max(1, round(self.epochs * num_images / batch_size))


def finetune(
    source: str | Path,
    train: Pattern,
    test: Pattern,
    *,
    settings: Settings | None = None,
    labels_per_class: int | None = None,
    baselines: bool = False,
    readout: str | None = None,
    network: str | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
) -> list[Row]:
    """Accuracy of the backbone in `source`, fine-tuned and frozen, under each head; and of the same one untrained.

    Args:
        source: an export folder, a run folder or a checkpoint folder.
        train, test: patterns of labelled shards.
        settings: of the fine-tuning; None takes the published ones.
        labels_per_class: learn from so few images of each class, drawn by `seed`; None takes all.
        baselines: also do all of it with the untrained network.
        readout: the only head wanted, one of `HEADS`; None takes the architecture's own, and the mean beside it.
        network: which network of a run ("student", "teacher"); None takes the run's choice.
        precision: float32 or bf16 autocast, in training and in scoring.
        seed: of the order of images, their augmentation, stochastic depth, the draw of labels, the untrained network.

    One process on one device. On a CPU, the same seed and number of threads give the same weights bit for bit.
    Raises UserError for anything wrong with source, shards, labels or settings, before training starts.
    """
    settings = settings or Settings()
    if precision not in ("fp32", "bf16"):
        raise UserError(f"There is no precision {precision!r}; choose one of: fp32, bf16.")
    heads = choose_heads(load_backbone(source, network=network, drop_path_rate=settings.drop_path).backbone, readout)
    all_train, test_shards = open_shards(train), open_shards(test)
    for warning in check_parts(all_train, test_shards, protocols=["linear"], labels_per_class=labels_per_class):
        log.warning(warning)
    train_shards = all_train if labels_per_class is None else _FewLabels(all_train, labels_per_class, seed)
    batch_size, steps = settings.length(len(train_shards))
    if steps < _FEW_STEPS:
        log.warning("Fine-tuning takes only %d steps of %d images: smaller batches give more.", steps, batch_size)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    few = "" if labels_per_class is None else f", {labels_per_class} labels per class"
    epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"

    def row(
        network: Network, protocol: str, value: float, head: str, seconds: float, given: dict[str, Any] | None = None
    ) -> Row:
        return Row(
            name, protocol + few, value, None, head, len(train_shards), len(test_shards), seed, round(seconds, 1),
            str(source), network.samples_seen, runtime.device_name(device),
            {"selfvil": __version__, "torch": torch.__version__}, runtime.commit(), given or {},
        )  # fmt: skip

    rows = []
    for name in ("pretrained", "untrained") if baselines else ("pretrained",):
        how: dict[str, Any] = {
            "network": network, "untrained": name == "untrained", "seed": seed, "drop_path_rate": settings.drop_path
        }  # fmt: skip
        frozen, began = load_backbone(source, **how), time.monotonic()
        seen = _frozen(frozen, heads, train_shards, test_shards, workers, device, precision, name)
        extracted = time.monotonic() - began
        for head, (train_features, test_features) in seen.items():
            began = time.monotonic()
            if labels_per_class is None:
                value = linear_probe(train_features, test_features, seed=seed).accuracy
            else:
                value, _ = few_label_probe(train_features, test_features, labels_per_class, draws=1)
            rows.append(row(frozen, "linear probe", value, head, extracted + time.monotonic() - began))
        for head in heads:
            began, title = time.monotonic(), f"{name}, {head}"
            tuned = load_backbone(source, **how)
            classifier = train_classifier(
                tuned, head, train_shards, settings, seed=seed, workers=workers, device=device, precision=precision,
                title=title,
            )  # fmt: skip
            value = classifier.accuracy(test_shards, workers=workers, title=f"{title}, test images")
            given = asdict(settings) | {"precision": precision}
            rows.append(row(tuned, f"fine-tuning, {epochs}", value, head, time.monotonic() - began, given))
    return rows


def choose_heads(backbone: nn.Module, readout: str | None = None) -> list[str]:
    """The head `backbone` is made for, and the mean of its patch tokens beside it; or `readout` alone.

    Raises UserError for a readout no head can be put on, or one whose token the backbone lacks.
    """
    own = choose_readout(backbone)[0]
    usable = list(dict.fromkeys([own, "mean"]))
    if readout is None:
        return usable
    if readout not in usable:
        raise UserError(
            f"{type(backbone).__name__} cannot be fine-tuned with a head on {readout!r}; choose of: "
            f"{', '.join(usable)}."
        )
    return [readout]


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned network; classes: int64 (K,), the label that each of its outputs stands for."""

    model: nn.Module
    classes: Tensor
    look: Normalisation
    precision: Precision

    def accuracy(self, test: Shards, *, batch_size: int = 256, workers: int = 0, title: str | None = None) -> float:
        """Top-1 on the readable images of `test`, in percent, each seen once, cropped at its centre."""
        device = self.classes.device

        def predict(images: Tensor) -> Tensor:
            with _autocast(device, self.precision):
                return self.model(images.to(device))

        self.model.eval()
        view = CenterCrop(self.look.img_size, self.look.mean, self.look.std)
        scores = labelled_rows(predict, test, view, self.look.channels, batch_size, workers, title)
        return 100 * float((self.classes.cpu()[scores.x.argmax(dim=1)] == scores.y).double().mean())


def train_classifier(
    network: Network,
    readout: str,
    train: Shards,
    settings: Settings,
    *,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    title: str | None = None,
) -> Classifier:
    """Train all of `network` and a new linear head on labelled images; its backbone is changed in place.

    readout: where the head sits, one of `HEADS`. Images are seen in the keyed order of pretraining, so the weights
    depend on `seed` alone. title: shown with a progress bar on a terminal.

    Raises UserError if the loss is no longer finite.
    """
    device, look = torch.device(device), network.normalisation
    model: Any = network.backbone
    classes = torch.from_numpy(np.unique(train.labels)).to(device)  # type: ignore[arg-type]  # all have a label
    batch_size, total = settings.length(len(train))
    warmup = round(settings.warmup * total)
    peak = settings.base_lr * batch_size / 256
    damaged: dict[int, str] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(len(classes), HEADS[readout])
        model.to(device).train()
        exempt: set[str] = getattr(model, "no_weight_decay", set)()
        scales = optim.layer_lr_scales(model, settings.layer_decay)
        optimizer = optim.adamw(optim.parameter_groups(model, exempt, lr_scales=scales), _BETAS)
        batches = train_batches(
            train, [RandomCropFlip(look.img_size, (settings.min_crop, 1.0), look.mean, look.std)], seed=seed,
            batch_size=batch_size, stop_step=total, workers=workers, channels=look.channels,
        )  # fmt: skip
        with closing(batches), _progress(title) as bar:
            task = bar.add_task(title or "", total=total, note="")
            for step, batch in enumerate(batches):
                lr = optim.cosine(step, total, peak, settings.min_lr, warmup)
                optim.set_rates(optimizer, lr, settings.weight_decay)
                runtime.seed_step(seed, step, rank=0)
                batch = batch.to(device)
                damaged |= {sample.id: f"{sample.key} in {sample.shard}: {sample.reason}" for sample in batch.bad}
                targets = torch.searchsorted(classes, batch.labels)
                with _autocast(device, precision):
                    scores = model(batch.views[0])
                loss = F.cross_entropy(scores.float(), targets, label_smoothing=settings.label_smoothing)
                loss.backward()
                optim.clip_gradients(model.parameters(), settings.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                if step % _LOOK_EVERY == 0 or step + 1 == total:
                    if not math.isfinite(loss.item()):
                        raise UserError(
                            f"Fine-tuning diverged: the loss of step {step + 1} is {loss.item()}; lower base_lr "
                            f"({settings.base_lr}) or raise warmup ({settings.warmup})."
                        )
                    bar.update(task, note=f"loss {loss.item():.3f}")
                bar.update(task, completed=step + 1)
    if damaged:
        log.warning("%d of %d training images cannot be read and were replaced (first: %s)",
                    len(damaged), len(train), next(iter(damaged.values())))  # fmt: skip
    return Classifier(model, classes, look, precision)


def _frozen(
    network: Network,
    heads: list[str],
    train: Shards,
    test: Shards,
    workers: int,
    device: torch.device,
    precision: Precision,
    name: str,
) -> dict[str, tuple[Features, Features]]:
    """What each head sees of the frozen network's training and test images, from one pass over them."""
    look = network.normalisation
    both = [
        extract(
            network.backbone, shards, img_size=look.img_size, mean=look.mean, std=look.std,
            readout=_TOGETHER.get(tuple(heads), heads[0]), workers=workers, device=device, precision=precision,
            title=f"{name}, {part} images",
        )
        for part, shards in (("train", train), ("test", test))
    ]  # fmt: skip
    widths = [choose_readout(network.backbone, head)[1] for head in heads]
    columns = zip(*(features.x.split(widths, dim=1) for features in both))
    return {
        head: (Features(train_x, both[0].y).to(device), Features(test_x, both[1].y).to(device))
        for head, (train_x, test_x) in zip(heads, columns)
    }


class _FewLabels(Shards):
    """As many images of each class of `shards` as asked for, drawn by `seed`, as shards of their own."""

    def __init__(self, shards: Shards, labels_per_class: int, seed: int) -> None:
        self.all, self.paths = shards, shards.paths
        labels, generator = np.asarray(shards.labels), np.random.default_rng(seed)
        drawn = [
            generator.permutation(np.flatnonzero(labels == label))[:labels_per_class] for label in np.unique(labels)
        ]
        self.ids = np.sort(np.concatenate(drawn))
        self.labels = labels[self.ids]
        self._descriptors = OrderedDict()  # none of its own

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        return self.all.read(int(self.ids[i]))

    def key(self, i: int) -> str:
        return self.all.key(int(self.ids[i]))

    def shard_of(self, i: int) -> Path:
        return self.all.shard_of(int(self.ids[i]))


def _autocast(device: torch.device, precision: Precision) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _progress(title: str | None) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=terminal.console(stderr=True), transient=True, disable=title is None or not sys.stderr.isatty(),
    )  # fmt: skip
