"""Score a backbone by the evaluations of the table; features are computed once for each network and readout.

    rows = score("exported", "train-{000..009}.tar", "test-000.tar", baselines=True)
    rows = score("exported", ..., {"few_label": settings("few_label", {"labels_per_class": 10})})

Two baselines show what pretraining gained: the same architecture untrained, and the pixels themselves.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from selfvil.data.index import Pattern, open_shards
from selfvil.errors import UserError
from selfvil.evaluate import ALL, evaluation, settings
from selfvil.evaluate.features import ALONE, Precision
from selfvil.evaluate.processes import Processes
from selfvil.evaluate.task import Score, Task, Trainer
from selfvil.runtime import commit, device_name
from selfvil.settings import Section
from selfvil.version import __version__
from selfvil.weights import load_pretrained

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row(Score):
    """A score, with all that is needed to report it; samples_seen: images seen in pretraining."""

    network: str
    seed: int
    source: str
    samples_seen: int
    device: str
    versions: dict[str, str]
    commit: str | None


def score(
    source: str | Path,
    train: Pattern,
    test: Pattern,
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
    keep: Callable[[list[Row]], None] | None = None,
    processes: Processes = ALONE,
    trainer: Trainer | None = None,
) -> list[Row]:
    """Scores of the backbone in `source` on labelled shards, and of the baselines if `baselines` is set.

    Args:
        source: an export folder, a run folder or a checkpoint folder.
        train, test: shard patterns.
        evaluations: names of `evaluate.EVALUATIONS` and their settings; None: knn and linear with their defaults.
        network: which network of a run ("student", "teacher"); None takes the run's choice.
        image: extension of the image to use where samples have several, as in `open_shards`.
        batch_size: images in a forward pass of feature extraction; None: 64 on a CPU, 256 elsewhere.
        precision: float32 or bf16 autocast.
        seed: of the untrained network, of held-out images, of draws and of fine-tuning.
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

    def task(name: str) -> Task:
        create = partial(load, untrained=name == "untrained")
        loaded = create()
        return Task(
            name, None if name == "raw pixels" else loaded, loaded.normalisation,
            open_shards(train, image=image), open_shards(test, image=image), create, device=device,
            precision=precision, batch_size=batch_size, workers=workers, seed=seed, source=str(source),
            processes=processes, trainer=trainer,
        )  # fmt: skip

    def checked() -> Task:
        first = task("pretrained")
        warnings = [warning for name, each in chosen.items() for warning in evaluation(name).check(first, each)]
        for warning in dict.fromkeys(warnings):
            log.log(logging.WARNING if processes.is_main else logging.DEBUG, warning)
        return first

    rows: list[Row] = []
    subject = processes.together(checked)
    for name in ("pretrained", "untrained", "raw pixels") if baselines else ("pretrained",):
        if name != "pretrained":
            subject = processes.together(partial(task, name))
        for evaluated, each in chosen.items():
            for found in evaluation(evaluated).evaluate(subject, each):
                values = vars(found) | {"seconds": round(found.seconds, 1)}
                rows.append(
                    Row(
                        network=name, seed=seed, source=str(source),
                        samples_seen=subject.network.samples_seen if subject.network is not None else 0,
                        device=device_name(device), versions={"selfvil": __version__, "torch": torch.__version__},
                        commit=commit(), **values,
                    )
                )  # fmt: skip
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
