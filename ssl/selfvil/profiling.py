"""Traces some steps of a run with torch.profiler, to a file for ui.perfetto.dev and a table."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 3
"""Steps of the launch before the first one that is traced: they include compilation and the start of the workers."""


class Profile:
    """Traces steps `WARM_UP` + 1 to `WARM_UP` + `steps` of a launch; does nothing if `steps` is None.

    Args:
        steps: number of steps to trace.
        folder: in which `trace.json.gz` is written.
        print_line: prints the table of the ten operations with the most self time, and the path of the trace.
    """

    def __init__(self, steps: int | None, folder: Path, print_line: Callable[[str], None]) -> None:
        self.folder, self.print_line, self._profiler = folder, print_line, None
        if steps is not None:
            self._key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
                schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()

    def step(self) -> None:
        """Report one more optimizer step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stop tracing; if the run ends before the last step to trace, write the steps so far."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, traced: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "trace.json.gz"
        traced.export_chrome_trace(str(path))
        table = traced.key_averages().table(sort_by=self._key, row_limit=10, max_name_column_width=50)
        self.print_line(f"{table}\ntrace of the steps: {path}, which ui.perfetto.dev opens")
