"""Requests to stop a run before its end: by a signal, by the recipe, or because the launcher ended.

A request takes effect between two micro-batches, the same ones on all processes: the micro-batches of an unfinished
step are discarded, the state after the last complete step is saved, and the same command continues from there.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed

from selfvil.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent by Ctrl-C, schedulers and launchers, a closed terminal, and before a time limit (SLURM's --signal)."""

STOPPED = 75
"""Exit status of a run that was stopped early with its state saved (EX_TEMPFAIL in sysexits.h: run it again)."""

PAUSE, COLLAPSE, ORPHANED = "pause_minutes", "monitor.on_collapse = stop", "the launcher ended"
"""Reasons for a stop other than signals."""

log = logging.getLogger("selfvil")


class Stopped(UserError):
    """A run that is part of a longer command was stopped, with its state saved; the same command continues it."""

    exit_status = STOPPED


class Interrupted(BaseException):
    """Raised in `StopRequest.interrupts` by a request to stop. `except Exception` does not catch it."""


class StopRequest:
    """Collects requests to stop, and shares them between all processes of a run. A context manager.

    The first signal is a request; a later one raises KeyboardInterrupt immediately, without saving. A launcher may send
    a signal again that the terminal or the scheduler has sent to every process, so signals within `SAME_SIGNAL` seconds
    of the first are ignored. The previous handlers are restored at the end. Outside of the main thread, Python cannot
    set handlers, so signals keep their previous effect.

    Args:
        processes: number of processes of the run; with more than one, all must create this together.
        verbose: whether this process prints that it received a signal.
    """

    SAME_SIGNAL = 3.0

    def __init__(self, processes: int = 1, verbose: bool = True) -> None:
        self.reason: str | None = None
        """The reason of this process's request, if there is one."""
        self._verbose = verbose
        self._signalled_at: float | None = None
        self._interrupts = False
        self._previous: dict[signal.Signals, Any] = {}
        # A separate group on the CPU, so that its collectives do not synchronise with a GPU.
        self._group: Any = distributed.new_group(backend="gloo") if processes > 1 else None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            log.warning("this run is not in the main thread, so signals cannot stop it")
            return self
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup started this process: the run continues when the terminal is closed
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._sent is not None and error is None:
            self._sent[0].wait()

    def request(self, reason: str) -> None:
        """Request a stop from this process."""
        self.reason = self.reason or reason

    def agreed(self) -> bool:
        """Whether any process has a request to stop: the same result on all processes. All must call this together.

        With several processes, the result is that of the previous call: the collective of a call runs in the
        background until the next one, so no process has to wait for it.
        """
        if self._group is None:
            return self.reason is not None
        requested = False
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            requested = bool(flag)
        flag = torch.tensor(int(self.reason is not None))
        self._sent = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True), flag
        return requested

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """In this context, a signal raises Interrupted immediately: for long work whose result may be discarded."""
        self._interrupts = True
        try:
            if self.reason is not None:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            self.request(name)
            if self._verbose:  # by a system call, since a signal handler must not use print
                message = f"selfvil: {name}: stopping after this micro-batch; again to stop now, without saving\n"
                os.write(2, message.encode())
            if self._interrupts:
                self._interrupts = False
                raise Interrupted
        elif time.monotonic() - self._signalled_at > self.SAME_SIGNAL:
            raise KeyboardInterrupt
