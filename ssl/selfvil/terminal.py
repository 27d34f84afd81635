"""Printing to a terminal with rich.

Text may contain a path, a key or a value of the user, such as runs/mae[v2], which rich would interpret as markup and
remove. Text is therefore printed literally, and style is given by arguments.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> "Console":
    """A console that prints text literally, in tables and titles too, without markup, emoji codes and highlighting."""
    from rich.console import Console  # here, so that `selfvil --help` is fast

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; called with (done, total)."""
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """A line on a terminal, nothing elsewhere, that says what is being done; called with its text."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda text: None
        return
    from rich.text import Text

    with screen.status("") as line:
        yield lambda text: line.update(Text(text))  # rich would interpret markup in a string
