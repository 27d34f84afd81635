"""`section.key=value` on the command line, applied to the tree of a recipe before it is checked.

The entries of `eval` are named, as in eval.knn.k=20 (`selfvil.evaluate.entries`).

An override also removes the keys that exclude it: a new length of the run removes the recipe's length, and a new
objective removes the keys of the old objective, so that its own defaults apply.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from selfvil import safe_yaml
from selfvil.advice import nearest_section
from selfvil.errors import UserError

log = logging.getLogger("selfvil")

LENGTHS = "epochs", "samples", "steps"
"""Keys of `budget` of which a run has exactly one."""

EVAL_TEXTS = "train", "test", "out"
"""Keys of the entries of `eval` whose values are text."""

Tree = dict[str, Any]
"""Section -> its keys and values; `eval` is a list of them."""


def apply(
    tree: Tree, overrides: Sequence[str] | Mapping[str, Any], sections: Sequence[str], texts: frozenset[str]
) -> dict[str, str]:
    """Change `tree` in place and return the override that set each key, as {"optim.base_lr": "optim.base_lr=1e-3"}.

    Args:
        overrides: texts of the command line, or values by their keys, as {"optim.base_lr": 1e-3}; only there, "eval"
            may be a list that replaces all entries.
        sections: names of the recipe's sections. texts: keys whose values are text, even where it looks like a number.

    Raises:
        UserError: an override is not of the form section.key=value, or its section does not exist.
    """
    given: dict[str, str] = {}
    values: dict[str, Any] = {}
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if key == "eval":
                tree[key] = value
                continue
            given[key], values[key] = f"{key}={value}", value
            _check_key(key, _short(given[key]), sections)
    else:
        for override in overrides:
            key, value = _split(override, sections, texts)
            given[key], values[key] = override, value
    lengths = [key for key in LENGTHS if values.get(f"budget.{key}") is not None]
    if lengths:
        for key in LENGTHS:
            tree.get("budget", {}).pop(key, None)
    _replace_objective(tree, values)
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section != "eval":
            tree.setdefault(section, {})[name] = value
    if evaluations := {key: value for key, value in values.items() if key.startswith("eval.")}:
        from selfvil.evaluate import entries

        tree["eval"], changed = entries.override(tree.get("eval"), evaluations)
        for key, names in changed.items():
            given |= dict.fromkeys(names, given.pop(key))
    return given


def _split(override: str, sections: Sequence[str], texts: frozenset[str]) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    name = name.strip()
    section, _, key = name.partition(".")
    _check_key(name if equals else "", _short(override), sections)
    if len(text) > safe_yaml.MAX_BYTES:
        raise UserError(f"override {_short(override)!r} is longer than {safe_yaml.MAX_BYTES >> 20} MiB")
    return name, safe_yaml.parse_value(text.strip(), name in texts or (section == "eval" and key.endswith(EVAL_TEXTS)))


def _check_key(name: str, shown: str, sections: Sequence[str]) -> None:
    section, dot, key = name.partition(".")
    if not (dot and section and all(key.split("."))) or key.count(".") > (section == "eval"):
        raise UserError(f"override {shown!r} is not of the form section.key=value, such as optim.batch_size=256")
    if section not in sections:
        raise UserError(f"override {shown!r}: there is no section {section}{nearest_section(section, key, sections)}")


def _short(override: str) -> str:
    return override if len(override) <= 100 else override[:97] + "..."


def _replace_objective(tree: Tree, values: dict[str, Any]) -> None:
    """With another objective.name, remove the recipe's keys of the old objective."""
    from selfvil.objectives import OBJECTIVES  # here, so that importing a recipe imports no other room

    old, new = tree.get("objective", {}).get("name"), values.get("objective.name")
    if new == old or not isinstance(new, str) or new not in OBJECTIVES:
        return
    dropped = [key for key in tree.get("objective", {}) if key != "name"]
    tree["objective"] = {}
    if dropped and os.environ.get("RANK", "0") == "0":  # one line for all processes
        log.warning(
            "objective.name=%s takes the defaults of %s: the recipe's settings of %s are left out (%s)",
            new, new, old, ", ".join(map(str, dropped)),
        )  # fmt: skip
