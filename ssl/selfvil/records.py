"""The files in a run's folder: their names, and how they are read.

    lease.json          which process writes into the folder (`selfvil.lease`)
    recipe.yaml         the resolved recipe
    run.json            an entry for each launch, and the summary of the last one: `RunRecord`
    metrics.jsonl       one record for each line: `read_metrics`
    ledger*.jsonl       damaged samples, one file for each process (`selfvil.data.ledger`)
    skipped.jsonl       steps with non-finite losses or gradients (`selfvil.divergence`)
    scores.json         rows of `selfvil eval ... --json RUN/scores.json`: `read_scores`
    checkpoints/        `selfvil.checkpoint`
    pictures/  profile/  tensorboard/  wandb/

Only checkpoints are verified, and they hold all that a run needs to continue. Every other file is informative: it may
be missing or damaged, and what can be read of it is used.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

LEASE = "lease.json"
RECIPE = "recipe.yaml"
RECORD = "run.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
SCORES = "scores.json"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
TENSORBOARD = "tensorboard"

SCORE_COLUMNS = ["network", "protocol", "value", "deviation", "readout", "train_images", "test_images"]
"""Entries of a row of scores.json that reports show."""

# In every record of kind "train"; the loss is absent if all steps were skipped.
_TRAIN_KEYS = ("lr", "samples", "epoch")

log = logging.getLogger("selfvil")


def is_unstarted(names: set[str]) -> bool:
    """Whether a folder with these files holds nothing but what a launch leaves that ended before it recorded itself."""
    early = {LEASE, METRICS, PICTURES, TENSORBOARD, "profile", "wandb"}
    return all(
        name in early or name == "ledger.jsonl" or name.startswith("ledger-") or name.endswith(".aside")
        for name in names
    )


# --- run.json --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """How a launch ended. `seconds` and `samples` count the whole run, earlier launches included."""

    run: str
    finished: bool
    step: int
    total_steps: int
    samples: int
    seconds: float
    images_per_second: float
    """Of this launch, from its first step to its last."""
    loss: float | None
    """Mean over the last logged steps."""
    checkpoint: str | None
    alarms: tuple[str, ...] = ()
    """Names of the doctor's rules that raised an alarm in this launch."""


class RunRecord(BaseModel):
    """Content of run.json: an id that no other run has, an entry for each launch, and the summary of the last one."""

    id: str | None = None
    launches: list[dict[str, Any]] = []
    summary: Summary | None = None


def read_record(folder: Path) -> RunRecord:
    """run.json of a run's folder; an empty record if it is missing, or, with a warning, if it is damaged."""
    path = folder / RECORD
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RunRecord()
    except (OSError, ValidationError, RecursionError) as error:
        log.warning("%s is damaged and ignored: %s", path, " ".join(str(error).split())[:200])
        return RunRecord()


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, each with "step" and "kind"; none if there is no file.

    Values that are neither number nor text are left out, and so are damaged lines, with one warning for all of them. A
    damaged last line gives no warning, since a crash may truncate it.
    """
    if not path.is_file():
        return []
    records, damaged = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = _metrics_record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged += 1
    if damaged:
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return records


def ends_incomplete(path: Path) -> bool:
    """Whether the last line of a file of JSON lines is incomplete, as after a kill."""
    return not path.read_bytes().endswith(b"\n")


def _metrics_record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    if record["kind"] == "train" and not all(isinstance(record.get(key), int | float) for key in _TRAIN_KEYS):
        return None
    return {key: value for key, value in record.items() if isinstance(value, int | float | str)}


# --- scores and pictures ---------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Rows of scores.json in a run's folder; none if it is missing or damaged."""
    try:
        rows = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def picture_file(folder: Path, step: int) -> Path:
    """The objective's picture after `step` steps."""
    return folder / PICTURES / f"step-{step:08d}.png"


def newest_picture(folder: Path) -> Path | None:
    """The picture of the highest step, if there is any."""
    return max((folder / PICTURES).glob("step-*.png"), default=None)


# --- ledger ----------------------------------------------------------------------------------------------------------


def ledger_file(folder: Path, rank: int) -> Path:
    """Damaged samples that process `rank` met."""
    return folder / (f"ledger-{rank}.jsonl" if rank else "ledger.jsonl")


def ledger_files(folder: Path) -> list[Path]:
    """The existing ledgers of all processes."""
    return sorted(folder.glob("ledger.jsonl")) + sorted(folder.glob("ledger-*.jsonl"))
