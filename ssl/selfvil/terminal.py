"""Printing to a terminal with rich.

Everything printed may hold a path, a key or a value of the user's, such as runs/mae[v2], which rich would read as
markup and drop. So text is printed as it is, and style is given by arguments.
"""

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints text literally, in tables and titles too: no markup, emoji codes or highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
