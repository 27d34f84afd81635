"""Checkpoints: folders that are written completely or not at all, and verified when they are read.

    root/step-00000500/
        objective.safetensors  optimizer.safetensors ...   one file per named group of tensors
        meta.json                                          facts about the run
        manifest.json                                      size and SHA-256 of every other file, written last

`save` writes into a hidden temporary folder, flushes every file and folder to the disk, renames it, compares every file
with the manifest, and only then removes old checkpoints. A process that is killed at any moment therefore leaves the
complete new checkpoint or none of it, and does not change older ones. Digests are needed because safetensors loads most
files with a flipped bit without an error. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfvil.errors import UserError
from selfvil.files import flush_folder
from selfvil.manifest import MANIFEST, Files, check_files, read_manifest, write_manifest

META = "meta.json"

# `.replaced` is an older save of the same step, renamed before the new one gets its name. It counts as a checkpoint, so
# that nothing is lost if the process is killed between the two renames.
_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|pruned)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    step: finished optimizer steps. meta: the content of meta.json. files: all files, as paths relative to `folder`.
    """

    folder: Path
    step: int
    meta: dict[str, Any]
    files: tuple[str, ...]

    def names(self) -> list[str]:
        """Names under which tensors were saved."""
        return [file.removesuffix(".safetensors") for file in self.files if file.endswith(".safetensors")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU, with their shapes and dtypes.

        Raises UserError if there is no such group, or its file cannot be read.
        """
        path = self.folder / f"{name}.safetensors"
        if name not in self.names():
            raise UserError(f"{self.folder} holds no tensors named {name!r}; it holds: {', '.join(self.names())}.")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def save(
    root: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    meta: dict[str, Any],
    keep: int = 2,
    milestone_every: int | None = None,
) -> Path:
    """Write the checkpoint of one step under `root` and return its folder.

    An earlier checkpoint of the same step is replaced. Call it from one process only.

    Args:
        root: folder of the checkpoints.
        step: finished optimizer steps.
        tensors: group -> name -> tensor, of any dtype and shape, on any device. Tied tensors are each stored in full.
        meta: JSON values only.
        keep: number of undamaged checkpoints to keep, at least two.
        milestone_every: checkpoints of steps that this number divides are never removed; they count towards `keep`.

    Raises:
        UserError: the files cannot be written, or are damaged afterwards; no earlier checkpoint is removed then.
    """
    root = Path(root)
    meta_text = json.dumps(meta, indent=1, allow_nan=False)  # first, since it may raise
    final = root / f"step-{step:08d}"
    partial = partial_folder(root, step)
    try:
        root.mkdir(parents=True, exist_ok=True)
        flush_folder(root.parent)
        _remove_leftovers(root)
        partial.mkdir()
        for name, group in tensors.items():
            save_tensors(_storable(group), partial / f"{name}.safetensors")
        (partial / META).write_text(meta_text, encoding="utf-8")
        write_manifest(partial, step=step)
        _put_in_place(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"Could not save the checkpoint {final}: {error}. Older checkpoints are unchanged.") from error
    if damage := _damage(final):
        raise UserError(
            f"The new checkpoint is damaged, so {root} is on a storage that damages files: use another one. Older "
            f"checkpoints were kept. {damage}"
        )
    _prune(root, final, max(keep, 2), milestone_every)
    return final


def partial_folder(root: str | Path, step: int) -> Path:
    """The temporary folder in which `save` writes the files of a step; the same path on every rank."""
    return Path(root) / f".step-{step:08d}.partial"


def load(folder: str | Path, verify: bool = True) -> Checkpoint:
    """Open the folder of a checkpoint, after comparing every file with the manifest.

    verify=False does not compare, for example on other ranks after one rank has verified the folder. Raises UserError
    if the folder is missing or damaged.
    """
    folder = Path(folder)
    step, files = _verify(folder) if verify else _read_manifest(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / META} cannot be read: {error}") from error
    return Checkpoint(folder, step, meta, tuple(files))


def newest(root: str | Path) -> Checkpoint | None:
    """The undamaged checkpoint of the highest step under `root`, or None if there is none.

    Damaged ones are skipped, with a warning for each that names the file. Unfinished ones are ignored.
    """
    for folder in _folders(Path(root)):
        try:
            return load(folder)
        except UserError as error:
            log.warning("Skipping a damaged checkpoint: %s", error)
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors to a safetensors file with the usual permissions of a new file.

    safetensors itself creates files that only their owner can read, and ignores the umask.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # of a new file, by the umask and the folder's default ACL
    save_file(tensors, path)
    path.chmod(mode)


def _storable(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, which safetensors requires."""
    stored: dict[str, Tensor] = {}
    stored_memory: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        if memory in stored_memory:
            tensor = tensor.clone()
        stored_memory.add(memory)
        stored[name] = tensor
    return stored


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = _replaced(final)
    if final.exists() and replaced.exists() and _damage(final):
        _remove(final)  # the replaced one is undamaged
    elif final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    flush_folder(final.parent)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


# --- verifying -------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> tuple[int, Files]:
    """Step and entries. Raises UserError if there is no folder, or its manifest is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint folder {folder}.")
    facts, files = read_manifest(folder, facts=["step"], required=[META])
    step, named = facts["step"], _FOLDER.fullmatch(folder.name)
    if not isinstance(step, int) or (named is not None and int(named[1]) != step):
        raise UserError(f"{folder / MANIFEST} is damaged: it belongs to step {step!r}.")
    return step, files


def _verify(folder: Path) -> tuple[int, Files]:
    """`_read_manifest`, and every file compared with it. Raises UserError at the first difference."""
    step, files = _read_manifest(folder)
    check_files(folder, files)
    return step, files


def _damage(folder: Path) -> str | None:
    try:
        _verify(folder)
    except UserError as error:
        return str(error)
    return None


# --- removing --------------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders under root, highest step first; a replaced one follows the one that replaced it."""
    if not root.is_dir():
        return []
    found = [(path, match) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    found.sort(key=lambda item: (-int(item[1][1]), item[1][2] is not None))
    return [path for path, _ in found]


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _prune(root: Path, just_saved: Path, keep: int, milestone_every: int | None) -> None:
    """Remove checkpoints older than the `keep` newest undamaged ones, except milestones."""
    kept = {just_saved}
    for folder in _folders(root):
        if folder == _replaced(just_saved) or (len(kept) >= keep and folder not in kept):
            if milestone_every is None or folder.name.endswith(".replaced") or _step(folder) % milestone_every:
                _remove(folder)
        elif folder not in kept:
            if damage := _damage(folder):
                log.warning("An older checkpoint is kept in place of a damaged one: %s", damage)
            else:
                kept.add(folder)


def _remove(folder: Path) -> None:
    """Rename, then delete, so that a partly deleted folder is not taken for a damaged checkpoint."""
    removed = folder.with_name(f".{folder.name.removesuffix('.replaced')}.pruned")
    try:
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        shutil.rmtree(removed)
    except OSError as error:  # only disk space is lost
        log.warning("Could not remove the old checkpoint %s: %s", folder, error)
