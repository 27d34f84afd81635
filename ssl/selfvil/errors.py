"""The one exception that means: the user can mend this."""

MAX_MESSAGE = 1500
"""Characters of a message: about a screen."""


class UserError(Exception):
    """A mistake in a recipe, a path, a shard or a command line.

    The message is one or two plain sentences: which file or key, what was wrong, what was expected, what to do.
    The command line prints it without a traceback and exits with status 2; nothing has been overwritten by then.
    A message longer than MAX_MESSAGE, as long names may cause, loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` with at most `limit` characters: a longer one loses its middle, and says how much of it."""
    if len(text) <= limit:
        return text
    mark = f" ... [{len(text) - limit} characters left out] ... "
    kept = limit - len(mark)
    return text[: kept * 2 // 3] + mark + text[len(text) - (kept - kept * 2 // 3) :]
