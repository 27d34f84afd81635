"""The exception for problems that the user can solve."""

import re

MAX_MESSAGE = 1500
"""Longest message in characters: about a screen."""


class UserError(Exception):
    """A mistake in a recipe, a path, a shard or a command line.

    The message is one or two plain sentences: which file or key, what was wrong, what was expected, what to do.
    The command line prints it without a traceback and exits with status 2; nothing has been overwritten then.
    The middle of a message longer than MAX_MESSAGE is left out, and so are the secrets of URLs (`redact`).
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(shorten(redact(message)))


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` with at most `limit` characters; the middle of a longer text is replaced by a note of its length."""
    if len(text) <= limit:
        return text
    mark = f" ... [{len(text) - limit} characters left out] ... "
    kept = limit - len(mark)
    return text[: kept * 2 // 3] + mark + text[len(text) - (kept - kept * 2 // 3) :]


_SECRETS = re.compile(r"(\b(?:https?|s3|gs|hf)://)([^\s/@'\"]*@)?")
_QUERY = re.compile(r"(\bhttps?://[^\s?'\"]*)\?(?!…)[^\s'\"]*")


def redact(text: str) -> str:
    """`text` without the user names, passwords and queries of URLs, which may hold signatures."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1?…", _SECRETS.sub(r"\1", text))
