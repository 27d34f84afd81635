"""Pages that are written when the site is built, from the code itself, so that they are never out of date.

reference/recipe.md from the settings models, reference/cli.md from the typer application, reference/recipes.md from the
recipes, CONTRIBUTING.md and CHANGELOG.md of the repository, and the drawings. Equations become MathML, which browsers
display without a script.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
sys.path[:0] = [str(DOCS), str(REPOSITORY / "ssl")]

import drawings  # noqa: E402

from selfvil.cli import app  # noqa: E402
from selfvil.evaluate import EVALUATIONS  # noqa: E402
from selfvil.evaluate.entries import Entry, entry_model  # noqa: E402
from selfvil.explain import describe_field  # noqa: E402
from selfvil.objectives import OBJECTIVES, settings_model  # noqa: E402
from selfvil.packaged import packaged_recipes  # noqa: E402
from selfvil.recipe import Recipe  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of docs/."""
    written = {
        "reference/recipe.md": recipe_page(),
        "reference/cli.md": cli_page(),
        "reference/recipes.md": recipes_page(),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
    }
    written |= {f"drawings/{name}": text for name, text in drawings.draw_all().items()}
    for name, content in written.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page: $$ ... $$ becomes a displayed equation, $ ... $ one in the line."""
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)  # leave code as it is
    return "".join(part if part.startswith("`") else _with_mathml(part) for part in parts)


def _with_mathml(text: str) -> str:
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1].strip(), display="block"), text, flags=re.DOTALL)
    # In a span, since Markdown takes a line that begins with <math> for a paragraph of its own.
    return re.sub(r"(?<!\\)\$([^$\n]+)\$", lambda found: f"<span>{convert(found[1])}</span>", text)


def from_root(name: str) -> str:
    """A page of the repository's root, with its links into docs/ as seen from docs/."""
    return (REPOSITORY / name).read_text(encoding="utf-8").replace("](docs/", "](")


# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe, of every objective and of every evaluation."""
    lines = [
        "# Recipe", "",
        "A recipe is one YAML file of the sections below. Each key can be changed on the command line, as "
        "`section.key=value`. `selfvil explain section.key` prints the same text, and `selfvil schema` the JSON schema "
        "for editors.", "",
    ]  # fmt: skip
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        lines += [f"## {section}", ""]
        if section == "objective":
            lines += ["The keys depend on `objective.name`.", ""]
            for name in OBJECTIVES:
                lines += [f"### objective: {name}", "", *_table("objective", settings_model(name)), ""]
        elif section == "eval":
            lines += [
                "A list of evaluations. Each entry has these keys, and the settings of its evaluation, which "
                "`selfvil eval NAME` has too.", "", *_table("eval", Entry), "",
            ]  # fmt: skip
            for name in EVALUATIONS:
                own = [key for key in entry_model(name).model_fields if key not in Entry.model_fields]
                summary = " ".join((entry_model(name).__doc__ or "").split())
                lines += [f"### eval: {name}", "", summary, "", *_table(f"eval.{name}", entry_model(name), own), ""]
        elif isinstance(model, type) and issubclass(model, BaseModel):
            lines += [" ".join((model.__doc__ or "").split()), "", *_table(section, model), ""]
    return "\n".join(lines)


def _table(section: str, model: type[BaseModel], keys: list[str] | None = None) -> Iterator[str]:
    yield "| key | meaning |"
    yield "|---|---|"
    for key in model.model_fields if keys is None else keys:
        text, shape, default = describe_field(model, key)
        shown = "it must be given" if default is None else f"default `{_cell(default)}`"
        yield f"| `{section}.{key}` | {_cell(text)}<br>*{_cell(shape)}; {shown}* |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def recipes_page() -> str:
    """The packaged recipes, each with its header and its text."""
    lines = [
        "# Recipes", "",
        "These recipes are installed with the package. `selfvil pretrain NAME` runs one, and `selfvil recipes NAME` "
        "prints it, so that a copy can be changed.", "",
    ]  # fmt: skip
    for name, path in packaged_recipes().items():
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip("# ")
        lines += [f"## {name}", "", title, "", f'```yaml title="{path.name}"', text.rstrip(), "```", ""]
    return "\n".join(lines)


# --- the command line ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options."""
    root: Any = typer.main.get_command(app)
    lines = ["# Command line", "", root.help or "", "", "Exit status:", ""]
    lines += [
        "- 0: success", "- 1: `inspect` or `pack --verify` found a problem",
        "- 2: a mistake, with one message that names the file or key and what to do",
        "- 3: a run stopped by its doctor (`monitor.on_collapse: stop`)",
        "- 4: a run without progress (`run.stall_minutes`)",
        "- 75: a run stopped early with its state saved; the same command continues it", "- 130: interrupted", "",
    ]  # fmt: skip
    for name, command in root.commands.items():
        lines += _command(f"selfvil {name}", command)
    return "\n".join(lines)


def _command(name: str, command: Any) -> list[str]:
    inner = getattr(command, "commands", {})
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join([name, *map(_argument, arguments), *["[OPTIONS]"] * (len(arguments) < len(command.params))])
    lines = [f"## {name}", "", _cell(command.help or ""), "", "```text", usage, "```", ""]
    rows = [row for parameter in command.params if (row := _parameter(parameter))]
    if rows:
        lines += ["| | meaning | default |", "|---|---|---|", *rows, ""]
    for inner_name, each in inner.items():
        lines += _command(f"{name} {inner_name}", each)
    return lines


def _parameter(parameter: Any) -> str | None:
    if parameter.name == "help":
        return None
    is_option = parameter.param_type_name == "option"
    shown = ", ".join(parameter.opts + parameter.secondary_opts) if is_option else _argument(parameter)
    default = parameter.default
    text = "" if default in (None, False, True, ()) or callable(default) else f"`{default}`"
    return f"| `{_cell(shown)}` | {_cell(getattr(parameter, 'help', '') or '')} | {text} |"


def _argument(parameter: Any) -> str:
    text = parameter.metavar or parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return text if parameter.required or parameter.metavar else f"[{text}]"
