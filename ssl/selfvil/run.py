"""The folder of a run: who may write into it, what it goes on from, and what is recorded in it.

    lease.json  recipe.yaml  run.json  metrics.jsonl  ledger.jsonl  checkpoints/  pictures/  tensorboard/

The checkpoints alone are verified, and they hold what a run needs to continue: weights, optimizer, recipe, plan. Every
other file only informs, may be damaged or missing, and costs nothing but what it told.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ValidationError

from selfvil import checkpoint, lease
from selfvil.checkpoint import Checkpoint
from selfvil.data.index import Shards
from selfvil.errors import UserError, shorten
from selfvil.files import write_text
from selfvil.plan import Plan, read_plan
from selfvil.recipe import Recipe, differences, parse, read

log = logging.getLogger("selfvil")

_MOST_DIGESTS = 10_000  # of shards in a checkpoint: 200 KB of text

# What a launch that died early may have left: with nothing else in it, a folder is as good as new.
_EARLY = {"lease.json", "metrics.jsonl", "metrics.aside", "ledger.jsonl", "tensorboard", "wandb", "pictures"}


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
    """What the doctor said in this launch, by the names of its rules."""


@dataclass(frozen=True)
class Start:
    """What a launch begins with: the plan of its steps, and the folder of the checkpoint it goes on from, if any."""

    plan: Plan
    checkpoint: str | None


class RunRecord(BaseModel):
    """What run.json holds: an id that no other run has, an entry for each launch, and how the last one ended."""

    id: str | None = None
    launches: list[dict[str, Any]] = []
    summary: Summary | None = None


class RunFolder:
    """The folder `run.out` of a run. Only the main process of a launch takes it and writes through it.

    A context manager: at its end the lease is released, and a launch that recorded nothing leaves no trace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: lease.Lease | None = None
        self._made: list[Path] = []
        self._recorded = False

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lease is not None:
            self._lease.release(forget=not self._recorded)
            self._lease = None
            if not self._recorded:
                self._remove_made()

    def take(self) -> None:
        """Make the folder if it is not there, and take its lease.

        Raises:
            UserError: it cannot be made or written, belongs to something else, or another launch uses it. Nothing was
                changed then.
        """
        name = f"run.out = {self.path}"
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{name} is a file: choose the name of a new folder, or of a run's")
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            if not self._is_ours():
                raise UserError(f"{name} is not empty and holds no run: choose a new folder")
            self._lease = lease.Lease.take(self.path, name)
        except OSError as error:
            self._remove_made()
            raise UserError(
                f"{name} cannot be made or written ({error.strerror or error}): choose another folder"
            ) from None

    def start(self, recipe: Recipe, shards: Shards) -> Start:
        """What this launch begins with. Nothing is changed.

        Raises:
            UserError: the folder holds a run that this recipe or these images cannot continue.
        """
        out, plan = self.path, Plan.of(recipe, len(shards))
        newest = checkpoint.newest(out / "checkpoints")
        if newest is None and any((out / "checkpoints").glob("step-*")):
            raise UserError(
                f"{out / 'checkpoints'} holds checkpoints, all damaged: restore one, or choose a new run.out"
            )
        begun = newest is not None or _size(out / "metrics.jsonl") > 0
        if begun and recipe.run.resume == "never":
            raise UserError(f"run.out = {out} already holds a run, and run.resume is never: choose a new folder")
        if newest is None:
            if begun:
                log.warning("%s holds a run without a checkpoint: it begins again from its first step", out)
            return Start(plan, None)
        old = _recipe_of(newest) or _recipe_file(out)
        _check_continues(out, newest, old, recipe, shards)
        before = read_plan(newest.meta.get("plan")) or Plan.of(old or recipe, newest.meta["data"]["num_samples"])
        plan = before.prolonged(plan, recipe, newest.step, f"run.out = {out}")
        for note in _changes(newest, before, plan, recipe):
            log.warning("run.out = %s: %s", out, note)
        return Start(plan, str(newest.folder))

    def record_launch(self, recipe: Recipe, first_step: int, description: dict[str, Any], id: str | None) -> str:
        """Save the resolved recipe, and one entry of versions, device and command (`description`) for each launch.

        id: the run's, as the checkpoint it goes on from has it. Returns the run's id. Raises UserError where the
        folder cannot be written; the same command then works once it can be.
        """
        record = read_record(self.path)
        record.id = id or record.id or uuid.uuid4().hex
        record.launches.append({"started": _now(), "first_step": first_step} | description)
        self._recorded = True
        try:
            write_text(self.path / "recipe.yaml", recipe.to_yaml())
            self._write_record(record)
        except OSError as error:
            raise UserError(
                f"run.out = {self.path} cannot be written ({error.strerror or error}): nothing is lost; the same "
                f"command works once it can be"
            ) from error
        return record.id

    def record_end(self, summary: Summary) -> None:
        """Record in run.json how this launch ended. Raises OSError."""
        record = read_record(self.path)
        if record.launches:
            record.launches[-1]["ended"] = _now()
        record.summary = summary
        self._write_record(record)

    def final_summary(self, total_steps: int) -> Summary | None:
        """How a run that has taken all its steps ended; None if it was killed before it could record it."""
        summary = read_record(self.path).summary
        return summary if summary and summary.finished and summary.step == total_steps else None

    def _write_record(self, record: RunRecord) -> None:
        write_text(self.path / "run.json", json.dumps(record.model_dump(mode="json"), indent=2) + "\n")

    def _is_ours(self) -> bool:
        """Whether the folder is new, a run's, or holds only what a launch that died early has left."""
        names = {path.name for path in self.path.iterdir()}
        if names & {"lease.json", "run.json", "recipe.yaml", "checkpoints"}:
            return True
        return all(name in _EARLY or name.endswith(".aside") or name.startswith("ledger-") for name in names)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # something else is in it by now
                break
        self._made.clear()


def read_record(folder: Path) -> RunRecord:
    """run.json of a run's folder; an empty record, with a warning, where it is damaged."""
    path = folder / "run.json"
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return RunRecord()
    except (OSError, ValidationError, RecursionError) as error:
        log.warning("%s is damaged and is left out: %s", path, _short(error))
        return RunRecord()


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run: recipe.yaml, or where that is damaged, with a warning, what its newest checkpoint holds.

    Raises:
        UserError: the folder is no run, or neither can be read.
    """
    path = folder / "recipe.yaml"
    try:
        return _parse(path)
    except FileNotFoundError:
        problem = f"{folder} is not the folder of a run: it holds no recipe.yaml"
    except (UserError, OSError) as error:
        problem = f"{path} is damaged: {_short(error)}"
    newest = checkpoint.newest(folder / "checkpoints")
    recipe = _recipe_of(newest) if newest else None
    if newest is None or recipe is None:
        raise UserError(problem)
    log.warning("%s is missing or damaged; the recipe is taken from %s", path, newest.folder)
    return recipe


def _parse(path: Path) -> Recipe:
    """Raises FileNotFoundError, OSError, and UserError for what is no recipe."""
    path.stat()
    return read(path)


def _recipe_file(folder: Path) -> Recipe | None:
    """The recipe of a run whose checkpoints are of before they held one."""
    path = folder / "recipe.yaml"
    try:
        return _parse(path)
    except (UserError, OSError) as error:
        log.warning(
            "%s cannot be read (%s): only architecture, objective, images and seed are compared with the run's",
            path, _short(error),
        )  # fmt: skip
        return None


def _recipe_of(saved: Checkpoint) -> Recipe | None:
    tree = saved.meta.get("recipe")
    if not isinstance(tree, dict):
        return None
    try:
        return parse(tree, f"{saved.folder / checkpoint.META}")
    except UserError as error:
        log.warning("%s", error)
        return None


def _check_continues(out: Path, newest: Checkpoint, old: Recipe | None, recipe: Recipe, shards: Shards) -> None:
    """Raise UserError unless a run of `recipe` on `shards` may go on from `newest`. old: its recipe, if known."""
    meta = newest.meta
    try:
        facts = {"model": meta["model"], "objective": meta["objective"], "run": {"seed": meta["seed"]}}
        fingerprint, num_samples, seconds = meta["data"]["fingerprint"], meta["data"]["num_samples"], meta["seconds"]
        if not isinstance(num_samples, int) or not isinstance(seconds, int | float):
            raise TypeError("a number is none")
    except (KeyError, TypeError) as error:
        raise UserError(f"{newest.folder / checkpoint.META} does not describe a run ({error!r})") from None
    if old is not None and (changed := differences(old.identity(), recipe.identity())):
        raise UserError(
            f"run.out = {out} holds a run of another recipe ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose a new run.out, or the old settings to go on"
        )
    ours = {
        "model": {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()},
        "objective": recipe.objective.model_dump(mode="json"),
        "run": {"seed": recipe.run.seed},
    }
    keys = facts if old is None else ("model",)
    if changed := differences({key: facts[key] for key in keys}, {key: ours[key] for key in keys}):
        raise UserError(f"{newest.folder} is of another run ({'; '.join(changed[:3])}): choose a new run.out")
    if fingerprint != shards.fingerprint:
        change = shards.describe_change(num_samples, meta["data"].get("shards"))
        raise UserError(
            f"data.train: the shards do not hold the images and labels, in the order, that {out} was trained on "
            f"({shorten(change, 800)}), so its sample order cannot be continued. File names and dates do not "
            f"matter. Restore the shards, or choose a new run.out"
        )


def _changes(newest: Checkpoint, before: Plan, plan: Plan, recipe: Recipe) -> list[str]:
    """What is allowed to change in a run, and changes more than rounding from here on."""
    notes, objective = [], recipe.objective
    if plan.total_steps != before.total_steps and hasattr(objective, "teacher_momentum"):
        notes.append(
            f"prolonged from {before.total_steps:,} to {plan.total_steps:,} steps: the teacher's momentum and "
            f"gram_start span the whole run, and follow the new length from here on"
        )
    micro_batch, old = recipe.optim.batch_size // recipe.optim.accumulate, newest.meta.get("micro_batch")
    sinkhorn = getattr(objective, "centring", None) == "sinkhorn"
    compares = objective.name == "lejepa" or sinkhorn or getattr(objective, "koleo_weight", 0) > 0
    if compares and isinstance(old, int) and old != micro_batch:
        notes.append(
            f"a micro-batch of all processes has {micro_batch:,} images now, and had {old:,}: this objective compares "
            f"the images of a micro-batch with each other, so its loss changes; keep optim.accumulate to avoid that"
        )
    return notes


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def checkpoint_meta(
    recipe: Recipe, shards: Shards, networks: Mapping[str, str], export: str, step: int, seconds: float, plan: Plan,
    run_id: str,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says about itself: enough to export its networks, and to continue the run, without its side
    files."""
    train = recipe.data.train
    return {
        "format": 1,
        "step": step,
        "samples": step * recipe.optim.batch_size,
        "seconds": seconds,
        "seed": recipe.run.seed,
        "run": run_id,
        "recipe": recipe.model_dump(mode="json"),
        "plan": plan.as_json(),
        "micro_batch": recipe.optim.batch_size // recipe.optim.accumulate,
        "model": {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()},
        "networks": dict(networks),
        "export": export,
        "objective": recipe.objective.model_dump(mode="json"),
        "data": {
            "pattern": train if isinstance(train, str) else " ".join(train),
            "mean": recipe.data.mean,
            "std": recipe.data.std,
            "img_size": list(recipe.model.img_size),
            "fingerprint": shards.fingerprint,
            "num_samples": len(shards),
            "shards": shards.digests if len(shards.paths) <= _MOST_DIGESTS else None,
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
