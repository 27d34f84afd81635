"""Ends a process that makes no progress, for example because a data worker or another process has stopped.

A thread of each process observes the main thread. If the main thread stays in one stage for longer than the limit, the
watchdog prints the process, the stage and the stacks of all threads, saves the state after the last complete step if
possible, and ends the process. It also detects that the launcher of a process was killed.
"""

import faulthandler
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from selfvil.stop import ORPHANED, StopRequest

STALLED = 4
"""Exit status of a run that was ended because it made no progress."""

LONG = 6
"""Limit, in multiples of `stall_minutes`, for stages in which one process works alone, such as an evaluation."""

_LAST_SAVE = 120.0  # seconds that the last save may take; the other processes wait for it
_KILL = 10.0  # seconds that a killed data worker may take to end

log = logging.getLogger("selfvil")


def longest_wait(stall_minutes: float | None) -> timedelta | None:
    """Timeout of collectives: longer than the limit of the watchdog, whose message is more useful."""
    return None if stall_minutes is None else timedelta(minutes=(LONG + 1) * stall_minutes) + timedelta(minutes=5)


class Watchdog:
    """Observes, inside its context, the thread that created it.

    Args:
        minutes: limit of one stage; None only detects the end of the launcher.
        rank, processes: rank of this process, and number of processes.
        stop: gets a request when the launcher ends, so that the run saves its state.
        save: saves the state after the last complete step, from another thread, and returns its path; None if one
            process cannot save alone (weights or optimizer state are sharded over processes).
    """

    def __init__(
        self,
        minutes: float | None,
        rank: int,
        processes: int,
        stop: StopRequest,
        save: Callable[[], Path | None] | None = None,
    ) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.rank, self.processes, self.stop, self.save = rank, processes, stop, save
        self.updating = threading.Lock()
        """Held by the main thread while it changes the state, and by the watchdog from its last save on."""
        self._stage, self._patience, self._waited, self._step = "starting", 1, 0.0, 0
        self._left = threading.Event()
        self._ends_process = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._watch, name="selfvil watchdog", daemon=True)
        self._launcher = _launcher()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def step(self, step: int) -> None:
        """Report that `step` optimizer steps are done and the next one begins."""
        self._step = step
        self._begin("computing a step", 1)

    @contextmanager
    def stage(self, name: str, patience: int = LONG) -> Iterator[None]:
        """In this context, the stage is called `name` and may take `patience` times the limit."""
        before = self._stage, self._patience
        self._begin(name, patience)
        try:
            yield
        finally:
            self._begin(*before)

    def _begin(self, stage: str, patience: int) -> None:
        self._stage, self._patience, self._waited = stage, patience, 0.0

    def _watch(self) -> None:
        pause = 1.0 if self.limit is None else min(1.0, self.limit / 10)
        last, orphaned = time.monotonic(), 0.0
        while not self._left.wait(pause):
            now = time.monotonic()
            # Time in which this process itself was stopped (SIGSTOP, Ctrl-Z) does not count.
            self._waited += min(now - last, 2 * pause)
            if self._launcher is not None and os.getppid() != self._launcher:
                self.stop.request(ORPHANED)
                orphaned += min(now - last, 2 * pause)
            last = now
            if orphaned > _LAST_SAVE:
                self._end("the launcher ended, and the run could not stop by itself")
            elif self.limit is not None and self._waited > self.limit * self._patience:
                self._report()
                if not self._ends_process:
                    return

    def _report(self) -> None:
        minutes = self._waited / 60
        who = f"process {self.rank} of {self.processes} on {socket.gethostname()}"
        _print(
            f"selfvil: {who} has made no progress for {minutes:.3g} minutes (run.stall_minutes) in step "
            f"{self._step + 1:,}, in the stage: {self._stage}. The stacks of its threads:"
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self.rank == 0:
            _print(f"selfvil: {self._last_save()}")
        if not self._ends_process:
            _print("selfvil: the run is not in the main thread, so the process is not ended")
            return
        if self.rank != 0:
            time.sleep(min(_LAST_SAVE, self.limit or 0))  # a launcher ends all processes when one has ended
        self._end(f"{who} ends with exit status {STALLED}")

    def _last_save(self) -> str:
        if self.save is None:
            return "nothing was saved, since optimizer state is sharded over processes; the last checkpoint is valid"
        if not self.updating.acquire(timeout=1):
            return "nothing was saved, since the process hangs while it updates weights; the last checkpoint is valid"
        result: list[str] = []

        def save() -> None:
            try:
                assert self.save is not None
                result.append(f"the state after the last complete step is saved in {self.save()}")
            except Exception as error:
                result.append(f"the state could not be saved ({error}); the last checkpoint is valid")

        thread = threading.Thread(target=save, daemon=True)  # a GPU that hangs would block this too
        thread.start()
        thread.join(_LAST_SAVE)
        return result[0] if result else "the state could not be saved in time; the last checkpoint is valid"

    def _end(self, why: str) -> None:
        _print(f"selfvil: {why}")
        workers = multiprocessing.active_children()  # data workers; a stopped one would not end with this process
        for worker in workers:
            worker.kill()
        for worker in workers:  # so that no worker is left after this process
            worker.join(_KILL)
        os._exit(STALLED)


def _print(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def _launcher() -> int | None:
    """Process id of the launcher that started this process, or None. A shell is not one: it may end before the run."""
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    names = ("torchrun", "accelerate", "torch.distributed", "accelerate.commands", "deepspeed")
    found: Any = any(os.path.basename(word).startswith(names) for word in words[:4])
    return parent if found else None
