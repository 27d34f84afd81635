"""The recipes that are installed with the package, found by name."""

import importlib.resources
import os
from pathlib import Path

from selfvil.advice import near
from selfvil.errors import UserError


def find(source: str | Path) -> Path:
    """Path of a recipe given as a file or as the bare name of a packaged one. Raises UserError."""
    path = Path(source).expanduser()
    if os.path.isfile(path):  # unlike path.is_file(), accepts names that no file can have
        return path
    packaged = packaged_recipes()
    if str(source) in packaged:
        return packaged[str(source)]
    if path.suffix == ".yaml" and not path.parent.name and path.stem in packaged:
        return packaged[path.stem]
    if os.path.isdir(path):
        raise UserError(f"{source} is a folder: give the recipe's file, or one of {', '.join(sorted(packaged))}")
    close = near(path.stem, packaged)
    choices = f"did you mean {' or '.join(close)}?" if close else f"those are {', '.join(sorted(packaged))}"
    raise UserError(
        f"no recipe {str(source)[:100]}: there is no such file, and no packaged recipe of that name; {choices}"
    )


def packaged_recipes() -> dict[str, Path]:
    """The recipes installed with the package, by name."""
    folder = Path(str(importlib.resources.files("selfvil").joinpath("recipes")))
    if not folder.is_dir():  # a checkout used through PYTHONPATH or an editable install
        folder = Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
