"""Examine a run from its folder, during the run or later: its metrics and its newest checkpoint.

The folder is only read. Any file may be incomplete, since a run may be killed at any moment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from selfvil.build import open_training
from selfvil.data.loader import Batch, View, train_batches
from selfvil.data.views import CenterCrop, RandomCropFlip
from selfvil.diagnostics.collapse import Doctor
from selfvil.diagnostics.gates import gate_vitals, record_forget_gates
from selfvil.diagnostics.rules import RULES
from selfvil.diagnostics.vitals import feature_vitals, lidar_vitals
from selfvil.diagnostics.wording import number
from selfvil.errors import UserError
from selfvil.evaluate.features import choose_readout
from selfvil.models.adapter import adapt
from selfvil.recipe import Recipe
from selfvil.records import METRICS, ends_incomplete, read_metrics, read_record
from selfvil.run import read_recipe
from selfvil.weights import load_network, open_checkpoint

LIDAR_IMAGES, LIDAR_VIEWS = 128, 8


@dataclass(frozen=True)
class Record:
    """The content of a run's folder. launches, summary: of run.json. cut: whether the last line of metrics.jsonl is
    incomplete; it is then left out of `metrics`."""

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    launches: list[dict[str, Any]]
    summary: dict[str, Any] | None
    cut: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.summary:
            return int(self.summary["total_steps"])
        latest = next(record for record in reversed(self.metrics) if "epoch" in record)
        num_samples = round(latest["samples"] / latest["epoch"])
        return self.recipe.budget.total_steps(num_samples, self.recipe.optim.batch_size)


def open_run(folder: Path) -> Record:
    """Read a run's folder.

    Raises:
        UserError: it is no run, or has no training metrics yet.
    """
    record = read_folder(folder)
    if not any(entry["kind"] == "train" for entry in record.metrics):
        raise UserError(
            f"{folder / METRICS} holds no training metrics: a run writes the first ones after monitor.log_every steps"
        )
    return record


def read_folder(folder: Path) -> Record:
    """Read a run's folder; its metrics may be missing. Raises UserError if it is no run."""
    recipe, metrics_file = read_recipe(folder), folder / METRICS
    run = read_record(folder)
    summary = asdict(run.summary) if run.summary else None
    cut = metrics_file.is_file() and ends_incomplete(metrics_file)
    return Record(folder, recipe, read_metrics(metrics_file), run.launches, summary, cut)


def examine(record: Record) -> Doctor:
    """A doctor that has judged the whole record."""
    takes_vitals = any(entry["kind"] == "doctor" for entry in record.metrics)
    doctor = Doctor(record.recipe, record.total_steps, takes_vitals)
    for step, entries in groupby(record.metrics, key=lambda entry: entry["step"]):
        merged = {key: value for entry in entries for key, value in entry.items() if isinstance(value, float)}
        doctor.judge(step, merged)
    return doctor


@torch.no_grad()
def measure(record: Record, num_images: int = 1024) -> dict[str, float]:
    """Vital signs of the newest checkpoint's features and gates, on training images.

    Uses more images than the run itself, without augmentation, so that ranks can be larger; LiDAR from 8 crops of each
    of 128 images. Raises UserError if there is no usable checkpoint, or the images cannot be read.
    """
    backbone, normalisation, _ = load_network(open_checkpoint(record.folder))
    readout = choose_readout(backbone.eval())
    crop = RandomCropFlip(normalisation.img_size, (0.2, 1.0), normalisation.mean, normalisation.std)
    with record_forget_gates(backbone) as gates:
        whole = training_images(record, num_images)
        features = torch.cat([adapt(backbone).read_out(batch.views[0], readout) for batch in whole])
    (views,) = training_images(record, LIDAR_IMAGES, [crop] * LIDAR_VIEWS)
    crops = torch.stack([adapt(backbone).read_out(images, readout) for images in views.views], dim=1)
    return feature_vitals(features) | lidar_vitals(crops) | gate_vitals(gates)


def training_images(record: Record, count: int, views: Sequence[View] | None = None) -> Iterator[Batch]:
    """Batches of up to 128 of the run's first `count` images, in its order. views: None takes the whole images.

    Raises UserError if the shards cannot be read.
    """
    recipe, shards = open_training(record.recipe)
    views = views or [CenterCrop(recipe.model.img_size, recipe.data.mean, recipe.data.std)]
    size = min(128, count, len(shards))
    return train_batches(
        shards, views, seed=recipe.run.seed, batch_size=size, stop_step=min(count, len(shards)) // size,
        channels=recipe.model.in_chans, decode=recipe.data.decode, window=recipe.data.window,
    )  # fmt: skip


NOTHING_JUDGED = (
    "nothing to judge: the run took no vital signs (monitor.doctor_every is null, or longer than the run so far), and "
    "its objective logs none of a teacher"
)


def as_table(doctor: Doctor, title: str) -> Table:
    """Symptom, value, healthy range, verdict and advice: one row for each rule with a value."""
    table = Table(title=title)
    for column in ("symptom", "value", "healthy", "verdict", "advice"):
        table.add_column(column, overflow="fold")
    for row in rows(doctor):
        table.add_row(*row, style="bold red" if row[3].startswith("ALARM") else "")
    return table


def rows(doctor: Doctor) -> list[tuple[str, str, str, str, str]]:
    """The rows of `as_table`, with the latest value, or the value of the alarm if there is one."""
    found = []
    for rule in RULES:
        alarm = doctor.alarms.get(rule.name)
        if rule.value not in doctor.latest:
            continue
        value = alarm.value if alarm else doctor.latest[rule.value]
        advice = doctor.advice(rule) if alarm else ""
        found.append((rule.symptom, number(value), rule.range(), doctor.verdict(rule), advice))
    return found


def signs_table(signs: dict[str, float], title: str) -> Table:
    """Measured vital signs, with the healthy range if a rule has one."""
    table = Table(title=title)
    for column in ("vital sign", "value", "healthy"):
        table.add_column(column)
    ranges = {rule.value: rule.range() for rule in RULES}
    for name, value in signs.items():
        table.add_row(name, number(value), ranges.get(name, ""))
    return table
