"""The `eval` section of a recipe: a list of evaluations, each with its shards, its interval and its settings.

    eval:
      - name: knn                    # from the table `evaluate.EVALUATIONS`
        train: shards/train-*.tar
        test: shards/test-*.tar
        every: 500
        k: 20

On the command line, `eval.knn.k=20` changes the entry of that name, or adds one; `eval.0.k=20` changes the first entry;
`eval.test=shards/new` changes every entry. The form of version 0.1, a mapping with train, test, every and linear, is
still read: `OldSection`.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from selfvil.advice import explain_errors
from selfvil.errors import UserError
from selfvil.evaluate import EVALUATIONS, evaluation, settings_model
from selfvil.settings import PathText, Section


class Entry(Section):
    """One evaluation of a recipe; the models of `entry_model` add the settings of an evaluation."""

    name: str
    """The evaluation; `selfvil explain eval` lists them."""
    train: PathText | list[PathText]
    """Labelled shards that the evaluation is fitted on."""
    test: PathText | list[PathText]
    """Labelled shards that are scored."""
    every: int | None = Field(None, ge=1)
    """Optimizer steps between two scores; null scores at the end only. The end is always scored."""
    at_start: bool = False
    """Also score before the first step: what a network without training, or the one of model.start_from, is worth."""
    allow_shared: bool = False
    """Score although some test images are also training images; their number is a warning then, not an error."""


class OldSection(Section):
    """`eval` as a mapping: k-NN, and a linear probe if `linear`, on the same shards."""

    train: PathText | list[PathText] | None = None
    test: PathText | list[PathText] | None = None
    every: int | None = Field(None, ge=1)
    linear: bool = True

    @model_validator(mode="after")
    def _both_or_none(self) -> "OldSection":
        if (self.train is None) != (self.test is None):
            raise ValueError("give both train and test, or neither")
        return self

    def entries(self) -> list[dict[str, Any]]:
        if self.train is None:
            return []
        shared = {"train": self.train, "test": self.test} | ({"every": self.every} if self.every else {})
        return [{"name": name} | copy.deepcopy(shared) for name in (("knn", "linear") if self.linear else ("knn",))]


@cache
def entry_model(name: str) -> type[Entry]:
    """An entry of evaluation `name`: the keys of `Entry` and those of its settings. Raises UserError."""
    settings = settings_model(name)
    named: Any = (Literal[name], Field(description=Entry.model_fields["name"].description))
    make: Any = create_model
    model = make(f"{name}_entry", __base__=(settings, Entry), name=named)
    model.__doc__ = settings.__doc__
    return cast(type[Entry], model)


def parse(section: Any) -> tuple[tuple[Entry, ...], list[tuple[str, str]]]:
    """The entries of a recipe's `eval` section, old form included, and (key, sentence) for each problem."""
    if isinstance(section, Mapping):
        if "name" in section:
            return (), [
                ("eval", "eval is a list of evaluations: write `- name: knn`, with a dash, and indent its keys")
            ]
        try:
            section = OldSection.model_validate(section).entries()
        except ValidationError as error:
            return (), list(explain_errors(error, OldSection, {"eval": list(OldSection.model_fields)}, prefix="eval"))
    entries, problems = [], []
    for label, values in zip(labels(section or []), section or []):
        name = values.get("name")
        try:
            model = entry_model(name) if isinstance(name, str) else evaluation(name)
            entries.append(model.model_validate(values))
        except UserError as error:
            problems.append(
                (f"{label}.name", f"missing key {label}.name" if name is None else f"{label}.name: {error}")
            )
        except ValidationError as error:
            problems += explain_errors(error, model, {label: list(model.model_fields)}, prefix=label)
    return tuple(entries), problems


def labels(section: list[Any]) -> list[str]:
    """How messages name each entry: eval.knn, or eval.0 where several entries have its name."""
    names = [str(entry.get("name")) for entry in section]
    return [
        f"eval.{name}" if name in EVALUATIONS and count == 1 else f"eval.{index}"
        for index, (name, count) in enumerate(zip(names, map(Counter(names).__getitem__, names)))
    ]


def metric_prefixes(entries: tuple[Entry, ...]) -> list[str]:
    """What goes before the metrics of each entry: nothing, or its number and a slash where several have its name."""
    counts = Counter(entry.name for entry in entries)
    return [f"{index}/" if counts[entry.name] > 1 else "" for index, entry in enumerate(entries)]


def old_form_warning(section: Mapping[str, Any], where: str) -> str | None:
    """What to write instead of a section in the old form; None if it asks for no evaluation, or is wrong."""
    try:
        entries = OldSection.model_validate(section).entries()
    except ValidationError:
        return None
    if not entries:
        return None
    text = yaml.safe_dump({"eval": entries}, sort_keys=False, width=1_000).rstrip()
    words = " ".join(f"eval.{entry['name']}.{key}={entry[key]}" for entry in entries for key in entry if key != "name")
    return (
        f"{where}: eval is a list of evaluations now, and the next version will not read this form. Write\n{text}\n"
        f"or, on the command line, {words}"
    )


def override(section: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Apply overrides such as {"eval.knn.k": 20} to an `eval` section.

    Returns the section, and for each override the keys that it set, as `labels` names them. Raises UserError for an
    entry that does not exist.
    """
    paths = {key: key.split(".")[1:] for key in values}
    of_one = {key: path for key, path in paths.items() if len(path) == 2}
    if not of_one and not isinstance(section, list):
        return {**(section or {}), **{path[0]: values[key] for key, path in paths.items()}}, {}
    if isinstance(section, Mapping):
        try:
            section = OldSection.model_validate(section).entries()
        except ValidationError:
            raise UserError(
                f"override {next(iter(of_one))}: the recipe's eval section is not a list of entries"
            ) from None
    entries = [dict(entry) for entry in section or []]
    changed: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for key, (which, name) in of_one.items():
        entry = _entry(entries, which, key)
        entry[name] = values[key]
        changed[key] = [(entry, name)]
    for key, path in paths.items():
        if key in of_one:
            continue
        if path[0] not in ("train", "test", "every", "at_start", "allow_shared"):
            raise UserError(
                f"override {key}: write eval.NAME.KEY, or eval.train, eval.test, eval.every, eval.at_start or "
                f"eval.allow_shared for all entries"
            )
        for entry in entries:
            entry[path[0]] = values[key]
        changed[key] = [(entry, path[0]) for entry in entries]
    label = {id(entry): each for entry, each in zip(entries, labels(entries))}
    return entries, {key: [f"{label[id(entry)]}.{name}" for entry, name in found] for key, found in changed.items()}


def _entry(entries: list[dict[str, Any]], which: str, key: str) -> dict[str, Any]:
    """The entry that an override names by its evaluation or its number; a new one for an evaluation without one."""
    if which.isdecimal():
        if int(which) >= len(entries):
            raise UserError(f"override {key}: eval has {len(entries)} entries, numbered from 0")
        return entries[int(which)]
    found = [index for index, entry in enumerate(entries) if entry.get("name") == which]
    if len(found) > 1:
        choices = " or ".join(f"eval.{index}" for index in found)
        raise UserError(f"override {key}: eval has {len(found)} entries named {which}: write {choices}")
    if not found:
        try:
            evaluation(which)
        except UserError as error:
            raise UserError(f"override {key}: {error}") from None
        entries.append({"name": which})
        return entries[-1]
    return entries[found[0]]
