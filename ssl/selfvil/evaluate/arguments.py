"""The words of `selfvil eval NAME... SOURCE key=value...`: evaluations, what they score, and their settings."""

from collections.abc import Sequence
from typing import Any

from selfvil import safe_yaml
from selfvil.advice import near
from selfvil.errors import UserError
from selfvil.evaluate import ALL, EVALUATIONS, evaluation, settings, settings_model
from selfvil.settings import Section

_TEXTS = {"out", "run"}  # settings whose value is text, even where it looks like a number

FORM = "selfvil eval NAME... SOURCE --train SHARDS --test SHARDS [key=value ...]"
COMPARE = "compare"
COMPARE_FORM = "selfvil eval compare [NAME...] SOURCE SOURCE ... --train SHARDS --test SHARDS [key=value ...]"


def parse_comparison(words: Sequence[str]) -> tuple[Any, ...]:
    """The settings of each evaluation, and then each source, of the words after `compare`; `all` if none is named.

    Raises UserError as `parse`, or for fewer than two sources.
    """
    named = list(words[: _count(words)]) or ["all"]
    rest = list(words[_count(words) :])
    count = next((i for i, word in enumerate(rest) if _is_setting(word) or word.startswith("-")), len(rest))
    sources, given = rest[:count], rest[count:]
    if len(sources) < 2:
        raise UserError(f"a comparison needs at least two networks, got {len(sources)}: {COMPARE_FORM}")
    evaluations, _ = parse([*named, sources[0], *given])
    return evaluations, *sources


def parse(words: Sequence[str]) -> tuple[dict[str, Section], str]:
    """The settings of each evaluation that `words` name, and the source.

    `key=value` sets a key of every named evaluation that has it, `NAME.key=value` that of one.
    Raises UserError for an unknown name, key, value or option.
    """
    for word in words:
        if word.startswith("-"):
            raise UserError(_unknown_option(word))
    chosen = names(words)
    if not chosen:
        evaluation(words[0] if words else "")
    rest = list(words[_count(words) :])
    if not rest or _is_setting(rest[0]):
        raise UserError(f"SOURCE is missing, an export, run or checkpoint folder or a timm model: {FORM}")
    values: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for word in rest[1:]:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word[:100]!r} after the source {rest[0][:100]!r} is not of the form key=value: {FORM}")
        name, dot, own = key.rpartition(".")
        if dot and name not in chosen:
            raise UserError(f"{word[:100]!r}: {name[:60]!r} is not among the evaluations of this command: "
                            f"{', '.join(chosen)}")  # fmt: skip
        takers = [name] if dot else [each for each in chosen if own in settings_model(each).model_fields] or chosen[:1]
        for taker in takers:
            values[taker][own] = safe_yaml.parse_value(text, own in _TEXTS)
    return {name: settings(name, given) for name, given in values.items()}, rest[0]


def names(words: Sequence[str]) -> list[str]:
    """The evaluations that the first of `words` name; `all` stands for several."""
    listed = [name for word in words[: _count(words)] for name in (ALL if word == "all" else (word,))]
    return list(dict.fromkeys(listed))


def _count(words: Sequence[str]) -> int:
    return next((i for i, word in enumerate(words) if word not in EVALUATIONS and word != "all"), len(words))


def _is_setting(word: str) -> bool:
    """Whether `word` is key=value of some evaluation; a path may have an equals sign too."""
    key, equals, _ = word.partition("=")
    return bool(equals) and any(key.rpartition(".")[2] in settings_model(name).model_fields for name in EVALUATIONS)


def _unknown_option(word: str) -> str:
    option, _, value = word.partition("=")
    key = option.lstrip("-").replace("-", "_")
    owners = [name for name in EVALUATIONS if key in settings_model(name).model_fields]
    if owners:
        return f"{option} is a setting of {' and '.join(owners)} now: write {key}={value or 'VALUE'} after the source"
    keys = [key for name in EVALUATIONS for key in settings_model(name).model_fields]
    found = near(key, keys)
    return f"there is no option {option[:60]}" + (f" (did you mean the setting {found[0]}=VALUE?)" if found else "")
