"""Semantic segmentation with frozen patch features: mean IoU under three protocols.

    selfvil eval segment SOURCE --train SHARDS --test SHARDS --json F [key=value ...]

- knn: the classes of the nearest training patches, without training; logistic: logistic regression on patches. Both as
  CAPI (Darcet et al., 2025), but images keep their aspect ratio, and predictions are scored at the size of the mask.
- linear: batch normalisation and a 1 × 1 convolution, predicted in sliding windows, as DINOv2 and DINOv3.

Each image is an image and a mask of class ids (`dense.masks`). Features are computed for one image at a time, and used
by all protocols. Several processes share the images; the main process fits.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from rich.progress import track
from torch import Tensor

from selfvil import terminal
from selfvil.data.base import DamagedSample
from selfvil.errors import UserError
from selfvil.evaluate.dense import pictures
from selfvil.evaluate.dense.head import LinearHead, Training, train_head
from selfvil.evaluate.dense.iou import Tally, confusion, mean_iou
from selfvil.evaluate.dense.knn import DISTANCES, KS, Distance, NearestPatches, held_out_predictions
from selfvil.evaluate.dense.logistic import CS, Logistic, fit_logistic
from selfvil.evaluate.dense.masks import Classes, Masked, open_masked, read_classes, readable
from selfvil.evaluate.dense.patches import PatchFeatures, PatchSample, cell_of, sample_patches
from selfvil.evaluate.task import Score, Task
from selfvil.files import require_writable
from selfvil.settings import PathText, Section

log = logging.getLogger(__name__)

Protocol = Literal["knn", "logistic", "linear"]
PROTOCOLS: tuple[Protocol, ...] = ("knn", "logistic", "linear")
Ids = Annotated[int, Field(ge=0, le=255)]


def _list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class Settings(Section):
    """Mean IoU of semantic segmentation with frozen patch features: k-NN, logistic regression and a linear head."""

    protocols: Annotated[list[Protocol], BeforeValidator(_list), Field(min_length=1)] = list(PROTOCOLS)  # noqa: RUF012
    """knn and logistic fit on patches; linear trains a head on crops and predicts in sliding windows."""
    mask: str | None = None
    """Extension of the masks in the shards; null takes KEY.mask.png, or KEY.png beside an image KEY.jpg."""
    ignore: Annotated[list[Ids], BeforeValidator(_list)] = [255]  # noqa: RUF012
    """Ids of pixels that are left out of training and of scores."""
    layers: int = Field(1, ge=1)
    """Last layers whose features are concatenated: 1, or 4 as in DINOv2's stronger protocol."""
    short_side: int | None = Field(None, ge=8, le=4096)
    """Pixels to which the shorter side of each image is resized; null keeps the size. Scores are at the mask's size."""
    max_patches: int = Field(20_000, ge=10)
    """Training patches for knn and logistic, the same number of each image, drawn by the seed; CAPI takes all."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images on which k, distance and C are chosen, by mean IoU of their patches."""
    k: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_list), Field(min_length=1)] = list(KS)  # noqa: RUF012
    """knn: numbers of neighbours to choose from."""
    distances: Annotated[list[Distance], BeforeValidator(_list), Field(min_length=1)] = list(DISTANCES)  # noqa: RUF012
    """knn: distances to choose from, cosine and l2."""
    c: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_list), Field(min_length=1)] = list(CS)  # noqa: RUF012
    """logistic: inverse strengths of the L2 penalty to choose from, as scikit-learn's C."""
    crop_size: int = Field(512, ge=8)
    """linear: side in pixels of training crops and of test windows; smaller images are used whole."""
    stride: int | None = Field(None, ge=1)
    """linear: pixels between test windows; null takes two thirds of crop_size, 341 of 512."""
    iterations: int = Field(500, ge=1)
    """linear: updates of the head. Published: 40,000, for hours on a GPU; 500 suit two CPU cores."""
    batch_size: int = Field(8, ge=1)
    """linear: crops in an update. Published: 16."""
    lr: float = Field(1e-2, gt=0)
    """linear: learning rate of AdamW. Published: 1e-3, for 40,000 iterations; a short training needs more."""
    weight_decay: float = Field(1e-4, ge=0)
    """linear: weight decay of AdamW."""
    warmup: float = Field(0.0375, ge=0, lt=1)
    """linear: fraction of the iterations in which the rate rises; then it falls to zero in a straight line."""
    scale: tuple[float, float] = (0.5, 2.0)
    """linear: smallest and largest size of the training images in multiples of their size, drawn for each crop."""
    flip: bool = True
    """linear: mirror half of the training crops."""
    bootstrap: int = Field(1_000, ge=0)
    """Samples of the test images from which the 95 % interval is computed; 0 for none."""
    out: PathText | None = None
    """Folder for pictures: test images beside their truth and the predictions. Files in it are kept."""
    pictures: int = Field(6, ge=1, le=50)
    """Test images in the picture, spread over the test set."""

    @model_validator(mode="after")
    def _sensible(self) -> "Settings":
        if self.stride is not None and self.stride > self.crop_size:
            raise ValueError(
                f"stride = {self.stride} is more than crop_size = {self.crop_size}: pixels between windows would have "
                f"no prediction"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 8:
            raise ValueError(f"scale = {list(self.scale)} must be two ascending numbers above 0, 8 at most")
        return self


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError for images, masks or classes that cannot be scored, or a network without patch features."""
    train, _, _, warnings = _open(task, settings)
    chosen = {"knn": len(settings.k) * len(settings.distances), "logistic": len(settings.c)}
    if len(train) < 2 and any(chosen.get(name, 1) > 1 for name in settings.protocols):
        raise UserError(
            "there is one training image, so none can be held out to choose k, distance and C on: give more, or one "
            "value of each, such as k=[1] distances=[cosine] c=[1]"
        )
    if settings.out is not None:
        require_writable(Path(settings.out) / "segment.png")
    if task.network is not None:
        _require_features(task, settings)
    return warnings


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Mean IoU in percent for each protocol, with the IoU of each class and the confusion matrix in `details`."""
    train, test, classes, _ = task.processes.together(lambda: _open(task, settings))
    features = task.processes.together(lambda: _features(task, settings))
    bad: list[DamagedSample] = []
    fits = _fit(task, settings, features, train, classes, bad)
    for fit in fits.values():
        fit.to(task.device)
    panels = _predict(task, settings, features, test, classes, fits, bad)
    damaged = {(str(each.shard), each.key): each for part in task.processes.exchange(bad) for each in part}
    if not task.processes.is_main:
        return
    if damaged:
        first = next(iter(damaged.values()))
        log.warning("%d images cannot be read and are left out (first: %s in %s: %s)",
                    len(damaged), first.key, first.shard, first.reason)  # fmt: skip
    shown = []
    if settings.out is not None:
        shown = [str(_draw(task, settings, classes, fits, panels))]
    for name, fit in fits.items():
        tally = fit.tally
        ious = tally.ious
        yield Score(
            metric=f"segment_{name}", protocol=_title(name, settings), value=tally.mean,
            interval=tally.interval(settings.bootstrap, task.seed), measure="mIoU",
            readout=_describe(task, settings, features), train_images=len(train), test_images=len(tally.rows),
            seconds=fit.seconds, settings=settings.model_dump(mode="json"),
            details={
                "iou": {name: None if np.isnan(v) else round(float(v), 3) for name, v in zip(classes.names, ious)},
                "pixel_accuracy": round(tally.pixel_accuracy, 3),
                "confusion": tally.matrix.tolist(),
                "classes": classes.names,
                "mean_over": "classes in the truth or the prediction of the whole test set",
                "chosen": fit.chosen,
                "pictures": shown,
            },
        )  # fmt: skip


# --- what is scored --------------------------------------------------------------------------------------------------


def _open(task: Task, settings: Settings) -> tuple[Masked, Masked, Classes, list[str]]:
    train, test = open_masked(task.train, settings.mask), open_masked(task.test, settings.mask)
    return train, test, *read_classes(train, test, settings.ignore)


def _features(task: Task, settings: Settings) -> PatchFeatures:
    # Raw pixels are read in the cells of the network that they are compared with.
    network = task.network if task.network is not None else task.create()
    return PatchFeatures(
        task.network, network.normalisation, cell_of(network.backbone), settings.layers, settings.short_side,
        task.device, task.precision == "bf16",
    )  # fmt: skip


def _require_features(task: Task, settings: Settings) -> None:
    """Raises UserError unless the network has features on a grid, tried on one image."""
    features = _features(task, settings)
    size = [max(1, side // cell) * cell for side, cell in zip(features.normalisation.img_size, features.cell)]
    try:
        features(torch.zeros(1, features.channels, *size))
    except (AssertionError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{type(features.backbone).__name__} gives no patch features of layers = {settings.layers}: {error}"
        ) from error
    if min(_crop(settings, features)) > settings.crop_size:
        raise UserError(f"crop_size = {settings.crop_size} is less than one patch of {features.cell[0]} pixels")


def _crop(settings: Settings, features: PatchFeatures) -> tuple[int, int]:
    """Side of windows: crop_size, rounded down to whole patches."""
    return tuple(max(1, settings.crop_size // cell) * cell for cell in features.cell)  # type: ignore[return-value]


def _title(name: str, settings: Settings) -> str:
    titles = {"knn": "patch k-NN", "logistic": "patch logistic regression"}
    return titles.get(name, f"linear head, {settings.iterations:,} iterations")


def _describe(task: Task, settings: Settings, features: PatchFeatures) -> str:
    cell = f"{features.cell[0]} x {features.cell[1]}"
    if task.network is None:
        return f"{cell} pixels"
    return f"{cell} patches, last {f'{settings.layers} layers' if settings.layers > 1 else 'layer'}"


def _progress(task: Task, what: str) -> Callable[[Iterator[Any], int], Iterator[Any]]:
    def show(items: Iterator[Any], total: int) -> Iterator[Any]:
        return iter(track(
            items, description=f"{task.name}, {what}", total=total, console=terminal.console(stderr=True),
            transient=True, disable=not sys.stderr.isatty() or not task.processes.is_main,
        ))  # fmt: skip

    return show


# --- fit -------------------------------------------------------------------------------------------------------------


@dataclass
class _Fit:
    """A fitted protocol. chosen: hyperparameters, and what they were chosen by. seconds: of fit and prediction."""

    model: NearestPatches | Logistic | LinearHead
    chosen: dict[str, Any]
    seconds: float
    scaler: tuple[Tensor, Tensor] | None = None
    tally: Tally = field(default_factory=lambda: Tally(0))

    def to(self, device: torch.device) -> None:
        self.model = self.model.to(device)
        if self.scaler is not None:
            self.scaler = self.scaler[0].to(device), self.scaler[1].to(device)


def _fit(
    task: Task, settings: Settings, features: PatchFeatures, train: Masked, classes: Classes, bad: list[DamagedSample]
) -> dict[str, _Fit]:
    """The fitted protocols, on every process, in the order of the settings. A collective."""
    processes, fits = task.processes, dict[str, _Fit | None]()
    sample, sampled = None, 0.0
    if {"knn", "logistic"} & set(settings.protocols):
        began = time.monotonic()
        sample = sample_patches(
            features, train, classes, settings.max_patches, task.seed, bad, processes, _progress(task, "patches")
        )
        sampled = time.monotonic() - began
    for name in dict.fromkeys(settings.protocols):
        began = time.monotonic()
        if name == "linear":
            how = Training(**settings.model_dump(include=set(Training.__dataclass_fields__)))
            head = train_head(
                features, train, classes, _crop(settings, features), how, task.seed, bad, processes,
                _progress(task, "linear head"),
            )  # fmt: skip
            fit = None if head is None else _Fit(head, {}, time.monotonic() - began)
        else:
            choose = _choose_knn if name == "knn" else _choose_logistic
            work = partial(_fit_patches, sample, settings, len(classes), task.seed, choose)
            fit = processes.together(work)
            if fit is not None:
                fit.seconds = time.monotonic() - began + sampled
        fits[name] = processes.exchange(fit)[0]
    return {name: fit for name, fit in fits.items() if fit is not None}


Choice = tuple[NearestPatches | Logistic, dict[str, Any]]


def _fit_patches(
    sample: PatchSample | None, settings: Settings, num_classes: int, seed: int, choose: Callable[..., Choice]
) -> _Fit | None:
    """Standardise the patches by their mean and deviation, as CAPI, and fit on them."""
    if sample is None:
        return None
    if not len(sample):
        raise UserError("no training patch has a label: every one is mostly ignored pixels, or cannot be read")
    mean, std = sample.x.mean(dim=0), sample.x.std(dim=0, correction=0)
    if not torch.isfinite(mean).all():
        raise UserError("the patch features of the training images hold NaN or infinity: the backbone is broken")
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), std, torch.inf)  # a constant feature becomes zero
    sample = PatchSample((sample.x - mean) / std, sample.pixels, sample.label, sample.image)
    images = sample.image.unique()
    order = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    count = min(max(1, round(settings.holdout * len(images))), len(images) - 1)
    held = torch.isin(sample.image, order[:count])
    parts = sample.select((~held).nonzero()[:, 0]), sample.select(held.nonzero()[:, 0])
    model, chosen = choose(sample, *parts, settings, num_classes)
    chosen |= {"patches": len(sample), "held_out_images": count}
    return _Fit(model, chosen, 0.0, (mean, std))


def _choose_knn(
    sample: PatchSample, fitted: PatchSample, held: PatchSample, settings: Settings, num_classes: int
) -> Choice:
    ks = [k for k in settings.k if k <= len(fitted)]
    if not ks:
        raise UserError(f"k = {settings.k}, but there are {len(fitted)} training patches: give smaller numbers")
    scores = {}
    if len(held) and len(ks) * len(settings.distances) > 1:
        for key, found in held_out_predictions(fitted, held, ks, settings.distances, num_classes).items():
            scores[key] = mean_iou(confusion(held.pixels.numpy(), found.numpy(), num_classes))
    k, distance = max(scores, key=lambda key: scores[key]) if scores else (ks[0], settings.distances[0])
    by = {f"k={k}, {distance}": round(value, 3) for (k, distance), value in scores.items()}
    model = NearestPatches(sample.x, sample.pixels, num_classes, k, distance)
    return model, {"k": k, "distance": distance, "held_out": by}


def _choose_logistic(
    sample: PatchSample, fitted: PatchSample, held: PatchSample, settings: Settings, num_classes: int
) -> Choice:
    scores = {}
    if len(held) and len(settings.c) > 1:
        truth = held.pixels.numpy()
        for c, model in fit_logistic(fitted.x, fitted.label, settings.c, tolerance=1e-4):
            found = np.broadcast_to(model.predict(held.x).numpy(), truth.shape)
            scores[c] = mean_iou(confusion(truth, found, num_classes))
    best = max(scores, key=lambda c: scores[c]) if scores else settings.c[0]
    final = dict(fit_logistic(sample.x, sample.label, [best]))[best]
    return final, {"c": best, "held_out": {f"c={c:.3g}": round(value, 3) for c, value in scores.items()}}


# --- predict ---------------------------------------------------------------------------------------------------------


class _Prepared:
    """A test image and its features, computed once for all protocols where they use the whole image."""

    def __init__(self, features: PatchFeatures, image: Image.Image) -> None:
        self.features = features
        self.size = features.size_of(image.height, image.width)
        self.pixels = features.prepare(image, self.size)
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """(D, h, w)."""
        if self._whole is None:
            self._whole = self.features(self.pixels[None])[0]
        return self._whole

    def window(self, box: Sequence[int]) -> Tensor:
        top, left, height, width = box
        if (height, width) == self.size:
            return self.whole()
        return self.features(self.pixels[None, :, top : top + height, left : left + width])[0]


def _segment(fit: _Fit, image: _Prepared, settings: Settings) -> Tensor:
    """Classes uint8 (H, W) at the size of the resized image."""
    if isinstance(fit.model, LinearHead):
        crop = _crop(settings, image.features)
        step = settings.stride or round(settings.crop_size * 2 / 3)
        return fit.model.predict(image.window, image.size, crop, [min(step, side) for side in crop])
    assert fit.scaler is not None
    found = image.whole()
    x = (found.flatten(1).mT - fit.scaler[0]) / fit.scaler[1]
    (height, width), grid = image.features.cell, found.shape[-2:]
    cells = fit.model.predict(x).expand(-1, height * width)  # (h w, P)
    return cells.reshape(*grid, height, width).permute(0, 2, 1, 3).reshape(image.size)


def _predict(
    task: Task, settings: Settings, features: PatchFeatures, test: Masked, classes: Classes, fits: dict[str, _Fit],
    bad: list[DamagedSample],
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    """Segment the test images, and fill the tally of each fit; returns the panels of the picture. A collective."""
    processes, count = task.processes, min(settings.pictures, len(test))
    drawn = {round(i) for i in np.linspace(0, len(test) - 1, count)} if settings.out is not None else set()
    table = pictures.colours(len(classes))
    tallies = {name: Tally(len(classes)) for name in fits}
    seconds = dict.fromkeys(fits, 0.0)
    panels: dict[int, dict[str, np.ndarray]] = {}

    def own() -> None:
        mine = range(processes.rank, len(test), processes.world_size)
        for i, image, mask in _progress(task, "test images")(readable(test, mine, features.channels, bad), len(mine)):
            truth, prepared = classes.without_ignored(mask), _Prepared(features, image)
            for name, fit in fits.items():
                began = time.monotonic()
                found = _segment(fit, prepared, settings).cpu().numpy()
                if found.shape != mask.shape:
                    found = np.asarray(Image.fromarray(found).resize(mask.shape[::-1], Image.Resampling.NEAREST))
                tallies[name].add(i, truth, found)
                seconds[name] += time.monotonic() - began
                if i in drawn:
                    panel = panels.setdefault(i, {"image": (shown := pictures.small(image))})
                    panel.setdefault("truth", pictures.painted(truth, table, shown))
                    panel[_title(name, settings)] = pictures.painted(found.astype(np.int64), table, shown)

    processes.together(own)
    everyones = processes.exchange((tallies, panels))
    for name, fit in fits.items():
        fit.tally = tallies[name].merge([each[name] for each, _ in everyones])
        fit.seconds += seconds[name]
    together = {i: panel for _, each in everyones for i, panel in each.items()}
    return [together[i] for i in sorted(together)]


def _draw(
    task: Task, settings: Settings, classes: Classes, fits: dict[str, _Fit], panels: list[dict[str, np.ndarray]]
) -> Path:
    matrices = [fit.tally.matrix for fit in fits.values()]
    shown = [i for i in range(len(classes)) if any(m[i].sum() + m[:, i].sum() for m in matrices)]
    scores = ", ".join(f"{_title(name, settings)} {fit.tally.mean:.1f} %" for name, fit in fits.items())
    title = f"{task.name}: mean IoU of {scores}"
    figure = pictures.draw(panels, classes.names, pictures.colours(len(classes)), shown, title)
    return pictures.save(figure, Path(str(settings.out)), f"segment_{task.name.replace(' ', '_')}")
