"""The progress line of a run: a bar on a terminal, plain lines everywhere else."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressLine:
    """Shows step, loss, images per second and the time left. Silent on all processes but the main one."""

    def __init__(self, start_step: int, total_steps: int, enabled: bool) -> None:
        self.enabled, self.start_step, self.total_steps = enabled, start_step, total_steps
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if enabled and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("pretrain"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=Console(),
            )  # fmt: skip
            self._task = self._bar.add_task("pretrain", total=total_steps, completed=start_step, note="")
            self._bar.start()

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, loss: float, images_per_second: float) -> None:
        """Show the latest mean loss and speed."""
        note = f"loss {loss:.4f} · {images_per_second:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        elif self.enabled:
            left = (time.monotonic() - self._began) / (step - self.start_step) * (self.total_steps - step)
            print(f"step {step:>7,}/{self.total_steps:,} · {note} · {_clock(left)} left", flush=True)

    def say(self, message: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar:
            self._bar.console.print(message, highlight=False)
        elif self.enabled:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
