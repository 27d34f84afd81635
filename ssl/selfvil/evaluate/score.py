"""Score a backbone by the evaluations of the table, all in one pass over the images of each pair of shards.

    rows = score("exported", "train-{000..009}.tar", "test-000.tar", baselines=True)
    rows = score("exported", ..., {"few_label": settings("few_label", {"labels_per_class": "1%"})})
    rows = score_pairs("exported", [Pair("a/train", "a/test"), Pair("b/train", "b/test")])

Two baselines show what pretraining gained: the same architecture untrained, and the pixels themselves.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from selfvil.data.base import Images, Pattern
from selfvil.data.images import open_images
from selfvil.errors import UserError, redact
from selfvil.evaluate import ALL, evaluation, needs, settings, want
from selfvil.evaluate.checks import shared_images
from selfvil.evaluate.features import ALONE, Precision
from selfvil.evaluate.processes import Processes
from selfvil.evaluate.task import Score, Task, Trainer
from selfvil.runtime import commit, device_name
from selfvil.settings import Section
from selfvil.version import __version__
from selfvil.weights import Network, load_pretrained

log = logging.getLogger(__name__)

PRETRAINED, UNTRAINED, RAW = "pretrained", "untrained", "raw pixels"


class Pair(NamedTuple):
    """Shard patterns of one data set: the images that evaluations are fitted on, and those that are scored."""

    train: Pattern
    test: Pattern

    def names(self) -> tuple[str, str]:
        """Both patterns as text, for tables."""
        train, test = (str(each) if isinstance(each, str | os.PathLike) else " ".join(map(str, each)) for each in self)
        return redact(train), redact(test)


@dataclass(frozen=True, kw_only=True)
class Row(Score):
    """A score, with all that is needed to report it.

    train, test: the shard patterns. shared_images: test images that are training images too, which `allow_shared`
    accepted. samples_seen: images seen in pretraining.
    """

    network: str
    train: str
    test: str
    shared_images: int
    seed: int
    source: str
    samples_seen: int
    device: str
    versions: dict[str, str]
    commit: str | None


def score(
    source: str | Path, train: Pattern, test: Pattern, evaluations: Mapping[str, Section] | None = None, **options: Any
) -> list[Row]:
    """Scores on one pair of shards; arguments and errors as `score_pairs`."""
    return score_pairs(source, [Pair(train, test)], evaluations, **options)


def score_pairs(
    source: str | Path,
    pairs: Sequence[Pair],
    evaluations: Mapping[str, Section] | None = None,
    *,
    baselines: bool = False,
    network: str | None = None,
    image: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    allow_shared: bool = False,
    keep: Callable[[list[Row]], None] | None = None,
    processes: Processes = ALONE,
    trainer: Trainer | None = None,
) -> list[Row]:
    """Scores of the backbone in `source` on pairs of labelled shards, and of the baselines if `baselines` is set.

    Args:
        source: an export folder, a run folder, a checkpoint folder, or the name of a timm model.
        evaluations: names of `evaluate.EVALUATIONS` and their settings; None: those of `evaluate.ALL` with their
            defaults.
        network: which network of a run ("student", "teacher"); None takes the run's choice.
        image: extension of the image to use where samples have several, as in `open_shards`.
        batch_size: images in a forward pass of feature extraction; None: 64 on a CPU, 256 elsewhere.
        precision: float32 or bf16 autocast.
        seed: of the untrained network, of held-out images, of draws, of probes, of resamples and of fine-tuning.
        allow_shared: score although test images are also training images, if not all are.
        keep: called with all rows so far after each new one, so that a later failure loses none.
        processes: which share the images; every one calls this, and the main process alone has rows.
        trainer: a `selfvil.trainer.Trainer`, for finetune.

    Raises UserError for anything wrong with source, shards, labels or settings, before features are computed.
    """
    chosen = {name: settings(name) for name in ALL} if evaluations is None else evaluations
    if precision not in ("fp32", "bf16"):
        raise UserError(f"There is no precision {precision!r}; choose one of: fp32, bf16.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = partial(load_pretrained, source, network=network, seed=seed)

    def make(name: str, loaded: Network, train: Images, test: Images) -> Task:
        task = Task(
            name, None if name == RAW else loaded, loaded.normalisation, train, test,
            partial(load, untrained=name == UNTRAINED), device=device, precision=precision, batch_size=batch_size,
            workers=workers, seed=seed, source=str(source), processes=processes, allow_shared=allow_shared,
            trainer=trainer,
        )  # fmt: skip
        want(task, chosen.items())
        return task

    def checked() -> tuple[Network, list[tuple[Images, Images]]]:
        if not pairs:
            raise UserError("There are no images to score: give a pair of training and test shards.")
        for name in chosen:
            evaluation(name)
        loaded = load()
        opened: list[tuple[Images, Images]] = [
            (open_images(pair.train, image=image), open_images(pair.test, image=image)) for pair in pairs
        ]
        warnings = list[str]()
        for train, test in opened:
            task = make(PRETRAINED, loaded, train, test)
            for name, each in chosen.items():
                warnings += evaluation(name).check(task, each)
                task.want(needs(name, task, each))
        for warning in dict.fromkeys(warnings):
            log.log(logging.WARNING if processes.is_main else logging.DEBUG, warning)
        return loaded, opened

    rows: list[Row] = []
    pretrained, opened = processes.together(checked)
    for pair, (train, test) in zip(pairs, opened):
        train_name, test_name = pair.names()
        shared = shared_images(train, test)
        for name in (PRETRAINED, UNTRAINED, RAW) if baselines else (PRETRAINED,):
            loaded = processes.together(partial(load, untrained=True)) if name == UNTRAINED else pretrained
            task = make(name, loaded, train, test)
            for evaluated, each in chosen.items():
                for found in evaluation(evaluated).evaluate(task, each):
                    values = vars(found) | {"seconds": round(found.seconds, 1)}
                    rows.append(
                        Row(
                            network=name, train=train_name, test=test_name, shared_images=shared,
                            seed=seed, source=str(source),
                            samples_seen=0 if task.network is None else task.network.samples_seen,
                            device=device_name(device), versions={"selfvil": __version__, "torch": torch.__version__},
                            commit=commit(), **values,
                        )
                    )  # fmt: skip
                    if keep is not None:
                        keep(rows)
    return rows


def as_table(rows: Sequence[Row]) -> Group:
    """A table for each pair of shards, with a line for each protocol and network, to be printed by rich."""
    pairs = list(dict.fromkeys((row.train, row.test) for row in rows))
    parts = [[row for row in rows if (row.train, row.test) == pair] for pair in pairs]
    titles = [f"train {train}, test {test}: " if len(pairs) > 1 else "" for train, test in pairs]
    return Group(*(_table(part, title) for part, title in zip(parts, titles)))


def _table(rows: Sequence[Row], title: str) -> Table:
    measures = dict.fromkeys(row.measure for row in rows)
    table = Table(title=f"{title}{' and '.join(measures)} in percent, {_images(rows[0])}")
    table.add_column("protocol", min_width=13)
    table.add_column("network")
    table.add_column("value", justify="right", no_wrap=len(measures) == 1)
    table.add_column("95 %", no_wrap=True)
    table.add_column("features")
    table.add_column("seconds", justify="right")
    protocols = list(dict.fromkeys(row.protocol for row in rows))
    for row in sorted(rows, key=lambda row: protocols.index(row.protocol)):
        value = f"{row.value:.2f}" if row.deviation is None else f"{row.value:.2f} ± {row.deviation:.2f}"
        value = f"{value} {row.measure}" if len(measures) > 1 else value
        interval = "" if row.interval is None else f"{row.interval[0]:.1f} … {row.interval[1]:.1f}"
        table.add_row(row.protocol, row.network, value, interval, row.readout, f"{row.seconds:.1f}")
    if any(row.interval is not None for row in rows):
        table.caption = "95 %: bootstrap interval over test images"
        if any(row.deviation is not None for row in rows):
            table.caption += "; ±: deviation over draws or seeds"
    return table


def _images(row: Row) -> str:
    shared = f", {row.shared_images:,} of them in both" if row.shared_images else ""
    return f"{row.train_images:,} train / {row.test_images:,} test images{shared}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]
