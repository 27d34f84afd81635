"""The summary of a run as a table, printed at its end and by `selfvil report`."""

from pathlib import Path
from typing import Any

from rich.table import Table

from selfvil import terminal
from selfvil.errors import UserError
from selfvil.records import RECORD, read_record


def print_summary(run: Path) -> None:
    """Print the summary in run.json.

    Raises:
        UserError: the folder holds no run, or its first launch has not ended.
    """
    record = read_record(run)
    summary = record.summary
    if summary is None:
        raise UserError(f"{run / RECORD} holds no summary: it is written when a launch ends")
    launch = record.launches[-1] if record.launches else {}
    hours, seconds = divmod(round(summary.seconds), 3600)
    table = Table(title=f"{run}: {'finished' if summary.finished else 'stopped'}", show_header=False)
    loss = "-" if summary.loss is None else f"{summary.loss:.4f}"
    rows = {
        "steps": f"{summary.step:,} of {summary.total_steps:,}",
        "images seen": f"{summary.samples:,}",
        "loss": loss,
        "images/s": f"{summary.images_per_second:,.0f} (last launch)",
        "wall time": f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} in {len(record.launches)} launch(es)",
        "device": f"{launch.get('processes', '?')} x {launch.get('device', '?')}",
        "commit": launch.get("commit") or f"selfvil {_version(launch)}",
        "checkpoint": summary.checkpoint or "-",
        "next": f"selfvil export {run} OUT",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    terminal.console().print(table)


def _version(launch: dict[str, Any]) -> Any:
    versions = launch.get("versions")
    return versions.get("selfvil", "?") if isinstance(versions, dict) else "?"
