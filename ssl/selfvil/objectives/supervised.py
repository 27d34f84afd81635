"""Supervised training of a classifier: from scratch, or fine-tuning of a backbone with `model.start_from`.

The classifier is timm's own: a linear layer on a readout of the backbone, so that an export is a timm model with
classes. The augmentations are those of Vision-LSTM (Alkin et al., 2024) and of MAE's fine-tuning (He et al., 2021).

What is random depends only on the seed and the positions of the samples: crops, mixing and stochastic depth are the
same after a resume, and for any number of processes and micro-batches.

Shapes: B images, C channels, K classes.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from timm.data import Mixup
from timm.layers import DropPath
from torch import Tensor, nn

from selfvil.data.views import ClassifierCrop, RandomCropFlip, preserved_randomness, seed_randomness
from selfvil.errors import UserError
from selfvil.models.adapter import CLASSIFIERS, adapt
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.objectives.crops import Scale, crops_picture, require_size
from selfvil.objectives.teacher import Teacher
from selfvil.settings import Section

_MIXED_ALIKE = 128  # consecutive samples with one mixing ratio and box: a GPU's batch in the published runs
_STREAM = 1_000  # of random numbers for mixing; the views of a sample have the streams 0, 1 ...


class SupervisedSettings(Section):
    """Settings of supervised training; the defaults are those of Vision-LSTM's published training from scratch."""

    name: Literal["supervised"] = "supervised"
    classes: int | list[int] | None = None
    """Number of classes, whose labels are 0, 1, 2 ...; or the list of their labels; null: those of data.train."""
    readout: Literal["bilateral_concat", "cls", "registers", "mean"] | None = None
    """Input of the classifier: first and last patch, class token, registers, or mean of all patches. null: for ViL
    bilateral_concat, or registers or cls if model.global_pool selects them; for ViT cls; otherwise mean."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a target that is spread over all classes."""
    crop_scale: Scale = (0.08, 1.0)
    """Range of the share of an image's area that a crop covers."""
    flip: bool = True
    """Flip half of the images left to right; false if a mirror image has another meaning, as with digits."""
    three_augment: bool = True
    """Make each image grey, inverted or blurred, one of these at random (Touvron et al., "DeiT III", 2022)."""
    color_jitter: float = Field(0.3, ge=0, le=1)
    """Largest change of brightness, contrast and saturation; 0 changes none."""
    randaugment: int | None = Field(None, ge=0, le=10)
    """Magnitude of RandAugment (Cubuk et al., 2020; timm's rand-mM-mstd0.5-inc1); null leaves it out."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle of the image is replaced by noise (random erasing, Zhong et al., 2017)."""
    mixup: float = Field(0.8, ge=0)
    """Parameter alpha of mixup (Zhang et al., 2017): two images are averaged; 0 leaves it out. Where mixup and cutmix
    are both given, half of the images get each. Both mix two neighbours of a micro-batch, which must be even."""
    cutmix: float = Field(1.0, ge=0)
    """Parameter alpha of cutmix (Yun et al., 2019): a rectangle comes from another image; 0 leaves it out."""
    head_lr: float = Field(1.0, gt=0)
    """Factor on the learning rate of the classifier."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average (EMA) of the weights, which is then exported and evaluated: it averages over about
    1 / (1 - ema_decay) steps, and these must be far fewer than those of the run. null keeps none."""

    @field_validator("classes")
    @classmethod
    def _at_least_two(cls, value: int | list[int] | None) -> int | list[int] | None:
        labels = range(value) if isinstance(value, int) else value
        if labels is not None and (len(labels) < 2 or min(labels) < 0 or len(set(labels)) < len(labels)):
            raise ValueError("a classifier needs at least two classes, with different labels from 0 on")
        return sorted(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_set_of_operations(self) -> "SupervisedSettings":
        if self.randaugment is not None and (self.three_augment or self.color_jitter):
            raise ValueError("randaugment takes the place of three_augment and color_jitter: set these to false and 0")
        return self

    def labels(self) -> list[int]:
        """The label of each class, ascending; empty while they are to be found in the data."""
        return list(range(self.classes)) if isinstance(self.classes, int) else list(self.classes or [])


class Supervised(Objective):
    """A classifier around `backbone`, which is any timm network that the adapter knows.

    Raises:
        UserError: the backbone lacks the token of the readout or cannot take the images, or the classes are not known.
    """

    classes: Tensor

    def __init__(self, backbone: Any, settings: SupervisedSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        labels = settings.labels()
        if not labels:
            raise UserError("objective.classes = null: the classes of data.train are not known here; give their number")
        if settings.randaugment is not None and image.in_chans not in (1, 3):
            raise UserError(
                f"objective.randaugment is for grey and RGB images, and model.in_chans is {image.in_chans}: set it to "
                "null, and objective.three_augment or objective.color_jitter instead"
            )
        readouts = adapt(backbone).classifier_readouts()
        self.readout = settings.readout or readouts[0]
        if self.readout not in readouts:
            raise UserError(
                f"objective.readout = {self.readout!r} is not possible for a classifier of {type(backbone).__name__}; "
                f"choose one of: {', '.join(readouts)}"
            )
        if not adapt(backbone).has_patches:  # how small images may be is only known by a forward pass
            require_size(backbone, image, image.size, "model.img_size")
        backbone.reset_classifier(len(labels), CLASSIFIERS[self.readout])
        self.backbone = backbone
        self.register_buffer("classes", torch.tensor(labels), persistent=False)
        self.depths = keyed_depths(backbone)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=len(labels)
            )
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = Teacher(backbone=backbone)
            self.networks, self.export = {"student": "backbone.", "ema": "ema.backbone."}, "ema"

    def views(self) -> list[View]:
        chosen, image = self.settings, self.image
        if not (chosen.three_augment or chosen.color_jitter or chosen.erasing or chosen.randaugment is not None):
            return [
                RandomCropFlip(
                    image.size, chosen.crop_scale, image.mean, image.std, flip=chosen.flip,
                    channel_drop=image.channel_drop,
                )
            ]  # fmt: skip
        return [
            ClassifierCrop(
                image.size, chosen.crop_scale, image.mean, image.std, three_augment=chosen.three_augment,
                jitter=chosen.color_jitter, randaugment=chosen.randaugment, erasing=chosen.erasing, flip=chosen.flip,
                channel_drop=image.channel_drop,
            )
        ]  # fmt: skip

    def check_micro_batch(self, images: int) -> None:
        if self.mixup is not None and images % 2:
            raise UserError(
                f"objective.mixup and cutmix mix pairs of images, and a micro-batch of one process has {images:,}: "
                "change optim.batch_size, optim.accumulate or the number of processes so that it is even, or set both "
                "to 0"
            )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images, targets = self.mix(batch, progress.seed)
        draw_depths(self.depths, batch.positions, progress.seed, images.device)
        scores = self.backbone(images).float()
        smoothing = 0.0 if self.mixup else self.settings.label_smoothing  # mixing has smoothed its targets
        loss = F.cross_entropy(scores, targets, label_smoothing=smoothing)
        truth = targets.argmax(dim=1) if self.mixup else targets
        accuracy = 100 * (scores.detach().argmax(dim=1) == truth).float().mean()
        return StepOutput(loss, {"accuracy": accuracy})

    def mix(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and their targets: class numbers (B,), or with mixup or cutmix distributions (B, K).

        Samples 2i and 2i + 1 of the run's order are mixed with each other, by timm's Mixup. The ratio and the box are
        drawn once for `_MIXED_ALIKE` consecutive samples. The last one of an odd number stays as it is.
        """
        images = batch.views[0]
        # Only images of a blank batch, which measures memory, have labels of no class.
        labels = torch.searchsorted(self.classes, batch.labels).clamp(max=len(self.classes) - 1)
        if self.mixup is None:
            return images, labels
        mixed, targets = images.clone(), F.one_hot(labels, len(self.classes)).float()
        with preserved_randomness():
            for group, rows in _groups(batch.positions):
                seed_randomness(seed, group, _STREAM)
                even, odd = rows[0::2], rows[1::2]
                pairs = torch.tensor([*even[: len(odd)], *reversed(odd)], device=images.device)
                if len(pairs):  # timm mixes the first with the last, the second with the last but one ...
                    mixed[pairs], targets[pairs] = self.mixup(images[pairs], labels[pairs])
        return mixed, targets

    def after_step(self, progress: Progress) -> None:
        if self.ema is not None and self.settings.ema_decay is not None:
            self.ema.follow(self, self.settings.ema_decay)

    def tags(self) -> dict[str, str]:
        head: str = self.backbone.pretrained_cfg["classifier"]  # type: ignore[index,assignment]  # of every timm model
        return {name: "head" for name, _ in self.named_parameters() if name.startswith(f"backbone.{head}.")}

    def lr_scales(self, progress: Progress) -> dict[str, float]:
        return {"head": self.settings.head_lr}

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        """Entropy of the mean target: predicting it for every image is the best constant. Mixing does not change it.

        None for fewer images than classes, of whose frequencies they say nothing.
        """
        if len(batch.labels) < len(self.classes):
            return None
        labels = torch.searchsorted(self.classes, batch.labels).clamp(max=len(self.classes) - 1)
        count, smoothing = len(self.classes), self.settings.label_smoothing
        mean = (1 - smoothing) * F.one_hot(labels, count).double().mean(dim=0) + smoothing / count
        return torch.special.entr(mean).sum().float()

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Images before and after mixing, a row for each."""
        return crops_picture([batch.views[0], self.mix(batch, progress.seed)[0]], self.image)


def _groups(positions: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Groups of samples that are mixed alike, by number, and the rows of each in a batch."""
    rows: dict[int, list[int]] = {}
    for row, position in enumerate(positions.tolist()):
        rows.setdefault(position // _MIXED_ALIKE, []).append(row)
    yield from rows.items()


class KeyedDepth(nn.Module):
    """timm's DropPath (Huang et al., "Stochastic Depth", 2016), with draws that are set before each forward pass."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep
        self.draws: Tensor | None = None
        """(B,), uniform in [0, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draws is None:
            return x
        keep = 1 - self.drop_prob
        kept = (self.draws >= self.drop_prob).to(x).view(-1, *[1] * (x.ndim - 1))
        return x * (kept / keep if self.scale_by_keep else kept)


def keyed_depths(model: nn.Module) -> list[KeyedDepth]:
    """Replace every DropPath of `model`, in place, and return what replaces them; they have no weights."""
    replaced = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                replaced.append(KeyedDepth(child.drop_prob or 0.0, child.scale_by_keep))
                setattr(module, name, replaced[-1])
    return replaced


def draw_depths(depths: list[KeyedDepth], positions: Tensor, seed: int, device: torch.device) -> None:
    """Draw for each sample and each of `depths`, by the seed and the sample's position."""
    if depths:
        draws = keyed_noise(seed, positions, len(depths), device)
        for depth, column in zip(depths, draws.unbind(dim=1)):
            depth.draws = column
