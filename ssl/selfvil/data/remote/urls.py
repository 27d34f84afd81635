"""URLs of remote files: which are accepted, and how they are shown.

Only the protocols in PROTOCOLS are read. Everything else that fsspec knows is refused: local files under another name,
protocols that run commands, and chains such as `simplecache::s3://`. A URL may hold a secret: the signature in its
query, or a password. `str(url)` leaves both out, and messages, logs and records only use that.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from selfvil.errors import UserError, redact, shorten

PROTOCOLS = ("https", "http", "s3", "gs", "hf")

_MOST = 1_000_000  # URLs of one pattern
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, order=True)
class Url:
    """A remote file. `text` is the whole URL; `str` leaves out user, password and query."""

    text: str

    def __str__(self) -> str:
        return redact(self.text)

    __repr__ = __str__

    def __fspath__(self) -> str:
        """The whole URL, secrets included: for opening it again."""
        return self.text

    @property
    def protocol(self) -> str:
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part of its path, such as train-000000.tar."""
        return self._split()[0].rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """Its folder, with the same query."""
        path, query = self._split()
        return Url(path.rpartition("/")[0] + query)

    def __truediv__(self, name: str) -> "Url":
        path, query = self._split()
        return Url(f"{path}/{name}{query}")

    def beside(self, suffix: str) -> "Url":
        """The file whose name is this one's with `suffix` added."""
        path, query = self._split()
        return Url(path + suffix + query)

    def _split(self) -> tuple[str, str]:
        """The URL without its query, and the query. In s3, gs and hf, `?` is part of a name, or of a glob."""
        if self.protocol not in ("http", "https"):
            return self.text, ""
        path, mark, query = self.text.partition("?")
        return path, mark + query


Location = Path | Url
"""A local or a remote file. Both have `name`, `parent` and `/`, and `str` is for messages."""


def is_remote(pattern: object) -> bool:
    """Whether a pattern, or one of a list of patterns, is a URL or a command instead of a path."""
    if isinstance(pattern, (str, os.PathLike)):
        text = os.fspath(pattern)
        return isinstance(text, str) and bool(_PROTOCOL.match(text) or text.startswith("pipe:") or "::" in text)
    return isinstance(pattern, Sequence) and any(map(is_remote, pattern))


def expand_braces(pattern: str) -> list[Url]:
    """The URLs of a pattern such as `https://host/train-{000000..000009}.tar`, in the order of the braces.

    Raises UserError if the protocol is not one of PROTOCOLS, a password is given, or the braces are unbalanced.
    """
    shown = shorten(redact(pattern), 200)
    protocol = _PROTOCOL.match(pattern)
    if protocol is None or protocol[1] not in PROTOCOLS or "::" in pattern:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise UserError(f"{shown} is no URL that is read: expected one of {known}; commands are never run")
    rest = pattern[protocol.end() :]
    if not rest.partition("/")[2]:
        raise UserError(f"{shown} names no file: expected e.g. {protocol[0]}NAME/train-{{000000..000009}}.tar")
    if "@" in rest.partition("/")[0]:
        raise UserError(f"{shown} holds a user name or password: put them into ~/.netrc, which is read, and not here")
    ranges = re.findall(r"{(-?\d{1,18})\.\.(-?\d{1,18})[.}]", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MOST:
        raise UserError(f"{shown} stands for more than {_MOST:,} files; check its braces")
    try:
        return [Url(text) for text in braceexpand(pattern)]
    except ValueError:
        raise UserError(f"{shown} has unbalanced braces; expected e.g. train-{{000000..000009}}.tar") from None
