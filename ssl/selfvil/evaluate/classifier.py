"""A network with a linear head, fine-tuned on labelled images.

A step is divided into micro-batches that fit into memory. The gradient equals that of the whole step to rounding: each
micro-batch is weighted by its number of images, and stochastic depth is drawn once for all images of a step. Networks
with batch normalisation are the exception, since its statistics are those of a micro-batch.
"""

import logging
import math
import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers import DropPath
from torch import Tensor, nn

from selfvil import footprint, optim, runtime, terminal
from selfvil.data.index import Shards
from selfvil.data.loader import train_batches
from selfvil.data.views import CenterCrop, RandomCropFlip
from selfvil.errors import UserError
from selfvil.evaluate.features import Precision, labelled_rows
from selfvil.settings import Section
from selfvil.weights import Network, Normalisation

log = logging.getLogger(__name__)

# Readouts that a head can be put on -> timm's `global_pool`.
HEADS = {"bilateral_concat": "bilateral_concat", "cls": "token", "registers": "registers", "mean": "avg"}

_BETAS = (0.9, 0.999)
_REPORT_EVERY = 10  # steps; reading the loss synchronises with the GPU
_CPU_MICRO_BATCH = 64  # images; more are slower on a CPU, and a fixed number makes results repeatable
_SHARE_OF_FREE = 0.5  # for tensors that autograd saves; the rest is for temporary tensors and data workers


class TrainingSettings(Section):
    """How a network is fine-tuned.

    The defaults are those of MAE's fine-tuning of ViT-B (He et al., "Masked Autoencoders", 2021, and its code), without
    its RandAugment, mixup, cutmix and erasing, and with the gradient clipping that Vision-LSTM's authors recommend.
    They are meant for 100,000 steps: for some hundred steps, raise base_lr, move layer_decay towards 1 and use smaller
    batches.
    """

    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(1024, ge=1)
    """Images in a step; at most all training images."""
    base_lr: float = Field(5e-4, gt=0)
    """Peak learning rate for 256 images a step; the peak is base_lr * batch_size / 256."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine schedule."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Learning rate of a layer over that of the layer above (Bao et al., "BEiT", 2021); a ViL block pair is a layer."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Probability of skipping a block for a sample (stochastic depth), as the architecture distributes it."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Fraction of a target that is spread over all classes."""
    min_crop: float = Field(0.08, gt=0, le=1)
    """Smallest fraction of an image's area that a random crop covers."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null never clips."""

    def length(self, num_images: int) -> tuple[int, int]:
        """Images in a step, and number of steps, for `num_images` training images."""
        batch_size = min(self.batch_size, num_images)
        return batch_size, max(1, round(self.epochs * num_images / batch_size))


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned network; classes: int64 (K,), the label of each of its outputs."""

    model: nn.Module
    classes: Tensor
    normalisation: Normalisation
    precision: Precision

    def accuracy(self, test: Shards, *, batch_size: int = 256, workers: int = 0, title: str | None = None) -> float:
        """Top-1 on the readable images of `test`, in percent; each image is cropped at its centre."""
        device = self.classes.device

        def predict(images: Tensor) -> Tensor:
            with autocast(device, self.precision):
                return self.model(images.to(device))

        self.model.eval()
        view = CenterCrop(self.normalisation.img_size, self.normalisation.mean, self.normalisation.std)
        scores = labelled_rows(predict, test, view, self.normalisation.channels, batch_size, workers, title)
        assert scores is not None  # this process alone computes them
        return 100 * float((self.classes.cpu()[scores.x.argmax(dim=1)] == scores.y).double().mean())


def train_classifier(
    network: Network,
    readout: str,
    train: Shards,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    micro_batch: int | None = None,
    title: str | None = None,
) -> Classifier:
    """Train all of `network` and a new linear head on labelled images; its backbone is changed in place.

    readout: the tokens that the head gets, one of `HEADS`. Images come in the keyed order of pretraining: the weights
    depend on `seed` only, and on micro_batch by rounding. micro_batch: images in a forward pass; None takes the result
    of `plan_micro_batch`. title: shown with a progress bar on a terminal.

    Raises UserError if the loss is no longer finite, or as `plan_micro_batch`.
    """
    device, normalisation = torch.device(device), network.normalisation
    model: Any = network.backbone
    crop = settings.min_crop, 1.0
    view = RandomCropFlip(normalisation.img_size, crop, normalisation.mean, normalisation.std)
    classes = torch.from_numpy(np.unique(train.labels)).to(device)  # type: ignore[arg-type]  # all have a label
    batch_size, total = settings.length(len(train))
    warmup = round(settings.warmup * total)
    peak = settings.base_lr * batch_size / 256
    damaged: dict[int, str] = {}
    problem: str | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(len(classes), HEADS[readout])
        model.to(device).train()
        micro_batch = micro_batch or plan_micro_batch(model, normalisation, batch_size, device, precision)
        parts = math.ceil(batch_size / micro_batch)
        drop_paths = _draw_for_whole_batch(model)
        exempt: set[str] = getattr(model, "no_weight_decay", set)()
        scales = optim.layer_lr_scales(model, settings.layer_decay)
        optimizer = optim.adamw(optim.parameter_groups(model, exempt, lr_scales=scales), _BETAS)
        batches = train_batches(
            train, [view], seed=seed, batch_size=batch_size, micro_batch=micro_batch, stop_step=total,
            workers=workers, channels=normalisation.channels,
        )  # fmt: skip
        with closing(batches), _progress(title) as bar:
            task = bar.add_task(title or "", total=total, note="")
            for step in range(total):
                lr = optim.cosine(step, total, peak, settings.min_lr, warmup)
                optim.set_rates(optimizer, lr, settings.weight_decay)
                runtime.seed_step(seed, step, rank=0)
                mean_loss, first = torch.zeros((), device=device), 0
                for _ in range(parts):
                    batch = next(batches).to(device)
                    problem = problem or batch.problem
                    damaged |= {each.id: f"{each.key} in {each.shard}: {each.reason}" for each in batch.bad}
                    for layer, drop_path in enumerate(drop_paths):
                        drop_path.draw_for(runtime.step_seed(seed, step, layer), first, batch_size)
                    with autocast(device, precision):
                        scores = model(batch.views[0])
                    targets = torch.searchsorted(classes, batch.labels)
                    loss = F.cross_entropy(scores.float(), targets, label_smoothing=settings.label_smoothing)
                    loss = loss * (len(targets) / batch_size)
                    loss.backward()
                    mean_loss += loss.detach()
                    first += len(targets)
                optim.clip_gradients(model.parameters(), settings.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                if step % _REPORT_EVERY == 0 or step + 1 == total:
                    if not math.isfinite(mean_loss.item()):
                        raise UserError(
                            f"Fine-tuning diverged: the loss of step {step + 1} is {mean_loss.item()}; lower base_lr "
                            f"({settings.base_lr}) or raise warmup ({settings.warmup})."
                        )
                    bar.update(task, note=f"loss {mean_loss.item():.3f}")
                bar.update(task, completed=step + 1)
    if problem:
        log.warning("%s", problem)
    if damaged:
        log.warning("%d of %d training images cannot be read and were replaced (first: %s)",
                    len(damaged), len(train), next(iter(damaged.values())))  # fmt: skip
    return Classifier(model, classes, normalisation, precision)


def plan_micro_batch(
    model: nn.Module, normalisation: Normalisation, batch_size: int, device: torch.device, precision: Precision
) -> int:
    """Images in a forward pass for steps of `batch_size`, so that the tensors saved by autograd fit into free memory.

    Measured with one image and with two. At most 64 on a CPU, at most the whole step elsewhere, in parts of equal size.
    Raises UserError if one image does not fit.
    """

    def saved(count: int) -> int:
        images = torch.zeros(count, normalisation.channels, *normalisation.img_size, device=device)
        with autocast(device, precision):
            return footprint.saved_bytes(model, lambda: model(images))

    one, two = saved(1), saved(2)
    each, free = max(1, two - one), footprint.free_bytes(device)
    fixed = max(0, one - each) + footprint.update_bytes(model)
    most = int((_SHARE_OF_FREE * free - fixed) / each)
    if most < 1:
        height, width = normalisation.img_size
        raise UserError(
            f"fine-tuning on images of {height} x {width} pixels needs at least "
            f"{(each + fixed) / _SHARE_OF_FREE / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free on {device}: "
            "use smaller images (img_size), or end other programs"
        )
    if device.type == "cpu":
        most = min(most, _CPU_MICRO_BATCH)
    return math.ceil(batch_size / math.ceil(batch_size / most))


class _DropPath(nn.Module):
    """timm's stochastic depth, with one draw for all images of a step, of which a micro-batch takes its part."""

    def __init__(self, drop_prob: float, scale_by_keep: bool) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep
        self.seed, self.first, self.batch_size = 0, 0, 0

    def draw_for(self, seed: int, first: int, batch_size: int) -> None:
        """The next images are those from index `first` on, of a step of `batch_size`."""
        self.seed, self.first, self.batch_size = seed, first, batch_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        draws = torch.rand(self.batch_size, generator=torch.Generator().manual_seed(self.seed))
        kept = (draws[self.first : self.first + len(x)] < keep).to(x).view(-1, *[1] * (x.ndim - 1))
        return x * (kept / keep if self.scale_by_keep else kept)


def _draw_for_whole_batch(model: nn.Module) -> list[_DropPath]:
    """Replace every DropPath module of `model`, in place; they have no weights."""
    replaced = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                replaced.append(_DropPath(child.drop_prob or 0.0, child.scale_by_keep))
                setattr(module, name, replaced[-1])
    return replaced


def autocast(device: torch.device, precision: Precision) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _progress(title: str | None) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=terminal.console(stderr=True), transient=True, disable=title is None or not sys.stderr.isatty(),
    )  # fmt: skip
