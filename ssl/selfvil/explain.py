"""`selfvil explain optim.base_lr`: a recipe key's documentation, type, limits and default."""

import json
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from selfvil.advice import near, nearest_section, suggestion
from selfvil.errors import UserError
from selfvil.evaluate import EVALUATIONS
from selfvil.evaluate.entries import Entry, entry_model
from selfvil.objectives import OBJECTIVES, settings_model
from selfvil.recipe import Recipe


def explain(name: str) -> str:
    """The documentation of a section or a key; for `objective` and `eval`, of each that has the key.

    eval.knn is the section of an evaluation, and eval.knn.k one of its keys.

    Raises:
        UserError: there is no such section or key; the message names similar ones.
    """
    section, dot, key = name.strip().partition(".")
    if section not in Recipe.model_fields:
        raise UserError(f"there is no section {section[:60]}{nearest_section(section, key, list(Recipe.model_fields))}")
    models = _models(section)
    if section == "eval" and (evaluation := key.partition(".")[0]) in EVALUATIONS:
        _, dot, key = key.partition(".")
        section, models = f"eval.{evaluation}", {f"eval.{evaluation}": models[evaluation]}
    if not dot:
        return "\n\n".join(_section(title, model) for title, model in models.items())
    found = {title: model for title, model in models.items() if key in model.model_fields}
    if not found:
        fields = {each: [key for model in _models(each).values() for key in model.model_fields] for each in _sections()}
        fields = {each: list(dict.fromkeys(keys)) for each, keys in fields.items()}
        if section != "eval":
            fields["eval"] = list(Entry.model_fields)
        if section not in fields:  # eval.knn
            fields = {section: list(models[section].model_fields)}
        if section == "objective" and not near(key, fields[section]):
            fields[section] = [*fields[section][:12], "..."]
        raise UserError(f"there is no key {name[:80]}{suggestion(section, key, fields)}")
    texts: dict[str, list[str]] = {}
    for title, model in found.items():
        texts.setdefault(_field(model, key), []).append(title)
    return "\n\n".join(f"{section}.{key}{_of(titles, models)}\n{text}" for text, titles in texts.items())


def _sections() -> list[str]:
    return list(Recipe.model_fields)


def _models(section: str) -> dict[str, type[BaseModel]]:
    if section == "objective":
        return {name: settings_model(name) for name in OBJECTIVES}
    if section == "eval":
        return {name: entry_model(name) for name in EVALUATIONS}
    return {section: Recipe.model_fields[section].annotation}  # type: ignore[dict-item]


def _of(titles: list[str], models: dict[str, type[BaseModel]]) -> str:
    return f" ({', '.join(titles)})" if len(models) > 1 else ""


def settings_help(name: str, model: type[BaseModel], keys: bool = True) -> str:
    """What an evaluation measures and, if `keys`, its settings with their defaults, in lines of 100 characters."""
    if not keys:
        return textwrap.fill(f"  {name:12} {_sentence(model.__doc__)}", 100, subsequent_indent=" " * 15)
    lines = [f"{name}: {_sentence(model.__doc__)}"]
    for key, field in model.model_fields.items():
        default = re.sub(
            r"\d\.\d{8,}",
            lambda number: f"{float(number[0]):.4g}",
            _value(field.get_default(call_default_factory=True)),
        )
        left, text = f"{key}={default}", _sentence(field.description)
        if len(left) > 26:
            lines += [textwrap.fill(f"  {left}", 100, subsequent_indent=" " * 6), textwrap.indent(
                textwrap.fill(text, 71), " " * 29)]  # fmt: skip
        else:
            lines.append(textwrap.fill(f"  {left:26} {text}", 100, subsequent_indent=" " * 29))
    return "\n".join(lines)


def _section(title: str, model: type[BaseModel]) -> str:
    lines = [f"{title}: {_sentence(model.__doc__)}"]
    lines += [f"  {key:26} {_sentence(field.description)}" for key, field in model.model_fields.items()]
    return "\n".join(lines)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")


def describe_field(model: type[BaseModel], key: str) -> tuple[str, str, str | None]:
    """Documentation, type in words, and default as JSON, None for a key that must be given."""
    field = model.model_fields[key]
    schema = model.model_json_schema()
    shape = _type(schema["properties"][key], schema.get("$defs", {}))
    text = " ".join((field.description or "").split())
    return text, shape, None if field.is_required() else _value(field.get_default(call_default_factory=True))


def _field(model: type[BaseModel], key: str) -> str:
    text, shape, default = describe_field(model, key)
    return f"  {text}\n  type: {shape}\n  default: {'none: it must be given' if default is None else default}"


def _value(value: Any) -> str:
    return json.dumps(value, default=str)


_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words: `whole number, at least 1, or null`."""
    if "anyOf" in schema:
        return ", or ".join(_type(each, definitions) for each in schema["anyOf"])
    if "$ref" in schema:
        return _type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        count = f"{len(items)} x " if "prefixItems" in schema else ""
        return f"list of {count}{_type(items[0], definitions)}"
    if schema.get("type") == "object" and "properties" in schema:
        return f"{{{', '.join(schema['properties'])}}}"
    limits = [f"{words} {schema[key]:g}" for key, words in _LIMITS.items() if key in schema]
    return ", ".join([_TYPES.get(schema.get("type", ""), "value"), *limits])
