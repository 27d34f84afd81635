"""The Python API: what `selfvil pretrain`, `eval`, `eval compare` and `export` do, for notebooks and scripts.

    import selfvil

    run = selfvil.pretrain("photos_laptop", data={"train": "shards/train"}, run={"out": "runs/first"})
    rows = selfvil.evaluate(run, "knn", train="shards/train", test="shards/test", k=20)
    found = selfvil.compare([run, "vit_tiny_patch16_224"], "knn", train="shards/train", test="shards/test")
    selfvil.export(run, "exported", formats=["onnx"])

Each may be called again in the same process, with other settings. A mistake raises `UserError`. The process is never
ended, and signal handlers, logging, random numbers and threads are afterwards as before.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfvil.data.base import Pattern
from selfvil.errors import UserError
from selfvil.evaluate import ALL, settings, settings_model
from selfvil.evaluate.compare import Comparison, draw
from selfvil.evaluate.compare import compare as compare_networks
from selfvil.evaluate.features import Precision
from selfvil.evaluate.score import Row, score
from selfvil.export import export as write_export
from selfvil.files import require_chart
from selfvil.pretrain import pretrain as run_recipe
from selfvil.recipe import Recipe, load
from selfvil.records import METRICS, Summary, read_metrics
from selfvil.runtime import undisturbed
from selfvil.settings import Section
from selfvil.trainer import Trainer

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
    allow_shared: bool = False,
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
        allow_shared: score although some test images are also training images; rows have their number.
        values: settings. ``k=20`` sets a key of every named evaluation that has it, ``knn={"k": 20}`` that of one.

    Returns:
        One row for each figure, with `protocol`, `value` in percent, its 95 % `interval` over test images, `network`,
        `seed` and all settings. The rows are dataclasses: `pandas.DataFrame(rows)` makes a table of them.

    Raises:
        UserError: the source, the shards, a name or a setting cannot be used; before features are computed.
    """
    path = _path(source, "evaluate: source")
    evaluations = _evaluations("evaluate", names, values)
    with undisturbed():
        return score(
            path, _shards(train, "evaluate: train"), _shards(test, "evaluate: test"), evaluations, baselines=baselines,
            network=network, image=image, workers=_count(workers, "evaluate"), device=_device(device, "evaluate"),
            precision=precision, seed=seed, allow_shared=allow_shared, trainer=Trainer(),
        )  # fmt: skip


def compare(
    sources: Sequence[Source],
    *names: str,
    train: Pattern,
    test: Pattern,
    chart: str | os.PathLike[str] | None = None,
    image: str | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    allow_shared: bool = False,
    **values: Any,
) -> Comparison:
    """Score several networks by the same evaluations, and measure their speed, memory and size.

    Args:
        sources: at least two, each as in `evaluate`. Each gets the images at its own size and normalisation.
        names, train, test, image, workers, device, precision, seed, allow_shared, values: as in `evaluate`. Settings
            that name a file or folder (``out``, ``run``) are refused, since all networks would write to it.
        chart: a PNG, SVG or PDF file: accuracy against images per second, and against parameters.

    Returns:
        `rows` of all networks, as those of `evaluate`, and `costs` by the name of each: images per second, bytes of
        a batch, parameters, multiply-adds.

    Raises:
        UserError: as `evaluate`, a source is given twice, or `chart` cannot be written; before features are computed.
    """
    if isinstance(sources, str | os.PathLike) or not isinstance(sources, Sequence):
        raise UserError(f"compare: sources = {str(sources)[:60]!r} is no list: give at least two networks, [A, B]")
    paths = [_path(source, f"compare: sources[{index}]") for index, source in enumerate(sources)]
    picture = None if chart is None else require_chart(_path(chart, "compare: chart"))
    evaluations = _evaluations("compare", names, values)
    with undisturbed():
        found = compare_networks(
            paths, _shards(train, "compare: train"), _shards(test, "compare: test"), evaluations, image=image,
            workers=_count(workers, "compare"), device=_device(device, "compare"), precision=precision, seed=seed,
            allow_shared=allow_shared, trainer=Trainer(),
        )  # fmt: skip
        assert found is not None  # only processes other than the main one have None
        if picture is not None:
            draw(found, picture)
        return found


def export(
    run: Source,
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    heads: bool = False,
    formats: Sequence[str] = (),
    images: str | os.PathLike[str] | None = None,
    train: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    workers: int = 2,
    licence: str | None = None,
) -> Path:
    """Write the pretrained backbone of a run to the new folder `out`, for `load_backbone` and timm, and return it.

    Args:
        run: a run, or one of its checkpoints. Of an existing export, only the files of `formats` are written.
        out: a folder that does not exist or is empty.
        network: "student", "teacher" ... of an objective that has several; None takes its default.
        heads: also write the rest of the objective, for model.start_from.
        formats: any of "onnx", "torch-export", "int8", "published". Each file is compared with the network.
        images: shards on which int8 is compared with float32; None: those of `test`, or of pretraining.
        train, test: labelled shards, on which the k-NN accuracy of both is measured.
        workers: processes that decode these images.
        licence: for the card, an identifier of the Hugging Face hub such as "apache-2.0".

    Raises:
        UserError: there is no undamaged checkpoint, `out` is in use or cannot be written, a format does not exist,
            cannot hold the network or returns other values. Nothing is left then.
    """
    chosen = [formats] if isinstance(formats, str) else formats
    if not isinstance(chosen, Sequence) or not all(isinstance(name, str) for name in chosen):
        raise UserError(f'export: formats = {str(formats)[:60]!r} is no list of formats: write formats=["onnx"]')
    of_images = {"images": images, "train": train, "test": test}
    shards = {name: None if each is None else _path(each, f"export: {name}") for name, each in of_images.items()}
    source, target = _path(run, "export: run"), _path(out, "export: out")
    with undisturbed():
        return write_export(
            source, target, network=network, heads=heads, formats=list(chosen), **shards,
            workers=_count(workers, "export"), licence=licence,
        )  # fmt: skip


def _evaluations(call: str, names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Section]:
    """The settings of each named evaluation, checked."""
    chosen = [each for name in names or ("all",) for each in (ALL if name == "all" else (name,))]
    given: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    fields = {name: settings_model(name).model_fields for name in given}
    for key, value in values.items():
        if key in given:
            if not isinstance(value, Mapping):
                raise UserError(f"{call}: {key} = {value!r} must be a mapping of settings, such as {key}={{...}}")
            given[key] |= value
        elif takers := [name for name in given if key in fields[name]]:
            for name in takers:
                given[name][key] = value
        else:
            given[chosen[0]][key] = value  # refused below, with the keys that exist
    return {name: settings(name, _plain(own)) for name, own in given.items()}


def _shards(pattern: Any, name: str) -> Any:
    for each in pattern if isinstance(pattern, list | tuple) else (pattern,):
        _path(each, name, "a path, a glob, a folder or a brace pattern of shards")
    return _plain(pattern)


def _device(device: Any, call: str) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"{call}: device = {str(device)[:60]!r} is none of torch: use cpu, cuda or cuda:0") from None


def _path(value: Any, name: str, expected: str = "a path") -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} = {str(value)[:60]!r} is a {type(value).__name__}: give {expected}")
    return os.fspath(value)


def _count(workers: Any, call: str) -> int:
    if not isinstance(workers, int) or workers < 0:
        raise UserError(f"{call}: workers = {str(workers)[:60]!r}: give a number of processes, 0 or more")
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
