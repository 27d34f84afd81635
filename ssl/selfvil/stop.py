"""Requests to stop a run before its end: by a signal, by the recipe, or because the launcher ended.

A request takes effect between two micro-batches, on all processes at the same one: the micro-batches of an unfinished
step are discarded, the state after the last whole step is saved, and the same command continues from there.
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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; schedulers and launchers; a closed terminal; the warning before a time limit, as SLURM's --signal sends."""

STOPPED = 75
"""Exit status of a run that was stopped early with its state saved (EX_TEMPFAIL of sysexits.h: run it again)."""

PAUSE, COLLAPSE, ORPHANED = "pause_minutes", "monitor.on_collapse = stop", "the launcher ended"
"""Reasons for a stop other than signals."""

log = logging.getLogger("selfvil")


class Interrupted(BaseException):
    """Raised by a request to stop inside `StopRequest.interrupts`. Not an Exception, so that no handler hides it."""


class StopRequest:
    """Collects requests to stop, and lets all processes of a run agree on them. A context manager.

    The first signal is a request; a later one raises KeyboardInterrupt at once, without saving. Launchers pass on a
    signal that the terminal or the scheduler has already sent to every process, so signals within `SAME_SIGNAL`
    seconds of the first count as the same one. The previous handlers are restored at the end. In a thread that is not
    the main one, Python cannot set handlers: signals then do what they did before.

    Args:
        processes: of the run; with more than one, all must create this together.
        answers: whether this process prints that it received a signal.
    """

    SAME_SIGNAL = 3.0

    def __init__(self, processes: int = 1, answers: bool = True) -> None:
        self.reason: str | None = None
        """Why this process was asked to stop, if it was."""
        self._answers = answers
        self._signalled_at: float | None = None
        self._interrupts = False
        self._previous: dict[signal.Signals, Any] = {}
        # A group of its own, on the CPU: waiting for it does not wait for a GPU.
        self._group: Any = distributed.new_group(backend="gloo") if processes > 1 else None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            log.warning("this run is not in the main thread, so signals cannot ask it to stop")
            return self
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup, which means: continue when the terminal closes
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._sent is not None and error is None:
            self._sent[0].wait()

    def request(self, reason: str) -> None:
        """Ask for a stop from this process."""
        self.reason = self.reason or reason

    def agreed(self) -> bool:
        """Whether a process was asked to stop, the same on all processes. All must call this together.

        With several processes, a request is known one call later: the answer to a call is collected while the
        processes work on, so that none of them waits.
        """
        if self._group is None:
            return self.reason is not None
        asked = False
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            asked = bool(flag)
        flag = torch.tensor(int(self.reason is not None))
        self._sent = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True), flag
        return asked

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within, a signal raises Interrupted at once: for long work whose result may be discarded."""
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
            if self._answers:  # by a system call, since print must not be used within a signal handler
                answer = f"selfvil: {name}: stopping after this micro-batch; again to stop now, without saving\n"
                os.write(2, answer.encode())
            if self._interrupts:
                self._interrupts = False
                raise Interrupted
        elif time.monotonic() - self._signalled_at > self.SAME_SIGNAL:
            raise KeyboardInterrupt
