"""The options --cache and --cache-gb of commands that read shards behind a URL.

An option is a variable of the environment for this command: everything that opens shards reads it, in whichever process
and however deep, and a recipe's data.cache and data.cache_gb come before it.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from selfvil.data.remote.cache import FOLDER_VARIABLE, GIGABYTES_VARIABLE, gigabytes


def _set_folder(folder: Path | None) -> Path | None:
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = str(folder.expanduser().absolute())
    return folder


def _set_gigabytes(text: str | None) -> str | None:
    if text is not None:
        gigabytes(text, "--cache-gb")
        os.environ[GIGABYTES_VARIABLE] = text
    return text


Folder = Annotated[
    Path | None,
    typer.Option(
        "--cache", callback=_set_folder,
        help=f"Folder for shards of a URL; default: {FOLDER_VARIABLE}, or one in the user's cache folder.",
    ),
]  # fmt: skip

Gigabytes = Annotated[
    str | None,
    typer.Option(
        "--cache-gb", callback=_set_gigabytes, metavar="NUMBER",
        help=f"Size of that folder, in GB; default: {GIGABYTES_VARIABLE}, or 50.",
    ),
]  # fmt: skip
