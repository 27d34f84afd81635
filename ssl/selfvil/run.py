"""The folder of a run: the lease, what a launch continues from, and the record of each launch.

`selfvil.records` has the names and formats of its files. A checkpoint holds all that a run needs to continue: weights,
optimizer, recipe and plan.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from selfvil import checkpoint, lease
from selfvil.checkpoint import Checkpoint
from selfvil.data.base import Images
from selfvil.errors import UserError, shorten
from selfvil.files import write_text
from selfvil.plan import Plan
from selfvil.recipe import Recipe, parse, read
from selfvil.records import (
    CHECKPOINTS,
    LEASE,
    METRICS,
    RECIPE,
    RECORD,
    RunRecord,
    Summary,
    is_unstarted,
    picture_file,
    read_record,
)

log = logging.getLogger("selfvil")

_MOST_DIGESTS = 10_000  # of shards or folders in a checkpoint: 200 KB of text


@dataclass(frozen=True)
class Start:
    """State of a run at the beginning of a launch, which the main process sends to the others.

    steps: the numbers of steps of its plan, for `Plan.read`. checkpoint: folder of the checkpoint to continue from.
    finished: summary of a finished run.
    """

    steps: dict[str, int]
    checkpoint: Path | None = None
    finished: Summary | None = None


class RunFolder:
    """The folder `run.out` of a run, used by the main process of a launch only.

    A context manager: at its end the lease is released, and the folder of a launch that recorded nothing is restored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: lease.Lease | None = None
        self._made: list[Path] = []
        self._recorded = False

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def record(self) -> Path:
        return self.path / RECORD

    def picture(self, step: int) -> Path:
        return picture_file(self.path, step)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lease is not None:
            self._lease.release(forget=not self._recorded)
            self._lease = None
            if not self._recorded:
                self._remove_made()

    def take(self) -> None:
        """Create the folder if it does not exist, and take its lease.

        Raises:
            UserError: it cannot be created or written, holds other files, or another launch uses it. Nothing is changed
                then.
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

    def start(self, recipe: Recipe, shards: Images) -> Start:
        """Decide how this launch begins, without changing anything.

        Raises:
            UserError: the folder holds a run that this recipe or these images cannot continue.
        """
        out, plan = self.path, Plan.of(recipe, len(shards))
        newest = checkpoint.newest(self.checkpoints)
        if newest is None and any(self.checkpoints.glob("step-*")):
            raise UserError(f"{self.checkpoints} holds checkpoints, all damaged: restore one, or choose a new run.out")
        begun = newest is not None or _size(out / METRICS) > 0
        if begun and recipe.run.resume == "never":
            raise UserError(f"run.out = {out} already holds a run, and run.resume is never: choose a new folder")
        if newest is None:
            if begun:
                log.warning("%s holds a run without a checkpoint: it starts again at the first step", out)
            return Start(plan.as_json())
        old = _recipe_of(newest) or _recipe_file(out)
        _check_continues(out, newest, old, recipe, shards)
        before = Plan.read(newest.meta.get("plan"), old or recipe, newest.meta["data"]["num_samples"])
        plan = before.prolonged(plan, newest.step, f"run.out = {out}")
        for note in _changes(newest, before, plan, recipe):
            log.warning("run.out = %s: %s", out, note)
        ended = read_record(out).summary if newest.step == plan.total_steps else None
        finished = ended if ended and ended.finished and ended.step == plan.total_steps else None
        return Start(plan.as_json(), newest.folder, finished)

    def record_launch(self, recipe: Recipe, description: dict[str, Any], saved: Checkpoint | None) -> str:
        """Save the resolved recipe, and an entry for this launch; return the run's id.

        description: versions, device and command. saved: the checkpoint that the launch continues from. Raises
        UserError if the folder cannot be written.
        """
        id, first_step = (saved.meta.get("run"), saved.step) if saved else (None, 0)
        record = read_record(self.path)
        record.id = id or record.id or uuid.uuid4().hex
        record.launches.append({"started": _now(), "first_step": first_step} | description)
        self._recorded = True
        try:
            write_text(self.path / RECIPE, recipe.to_yaml())
            self._write_record(record)
        except OSError as error:
            raise UserError(
                f"run.out = {self.path} cannot be written ({error.strerror or error}): nothing is lost; run "
                f"the same command again when it can be written"
            ) from error
        return record.id

    def record_end(self, summary: Summary) -> None:
        """Record the end of this launch in run.json. Raises OSError."""
        record = read_record(self.path)
        if record.launches:
            record.launches[-1]["ended"] = _now()
        record.summary = summary
        self._write_record(record)

    def _write_record(self, record: RunRecord) -> None:
        write_text(self.record, json.dumps(record.model_dump(mode="json"), indent=2) + "\n")

    def _is_ours(self) -> bool:
        """Whether the folder is empty, belongs to a run, or holds only files of a launch that ended early."""
        names = {path.name for path in self.path.iterdir()}
        return bool(names & {LEASE, RECORD, RECIPE, CHECKPOINTS}) or is_unstarted(names)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it is not empty
                break
        self._made.clear()


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run, from recipe.yaml; if that is damaged, from its newest checkpoint, with a warning.

    Raises:
        UserError: the folder is no run, or neither can be read.
    """
    path = folder / RECIPE
    try:
        return _parse(path)
    except FileNotFoundError:
        problem = f"{folder} is not the folder of a run: it holds no recipe.yaml"
    except (UserError, OSError) as error:
        problem = f"{path} is damaged: {_short(error)}"
    newest = checkpoint.newest(folder / CHECKPOINTS)
    recipe = _recipe_of(newest) if newest else None
    if newest is None or recipe is None:
        raise UserError(problem)
    log.warning("%s is missing or damaged; the recipe is taken from %s", path, newest.folder)
    return recipe


def _parse(path: Path) -> Recipe:
    """Raises OSError, FileNotFoundError included, and UserError if the file holds no recipe."""
    path.stat()
    return read(path)


def _recipe_file(folder: Path) -> Recipe | None:
    """The recipe of a run whose checkpoints, of an earlier version, do not hold it."""
    path = folder / RECIPE
    try:
        return _parse(path)
    except (UserError, OSError) as error:
        log.warning(
            "%s cannot be read (%s): only architecture, objective, images and seed are compared",
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


def _check_continues(out: Path, newest: Checkpoint, old: Recipe | None, recipe: Recipe, shards: Images) -> None:
    """Raise UserError unless a run of `recipe` on `shards` may continue from `newest`. old: its recipe, if known."""
    meta = newest.meta
    try:
        facts = {"model": meta["model"], "objective": meta["objective"], "run": {"seed": meta["seed"]}}
        fingerprint, num_samples, seconds = meta["data"]["fingerprint"], meta["data"]["num_samples"], meta["seconds"]
        if not isinstance(num_samples, int) or not isinstance(seconds, int | float):
            raise TypeError("num_samples and seconds must be numbers")
    except (KeyError, TypeError) as error:
        raise UserError(f"{newest.folder / checkpoint.META} does not describe a run ({error!r})") from None
    if old is not None and (changed := differences(old.identity(), recipe.identity())):
        raise UserError(
            f"run.out = {out} holds a run of another recipe ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose a new run.out, or the old settings to continue"
        )
    ours = {
        "model": {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()},
        "objective": recipe.objective.model_dump(mode="json"),
        "run": {"seed": recipe.run.seed},
    }
    keys = facts if old is None else ("model",)
    if changed := differences({key: facts[key] for key in keys}, {key: ours[key] for key in keys}):
        raise UserError(f"{newest.folder} belongs to another run ({'; '.join(changed[:3])}): choose a new run.out")
    if fingerprint != shards.fingerprint:
        change = shards.describe_change(num_samples, meta["data"].get("shards"))
        raise UserError(
            f"data.train: these are not the images and labels, in the order, that {out} was trained on "
            f"({shorten(change, 800)}), so its sample order cannot be continued. File names and dates do not "
            f"matter. Restore the images, or choose a new run.out"
        )


def _changes(newest: Checkpoint, before: Plan, plan: Plan, recipe: Recipe) -> list[str]:
    """Warnings about settings that may change during a run, but change its result by more than rounding."""
    notes, objective = [], recipe.objective
    if plan.total_steps != before.total_steps and hasattr(objective, "teacher_momentum"):
        notes.append(
            f"prolonged from {before.total_steps:,} to {plan.total_steps:,} steps: the teacher's momentum and "
            f"gram_start are scheduled over the whole run, and use the new length from now on"
        )
    micro_batch, old = recipe.optim.batch_size // recipe.optim.accumulate, newest.meta.get("micro_batch")
    sinkhorn = getattr(objective, "centring", None) == "sinkhorn"
    compares = objective.name in ("lejepa", "visreg") or sinkhorn or getattr(objective, "koleo_weight", 0) > 0
    if compares and isinstance(old, int) and old != micro_batch:
        notes.append(
            f"a micro-batch of all processes has {micro_batch:,} images now, and had {old:,}: this objective compares "
            f"the images of a micro-batch with each other, so its loss changes; keep optim.accumulate to avoid that"
        )
    record = newest.meta.get("recipe")
    data = record.get("data") if isinstance(record, dict) else None
    decode = data.get("decode", "exact") if isinstance(data, dict) else "exact"  # as versions without the key
    if recipe.data.decode != decode:
        notes.append(
            f"data.decode is {recipe.data.decode}, and was {decode}: views of large JPEGs differ a little from now on; "
            f"set data.decode={decode} to avoid that"
        )
    return notes


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def checkpoint_meta(
    recipe: Recipe, shards: Images, networks: Mapping[str, str], export: str, step: int, seconds: float, plan: Plan,
    run_id: str,
) -> dict[str, Any]:  # fmt: skip
    """Facts in a checkpoint, sufficient to export its networks and to continue the run without any other file."""
    return {
        "format": 1,
        "step": step,
        "samples": step * recipe.optim.batch_size,
        "seconds": seconds,
        "seed": recipe.run.seed,
        "run": run_id,
        "recipe": recipe.as_record(),
        "plan": plan.as_json(),
        "micro_batch": recipe.optim.batch_size // recipe.optim.accumulate,
        "model": {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()},
        "networks": dict(networks),
        "export": export,
        "objective": recipe.objective.model_dump(mode="json"),
        "data": {
            "pattern": recipe.data.described,
            "mean": recipe.data.mean,
            "std": recipe.data.std,
            "img_size": list(recipe.model.img_size),
            "fingerprint": shards.fingerprint,
            "num_samples": len(shards),
            "shards": shards.digests if len(shards.digests) <= _MOST_DIGESTS else None,
        },
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines such as `optim.base_lr: 0.1 -> 0.2` for two identities."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
