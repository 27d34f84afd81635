"""Read YAML from a file that may be damaged or hostile: its size is limited, and only plain values are accepted.

Aliases are refused, because nine lines of them can represent a thousand million values. Tags, repeated keys (the parser
would silently keep the last one) and deep nesting (which would exhaust the stack) are refused too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from selfvil.errors import UserError

MAX_BYTES = 2**20
"""Largest file in bytes that is parsed; a recipe has a few thousand."""

MAX_DEPTH = 16
"""Deepest nesting of lists and mappings; a recipe needs 3."""

_QUOTES = ", or put text that begins with * or & in quotes"


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with the file, the line and the problem."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES >> 20} MiB, which is no recipe: is it the right file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: byte {error.start} is wrong") from None
    try:
        tree = parse(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} is not a recipe: expected sections such as `optim:`, each with `key: value` lines")
    return dict(tree)


def parse(text: str) -> Any:
    """The value of one YAML document.

    Raises:
        ValueError: a sentence with line and column, for invalid YAML and for what this module refuses.
    """
    try:
        _refuse_aliases_and_depth(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node)
        return _construct(loader, node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_sentence(error, text)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_value(text: str, is_text: bool) -> Any:
    """The value of `key=value` on a command line: what YAML reads, or the text itself where it is no YAML.

    is_text: the key takes text, even where it looks like a number or a date, as run.out=2026 does.
    """
    try:
        value = parse(text)
    except ValueError:
        return text
    # A brace pattern at the start of a path reads as a YAML mapping, and no field takes a mapping: it is meant as text.
    return text if isinstance(value, dict) or (is_text and not isinstance(value, str | list | None)) else value


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # a number of 5,000 digits, the 45th of a month
        raise ValueError(f"it has an impossible number or date: {str(error)[:100]}") from None


def _refuse_aliases_and_depth(text: str) -> None:
    """Check the parser's events, which need neither stack nor memory, before anything is built from them."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"{_place(event.start_mark)}: *{str(event.anchor)[:40]} is an alias, and recipes have none: write "
                f"the value itself{_QUOTES}"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"{_place(event.start_mark)}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _refuse_repeated_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(child)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Mark] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = seen[key.value].line + 1
                    raise ValueError(f"{_place(key.start_mark)}: {key.value[:40]} was given before, in line {line}")
                seen[key.value] = key.start_mark
            _refuse_repeated_keys(value)


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _sentence(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{_place(mark)}: " if mark else ""
    problem = " ".join((error.problem or "it cannot be parsed").split())[:200]
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    hint = ""
    if "\t" in line:
        hint = " (indent with spaces: YAML allows no tabs)"
    elif "mapping values are not allowed" in problem:
        hint = " (is the line before it indented alike, and text with a colon in quotes?)"
    elif "an alias" in (error.context or "") or "an anchor" in (error.context or ""):
        hint = _QUOTES
    elif "constructor for the tag" in problem:
        hint = " (recipes have plain values, no tags)"
    elif "unhashable" in problem:
        problem = "a list or a mapping cannot be a key"
    return f"{where}{problem}{hint}"
