"""The code blocks of README.md and docs/: how they are found, and how they run.

A comment above a block says how its test differs from what the page shows:

    <!-- not run: REASON -->       it cannot run in a test, for this reason
    <!-- slow -->                  it runs only in the slow tests, by bash
    <!-- test: WORDS -->           these words are added to each selfvil command; exit=75 is the expected exit status
    <!-- needs: NAMES -->          once for a page, in any place: what exists in its folder (`Page.needs`)

Blocks of one page run in order in one folder, and its Python blocks share their names. A block with a title is a file:
it is written, not run. bash blocks hold selfvil commands, which run in this process, and a few simple others. YAML is
checked as a part of a recipe. `text` is output, and is not checked. Budgets and networks are made small (`tiny`).
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from selfvil import api, cli
from selfvil import recipe as recipes
from selfvil.evaluate import compare
from selfvil.evaluate.speed import measure

REPOSITORY = Path(__file__).resolve().parents[1]
LANGUAGES = {"python", "bash", "yaml", "text"}
_SIMPLE = {"ls", "cat", "mkdir", "cp", "mv", "rm", "ln", "echo", "head"}


@dataclass
class Block:
    language: str
    title: str | None
    text: str
    line: int
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return [word for word in self.comments.get("test", "").split() if not word.startswith("exit=")]

    @property
    def status(self) -> int:
        return next((int(w[5:]) for w in self.comments.get("test", "").split() if w.startswith("exit=")), 0)


@dataclass
class Page:
    path: Path
    blocks: list[Block]
    needs: list[str]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(REPOSITORY))


def pages() -> list[Page]:
    files = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [read_page(file) for file in [*files, REPOSITORY / "CONTRIBUTING.md"]]


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    needs = re.findall(r"<!-- needs: (.*?) -->", text)
    return Page(path, list(find_blocks(text)), " ".join(needs).split())


def find_blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, with the comments directly above each. Raises ValueError for a fence without end."""
    lines = text.splitlines()
    comments: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        if found := re.match(r"^( *)(`{3,}|~{3,})(.*)$", line):
            indent, fence, info = found.groups()
            end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == fence), None)
            if end is None:
                raise ValueError(f"line {number + 1}: this block has no end")
            body = "\n".join(each[len(indent) :] for each in lines[number + 1 : end]) + "\n"
            title = re.search(r'title="([^"]*)"', info)
            yield Block(info.split()[0] if info.split() else "", title and title[1], body, number + 1, comments)
            comments, number = {}, end
        elif found := re.match(r"^ *<!-- (not run|slow|test|needs)(?:: (.*?))? -->$", line):
            comments = comments | {found[1]: found[2] or ""}
        elif line.strip():
            comments = {}
        number += 1


# --- running ---------------------------------------------------------------------------------------------------------


def tiny(recipe: recipes.Recipe, words: list[str]) -> recipes.Recipe:
    """The same recipe with two steps, a small network and no workers; `words` override that."""
    values: dict[str, Any] = {
        "budget.steps": 2, "optim.batch_size": 8, "optim.accumulate": 1, "optim.min_lr": 0, "data.workers": 0,
        "run.precision": "fp32", "run.threads": 1, "monitor.doctor_every": None, "model.depth": 1,
    }  # fmt: skip
    if recipe.model.name.startswith("vil_"):
        values |= {"model.embed_dim": 32}
    else:
        values.pop("model.depth")
    for key, small in {"decoder_dim": 32, "decoder_depth": 1, "out_dim": 64, "hidden_dim": 64, "bottleneck_dim": 16,
                       "local_crops": 2}.items():  # fmt: skip
        if isinstance(getattr(recipe.objective, key, None), int):
            values[f"objective.{key}"] = small
    if recipe.budget.pause_minutes is not None:
        values["budget.pause_minutes"] = 1e-9
    return _load(_load(recipe, values), [word for word in words if "." in word.partition("=")[0]])


_load = recipes.load


class Runner:
    """Runs the blocks of a page in the current folder."""

    def __init__(self, monkeypatch: Any, shrink: bool = True) -> None:
        self.names: dict[str, Any] = {"__name__": "documentation_page"}
        self.words: list[str] = []
        self.shrink = shrink
        for module in (recipes, api):
            monkeypatch.setattr(module, "load", self.load)
        monkeypatch.setattr(compare, "measure", partial(measure, rounds=2, seconds=0.01))

    def load(self, source: Any, overrides: Any = ()) -> recipes.Recipe:
        recipe = _load(source, overrides)
        return tiny(recipe, self.words) if self.shrink else _load(recipe, self.words)

    def run(self, block: Block) -> None:
        self.words = block.words
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        if block.language == "yaml":
            check_yaml(block.text)
        elif block.title is not None:
            return
        elif block.language == "python":
            exec(compile(block.text, f"<block at line {block.line}>", "exec"), self.names)
        elif block.language == "bash":
            for words in commands(block.text):
                self.command(words, block)

    def command(self, words: list[str], block: Block) -> None:
        if words[0] in _SIMPLE:
            subprocess.run(words, check=True)
            return
        assert words[0] == "selfvil", f"a test runs selfvil commands only, not {words[0]}: say `not run` or `slow`"
        more = block.words if words[1] == "eval" else []
        if words[1] in ("eval", "embed", "pack") and "--workers" not in words:
            more = [*more, "--workers", "1" if words[1] == "pack" else "0"]
        status = _exit_status([*words[1:], *more])
        assert status == block.status, f"{shlex.join(words)} ended with status {status}"


def _exit_status(words: list[str]) -> int:
    try:
        cli.main(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a bash block, as words: lines that end in a backslash are joined, and comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words[2:] if words[:2] == ["python", "-m"] else words


def check_yaml(text: str) -> None:
    """YAML in a page is a part of a recipe: with the demo's other sections it must be a valid one."""
    tree = yaml.safe_load(text)
    base = _load("demo").model_dump(mode="json")
    if "name" in tree.get("objective", {}):
        base.pop("objective")
    if any(key in tree.get("budget", {}) for key in ("epochs", "samples", "steps")):
        base.pop("budget")
    if "in_chans" in tree.get("model", {}):
        for key in ("mean", "std"):
            base["data"].pop(key)
    merged = {name: {**section, **tree.get(name, {})} if isinstance(section, dict) else section
              for name, section in base.items()}  # fmt: skip
    recipes.parse({**tree, **merged, **({"eval": tree["eval"]} if "eval" in tree else {})}, "a block of YAML")


@contextmanager
def folder(path: Path, monkeypatch: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        yield
