"""The damaged samples of a run, and a limit on their number."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

_FEWEST_BAD = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read or decoded, at the position where it was met, and the id that took its place."""

    position: int
    id: int
    shard: str
    key: str
    reason: str
    replaced_by: int


class Ledger:
    """The damaged samples of a run: one JSON line for each, in the run's folder, and one limit for the whole run.

    Process 0 writes `ledger.jsonl`, process r `ledger-r.jsonl`. Each reads all of them at the start, so that a run that
    goes on with another number of processes forgets none. While it runs, the processes exchange `unshared()` and pass
    what all of them gave to `merge`; a sample that several met counts once.

    The limit is `max_bad` (a share) of the data set's samples, but at least 10, so that a small data set survives a
    few; with `max_bad` 0 the first one is too many.
    """

    def __init__(self, folder: Path, num_samples: int, max_bad: float = 0.001, rank: int = 0) -> None:
        self.folder, self.num_samples = Path(folder), num_samples
        self.path = self.folder / (f"ledger-{rank}.jsonl" if rank else "ledger.jsonl")
        self.limit = max(_FEWEST_BAD, int(max_bad * num_samples)) if max_bad > 0 else 0
        self._ids: set[int] = set()
        self._unwritten = ""
        for path in (self.folder / "ledger.jsonl", *sorted(self.folder.glob("ledger-*.jsonl"))):
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            self._ids |= _ids(text, num_samples)
            if path == self.path and text and not text.endswith("\n"):  # a crash cut the last line
                self._unwritten = "\n"
        self._unshared = set(self._ids)

    def __len__(self) -> int:
        """Distinct damaged samples so far, those of earlier launches included."""
        return len(self._ids)

    def record(self, bad: Iterable[BadSample]) -> None:
        """Enter what was not entered before. What cannot be written now, as on a full disk, is counted, and written
        with the next samples."""
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
                    os.truncate(self.path, written)  # no half line
                    raise
            self._unwritten = ""
        except OSError as error:
            _log.warning("%s cannot be written: %s; its %d samples are kept in memory", self.path, error, len(self))

    def unshared(self) -> list[int]:
        """The ids that this process has not passed to the others yet."""
        new = sorted(self._unshared)
        self._unshared.clear()
        return new

    def merge(self, ids: Iterable[int]) -> None:
        """Count what other processes met; it stands in their files."""
        self._ids.update(ids)

    def excess(self) -> str | None:
        """A sentence for the user where more samples are damaged than the limit allows, else None."""
        if len(self) <= self.limit:
            return None
        return (
            f"{len(self):,} of {self.num_samples:,} samples are damaged, more than the {self.limit:,} that "
            f"data.max_bad allows; they are listed in {self.folder}/ledger*.jsonl: raise data.max_bad to go on, or "
            "delete these files if the samples can be read again"
        )


def _ids(text: str, num_samples: int) -> set[int]:
    """The ids in the lines of a ledger; lines that are cut or damaged are passed over."""
    found = set()
    for line in text.splitlines():
        try:
            id = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(id, int) and 0 <= id < num_samples:
            found.add(id)
    return found
