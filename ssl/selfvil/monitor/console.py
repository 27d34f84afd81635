"""The progress of a run: a bar on a terminal; otherwise, as in a log file, one line every 30 seconds."""

import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from selfvil import terminal
from selfvil.files import Outputs

EVERY = 30.0
"""Seconds between two lines if standard output is no terminal."""


class ProgressLine:
    """Prints step, loss, images per second and the remaining time, if `enabled` (on the main process).

    Without a terminal, a line is printed about every `EVERY` seconds, and one after the last step. A closed standard
    output is recorded in `outputs`, and nothing more is printed.
    """

    def __init__(
        self, start_step: int, total_steps: int, enabled: bool, clock: Callable[[], float] = time.monotonic,
        outputs: Outputs | None = None,
    ) -> None:  # fmt: skip
        self._outputs = outputs or Outputs()
        self.enabled, self.start_step, self.total_steps = enabled, start_step, total_steps
        self._clock, self._printed = clock, clock()
        self._first_done = 0.0  # end of the first step of this launch, which includes the start of the workers
        self._note = ""
        self._bar: Progress | None = None
        if enabled and sys.stdout is not None and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("pretrain"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=terminal.console(),
            )  # fmt: skip
            self._task = self._bar.add_task("pretrain", total=total_steps, completed=start_step, note="")
            self._bar.start()

    def step(self, step: int) -> None:
        """Report that `step` optimizer steps are done. After two steps of a launch, estimate the remaining time."""
        if self._bar:
            self._bar.update(self._task, completed=step)
        done, now = step - self.start_step, self._clock()
        if done == 1:
            self._first_done = now
        elif done == 2 and step < self.total_steps:
            self.print_line(f"about {duration(self._left(step))} left")
        if now - self._printed >= EVERY and step < self.total_steps:
            self._print(step)

    def log(self, step: int, loss: float, images_per_second: float) -> None:
        """Set the latest mean loss and speed."""
        self._note = f"loss {loss:.4f} · {images_per_second:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, note=self._note)
        elif step == self.total_steps:
            self._print(step)

    def print_line(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(message)
        else:
            self._write(message)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _print(self, step: int) -> None:
        self._printed = self._clock()
        if not self._bar:
            left = f"about {duration(self._left(step))} left" if step - self.start_step > 1 else ""
            parts = [f"step {step:>7,}/{self.total_steps:,}", self._note, left if step < self.total_steps else "done"]
            self._write(" · ".join(part for part in parts if part))

    def _write(self, text: str) -> None:
        if self.enabled:
            with self._outputs.writing("standard output"):
                print(text, flush=True)
                return
            self.enabled = False

    def _left(self, step: int) -> float:
        """Remaining seconds, by the mean time of this launch's steps without its first."""
        return (self._clock() - self._first_done) / (step - self.start_step - 1) * (self.total_steps - step)


def duration(seconds: float) -> str:
    """A duration in its two largest units: 40 s, 12 min, 3 h 20 min, 2 days 4 h."""
    if seconds < 100:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
