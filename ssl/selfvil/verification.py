"""`selfvil verify`: compare every file of an export, a run or a checkpoint with its digest."""

from pathlib import Path

from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.manifest import MANIFEST, Files, check_files, read_manifest
from selfvil.records import CHECKPOINTS
from selfvil.weights import CONFIG, HEADS, WEIGHTS, check_digest, is_export, verified_config

CARD = "README.md"
"""The model card, which may be edited after the export: a change is reported, and is no error."""


def verify(source: str | Path) -> list[str]:
    """Compare files with their digests; return sentences about them, and about files without a digest.

    source: an export, a run (all its checkpoints) or one checkpoint. Raises UserError if it is none of these, or if a
    file is missing or damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; expected an export, a run or a checkpoint.")
    if is_export(folder):
        return _verify_export(folder)
    if (folder / CHECKPOINTS).is_dir():
        return _verify_run(folder)
    if (folder / MANIFEST).is_file():
        return [_verify_checkpoint(folder)]
    raise UserError(
        f"{folder} is no export ({CONFIG}), no run (checkpoints/) and no checkpoint ({MANIFEST}): nothing was verified."
    )


def _verify_export(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():
        heads = verified_config(folder)["selfvil"].get("heads_sha256")
        if heads is not None:
            check_digest(folder / HEADS, heads)
        verified = f"{WEIGHTS} and {HEADS} are" if heads is not None else f"{WEIGHTS} is"
        return [f"{folder}, an older export: {verified} undamaged. No other file of it has a digest."]
    _, files = read_manifest(folder, required=[CONFIG])
    card = {name: files.pop(name) for name in [CARD] if name in files}
    check_files(folder, files)
    sentences = [f"{folder}, an export: {', '.join(files)} are undamaged ({_megabytes(files)})."]
    try:
        check_files(folder, card)
    except UserError:
        sentences.append(f"{CARD} was edited, damaged or removed since the export; loading does not depend on it.")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if added := sorted(present - files.keys() - {CARD, MANIFEST}):
        sentences.append(f"Not part of the export, and not verified: {_few(added)}.")
    return sentences


def _verify_run(folder: Path) -> list[str]:
    sentences, damage = [], []
    for saved in sorted((folder / CHECKPOINTS).glob("step-*")):
        try:
            sentences.append(_verify_checkpoint(saved))
        except UserError as error:
            damage.append(str(error))
    if damage:
        raise UserError(f"{' '.join(damage[:3])} Undamaged checkpoints in {folder}: {len(sentences)}.")
    if not sentences:
        raise UserError(f"{folder / CHECKPOINTS} holds no checkpoint: nothing was verified.")
    others = sorted(path.name for path in folder.iterdir() if path.name != CHECKPOINTS)
    return [*sentences, f"No digest protects the other files of the run: {_few(others)}."] if others else sentences


def _verify_checkpoint(folder: Path) -> str:
    saved = checkpoint.load(folder)
    return f"{folder}, a checkpoint of step {saved.step:,}: {', '.join(saved.files)} are undamaged."


def _megabytes(files: Files) -> str:
    return f"{sum(entry['bytes'] for entry in files.values()) / 1e6:,.1f} MB"


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
