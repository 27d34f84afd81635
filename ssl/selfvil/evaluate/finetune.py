"""Fine-tune a backbone with a linear head, and compare it with a linear probe on the same tokens, frozen.

The head of a Vision-LSTM gets its first and last token, concatenated (Bilateral Concat: Alkin et al., "Vision-LSTM",
2024), that of a ViT the class token; a second head gets the mean of all patch tokens. The network after the last step
is scored: nothing is chosen on the test images.

Fine-tuning is a run of the training loop with the objective `supervised`, so it takes place on all processes of the
launch by their strategy, and with `run=FOLDER` it is kept and continues after an interruption.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfvil.data.subset import FewLabels
from selfvil.errors import UserError
from selfvil.evaluate import intervals
from selfvil.evaluate.accuracy import rank_of_truth
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features
from selfvil.evaluate.few_label import few_label_draws
from selfvil.evaluate.linear import linear_probe, require_probe_labels
from selfvil.evaluate.saved import add_score, export_classifier, write_start
from selfvil.evaluate.task import Score, Task, Trainer
from selfvil.models.adapter import adapt
from selfvil.settings import PathText, Section, Size
from selfvil.stop import Stopped
from selfvil.timm_folder import require_new_folder
from selfvil.weights import Network, load_pretrained, model_arguments

# Readouts of two heads -> the readout that has the tokens of both.
_TOGETHER: dict[tuple[str, ...], str] = {
    ("bilateral_concat", "mean"): "first_last_mean",
    ("cls", "mean"): "cls_mean",
    ("registers", "mean"): "registers_mean",
}
_FEW_STEPS = 100
_EVEN_SHARE = 64  # a process's images of a step; above, a number that divides into micro-batches is taken


class Settings(Section):
    """Accuracy after fine-tuning the whole network, and of a linear probe on the same tokens, frozen.

    The defaults are those of MAE's fine-tuning of ViT-B (He et al., "Masked Autoencoders", 2021, and its code), with
    the gradient clipping that Vision-LSTM's authors recommend, and without its RandAugment (9), mixup (0.8), cutmix (1)
    and erasing (0.25). They are meant for 100,000 steps: for some hundred steps, raise base_lr, move layer_decay
    towards 1 and use smaller batches.
    """

    epochs: float = Field(100, gt=0)
    """Passes over the training images."""
    batch_size: int = Field(1024, ge=1)
    """Images in a step, over all processes; at most all training images."""
    base_lr: float = Field(5e-4, gt=0)
    """Peak learning rate for 256 images a step; the peak is base_lr * batch_size / 256."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine schedule, at most the peak."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Learning rate of a layer over that of the layer above (Bao et al., "BEiT", 2021); a ViL block pair is a layer."""
    head_lr: float = Field(1.0, gt=0)
    """Factor on the learning rate of the head."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Probability of skipping a block for a sample (stochastic depth), as the architecture distributes it."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Fraction of a target that is spread over all classes."""
    min_crop: float = Field(0.08, gt=0, le=1)
    """Smallest fraction of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the images left to right; false if a mirror image has another meaning, as with digits."""
    randaugment: int | None = Field(None, ge=0, le=10)
    """Magnitude of RandAugment; null leaves it out."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle of the image is replaced by noise."""
    mixup: float = Field(0.0, ge=0)
    """Parameter alpha of mixup; 0 leaves it out."""
    cutmix: float = Field(0.0, ge=0)
    """Parameter alpha of cutmix; 0 leaves it out."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, which is then the network that is scored; null keeps none."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null never clips."""
    readout: Literal["bilateral_concat", "cls", "registers", "mean"] | None = None
    """The only head; null takes the one that the architecture is made for, and one on the mean of the patch tokens."""
    labels_per_class: int | None = Field(None, ge=1)
    """Images of each class to learn from, drawn by the seed; null uses all."""
    img_size: Size | None = None
    """Height and width of the images in pixels; null takes those of pretraining. Learned positions are resampled."""
    stride: int | None = Field(None, ge=1)
    """ViL: distance between patches in pixels; half the patch gives a sequence about four times as long. null: as in
    pretraining."""
    run: PathText | None = None
    """Folder in which the runs of the heads are kept; the same command then continues an interrupted one."""
    out: PathText | None = None
    """New folder for the fine-tuned network with the first head, which timm loads; written before it is scored."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError inside a run, for too few labels, a readout, size or stride the network does not allow, too
    little memory, or a folder that cannot be written; warns of few steps."""
    if settings.out is not None:
        require_new_folder(settings.out)
    if settings.run is not None:
        _require_runs(Path(settings.run))
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), settings.labels_per_class)
    if task.trainer is None:
        raise UserError(
            "fine-tuning is a training run of its own, which cannot take place inside another one: run selfvil eval "
            "finetune SOURCE --train SHARDS --test SHARDS afterwards (in Python: selfvil.evaluate(SOURCE, 'finetune'))"
        )
    batch_size, steps = length(task, settings)
    if task.network is not None:
        for head in choose_heads(task.network.backbone, settings.readout):
            task.trainer.begin(recipe(task, settings, head, Path("unused"), None), task.device, _processes(task))
    if steps < _FEW_STEPS:
        warnings.append(f"Fine-tuning takes only {steps} steps of {batch_size} images: smaller batches give more.")
    return warnings


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy for each head: of linear probes on the frozen network, then of the fine-tuned networks.

    Every process extracts features and fine-tunes; the main process alone fits the probes. Raw pixels have no score.
    """
    if task.network is None or task.trainer is None:
        return
    heads = choose_heads(task.network.backbone, settings.readout)
    with _folder(task, settings) as folder:
        began = time.monotonic()
        start = folder / f"{_prefix(task)}start"
        task.processes.together(lambda: write_start(start, task) if task.processes.is_main else None)
        whole = recipe(task, settings, heads[0], folder, start)
        backbone = task.processes.together(lambda: _trainer(task).begin(whole, task.device, _processes(task)))
        size = tuple(whole["model"]["img_size"])
        frozen = task.network._replace(
            backbone=backbone,
            normalisation=type(task.normalisation)(task.normalisation.mean, task.normalisation.std, size),
        )
        train = task.train
        if settings.labels_per_class is not None:
            train = FewLabels(train, settings.labels_per_class, task.seed)
        joint = _TOGETHER.get(tuple(heads), heads[0])
        parts = [task.extract(frozen, shards, joint, part) for part, shards in (("train", train), ("test", task.test))]
        extracted = time.monotonic() - began
        how = settings.model_dump(mode="json", exclude={"run", "out", "readout", "labels_per_class"})
        how |= {"precision": task.precision, "img_size": list(size), "processes": task.processes.world_size}
        few = "" if settings.labels_per_class is None else f", {settings.labels_per_class} labels per class"
        epochs = f"{settings.epochs:g} epoch{'s' if settings.epochs != 1 else ''}"

        def score(kind: str, protocol: str, head: str, correct: Tensor, seconds: float, how: dict[str, Any]) -> Score:
            found = intervals.accuracy(correct, task.seed)
            return Score(
                metric=f"{kind}_{head}", protocol=protocol + few, value=found.value, interval=found.interval,
                readout=head, train_images=len(train), test_images=correct.shape[-1], seconds=seconds, settings=how,
            )  # fmt: skip

        if parts[0] is not None and parts[1] is not None:
            for head, (x, queries) in split(frozen, heads, parts[0], parts[1], task.device).items():
                began = time.monotonic()
                with task.processes.interrupts():
                    if settings.labels_per_class is None:
                        correct = linear_probe(x, queries, seed=task.seed).correct
                    else:
                        correct = few_label_draws(x, queries, settings.labels_per_class, draws=1)
                yield score("frozen", "linear probe", head, correct, extracted + time.monotonic() - began, {})
        del frozen, backbone, parts
        for head in heads:
            began = time.monotonic()
            tuned = _fine_tune(task, settings, head, folder, start, how, save=head == heads[0])
            if tuned is not None:
                yield score("finetune", f"fine-tuning, {epochs}", head, tuned, time.monotonic() - began, how)


def _fine_tune(
    task: Task, settings: Settings, head: str, folder: Path, start: Path, how: dict[str, Any], save: bool
) -> Tensor | None:
    """Whether the network, fine-tuned with `head`, classifies each test image correctly: bool (N,); None but on the
    main process. Collective.

    The network is also written to `settings.out` if `save`.
    """
    whole = recipe(task, settings, head, folder, start)
    summary = _trainer(task).run(whole, task.device, _processes(task))
    if not summary.finished:
        again = "the same command continues it" if settings.run else "nothing is kept without run=FOLDER"
        raise Stopped(f"fine-tuning was stopped after step {summary.step:,} of {summary.total_steps:,}: {again}")
    run = Path(whole["run"]["out"])
    network: Network = task.processes.together(lambda: load_pretrained(run))
    out = Path(settings.out) if settings.out is not None and save and task.name == "pretrained" else None
    labels = sorted(set(task.train.labels.tolist()))  # type: ignore[union-attr]  # all have one
    if out is not None:
        task.processes.together(
            lambda: export_classifier(network, labels, out, start, task, head, how) if task.processes.is_main else None
        )
    ranks = rank_of_truth(task, network, labels, f"{task.name}, {head}, test images")
    if ranks is None:
        return None
    correct = ranks == 0
    if out is not None:
        add_score(out, intervals.percent(correct), task.test)
    return correct


# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe(task: Task, settings: Settings, head: str, folder: Path, start: Path | None) -> dict[str, Any]:
    """The sections of a run that fine-tunes the task's network with `head`, in a folder of its own in `folder`.

    start: the network as an export, which the run begins with; None: initialised by the seed.
    """
    network = task.network
    assert network is not None
    (batch_size, steps), shown = length(task, settings), task.normalisation
    arguments = {key: value for key, value in model_arguments(task.source).items() if key != "num_classes"}
    model = arguments | {
        "name": network.backbone.pretrained_cfg["architecture"],  # type: ignore[index]  # of every timm model
        "img_size": list(settings.img_size or shown.img_size),
        "patch_size": _patch_size(network.backbone),
        "in_chans": shown.channels,
        "drop_path_rate": settings.drop_path,
        "start_from": None if start is None else str(start),
        "start_heads": "new",
    }
    if settings.stride is not None:
        model["stride"] = settings.stride
    objective = {"name": "supervised", "readout": head, "crop_scale": [settings.min_crop, 1.0], "three_augment": False}
    same = ("label_smoothing", "flip", "randaugment", "erasing", "mixup", "cutmix", "head_lr", "ema_decay")
    objective |= {"color_jitter": 0.0} | {key: getattr(settings, key) for key in same}
    optim = {"batch_size": batch_size, "betas": [0.9, 0.999], "on_nonfinite": "stop"}
    optim["min_lr"] = min(settings.min_lr, settings.base_lr * batch_size / 256)
    optim |= {key: getattr(settings, key) for key in ("base_lr", "warmup", "layer_decay", "weight_decay", "clip_norm")}
    kept = settings.run is not None
    return {
        "model": model,
        "data": {
            "train": [str(path) for path in task.train.paths], "image": task.train.image, "mean": list(shown.mean),
            "std": list(shown.std), "workers": task.workers, "max_bad": 1.0,
            "labels_per_class": settings.labels_per_class,
        },
        "objective": objective,
        "optim": optim,
        "budget": {"steps": steps},
        "run": {
            "out": str(folder / f"{_prefix(task)}{head}"), "seed": task.seed, "precision": task.precision,
            "checkpoint_every": max(1, min(500, steps // 10)) if kept else steps,
        },
        "monitor": {"log_every": 10, "tensorboard": False, "doctor_every": 50 if kept else None},
    }  # fmt: skip


def length(task: Task, settings: Settings) -> tuple[int, int]:
    """Images in a step, which all processes can share equally, and the number of steps."""
    num_images = len(task.train)
    if settings.labels_per_class is not None:
        num_images = settings.labels_per_class * len(set(task.train.labels.tolist()))  # type: ignore[union-attr]
    processes = _processes(task)
    share = max(1, min(settings.batch_size, num_images) // processes)
    if share > _EVEN_SHARE:
        share -= share % 16
    elif settings.mixup or settings.cutmix:
        share = max(2, share - share % 2)
    return share * processes, max(1, round(settings.epochs * num_images / (share * processes)))


def choose_heads(backbone: nn.Module, readout: str | None = None) -> list[str]:
    """The readout that `backbone` is made for, and the mean of its patch tokens; or `readout` alone.

    Raises UserError for a readout that no head can be put on, or one whose token the backbone lacks.
    """
    usable = adapt(backbone).classifier_readouts()
    if readout is None:
        return usable
    if readout not in usable:
        raise UserError(
            f"{type(backbone).__name__} cannot be fine-tuned with a head on {readout!r}; choose of: "
            f"{', '.join(usable)}."
        )
    return [readout]


def split(
    network: Network, heads: list[str], train: Features, test: Features, device: torch.device
) -> dict[str, tuple[Features, Features]]:
    """The features of each head, from those of all heads together."""
    widths = [adapt(network.backbone).readout_dim(head) for head in heads]
    columns = zip(*(features.x.split(widths, dim=1) for features in (train, test)))
    return {
        head: (Features(train_x, train.y).to(device), Features(test_x, test.y).to(device))
        for head, (train_x, test_x) in zip(heads, columns)
    }


def _require_runs(folder: Path) -> None:
    """Raise UserError unless `folder` is new or empty, or holds runs of fine-tuning."""
    if folder.exists() and not (
        folder.is_dir() and (any(folder.glob("*start/config.json")) or not any(folder.iterdir()))
    ):
        raise UserError(
            f"run = {folder} exists and holds no fine-tuning: choose a new folder, or that of an interrupted one"
        )


@contextmanager
def _folder(task: Task, settings: Settings) -> Iterator[Path]:
    """The folder of the runs, the same on every process; a temporary one is removed at the end. Collective."""
    if settings.run is not None:
        yield Path(settings.run)
        return
    with tempfile.TemporaryDirectory(prefix="selfvil-finetune-") as folder:
        yield Path(task.processes.exchange(folder)[0])
        task.processes.exchange(None)  # the main process removes it after all have read it


def _prefix(task: Task) -> str:
    return "" if task.name == "pretrained" else f"{task.name}-"


def _trainer(task: Task) -> Trainer:
    assert task.trainer is not None  # `check` has refused a task without one
    return task.trainer


def _processes(task: Task) -> int:
    return task.processes.world_size


def _patch_size(backbone: nn.Module) -> int | None:
    """The side of a patch in pixels; None for a network without patches. Raises UserError if it is not square."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if size is None or isinstance(size, int):
        return size
    if len(set(size)) > 1:
        raise UserError(f"patches of {size[0]} x {size[1]} pixels cannot be fine-tuned: only square ones can")
    return int(size[0])
