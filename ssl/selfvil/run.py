"""The folder of a run: who may write into it, what it goes on from, and what is recorded in it.

recipe.yaml  run.json  metrics.jsonl  ledger.jsonl  checkpoints/  pictures/  tensorboard/
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfvil import checkpoint
from selfvil.data.index import Shards
from selfvil.errors import UserError, shorten
from selfvil.files import write_text
from selfvil.recipe import Recipe, differences, read

log = logging.getLogger("selfvil")

_MOST_DIGESTS = 10_000  # of shards in a checkpoint: 200 KB of text


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


class RunFolder:
    """The folder `run.out` of a run. Only the main process of a launch writes through it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, recipe: Recipe, shards: Shards) -> str | None:
        """The checkpoint to go on from, or None where the folder is new.

        Raises UserError, before anything is written, if it holds something else than a run of the same recipe on the
        same images.
        """
        out = self.path
        if not out.exists() or not any(out.iterdir()):
            return None
        old_file = out / "recipe.yaml"
        if not old_file.exists():
            raise UserError(f"run.out = {out} is not empty and holds no run: choose a new folder")
        if recipe.run.resume == "never":
            raise UserError(f"run.out = {out} already holds a run, and run.resume is never: choose a new folder")
        old = read(old_file)
        if changed := differences(old.identity(), recipe.identity()):
            raise UserError(
                f"run.out = {out} holds a run of another recipe ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}): choose a new run.out, or the old settings to go on"
            )
        newest = checkpoint.newest(out / "checkpoints")
        if newest is None and any((out / "checkpoints").glob("step-*")):
            raise UserError(
                f"{out / 'checkpoints'} holds checkpoints, all damaged: restore one, or choose a new run.out"
            )
        if newest is None:
            log.warning("%s holds a run without a usable checkpoint: it begins again from its first step", out)
            return None
        model = {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()}
        if changed := differences(newest.meta["model"], model):
            raise UserError(f"{newest.folder} is of another architecture ({'; '.join(changed)}): choose a new run.out")
        data = newest.meta["data"]
        if data["fingerprint"] != shards.fingerprint:
            change = shards.describe_change(data["num_samples"], data.get("shards"))
            raise UserError(
                f"data.train: the shards do not hold the images and labels, in the order, that {out} was trained on "
                f"({shorten(change, 800)}), so its sample order cannot be continued. File names and dates do not "
                f"matter. Restore the shards, or choose a new run.out"
            )
        return str(newest.folder)

    def record_launch(self, recipe: Recipe, first_step: int, description: dict[str, Any]) -> None:
        """Save the resolved recipe, and one entry of versions, device and command (`description`) for each launch."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", recipe.to_yaml())
        record = self._record()
        launch = {"started": _now(), "first_step": first_step} | description
        record["launches"] = [*record.get("launches", []), launch]
        self._write_record(record)

    def record_end(self, summary: Summary) -> None:
        """Record in run.json how this launch ended."""
        record = self._record()
        record["launches"][-1]["ended"] = _now()
        record["summary"] = asdict(summary)
        self._write_record(record)

    def final_summary(self) -> Summary | None:
        """How a run that has finished ended; None if it has not, or was killed before it could record it."""
        summary = self._record().get("summary")
        return Summary(**summary) if summary and summary["finished"] else None

    def _record(self) -> dict[str, Any]:
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_record(self, record: dict[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")


def checkpoint_meta(
    recipe: Recipe, shards: Shards, networks: Mapping[str, str], export: str, step: int, seconds: float
) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to rebuild and export its networks without this recipe."""
    train = recipe.data.train
    return {
        "format": 1,
        "step": step,
        "samples": step * recipe.optim.batch_size,
        "seconds": seconds,
        "seed": recipe.run.seed,
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
