"""Fine-tune a backbone with a linear head, and compare it with a linear probe on the same tokens, frozen.

    rows = finetune("exported", "train-{000..009}.tar", "test-000.tar", settings=Settings(epochs=5), baselines=True)

A Vision-LSTM's head sees its first and last token side by side (Bilateral Concat: Alkin et al., "Vision-LSTM", 2024), a
ViT's the class token; beside it stands the mean of all patch tokens. What is scored is the network after its last
step: the test images choose nothing.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from selfvil import runtime
from selfvil.data.index import Pattern, Shards, open_shards
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_parts
from selfvil.evaluate.classifier import Settings, plan_micro_batch, train_classifier
from selfvil.evaluate.features import Features, Precision, extract, load_backbone
from selfvil.evaluate.linear import few_label_probe, linear_probe
from selfvil.evaluate.saved import add_score, export_classifier
from selfvil.evaluate.score import Row
from selfvil.export import need_new_folder
from selfvil.models.heads import choose_readout
from selfvil.version import __version__
from selfvil.weights import Network

log = logging.getLogger(__name__)

# Two heads' tokens, read in one pass.
_TOGETHER: dict[tuple[str, ...], str] = {
    ("bilateral_concat", "mean"): "first_last_mean",
    ("cls", "mean"): "cls_mean",
    ("registers", "mean"): "registers_mean",
}
_FEW_STEPS = 100


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
    image: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    keep: Callable[[list[Row]], None] | None = None,
    out: str | Path | None = None,
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
        image: extension of the image to use where samples have several, as in `open_shards`.
        img_size: side of the images, or height and width, in pixels; None takes that of pretraining. Learned positions
            are resampled.
        precision: float32 or bf16 autocast, in training and in scoring.
        seed: of the order of images, their augmentation, stochastic depth, the draw of labels, the untrained network.
        keep: called with all rows so far after each new one, so that a later failure loses none.
        out: a new folder for the fine-tuned network with the first head, which timm loads. It is written before the
            network is scored.

    One process on one device. On a CPU, the same seed and number of threads give the same weights bit for bit, unless
    memory is so short that micro-batches must be smaller.
    Raises UserError for anything wrong with source, shards, labels or settings, before training starts.
    """
    settings = settings or Settings()
    out = None if out is None else need_new_folder(out)
    if precision not in ("fp32", "bf16"):
        raise UserError(f"There is no precision {precision!r}; choose one of: fp32, bf16.")
    given = load_backbone(source, network=network, drop_path_rate=settings.drop_path)
    heads = choose_heads(given.backbone, readout)
    given = resize(given, img_size)
    all_train, test_shards = open_shards(train, image=image), open_shards(test, image=image)
    for warning in check_parts(all_train, test_shards, protocols=["linear"], labels_per_class=labels_per_class):
        log.warning(warning)
    train_shards = all_train if labels_per_class is None else _FewLabels(all_train, labels_per_class, seed)
    batch_size, steps = settings.length(len(train_shards))
    if steps < _FEW_STEPS:
        log.warning("Fine-tuning takes only %d steps of %d images: smaller batches give more.", steps, batch_size)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan_micro_batch(given.backbone.to(device), given.normalisation, batch_size, device, precision)  # or refuse now
    size = given.normalisation.img_size
    del given
    how_tuned = asdict(settings) | {"precision": precision, "img_size": list(size)}
    few = "" if labels_per_class is None else f", {labels_per_class} labels per class"
    epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"

    def row(
        network: Network, protocol: str, value: float, head: str, seconds: float, how: dict[str, Any] | None = None
    ) -> Row:
        return Row(
            name, protocol + few, value, None, head, len(train_shards), len(test_shards), seed, round(seconds, 1),
            str(source), network.samples_seen, runtime.device_name(device),
            {"selfvil": __version__, "torch": torch.__version__}, runtime.commit(), how or {},
        )  # fmt: skip

    rows: list[Row] = []

    def add(new: Row) -> None:
        rows.append(new)
        if keep is not None:
            keep(rows)

    for name in ("pretrained", "untrained") if baselines else ("pretrained",):
        how: dict[str, Any] = {
            "network": network, "untrained": name == "untrained", "seed": seed, "drop_path_rate": settings.drop_path
        }  # fmt: skip
        frozen, began = resize(load_backbone(source, **how), img_size), time.monotonic()
        seen = _frozen(frozen, heads, train_shards, test_shards, workers, device, precision, name)
        extracted = time.monotonic() - began
        for head, (train_features, test_features) in seen.items():
            began = time.monotonic()
            if labels_per_class is None:
                value = linear_probe(train_features, test_features, seed=seed).accuracy
            else:
                value, _ = few_label_probe(train_features, test_features, labels_per_class, draws=1)
            add(row(frozen, "linear probe", value, head, extracted + time.monotonic() - began))
        for head in heads:
            began, title = time.monotonic(), f"{name}, {head}"
            tuned = resize(load_backbone(source, **how), img_size)
            classifier = train_classifier(
                tuned, head, train_shards, settings, seed=seed, workers=workers, device=device, precision=precision,
                title=title,
            )  # fmt: skip
            wanted = out is not None and name == "pretrained" and head == heads[0]
            if out is not None and wanted:
                export_classifier(
                    classifier, out, source=source, network=tuned, readout=head, train=train_shards, settings=how_tuned
                )
            value = classifier.accuracy(test_shards, workers=workers, title=f"{title}, test images")
            if out is not None and wanted:
                add_score(out, value, test_shards)
            add(row(tuned, f"fine-tuning, {epochs}", value, head, time.monotonic() - began, how_tuned))
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


def resize(network: Network, img_size: int | tuple[int, int] | None) -> Network:
    """`network` for images of another side, or height and width, in pixels; None leaves it as it is.

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
            f"{type(backbone).__name__} cannot take images of {height} x {width} pixels (--img-size): {reason}"
        ) from None
    return network._replace(normalisation=replace(network.normalisation, img_size=(height, width)))


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
