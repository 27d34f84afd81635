"""`section.key=value` on the command line, applied to the tree of a recipe before it is checked.

An override replaces what it excludes: another length of the run replaces the recipe's, and another objective takes its
own defaults in place of the old one's keys.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from selfvil import safe_yaml
from selfvil.advice import nearest_section
from selfvil.errors import UserError
from selfvil.objectives import OBJECTIVES  # names only: it imports no objective

log = logging.getLogger("selfvil")

LENGTHS = "epochs", "samples", "steps"
"""Keys of `budget` of which a run has exactly one."""

Tree = dict[str, dict[str, Any]]


def apply(tree: Tree, overrides: Sequence[str], sections: Sequence[str], texts: frozenset[str]) -> dict[str, str]:
    """Change `tree` in place and return the override that set each key, as {"optim.base_lr": "optim.base_lr=1e-3"}.

    Args:
        sections: names of the recipe's sections. texts: keys whose values are text, even where it looks like a number.

    Raises:
        UserError: an override is not of the form section.key=value, or its section does not exist.
    """
    given: dict[str, str] = {}
    values: dict[str, Any] = {}
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
        tree.setdefault(section, {})[name] = value
    return given


def _split(override: str, sections: Sequence[str], texts: frozenset[str]) -> tuple[str, Any]:
    shown = override if len(override) <= 100 else override[:97] + "..."
    name, equals, text = override.partition("=")
    name = name.strip()
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key) or "." in key:
        raise UserError(f"override {shown!r} is not of the form section.key=value, such as optim.batch_size=256")
    if section not in sections:
        raise UserError(f"override {shown!r}: there is no section {section}{nearest_section(section, key, sections)}")
    if len(text) > safe_yaml.MAX_BYTES:
        raise UserError(f"override {shown!r} is longer than {safe_yaml.MAX_BYTES >> 20} MiB")
    return name, _value(text.strip(), name in texts)


def _value(text: str, is_text: bool) -> Any:
    """What YAML reads; the text itself where that is no YAML, or where only text makes sense."""
    try:
        value = safe_yaml.parse(text)
    except ValueError:
        return text
    # A brace pattern at the start of a path reads as a YAML mapping, and no field takes a mapping: it is meant as text.
    # So is a run.out that looks like a number or a date.
    return text if isinstance(value, dict) or (is_text and not isinstance(value, str | list | None)) else value


def _replace_objective(tree: Tree, values: dict[str, Any]) -> None:
    """With another objective.name, drop the recipe's keys of the old objective."""
    old, new = tree.get("objective", {}).get("name"), values.get("objective.name")
    if new == old or not isinstance(new, str) or new not in OBJECTIVES:
        return
    dropped = [key for key in tree.get("objective", {}) if key != "name"]
    tree["objective"] = {}
    if dropped and os.environ.get("RANK", "0") == "0":  # one line, not one from each process
        log.warning(
            "objective.name=%s takes the defaults of %s: the recipe's settings of %s are left out (%s)",
            new, new, old, ", ".join(map(str, dropped)),
        )  # fmt: skip
