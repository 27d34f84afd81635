"""A checkpoint is a folder that is never half there.

    root/step-00000500/
        objective.safetensors  optimizer.safetensors ...   one file per named group of tensors
        meta.json                                          plain facts about the run
        manifest.json                                      size and SHA-256 of every other file, written last

`save` writes into a hidden folder aside, flushes every file and folder to the disk, renames, reads everything back
against the manifest, and only then removes old checkpoints. A process killed at any moment therefore leaves either
the whole new checkpoint or none of it, and the older ones untouched. Hashes are needed because a flipped bit is
invisible otherwise: safetensors loads almost every file with one. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
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

# `.replaced` is an older save of the same step, moved out of the way while the new one takes its name. It still
# counts as a checkpoint, so that being killed between those two renames loses nothing.
_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|pruned)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder whose files were all found to be as they were written.

    folder: where it lies. step: optimizer steps taken. meta: the content of meta.json. files: every file in it,
    by its path below the folder.
    """

    folder: Path
    step: int
    meta: dict[str, Any]
    files: tuple[str, ...]

    def names(self) -> list[str]:
        """Names under which tensors were saved."""
        return [file.removesuffix(".safetensors") for file in self.files if file.endswith(".safetensors")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU, with the shapes and dtypes they were saved with.

        Raises UserError if there is no such group, or its file is no safetensors file.
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
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of one step under `root` and return its folder.

    tensors: group name -> tensor name -> tensor, any dtype and shape, on any device; tied tensors are stored each in
    full. meta: JSON values only. keep: how many undamaged checkpoints stay, never fewer than two. extra: called with
    the unfinished folder so that another engine can add its own files (nested folders too); the manifest covers them.

    Call it from one process only. If that step was saved before, the new one takes its place. Raises UserError if
    the files cannot be written or do not read back as written; the checkpoints already there are then all kept.
    """
    root = Path(root)
    meta_text = json.dumps(meta, indent=1, allow_nan=False)  # before anything is touched: it may refuse
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
        if extra is not None:
            extra(partial)
        write_manifest(partial, step=step)
        _put_in_place(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"Could not save the checkpoint {final}: {error}. Older checkpoints are untouched.") from error
    if damage := _damage(final):
        raise UserError(
            f"The checkpoint just saved does not read back as it was written, so {root} is on a storage that damages "
            f"files; older checkpoints were kept. {damage}"
        )
    _prune(root, final, max(keep, 2))
    return final


def partial_folder(root: str | Path, step: int) -> Path:
    """Where `save` collects the files of a step before they are renamed: the same path on every rank."""
    return Path(root) / f".step-{step:08d}.partial"


def load(folder: str | Path, verify: bool = True) -> Checkpoint:
    """Open one checkpoint folder. Every file is compared with the manifest first.

    verify=False skips the hashing, for the other ranks once one rank has verified the folder.
    Raises UserError, naming the file, what was expected and what was found, if the folder is missing or damaged.
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

    Damaged ones are passed over, each with a logged warning that says which file is wrong. Unfinished ones are not
    looked at.
    """
    for folder in _folders(Path(root)):
        try:
            return load(folder)
        except UserError as error:
            log.warning("Skipping a damaged checkpoint: %s", error)
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors to a safetensors file that has the permissions of any other new file.

    safetensors itself makes files that only their owner can read, whatever the umask.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # of a new file: the umask and the folder's default ACL, without a race
    save_file(tensors, path)
    path.chmod(mode)


def _storable(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors asks for."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            tensor = tensor.clone()
        seen.add(memory)
        stored[name] = tensor
    return stored


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = _replaced(final)
    if final.exists() and replaced.exists() and _damage(final):
        _remove(final)  # the one it had replaced is still the better of the two
    elif final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    flush_folder(final.parent)


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


# --- tidying ---------------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders under root, highest step first, a replaced one right after the one that replaced it."""
    if not root.is_dir():
        return []
    found = [(path, match) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    found.sort(key=lambda item: (-int(item[1][1]), item[1][2] is not None))
    return [path for path, _ in found]


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _prune(root: Path, just_saved: Path, keep: int) -> None:
    """Remove what is older than the `keep` newest undamaged checkpoints; damaged ones among those do not count."""
    kept = {just_saved}
    for folder in _folders(root):
        if folder == _replaced(just_saved) or (len(kept) >= keep and folder not in kept):
            _remove(folder)
        elif folder not in kept:
            if damage := _damage(folder):
                log.warning("An older checkpoint is kept in place of a damaged one: %s", damage)
            else:
                kept.add(folder)


def _remove(folder: Path) -> None:
    """Rename first: a folder that is half deleted must not look like a damaged checkpoint."""
    going = folder.with_name(f".{folder.name.removesuffix('.replaced')}.pruned")
    try:
        shutil.rmtree(going, ignore_errors=True)
        os.rename(folder, going)
        shutil.rmtree(going)
    except OSError as error:  # the new checkpoint is safe; an old one that stays costs only room
        log.warning("Could not remove the old checkpoint %s: %s", folder, error)
