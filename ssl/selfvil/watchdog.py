"""Ends a process that makes no progress, such as one that waits for a stopped data worker or a stopped process.

A thread of each process watches what the main thread does. When that stays in one stage for longer than its bound,
the thread prints which process and which stage it is, with the stacks of all threads, saves the state after the last
whole step if it can, and ends the process. It also notices when the launcher of a process was killed.
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
"""The bound of stages in which one process works while the others wait, such as an evaluation, over `stall_minutes`."""

_LAST_SAVE = 120.0  # seconds that the last save may take, for which the other processes wait
_KILL = 10.0  # seconds that a killed data worker may take to end

log = logging.getLogger("selfvil")


def longest_wait(stall_minutes: float | None) -> timedelta | None:
    """How long a collective may take before the backend ends it: longer than the watchdog, which explains more."""
    return None if stall_minutes is None else timedelta(minutes=(LONG + 1) * stall_minutes) + timedelta(minutes=5)


class Watchdog:
    """Watches the thread that creates it, from entering the context to leaving it.

    Args:
        minutes: bound on one stage; None watches only for the end of the launcher.
        rank, processes: of this process in the run.
        stop: told when the launcher ends, so that the run saves its state.
        save: saves the state after the last whole step, from another thread, and returns where; None where one process
            cannot (weights or optimizer state divided among processes).
    """

    def __init__(
        self,
        minutes: float | None,
        rank: int,
        processes: int,
        stop: StopRequest,
        save: Callable[[], Path | None] | None = None,
    ) -> None:
        self.bound = None if minutes is None else 60 * minutes
        self.rank, self.processes, self.stop, self.save = rank, processes, stop, save
        self.updating = threading.Lock()
        """Held by the main thread while it changes the state, and for good once the last save has begun."""
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
        """`step` optimizer steps are done, and the next one begins."""
        self._step = step
        self._begin("computing a step", 1)

    @contextmanager
    def stage(self, name: str, patience: int = LONG) -> Iterator[None]:
        """The work within is called `name` and may take `patience` times the bound."""
        before = self._stage, self._patience
        self._begin(name, patience)
        try:
            yield
        finally:
            self._begin(*before)

    def _begin(self, stage: str, patience: int) -> None:
        self._stage, self._patience, self._waited = stage, patience, 0.0

    def _watch(self) -> None:
        pause = 1.0 if self.bound is None else min(1.0, self.bound / 10)
        last, orphaned = time.monotonic(), 0.0
        while not self._left.wait(pause):
            now = time.monotonic()
            # Time in which this process was itself stopped (SIGSTOP, Ctrl-Z) does not count.
            self._waited += min(now - last, 2 * pause)
            if self._launcher is not None and os.getppid() != self._launcher:
                self.stop.request(ORPHANED)
                orphaned += min(now - last, 2 * pause)
            last = now
            if orphaned > _LAST_SAVE:
                self._end("the launcher ended, and the run could not stop by itself")
            elif self.bound is not None and self._waited > self.bound * self._patience:
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
            _print(f"selfvil: {self._save_what_there_is()}")
        if not self._ends_process:
            _print("selfvil: the run is not in the main thread, so the process is not ended")
            return
        if self.rank != 0:
            time.sleep(min(_LAST_SAVE, self.bound or 0))  # a launcher ends all processes when one has ended
        self._end(f"{who} ends with exit status {STALLED}")

    def _save_what_there_is(self) -> str:
        if self.save is None:
            return "nothing was saved, since optimizer state is divided among processes; the last checkpoint is sound"
        if not self.updating.acquire(timeout=1):
            return "nothing was saved, since the process hangs while it updates weights; the last checkpoint is sound"
        result: list[str] = []

        def save() -> None:
            try:
                assert self.save is not None
                result.append(f"the state after the last whole step is saved in {self.save()}")
            except Exception as error:
                result.append(f"the state could not be saved ({error}); the last checkpoint is sound")

        thread = threading.Thread(target=save, daemon=True)  # a GPU that hangs would hang this too
        thread.start()
        thread.join(_LAST_SAVE)
        return result[0] if result else "the state could not be saved in time; the last checkpoint is sound"

    def _end(self, why: str) -> None:
        _print(f"selfvil: {why}")
        workers = multiprocessing.active_children()  # data workers; a stopped one would outlive this process
        for worker in workers:
            worker.kill()
        for worker in workers:  # so that nothing is left when this process has ended
            worker.join(_KILL)
        os._exit(STALLED)


def _print(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def _launcher() -> int | None:
    """Process id of the launcher that started this process, if one did; a shell is none, which may end before a run."""
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    names = ("torchrun", "accelerate", "torch.distributed", "accelerate.commands", "deepspeed")
    found: Any = any(os.path.basename(word).startswith(names) for word in words[:4])
    return parent if found else None
