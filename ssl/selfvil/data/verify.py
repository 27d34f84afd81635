"""Read packed shards back: `selfvil pack --verify`."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from selfvil.data.check import examine
from selfvil.data.index import Progress, Shards, open_shards
from selfvil.data.processes import map_processes
from selfvil.data.read import DamagedImage
from selfvil.errors import UserError
from selfvil.files import flush_file

_CHUNK = 32


@dataclass(frozen=True)
class Verification:
    """samples: number that was read back. unchanged: of these, how many have the bytes of their source file; the others
    were resized or converted. problems: (key, problem)."""

    samples: int
    unchanged: int
    problems: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        changed = self.samples - self.unchanged
        text = f"verified: {self.samples:,} samples read back and decoded, {changed:,} of them resized or converted"
        return f"{text}; {len(self.problems):,} problems" if self.problems else f"{text}; no problems"


def verify_pack(out: Path, workers: int | None = None, progress: Progress | None = None) -> Verification:
    """Read every sample of a folder that `pack` wrote, from the disk.

    Bytes must have the CRC-32 of the index, decode to pixels, and be listed in sources.tsv under the same key, in the
    same order.

    Raises UserError: the folder, or its sources.tsv, cannot be read.
    """
    try:
        lines = (out / "sources.tsv").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{out / 'sources.tsv'} cannot be read ({error.strerror or error}); --verify is for folders of selfvil pack"
        ) from None
    rows = [line.split("\t") for line in lines]
    shards = open_shards(out)
    for path in out.glob("*.tar"):
        flush_file(path)  # so that the disk is read, not the page cache
    problems: list[tuple[str, str]] = []
    if len(rows) != len(shards):
        problems.append(("", f"the shards hold {len(shards):,} samples, sources.tsv lists {len(rows):,}"))
    count, unchanged = min(len(rows), len(shards)), 0
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    done = 0
    for part in map_processes(partial(_read_back, shards), chunks, workers):
        for i, (key, origin, problem) in enumerate(part, done):
            if problem:
                problems.append((key, problem))
            elif key != rows[i][0]:
                problems.append((key, f"sources.tsv lists {rows[i][0]} here"))
            unchanged += origin == rows[i][-1]
        done += len(part)
        if progress is not None:
            progress(done, count)
    return Verification(count, unchanged, problems)


def _read_back(shards: Shards, i: int) -> tuple[str, str, str]:
    """The key of sample i, the hash of its bytes as in sources.tsv, and what is wrong with it, or ""."""
    key = shards.key(i)
    try:
        data = shards.read(i)
        examine(data)
    except DamagedImage as damage:
        return key, "", str(damage)
    return key, hashlib.sha256(data).hexdigest()[:16], ""
