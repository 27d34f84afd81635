"""manifest.json: size and SHA-256 of every other file in a folder, to detect damage before anything is loaded.

Hashes are needed because safetensors loads almost every file with a flipped bit without an error.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfvil.errors import UserError
from selfvil.files import flush_file, flush_folder, write_text

FORMAT = 1
MANIFEST = "manifest.json"

Files = dict[str, dict[str, Any]]
"""Path below the folder -> {"bytes": size, "sha256": digest}."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write the manifest of all files in `folder`, with `facts` (JSON values), and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    for path in files:
        flush_file(path)
    manifest = folder / MANIFEST
    manifest.write_text(_text(facts, entries), encoding="utf-8")
    flush_file(manifest)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        flush_folder(inner)
    flush_folder(folder)


def renew_entry(folder: Path, name: str) -> None:
    """Update size and SHA-256 of one file, after an intended change, in a manifest without facts."""
    _, files = read_manifest(folder)
    write_text(folder / MANIFEST, _text({}, files | {name: _entry(folder / name)}))


def read_manifest(
    folder: Path, facts: Iterable[str] = (), required: Iterable[str] = ()
) -> tuple[dict[str, Any], Files]:
    """The facts with the given names, and the entries of all files.

    The bytes must be exactly as written, since nothing else protects the manifest itself. Raises UserError if it is
    missing or damaged, or does not list the `required` files.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is incomplete.")
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        written_by, files = content["format"], content["files"]
        found = {name: content[name] for name in facts}
        if written_by != FORMAT:
            raise UserError(f"{path} has format {written_by!r}, expected {FORMAT}; another selfvil wrote it.")
        if text != _text(found, files):
            raise ValueError("its bytes are not as they were written")
        if missing := sorted(set(required) - files.keys()):
            raise ValueError(f"it does not list {missing[0]}")
        for name, entry in files.items():
            inside = Path(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise ValueError(f"it names a file outside the folder, {name!r}")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"the entry of {name!r} is wrong")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    return found, files


def check_files(folder: Path, files: Files) -> None:
    """Compare files with their entries. Raises UserError for the first one that is missing or different."""
    for name, expected in files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise UserError(f"{path} is missing, though the manifest lists it.")
            if path.stat().st_size != expected["bytes"]:
                raise UserError(f"{path} is damaged: it has {path.stat().st_size} bytes, expected {expected['bytes']}.")
            found = sha256(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        if found != expected["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is {found}, expected {expected['sha256']}.")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _text(facts: dict[str, Any], files: Files) -> str:
    return json.dumps({"format": FORMAT, **facts, "files": files}, indent=1, sort_keys=True) + "\n"
