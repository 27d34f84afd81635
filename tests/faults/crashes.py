"""Kills, crashes and full disks: the same command must then finish, with the weights of an uninterrupted run."""

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.children import FINISHED, REFUSED, Child, Ended, count_writes, die_at, fill_disk_at, run
from faults.rows import Row
from runs import PACKAGED, assert_same_state, overrides
from selfvil.cli import main
from selfvil.data.index import open_shards
from selfvil.data.pack import pack
from selfvil.export import export
from selfvil.weights import load_pretrained

STEPS = 6


def command(shards: Path, out: Path, *more: str, objective: str = "mae") -> Callable[[], None]:
    """`selfvil pretrain` of a small run of 6 steps, as a function; a checkpoint after every second step."""
    steps = [f"budget.steps={STEPS}", "run.checkpoint_every=2", "monitor.log_every=2"]
    arguments = ["pretrain", PACKAGED[objective], *overrides(objective, shards, out, *steps, *more)]
    return lambda: main(arguments)


def undisturbed(shards: Path, folder: Path, objective: str = "mae") -> Path:
    """An uninterrupted run."""
    ended = run(command(shards, folder / f"undisturbed-{objective}", objective=objective), folder / "log")
    assert ended.status == FINISHED, ended.text
    return folder / f"undisturbed-{objective}"


def finishes(shards: Path, out: Path, whole: Path, objective: str = "mae") -> str | None:
    """Run the command again, and return what is wrong with its end, or None."""
    ended = run(command(shards, out, objective=objective), out.with_suffix(".log"))
    if ended.status != FINISHED:
        return f"the same command is refused or fails: {last_line(ended)}"
    try:
        assert_same_state(whole, out)
    except AssertionError as error:
        return str(error)
    return None


def random_kills(shards: Path, folder: Path, count: int, seed: int = 0, objective: str = "mae") -> Row:
    """SIGKILL at a random moment of a run, with data workers in every second run; then the same command again."""
    draw, row = random.Random(seed), Row(f"kill -9 at a random moment ({objective})")
    whole = undisturbed(shards, folder, objective)
    began = time.monotonic()
    run(command(shards, folder / "timed", objective=objective), folder / "log")
    seconds = time.monotonic() - began
    for number in range(count):
        out = folder / f"killed-{objective}-{number}"
        child = Child(command(shards, out, f"data.workers={number % 2}", objective=objective), out.with_suffix(".log"))
        time.sleep(draw.uniform(0, seconds))
        child.signal(signal.SIGKILL)
        child.wait()
        row.add(f"kill {number}", finishes(shards, out, whole, objective))
        shutil.rmtree(out, ignore_errors=True)
    return row


def crash_points(shards: Path, folder: Path, every: int = 1, full_disk: bool = False) -> Row:
    """End a run just before its n-th file operation, or let the disk be full from then on; then the command again."""
    row = Row("full disk from a file operation on" if full_disk else "crash before a file operation")
    whole = undisturbed(shards, folder)
    fault = fill_disk_at if full_disk else die_at
    for number in range(0, _operations(command(shards, folder / "counted"), folder / "counted"), every):
        out = folder / f"point-{number}"

        def disturbed(out: Path = out, number: int = number) -> None:
            fault(out, number)
            command(shards, out)()

        ended = run(disturbed, out.with_suffix(".log"))
        wrong = None if ended.one_sentence else f"it ends in a traceback: {last_line(ended)}"
        row.add(f"operation {number}", wrong or finishes(shards, out, whole))
        shutil.rmtree(out, ignore_errors=True)
    return row


def crash_points_of_writers(shards: Path, folder: Path, every: int = 1, full_disk: bool = False) -> Row:
    """The same for `pack`, `export` and an index: their output is complete, or absent and can be written again."""
    row = Row(f"{'full disk' if full_disk else 'crash'} in pack, export and index")
    whole = undisturbed(shards, folder)

    def copied(out: Path) -> None:
        for shard in shards.glob("*.tar"):
            shutil.copy(shard, out)

    for writer in (
        Writer("pack", lambda out: pack(str(shards / "digits-*.tar"), out / "packed", workers=1), _check_packed),
        Writer("export", lambda out: export(whole, out / "exported"), lambda out: load_pretrained(out / "exported")),
        Writer("index", lambda out: open_shards(out / "*.tar"), lambda out: open_shards(out / "*.tar").read(0), copied),
    ):
        _crash_points_of(writer, row, folder, every, fill_disk_at if full_disk else die_at)
    return row


@dataclass(frozen=True)
class Writer:
    """Work that prepares a folder, writes into it, and checks what was written."""

    name: str
    write: Callable[[Path], object]
    check: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda out: None


def _crash_points_of(writer: Writer, row: Row, folder: Path, every: int, fault: Callable[[Path, int], None]) -> None:
    def fresh(suffix: object) -> Path:
        out = folder / f"{writer.name}-{suffix}"
        out.mkdir()
        writer.prepare(out)
        return out

    counted = fresh("counted")
    for number in range(0, _operations(lambda: writer.write(counted), counted), every):
        out = fresh(number)

        def disturbed(out: Path = out, number: int = number) -> None:
            fault(out, number)
            writer.write(out)

        ended = run(disturbed, out.with_suffix(".log"))
        wrong = None if ended.one_sentence else f"it ends in a traceback: {last_line(ended)}"
        row.add(f"{writer.name}, operation {number}", wrong or _redone(writer, out))
        shutil.rmtree(out, ignore_errors=True)


def _redone(writer: Writer, out: Path) -> str | None:
    """Repeat the work if its output is absent, and check the result."""
    log = out.with_suffix(".log")
    if writer.name == "index" or not (out / f"{writer.name}ed").exists():
        again = run(lambda: writer.write(out), log)
        if again.status != FINISHED:
            return f"it cannot be done again: {last_line(again)}"
    checked = run(lambda: writer.check(out), log)
    return None if checked.status == FINISHED else f"what it left is not whole: {last_line(checked)}"


def _check_packed(out: Path) -> None:
    shards = open_shards(out / "packed")
    assert len(shards) == 200
    for number in range(0, 200, 20):
        shards.read(number)


def _operations(work: Callable[[], object], folder: Path) -> int:
    """The number of operations on files below `folder` without a fault."""
    log = folder.with_suffix(".count")

    def counted() -> None:
        read = count_writes(folder)
        with contextlib.suppress(SystemExit):
            work()
        print(f"operations={read()}")

    ended = run(counted, log)
    assert ended.status in (FINISHED, REFUSED), ended.text
    return int(ended.text.rpartition("operations=")[2])


def last_line(ended: Ended) -> str:
    """Exit status and last line of the output, for a report."""
    lines = ended.text.strip().splitlines()
    return f"status {ended.status}, {lines[-1] if lines else 'nothing printed'}"[:300]
