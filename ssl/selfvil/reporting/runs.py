"""What the page is made of: the folders of runs, read once, with a name and a letter for each run."""

import math
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selfvil.diagnostics.checkup import Record, read_folder
from selfvil.errors import UserError
from selfvil.lease import in_use
from selfvil.records import METRICS, RECORD, SCORES, read_scores
from selfvil.reporting.charts import smoothed
from selfvil.reporting.elements import capitalised

COLOURS = 8
MOST_RUNS = 24
"""Each colour in three patterns of dashes; and no more letters would fit into a chart."""

Axis = str
AXES: dict[Axis, str] = {"samples": "images seen", "step": "steps", "seconds": "training time"}
"""Horizontal axes of curves, the first one chosen at the beginning."""


@dataclass(frozen=True)
class Run:
    """One run of the page.

    letter, style: how tables and charts name it ("" if the page has one run), and the CSS class of its colour. name:
    its folder, with as many parents as make it distinct. record: what its folder holds. scores: rows of scores.json.
    missing: sentences about what is missing or damaged.
    """

    letter: str
    style: str
    name: str
    record: Record
    scores: list[dict[str, Any]]
    missing: list[str] = field(default_factory=list)

    def captioned(self, text: str) -> str:
        """`text` after the letter of the run."""
        return f"{self.letter}: {text}" if self.letter else capitalised(text)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """Records of kind "train", in the order of their steps."""
        return sorted((entry for entry in self.record.metrics if entry["kind"] == "train"), key=lambda e: e["step"])

    @cached_property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None before its first record."""
        try:
            return self.record.total_steps
        except (StopIteration, ArithmeticError, ValueError, UserError):
            return None

    @cached_property
    def status(self) -> str:
        """In a few words: finished, stopped, running, or killed."""
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        at = f"at step {self.train[-1]['step']:,}{of}" if self.train else "before its first record"
        summary, launches = self.record.summary, self.record.launches
        if in_use(self.record.folder):
            return f"running, {at}"
        if launches and "ended" not in launches[-1]:
            return f"killed, or running on another machine, {at}"
        if summary is None:
            return f"not known ({RECORD} is missing or damaged), {at}"
        return "finished" if summary["finished"] else f"stopped {at}"

    def series(self, key: str, kind: str = "train") -> list[tuple[int, float]]:
        """(step, value) of the records of this kind that have a finite number for `key`, in the order of steps."""
        entries = self.train if kind == "train" else [e for e in self.record.metrics if e["kind"] == kind]
        found = ((entry["step"], number(entry.get(key))) for entry in entries)
        return sorted((step, value) for step, value in found if value is not None)

    def keys(self, kind: str) -> list[str]:
        """Names of the numbers in the records of this kind, in the order of their first appearance."""
        entries = (entry for entry in self.record.metrics if entry["kind"] == kind)
        return list(dict.fromkeys(
            key for entry in entries for key, value in entry.items() if key != "step" and number(value) is not None
        ))  # fmt: skip

    def along(self, axis: Axis, steps: Sequence[int]) -> list[float] | None:
        """Where steps lie on an axis of `AXES`, from the records of training; None if these do not have it."""
        if axis == "step":
            return [float(step) for step in steps]
        known = self._seconds if axis == "seconds" else self.series("samples")
        if not known:
            return None
        return [float(x) for x in np.interp(steps, [0, *(step for step, _ in known)], [0, *(x for _, x in known)])]

    @cached_property
    def _seconds(self) -> list[tuple[int, float]]:
        """(step, seconds of all training steps until then), without evaluations, pictures and saves."""
        speeds, total, before = dict(self.series("images_per_second")), 0.0, 0.0
        found = []
        for step, samples in self.series("samples"):
            if speeds.get(step, 0.0) <= 0:
                return []
            total, before = total + max(samples - before, 0.0) / speeds[step], samples
            found.append((step, total))
        return found

    def smooth_loss(self, samples: float) -> float:
        """The smoothed loss after so many images; the run must have logged losses."""
        points = self.series("loss")
        seen = self.along("samples", [step for step, _ in points]) or [0.0]
        return float(np.interp(samples, seen, [value for _, value in smoothed(points)]))

    @property
    def seconds(self) -> float | None:
        """Seconds of the training steps; None if not known."""
        return self._seconds[-1][1] if self._seconds else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of runs.

    Raises UserError if there are none or more than `MOST_RUNS`, one is given twice, or one is no run.
    """
    if not folders:
        raise UserError("no run is given; give the folders of one run or several")
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are given; a page holds at most {MOST_RUNS}, so leave some out")
    for number_, folder in enumerate(folders):
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}; give the folder of a run, which holds its recipe.yaml")
        for other in folders[:number_]:
            if os.path.samefile(folder, other):
                same = "" if str(folder) == str(other) else f" (as {other})"
                raise UserError(f"{folder} is given twice{same}; give each run once")
    return [
        _read(folder, name, string.ascii_uppercase[i] if len(folders) > 1 else "", f"c{i % COLOURS} d{i // COLOURS}")
        for i, (folder, name) in enumerate(zip(folders, distinct_names(folders)))
    ]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as make it different from the others."""
    parts = [folder.resolve().parts for folder in folders]
    counts = [1] * len(parts)
    while True:
        names = ["/".join(each[-count:]) for each, count in zip(parts, counts)]
        repeated = [
            i for i, name in enumerate(names) if names.count(name) > 1 and counts[i] < len(parts[i])
        ]  # fmt: skip
        if not repeated:
            return names
        counts = [count + (i in repeated) for i, count in enumerate(counts)]


def metric_name(key: str) -> str:
    """A score's name in metrics.jsonl as text: k-NN, k = 20 for knn_20."""
    return re.sub(r"knn_(\d+)", r"k-NN, k = \1", key)


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else, and for numbers that no chart can show."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e100 and math.isfinite(value) else None


def _read(folder: Path, name: str, letter: str, style: str) -> Run:
    try:
        record = read_folder(folder)
        scores = read_scores(folder)
        lines = (folder / METRICS).read_bytes().splitlines() if (folder / METRICS).is_file() else None
        has_scores = (folder / SCORES).exists()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    run = Run(letter, style, name, record, scores)
    missing = run.missing
    if lines is None:
        missing.append(f"There is no {METRICS}: the run has not begun, or the file was removed.")
    elif not run.train:
        missing.append(f"{METRICS} holds no training metrics yet: the first ones follow after monitor.log_every steps.")
    damaged = len(lines or ()) - len(record.metrics)
    if record.cut and damaged:
        missing.append(f"The last line of {METRICS} is incomplete, as after a kill; that record is left out.")
        damaged -= 1
    if damaged > 0:
        missing.append(f"{damaged:,} of {len(lines or ()):,} lines of {METRICS} are damaged and left out.")
    if not record.launches:
        missing.append(f"{RECORD} is missing or damaged, so device, versions and command are not known.")
    if has_scores and not scores:
        missing.append(f"{SCORES} is damaged or empty.")
    return run
