"""Patterns of local shards: which files they stand for, and what to say where they stand for none."""

import difflib
import glob
import math
import os
import re
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

from selfvil.data.base import Pattern
from selfvil.data.sidecar import SIDECAR, STATS
from selfvil.errors import UserError

_MOST_SHARDS = 1_000_000


def expand_shards(pattern: Pattern) -> list[Path]:
    """Paths of the shards that match a pattern, or a list of patterns.

    A pattern is a file, a folder (all its *.tar, sorted), a glob (sorted) or a brace pattern such as
    `train-{000000..000009}.tar` or `{a,b}/*.tar` (in the order of the braces); `~` is the home folder.

    Raises:
        UserError: nothing matches, files are missing (all of them are named), or a file is given twice.
    """
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    if not patterns or not all(os.fspath(each) for each in patterns):
        raise UserError("no shards given: expected a path, a folder, a glob or a brace pattern of WebDataset tars")
    paths = [path for each in patterns for path in _expand(os.fspath(each))]
    seen: dict[str, Path] = {}
    real = lru_cache(os.path.realpath)  # of folders: thousands of shards lie in a few
    for path in paths:
        resolved = os.path.realpath(path) if path.is_symlink() else os.path.join(real(path.parent), path.name)
        if (twice := seen.setdefault(resolved, path)) is not path:
            raise UserError(f"shard {path} is given twice (also as {twice}); name each shard once")
    return paths


def _expand(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    ranges = re.findall(r"{(-?\d{1,18})\.\.(-?\d{1,18})[.}]", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MOST_SHARDS:
        raise UserError(f"shard pattern {pattern} stands for more than {_MOST_SHARDS:,} files; check its braces")
    try:
        # A file name may contain braces or stars: an existing file of that name is used.
        names = [pattern] if os.path.exists(pattern) else list(braceexpand(pattern))
    except ValueError:
        raise UserError(
            f"shard pattern {pattern} has unbalanced braces; expected e.g. train-{{000000..000009}}.tar"
        ) from None
    paths: list[Path] = []
    missing: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
            if not found:
                raise UserError(f"folder {name} holds no .tar files; expected WebDataset shards (see `selfvil pack`)")
            paths += map(Path, found)
        elif os.path.isfile(name):
            paths.append(Path(name))
        elif os.path.exists(name):  # opening a pipe would block
            raise UserError(f"{name} is no regular file; expected a WebDataset shard (.tar)")
        elif glob.has_magic(name):
            found = sorted(each for each in glob.glob(name, recursive=True) if not each.endswith((SIDECAR, STATS)))
            if not found:
                raise UserError(f"no file matches {name}{_neighbours(name)}")
            paths += map(Path, found)
        else:
            missing.append(name)
    if len(missing) == 1 and not Path(missing[0]).suffix:
        raise UserError(f"there is no folder {missing[0]}{_near_folders(Path(missing[0]))}")
    if missing:
        what = "shard" if len(missing) == 1 else f"{len(missing)} of the {len(names)} shards"
        missing = [*missing[:20], f"and {len(missing) - 20} more"] if len(missing) > 20 else missing
        raise UserError(f"missing {what}: {', '.join(missing)}{_neighbours(missing[0])}")
    return paths


def _neighbours(name: str) -> str:
    """The shards in the folder of a missing one, for a message: they show a mistake in the pattern."""
    folder = Path(name).parent
    if not folder.is_dir():
        return f" (there is no folder {folder})" if not glob.has_magic(str(folder)) else ""
    tars = sorted(path.name for path in folder.glob("*.tar"))
    shown = ", ".join(tars if len(tars) <= 4 else [*tars[:2], "...", tars[-1]])
    return f" (the folder {folder} holds {shown or 'no .tar files'})"


def _near_folders(path: Path) -> str:
    """For a message: folders with a name similar to that of a missing one, or its nearest parent that exists."""
    if not path.parent.is_dir():
        above = next((parent for parent in path.parents if parent.is_dir()), None)
        return "" if above is None else f" (of its parents, {above} exists)"
    folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    near = difflib.get_close_matches(path.name, folders, n=3)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""
