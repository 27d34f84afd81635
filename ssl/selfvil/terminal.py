"""Printing to a terminal with rich.

Text may contain a path, a key or a value of the user, such as runs/mae[v2], which rich would interpret as markup and
remove. Text is therefore printed literally, and style is given by arguments.
"""

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints text literally, in tables and titles too, without markup, emoji codes and highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
