"""The list of a run's damaged samples, and a limit on their number."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from selfvil.records import ledger_file, ledger_files

_FEWEST_BAD = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or decoded, the position where it occurred, and the id of its replacement, -1 if
    it was left out. source: its name, in a mixture."""

    position: int
    id: int
    shard: str
    key: str
    reason: str
    replaced_by: int
    source: str = ""


class Ledger:
    """The damaged samples of a run: one JSON line for each in the run's folder, and one limit for the whole run.

    Process 0 writes `ledger.jsonl`, process r `ledger-r.jsonl`. Each process reads all these files at the start, so a
    run that resumes with another number of processes keeps its list. During the run, the processes exchange
    `unshared()` and pass the union to `merge`. A sample that several processes met counts once.

    The limit is the share `max_bad` of the data set's samples, but at least 10, so that a small data set tolerates a
    few. With `max_bad` 0, one damaged sample exceeds it.
    """

    def __init__(self, folder: Path, num_samples: int, max_bad: float = 0.001, rank: int = 0) -> None:
        self.folder, self.num_samples = Path(folder), num_samples
        self.path = ledger_file(self.folder, rank)
        self.limit = max(_FEWEST_BAD, int(max_bad * num_samples)) if max_bad > 0 else 0
        self._ids: set[int] = set()
        self._unwritten = ""
        for path in ledger_files(self.folder):
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            self._ids |= _ids(text, num_samples)
            if path == self.path and text and not text.endswith("\n"):  # a crash truncated the last line
                self._unwritten = "\n"
        self._unshared = set(self._ids)

    def __len__(self) -> int:
        """Number of different damaged samples so far, earlier launches included."""
        return len(self._ids)

    def record(self, bad: Iterable[BadSample]) -> None:
        """Add samples that are not in the list yet. If the file cannot be written, as on a full disk, they count
        nevertheless, and are written with the next ones."""
        new = {sample.id: sample for sample in bad if sample.id not in self._ids}
        if not new:
            return
        self._ids |= new.keys()
        self._unshared |= new.keys()
        self._unwritten += "".join(json.dumps(asdict(sample)) + "\n" for sample in new.values())
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                written = file.tell()
                try:
                    file.write(self._unwritten)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, written)  # leave no incomplete line
                    raise
            self._unwritten = ""
        except OSError as error:
            _log.warning("%s cannot be written: %s; its %d samples are kept in memory", self.path, error, len(self))

    def unshared(self) -> list[int]:
        """The ids that this process has not sent to the others yet."""
        new = sorted(self._unshared)
        self._unshared.clear()
        return new

    def merge(self, ids: Iterable[int]) -> None:
        """Count the samples of other processes. They are written to the files of those processes."""
        self._ids.update(ids)

    def excess(self) -> str | None:
        """A sentence for the user if more samples are damaged than the limit allows, else None."""
        if len(self) <= self.limit:
            return None
        return (
            f"{len(self):,} of {self.num_samples:,} samples are damaged, more than the {self.limit:,} that "
            f"data.max_bad allows; they are listed in {self.folder}/ledger*.jsonl: raise data.max_bad to continue, or "
            "delete these files if the samples can be read again"
        )


def _ids(text: str, num_samples: int) -> set[int]:
    """The ids in the lines of a ledger; damaged lines are skipped."""
    found = set()
    for line in text.splitlines():
        try:
            id = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(id, int) and 0 <= id < num_samples:
            found.add(id)
    return found
