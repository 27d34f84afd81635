"""The Python API: what `selfvil pretrain`, `eval` and `export` do, as functions for notebooks and scripts.

    import selfvil

    run = selfvil.pretrain("photos_laptop", data={"train": "shards/train"}, run={"out": "runs/first"})
    rows = selfvil.evaluate(run, "knn", train="shards/train", test="shards/test", k=20)
    selfvil.export(run, "exported")

Each may be called again in the same process, with other settings. A mistake raises `UserError`. The process is never
ended, and signal handlers, logging, random numbers and threads are afterwards as before.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfvil.data.index import Pattern
from selfvil.errors import UserError
from selfvil.evaluate import ALL, settings, settings_model
from selfvil.evaluate.features import Precision
from selfvil.evaluate.score import Row, score
from selfvil.export import export as write_export
from selfvil.pretrain import pretrain as run_recipe
from selfvil.recipe import Recipe, load
from selfvil.records import METRICS, Summary, read_metrics
from selfvil.runtime import undisturbed

Source = str | os.PathLike[str]
"""An export, a run or a checkpoint folder, a `Run`, or the name of a timm model."""


@dataclass(frozen=True)
class Run:
    """A run's folder and how its last launch ended. It can be used wherever a path is expected.

    Attributes:
        folder: recipe, checkpoints and metrics.
        summary: `finished` is False for a run that was stopped; the same call continues it. `loss` is the mean over the
            last logged steps, `alarms` names the signs of collapse that the doctor found.
    """

    folder: Path
    summary: Summary

    def __fspath__(self) -> str:
        return str(self.folder)

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        """The records of metrics.jsonl of one kind, such as train or eval, in the order of their steps."""
        return [record for record in read_metrics(self.folder / METRICS) if record["kind"] == kind]


def pretrain(recipe: Source | Recipe, **overrides: Any) -> Run:
    """Pretrain by a recipe, in this process, to its end or until it is stopped; in both cases the state is saved.

    A run that exists in `run.out` is continued. In the main thread, Ctrl-C or a notebook's stop button saves and stops,
    and the call returns a run whose `summary.finished` is False. run.stall_minutes is null here, since the watchdog
    ends the process; give it to have the watchdog.

    Args:
        recipe: the name of a packaged recipe, the path of a recipe file, or a recipe of `selfvil.recipe.load`.
        overrides: sections and their changed keys, such as ``optim={"batch_size": 64}``, or single keys, such as
            ``**{"optim.batch_size": 64}``. ``eval=[...]`` replaces all evaluations, and ``eval={"knn": {"k": 5}}``
            changes or adds one.

    Raises:
        UserError: the recipe, the images or the folder cannot be used. Nothing is overwritten.
    """
    source = recipe if isinstance(recipe, Recipe) else _path(recipe, "pretrain: recipe", "a recipe's name or file")
    changed = load(source, {"run.stall_minutes": None} | _keys(overrides))
    summary = run_recipe(changed)
    return Run(Path(changed.run.out), summary)


def evaluate(
    source: Source,
    *names: str,
    train: Pattern,
    test: Pattern,
    baselines: bool = False,
    network: str | None = None,
    image: str | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    **values: Any,
) -> list[Row]:
    """Scores of a backbone on labelled shards, without printing them; features are computed once for all evaluations.

    Args:
        source: an export, a run, a checkpoint, or the name of a timm model.
        names: evaluations, such as "knn"; none, or "all": k-NN and the linear probe.
        train, test: shards to fit on and to score: a path, a glob, a folder or a brace pattern.
        baselines: also score the untrained network and raw pixels.
        network: which network of a run that has several, such as "teacher".
        image: extension of the image if samples have several.
        workers: processes that decode images; 0 decodes in this process.
        device: None takes the GPU if there is one.
        precision: fp32, or bf16 autocast.
        seed: of the untrained network, held-out images, draws and fine-tuning.
        values: settings. ``k=20`` sets a key of every named evaluation that has it, ``knn={"k": 20}`` that of one.

    Returns:
        One row for each figure, with `protocol`, `value` in percent, `network`, `seed` and all settings. The rows are
        dataclasses: `pandas.DataFrame(rows)` makes a table of them.

    Raises:
        UserError: the source, the shards, a name or a setting cannot be used; before features are computed.
    """
    path, workers = _path(source, "evaluate: source"), _count(workers)
    for part, pattern in (("train", train), ("test", test)):
        for each in pattern if isinstance(pattern, list | tuple) else (pattern,):
            _path(each, f"evaluate: {part}", "a path, a glob, a folder or a brace pattern of shards")
    chosen = [each for name in names or ("all",) for each in (ALL if name == "all" else (name,))]
    given: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    fields = {name: settings_model(name).model_fields for name in given}
    for key, value in values.items():
        if key in given:
            if not isinstance(value, Mapping):
                raise UserError(f"evaluate: {key} = {value!r} must be a mapping of settings, such as {key}={{...}}")
            given[key] |= value
        elif takers := [name for name in given if key in fields[name]]:
            for name in takers:
                given[name][key] = value
        else:
            given[chosen[0]][key] = value  # refused below, with the keys that exist
    evaluations = {name: settings(name, _plain(own)) for name, own in given.items()}
    try:
        where = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"evaluate: device = {str(device)[:60]!r} is none of torch: use cpu, cuda or cuda:0") from None
    with undisturbed():
        return score(
            path, _plain(train), _plain(test), evaluations, baselines=baselines, network=network,
            image=image, workers=workers, device=where, precision=precision, seed=seed,
        )  # fmt: skip


def export(run: Source, out: str | os.PathLike[str], *, network: str | None = None, heads: bool = False) -> Path:
    """Write the pretrained backbone of a run to the new folder `out`, for `load_backbone` and timm, and return it.

    Args:
        run: a run, or one of its checkpoints.
        out: a folder that does not exist or is empty.
        network: "student", "teacher" ... of an objective that has several; None takes its default.
        heads: also write the rest of the objective, for model.start_from.

    Raises:
        UserError: there is no undamaged checkpoint, or `out` is in use or cannot be written.
    """
    return write_export(_path(run, "export: run"), _path(out, "export: out"), network=network, heads=heads)


def _path(value: Any, name: str, expected: str = "a path") -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} = {str(value)[:60]!r} is a {type(value).__name__}: give {expected}")
    return os.fspath(value)


def _count(workers: Any) -> int:
    if not isinstance(workers, int) or workers < 0:
        raise UserError(f"evaluate: workers = {str(workers)[:60]!r}: give a number of processes, 0 or more")
    return workers


def _keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"batch_size": 64}} and {"optim.batch_size": 64} as the latter."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if "." in name or (name == "eval" and not isinstance(value, Mapping)):
            flat[name] = _plain(value)
        elif isinstance(value, Mapping):
            for key, each in value.items():
                inner = each if name == "eval" and isinstance(each, Mapping) else None
                named = {f"{key}.{setting}": x for setting, x in inner.items()} if inner is not None else {key: each}
                flat |= {f"{name}.{setting}": _plain(x) for setting, x in named.items()}
        else:
            raise UserError(
                f"pretrain: {name} = {str(value)[:60]!r} is not a section with its keys: write "
                f'optim={{"batch_size": 64}}, or **{{"optim.batch_size": 64}}'
            )
    return flat


def _plain(value: Any) -> Any:
    """Paths as text, at any depth, and tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
