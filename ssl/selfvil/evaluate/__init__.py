"""The table of evaluations: adding one is one file and one line here.

The file of an evaluation defines three names:

    class Settings(Section)                       its settings, each documented
    def check(task, settings) -> list[str]        raises UserError for what cannot be scored; returns warnings
    def evaluate(task, settings) -> Iterator[Score]

A `task.Task` holds the network, the labelled shards and the processes. `check` runs before training or feature
extraction, on every process. `evaluate` runs on every process too, and yields scores on the main process alone. The
training loop (`monitor.evaluations`) and the command line (`score.score`) call the same functions.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from selfvil.advice import explain_errors, near
from selfvil.errors import UserError
from selfvil.settings import Section

EVALUATIONS = {
    "knn": "selfvil.evaluate.knn",
    "linear": "selfvil.evaluate.linear",
    "few_label": "selfvil.evaluate.few_label",
    "finetune": "selfvil.evaluate.finetune",
    "accuracy": "selfvil.evaluate.accuracy",
}

ALL = ("knn", "linear")
"""What `selfvil eval all` runs: the evaluations that need no choice of settings and train no network."""


def evaluation(name: object) -> Any:
    """The module of evaluation `name`: `Settings`, `check`, `evaluate`. Raises UserError for an unknown name."""
    if not isinstance(name, str) or name not in EVALUATIONS:
        found = near(str(name), EVALUATIONS)
        meant = f"did you mean {found[0]}? " if found else ""
        raise UserError(f"there is no evaluation {str(name)[:60]!r} ({meant}choose one of: {', '.join(EVALUATIONS)})")
    return importlib.import_module(EVALUATIONS[name])


def settings_model(name: object) -> type[Section]:
    """The pydantic model of the settings of evaluation `name`. Raises UserError for an unknown name."""
    return evaluation(name).Settings


def settings(name: str, values: Mapping[str, Any] | None = None) -> Section:
    """The settings of evaluation `name`: `values`, and defaults for the rest. Raises UserError for a wrong one."""
    model = settings_model(name)
    try:
        return model.model_validate(dict(values or {}))
    except ValidationError as error:
        problems = explain_errors(error, model, {name: list(model.model_fields)}, prefix=name)
        raise UserError("; ".join(sentence for _, sentence in problems)) from None
