"""Checkpoints saved in the background: training continues as soon as the state is copied to host memory."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfvil import checkpoint

State = dict[str, dict[str, Tensor]]
"""Group -> name -> tensor, as `checkpoint.save` takes it."""


class BackgroundSaver:
    """Writes the checkpoints of a run, one at a time, in a thread of the main process.

    A failed save does not end the run immediately: `take_failure` returns the reason, and the loop then stops. As with
    `checkpoint.save`, a process that is killed during a save does not change older checkpoints.

    Args:
        root: folder of the checkpoints.
        keep: number of undamaged checkpoints to keep.
        milestone_every: checkpoints of steps that this number divides are never removed; None has no milestones.
        check: called with the step and all tensors before anything is written; raises UserError to reject them.
    """

    def __init__(
        self, root: Path, keep: int, milestone_every: int | None, check: Callable[[int, dict[str, Tensor]], None]
    ) -> None:
        self.root, self.keep, self.milestone_every, self.check = root, keep, milestone_every, check
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._first: Exception | None = None

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:  # a request to stop without saving
            self._thread.join()

    def take_failure(self) -> str | None:
        """Why the last save failed, once; None where none has, or where it is still running.

        If the next save fails too, `wait` raises this first error, which is nearer to the cause.
        """
        if self._error is None:
            return None
        self._first, self._error = self._error, None
        return str(self._first)

    @torch.no_grad()
    def start(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Copy `state` to host memory and start writing it, after the previous save has ended.

        Raises UserError if the previous save failed.
        """
        self.wait()
        copied = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in state.items()
        }
        # A daemon, so that a second Ctrl-C ends the process immediately; an interrupted save leaves no checkpoint.
        self._thread = threading.Thread(
            target=self._write, args=(step, copied, meta), name="selfvil checkpoint", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Return when no save is running; a failure stays for `take_failure` or `wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when no save is running. Raises the exception of the last one, such as UserError, if it failed."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def save(self, step: int, state: State, meta: dict[str, Any]) -> Path:
        """Write `state` in this thread, after the previous save has ended. Raises UserError if it cannot be written."""
        self.join()
        return self._save(step, state, meta)

    def _write(self, step: int, state: State, meta: dict[str, Any]) -> None:
        try:
            self._save(step, state, meta)
            self._first = None
        except Exception as error:  # raised again by `wait` in the training thread
            self._error = self._first or error

    def _save(self, step: int, state: State, meta: dict[str, Any]) -> Path:
        self.check(step, {name: tensor for tensors in state.values() for name, tensor in tensors.items()})
        return checkpoint.save(self.root, step, state, meta, self.keep, self.milestone_every)
