"""Score a backbone: features once for each network, then every protocol that was asked for on them.

    rows = score("exported", "train-{000..009}.tar", "test-000.tar", baselines=True)

Two baselines say what pretraining was worth: the same architecture untrained, and the pixels themselves.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from selfvil.data.index import Pattern, open_shards
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_parts
from selfvil.evaluate.features import (
    Features,
    Precision,
    choose_readout,
    extract,
    load_backbone,
    raw_pixels,
)
from selfvil.evaluate.knn import knn
from selfvil.evaluate.linear import few_label_probe, linear_probe
from selfvil.runtime import commit, device_name
from selfvil.version import __version__
from selfvil.weights import Network, Normalisation

log = logging.getLogger(__name__)

PROTOCOLS = ("knn", "linear")
_RAW_SIDE = 32  # pixels; the longer side of images whose pixels are probed


@dataclass(frozen=True)
class Row:
    """One figure, with all that is needed to report it.

    value: top-1 accuracy in percent, or its mean over draws or seeds; deviation: standard deviation over these, if any.
    seconds: wall time of features and protocol together. samples_seen: images seen in pretraining. settings: of the
    protocol, where it has any.
    """

    network: str
    protocol: str
    value: float
    deviation: float | None
    readout: str
    train_images: int
    test_images: int
    seed: int
    seconds: float
    source: str
    samples_seen: int
    device: str
    versions: dict[str, str]
    commit: str | None
    settings: dict[str, Any] = field(default_factory=dict)


def score(
    source: str | Path,
    train: Pattern,
    test: Pattern,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    labels_per_class: int | None = None,
    draws: int = 20,
    probe_seeds: int = 1,
    baselines: bool = False,
    readout: str | None = None,
    network: str | None = None,
    image: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Accuracy of the backbone in `source` on labelled shards, and of the baselines if asked for.

    Args:
        source: an export folder, a run folder or a checkpoint folder.
        train, test: shard patterns.
        protocols: of "knn" (DINO's k-NN, four values of k) and "linear" (logistic regression).
        labels_per_class: fit the linear probe on so few labels, mean over `draws`; None uses all labels.
        probe_seeds: linear probes on all labels, of which the mean is reported: seeds seed, seed + 1, ...
        readout: how tokens become features, one of `models.heads.READOUTS`; None takes the architecture's usual one.
        network: which network of a run ("student", "teacher"); None takes the run's choice.
        image: extension of the image to use where samples have several, as in `open_shards`.
        seed: of the untrained network, of the held-out part and of the draws.
        keep: called with all rows so far after each protocol, so that a later failure loses none.

    Raises UserError for anything wrong with source, shards or labels, before features are computed.
    """
    if unknown := [protocol for protocol in protocols if protocol not in PROTOCOLS]:
        raise UserError(f"There is no protocol {unknown[0]!r}; choose of: {', '.join(PROTOCOLS)}.")
    if probe_seeds < 1:
        raise UserError(f"There must be at least one probe, got probe_seeds = {probe_seeds}.")
    pretrained = load_backbone(source, network=network)
    readout = choose_readout(pretrained.backbone, readout)
    shards = open_shards(train, image=image), open_shards(test, image=image)
    for warning in check_parts(*shards, protocols=protocols, labels_per_class=labels_per_class):
        log.warning(warning)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def features(name: str, subject: Network | Normalisation) -> Iterator[Features]:
        for part, each in zip(("train", "test"), shards):
            title = f"{name}, {part} images"
            if isinstance(subject, Normalisation):
                yield raw_pixels(
                    each, _raw_size(subject), channels=subject.channels, workers=workers, title=title,
                )  # fmt: skip
            else:
                look = subject.normalisation
                yield extract(
                    subject.backbone, each, img_size=look.img_size, mean=look.mean, std=look.std, readout=readout,
                    batch_size=batch_size, workers=workers, device=device, precision=precision, title=title,
                )  # fmt: skip

    subjects: dict[str, tuple[Network | Normalisation, str]] = {"pretrained": (pretrained, readout)}
    if baselines:
        untrained = load_backbone(source, network=network, untrained=True, seed=seed)
        height, width = _raw_size(pretrained.normalisation)
        subjects["untrained"] = untrained, readout
        subjects["raw pixels"] = pretrained.normalisation, f"{height} x {width} pixels"
    rows = []
    for name, (subject, how) in subjects.items():
        began = time.monotonic()
        train_features, test_features = (part.to(device) for part in features(name, subject))
        extracted = time.monotonic() - began
        for protocol in protocols:
            began = time.monotonic()
            results = _run(protocol, train_features, test_features, labels_per_class, draws, probe_seeds, seed)
            seconds = extracted + time.monotonic() - began
            rows += [
                Row(
                    name, label, value, deviation, how, len(train_features), len(test_features), seed,
                    round(seconds, 1), str(source), subject.samples_seen if isinstance(subject, Network) else 0,
                    device_name(device), {"selfvil": __version__, "torch": torch.__version__}, commit(),
                )
                for label, (value, deviation) in results.items()
            ]  # fmt: skip
            if keep is not None:
                keep(rows)
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """One line for each protocol and network, to be printed by rich."""
    first = rows[0]
    table = Table(title=f"Top-1 accuracy in percent, {first.train_images:,} train / {first.test_images:,} test images")
    for column in ("protocol", "network"):
        table.add_column(column)
    table.add_column("accuracy", justify="right")
    table.add_column("features")
    table.add_column("seconds", justify="right")
    for row in sorted(rows, key=lambda row: [each.protocol for each in rows].index(row.protocol)):
        deviation = "" if row.deviation is None else f" ± {row.deviation:.2f}"
        table.add_row(row.protocol, row.network, f"{row.value:.2f}{deviation}", row.readout, f"{row.seconds:.1f}")
    return table


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def _run(
    protocol: str,
    train: Features,
    test: Features,
    labels_per_class: int | None,
    draws: int,
    probe_seeds: int,
    seed: int,
) -> dict[str, tuple[float, float | None]]:
    """What was measured -> (percent, deviation)."""
    if protocol == "knn":
        return {f"k-NN, k = {k}": (value, None) for k, value in knn(train, test).items()}
    if labels_per_class is None:
        values = [linear_probe(train, test, seed=each).accuracy for each in range(seed, seed + probe_seeds)]
        return {"linear probe": (statistics.mean(values), statistics.stdev(values) if probe_seeds > 1 else None)}
    label = f"linear probe, {labels_per_class} labels per class, {draws} draws"
    return {label: few_label_probe(train, test, labels_per_class, draws, seed)}


def _raw_size(look: Normalisation) -> tuple[int, int]:
    shrink = min(1.0, _RAW_SIDE / max(look.img_size))
    height, width = (max(1, round(side * shrink)) for side in look.img_size)
    return height, width
