"""The table of evaluations: adding one is one file and one line here.

The file of an evaluation defines three names,

    class Settings(Section)                       its settings, each documented
    def check(task, settings) -> list[str]        raises UserError for what cannot be scored; returns warnings
    def evaluate(task, settings) -> Iterator[Score]

and, if it uses `Task.features`, a fourth, so that one pass over the images computes what all evaluations need:

    def needs(task, settings) -> list[str | None]    the readouts that it will ask `task.features` for

A `task.Task` holds the network, the labelled shards and the processes. `check` runs before training or feature
extraction, on every process. `evaluate` runs on every process too, and yields scores on the main process alone. The
training loop (`monitor.evaluations`) and the command line (`score.score`) call the same functions.
"""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from selfvil.advice import explain_errors, near
from selfvil.errors import UserError
from selfvil.settings import Section

EVALUATIONS = {
    "knn": "selfvil.evaluate.knn",
    "linear": "selfvil.evaluate.linear",
    "linear_grid": "selfvil.evaluate.linear_grid",
    "mae_probe": "selfvil.evaluate.mae_probe",
    "attentive": "selfvil.evaluate.attentive",
    "few_label": "selfvil.evaluate.few_label",
    "finetune": "selfvil.evaluate.finetune",
    "accuracy": "selfvil.evaluate.accuracy",
    "segment": "selfvil.evaluate.segment",
    "robustness": "selfvil.evaluate.robustness",
}

ALL = ("knn", "linear")
"""What `selfvil eval all` runs: the protocols that need one vector for each image, no choice of settings, and little
time."""

_OTHER_NAMES = {"logistic": "linear", "log_regression": "linear", "few_shot": "few_label", "attention": "attentive"}


def evaluation(name: object) -> Any:
    """The module of evaluation `name`: `Settings`, `check`, `evaluate`. Raises UserError for an unknown name."""
    if not isinstance(name, str) or name not in EVALUATIONS:
        found = near(str(name), EVALUATIONS) or [_OTHER_NAMES[key] for key in _OTHER_NAMES if key == name]
        meant = f"did you mean {found[0]}? " if found else ""
        raise UserError(f"there is no evaluation {str(name)[:60]!r} ({meant}choose one of: {', '.join(EVALUATIONS)})")
    return importlib.import_module(EVALUATIONS[name])


def needs(name: str, task: Any, settings: Any) -> list[str | None]:
    """The features that evaluation `name` asks `task` for, by its function `needs`; none if it has no such function.

    Raises UserError for features that the network does not have.
    """
    own = getattr(evaluation(name), "needs", None)
    return [] if own is None else list(own(task, settings))


def want(task: Any, evaluations: Iterable[tuple[str, Any]]) -> None:
    """Name to `task` the features that evaluations need, each with its settings, so that one pass computes all.

    An evaluation whose features are not possible is left out: it raises its own error in its turn.
    """
    for name, settings in evaluations:
        with suppress(UserError):
            task.want(needs(name, task, settings))


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
