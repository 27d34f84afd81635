"""Flipped bits and truncated files: the original content is read, or the damage is reported; no wrong result."""

import hashlib
import logging
import random
import shutil
from pathlib import Path

import selfvil
from faults.children import FINISHED, REFUSED, Ended, run
from faults.crashes import command, undisturbed
from faults.rows import Row
from runs import state
from selfvil.data.index import open_shards
from selfvil.data.read import DamagedImage
from selfvil.errors import UserError
from selfvil.export import export


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file and return how: a flipped bit (most often), truncated, emptied, or a part set to zero."""
    original = path.read_bytes()
    content = bytearray(original)
    kind = draw.choice(["flip", "flip", "flip", "cut", "empty", "zeros"])
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "empty":
        content.clear()
    else:
        end = min(len(content), at + 64)
        content[at:end] = bytes(end - at)
    if content == original:  # there were zeros before
        content[at] ^= 1
    path.write_bytes(content)
    return f"{path.name}, {kind} at byte {at}"


def damaged_runs(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """One damaged file of a run that stopped half-way; then the command again."""
    draw, row = random.Random(seed), Row("a damaged file in a run's folder, then resumed")
    whole = undisturbed(shards, folder)
    expected = state(whole)
    paused = folder / "paused"
    ended = run(command(shards, paused, "run.checkpoint_every=1", "budget.pause_minutes=1e-6"), folder / "log")
    assert ended.one_sentence, ended.text
    again = run(command(shards, paused, "run.checkpoint_every=1", "budget.pause_minutes=1e-6"), folder / "log")
    assert again.one_sentence, again.text  # two checkpoints now
    files = sorted(path.relative_to(paused) for path in paused.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(count):
        out = Path(shutil.copytree(paused, folder / f"damaged-{number}"))
        what = damage(out / draw.choice(files), draw)
        ended = run(command(shards, out, "run.checkpoint_every=1"), folder / f"damaged-{number}.log")
        row.add(what, _wrong_run(ended, out, expected))
        shutil.rmtree(out)
    return row


def _wrong_run(ended: Ended, out: Path, expected: dict) -> str | None:
    if not ended.one_sentence:
        return f"a traceback: {ended.text.strip().splitlines()[-1][:200]}"
    if ended.status == REFUSED:
        return None
    if ended.status != FINISHED:
        return f"status {ended.status}"
    found = state(out)
    same = found.keys() == expected.keys() and all(bool((found[key] == expected[key]).all()) for key in found)
    return None if same else "it finishes with other weights"


def damaged_exports(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """One damaged file of an export; then `selfvil.load_backbone` must refuse it."""
    draw, row = random.Random(seed), Row("a damaged file in an export, then selfvil.load_backbone")
    refused, exported = 0, folder / "exported"
    export(undisturbed(shards, folder), exported)
    for number in range(count):
        out = Path(shutil.copytree(exported, folder / f"export-{number}"))
        what = damage(out / draw.choice(["model.safetensors", "config.json"]), draw)
        ended = run(lambda out=out: selfvil.load_backbone(out), folder / f"export-{number}.log")
        refused += ended.status == REFUSED
        row.add(what, None if ended.status == REFUSED else f"status {ended.status}: {ended.text.strip()[-200:]}")
        shutil.rmtree(out)
    row.notes.append(f"{refused} refused by a sentence")
    return row


def damaged_shards(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """Damage in an indexed shard. An image has its original bytes or is refused; never other bytes."""
    draw, row = random.Random(seed), Row("damage in an indexed shard")
    source = next(iter(sorted(shards.glob("*.tar"))))
    original = open_shards(source)
    digests = [hashlib.sha256(original.read(i)).digest() for i in range(len(original))]
    log = _Messages()
    for number in range(count):
        out = folder / f"shard-{number}"
        out.mkdir()
        copy = Path(shutil.copy(source, out / source.name))
        open_shards(copy)
        what = damage(copy, draw)
        log.clear()
        row.add(what, _wrong_shard(copy, digests, log))
        shutil.rmtree(out)
    log.close()
    return row


def _wrong_shard(shard: Path, digests: list[bytes], log: "_Messages") -> str | None:
    try:
        opened = open_shards(shard)
    except UserError:
        return None
    if len(opened) != len(digests) and not log.messages:
        return f"{len(opened)} samples in place of {len(digests)}, and nothing is said"
    for number in range(min(len(opened), len(digests))):
        try:
            same = hashlib.sha256(opened.read(number)).digest() == digests[number]
        except DamagedImage:
            continue
        if not same and not log.messages:
            return f"sample {number} has other bytes, and nothing is said"
    return None


class _Messages(logging.Handler):
    """The warnings that selfvil logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("selfvil").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def clear(self) -> None:
        self.messages.clear()

    def close(self) -> None:
        logging.getLogger("selfvil").removeHandler(self)
        super().close()


def damaged_indexes(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """A damaged index of a shard: it is built again, or its original content is read."""
    draw, row = random.Random(seed), Row("a damaged index beside a shard")
    source = next(iter(sorted(shards.glob("*.tar"))))
    original = open_shards(source)
    for number in range(count):
        out = folder / f"index-{number}"
        out.mkdir()
        copy = Path(shutil.copy2(source, out / source.name))
        open_shards(copy)
        what = damage(next(iter(out.glob("*.npz"))), draw)
        try:
            opened = open_shards(copy)
            same = opened.fingerprint == original.fingerprint and opened.read(3) == original.read(3)
            wrong = None if same else "it is read wrong"
        except Exception as error:  # any exception is a failure of this test
            wrong = f"{type(error).__name__}: {error}"
        row.add(what, wrong)
        shutil.rmtree(out)
    return row
