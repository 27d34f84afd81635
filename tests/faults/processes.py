"""Signals, two launches into one folder, stopped and killed processes: each run ends in bounded time, and resumes."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil

from faults.children import FINISHED, REFUSED, Child, run
from faults.crashes import command, finishes, last_line, undisturbed
from faults.rows import Row
from selfvil import checkpoint
from selfvil.stop import STOPPED
from selfvil.watchdog import STALLED

INTERRUPTED = 130


def signals(shards: Path, folder: Path, each: int, seed: int = 0) -> Row:
    """Every signal that requests a stop, at random moments of a run; then the same command again."""
    draw, row, slowest = random.Random(seed), Row("a signal at a random moment"), 0.0
    whole = undisturbed(shards, folder)
    seconds = run(command(shards, folder / "timed"), folder / "log").seconds
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        for count in range(each):
            out = folder / f"{number.name}-{count}"
            child = Child(command(shards, out, f"data.workers={count % 2}"), out.with_suffix(".log"))
            time.sleep(draw.uniform(0, seconds))
            child.signal(number)
            sent = time.monotonic()
            ended = child.wait()
            slowest = max(slowest, time.monotonic() - sent)
            # Before the run has started, a signal has its default effect: there is nothing to save yet.
            early = ended.status == (INTERRUPTED if number == signal.SIGINT else -number)
            saved = ended.status == STOPPED and checkpoint.newest(out / "checkpoints") is not None
            wrong = None if early or saved or ended.status == FINISHED else f"it ends with {last_line(ended)}"
            row.add(f"{number.name} {count}", wrong or finishes(shards, out, whole))
            shutil.rmtree(out, ignore_errors=True)
    row.notes.append(f"longest time from the signal to the end {slowest:.1f} s")
    return row


def two_launches(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """Two launches into one new folder, started within a fraction of a second: one runs, the other is refused."""
    draw, row = random.Random(seed), Row("two launches into one folder")
    whole = undisturbed(shards, folder)
    for number in range(count):
        out = folder / f"both-{number}"
        first = Child(command(shards, out), folder / f"first-{number}.log")
        time.sleep(draw.uniform(0, 0.5))
        second = Child(command(shards, out), folder / f"second-{number}.log")
        ended = [first.wait(), second.wait()]
        # If the first has finished, the second finds a finished run, which is no fault.
        wrong = None
        if FINISHED not in (statuses := sorted(each.status for each in ended)) or statuses[1] not in (
            FINISHED,
            REFUSED,
        ):
            wrong = f"they end with {' and '.join(map(last_line, ended))}"
        row.add(f"pair {number}", wrong or finishes(shards, out, whole))
        shutil.rmtree(out, ignore_errors=True)
    return row


def killed_workers(shards: Path, folder: Path, count: int, seed: int = 0) -> Row:
    """SIGKILL to a data worker, as when memory runs out: save and one sentence; then the command again."""
    draw, row = random.Random(seed), Row("a data worker killed")
    whole = undisturbed(shards, folder)
    for number in range(count):
        out = folder / f"worker-{number}"
        child = Child(command(shards, out, "data.workers=1"), out.with_suffix(".log"))
        worker = _worker_of(child)
        if worker is not None:
            time.sleep(draw.uniform(0, 0.3))
            _send(worker, signal.SIGKILL)
        ended = child.wait()
        wrong = None if ended.status in (FINISHED, REFUSED) and ended.one_sentence else f"{last_line(ended)}"
        row.add(f"worker {number}", wrong or finishes(shards, out, whole))
        shutil.rmtree(out, ignore_errors=True)
    return row


def stopped_workers(shards: Path, folder: Path, count: int, bound: float = 0.05) -> Row:
    """SIGSTOP to a data worker: the watchdog ends the run after run.stall_minutes = `bound`; then the command again."""
    row, slowest = Row("a data worker stopped"), 0.0
    whole = undisturbed(shards, folder)
    for number in range(count):
        out = folder / f"stopped-{number}"
        child = Child(command(shards, out, "data.workers=1", f"run.stall_minutes={bound}"), out.with_suffix(".log"))
        worker = _worker_of(child)
        if worker is not None:
            _send(worker, signal.SIGSTOP)
        began = time.monotonic()
        ended = child.wait(120)
        slowest = max(slowest, time.monotonic() - began)
        wrong = None if ended.status in (STALLED, FINISHED) else f"it ends with {last_line(ended)}"
        if worker is not None and worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            wrong = wrong or "the worker outlives the run"
            worker.kill()
        row.add(f"worker {number}", wrong or finishes(shards, out, whole))
        shutil.rmtree(out, ignore_errors=True)
    row.notes.append(f"bound {60 * bound:.0f} s, longest time to the end {slowest:.1f} s")
    return row


def _worker_of(child: Child) -> psutil.Process | None:
    """The first data worker that the child starts; None if it ends without one.

    A worker is a fork of its parent for good. So is git for a moment, before it is git; stopped then, it would hold up
    the parent inside of vfork, which no watchdog can end.
    """
    seen: set[int] = set()
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(child.pid)
            forks = [process for process in parent.children() if process.cmdline() == parent.cmdline()]
            if found := [process for process in forks if process.pid in seen]:
                return found[0]
            seen = {process.pid for process in forks}
        time.sleep(0.01)
    return None


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
