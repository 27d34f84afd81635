"""How a run went, in one table: printed at its end and by `selfvil report`."""

import json
from pathlib import Path

from rich.table import Table

from selfvil import terminal
from selfvil.errors import UserError


def print_summary(run: Path) -> None:
    """Print the summary that run.json holds.

    Raises:
        UserError: the folder holds no run, or one whose first launch has not ended.
    """
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"{run} holds no run.json: it is not the folder of a run")
    record = json.loads(path.read_text())
    summary = record.get("summary")
    if summary is None:
        raise UserError(f"{run} has not come to a stop yet: its summary is written when a launch ends")
    launch = record["launches"][-1]
    hours, seconds = divmod(round(summary["seconds"]), 3600)
    table = Table(title=f"{run}: {'finished' if summary['finished'] else 'stopped'}", show_header=False)
    loss = "-" if summary["loss"] is None else f"{summary['loss']:.4f}"
    rows = {
        "steps": f"{summary['step']:,} of {summary['total_steps']:,}",
        "images seen": f"{summary['samples']:,}",
        "loss": loss,
        "images/s": f"{summary['images_per_second']:,.0f} (last launch)",
        "wall time": f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} in {len(record['launches'])} launch(es)",
        "device": f"{launch['processes']} x {launch['device']}",
        "commit": launch["commit"] or f"selfvil {launch['versions']['selfvil']}",
        "checkpoint": summary["checkpoint"] or "-",
        "next": f"selfvil export {run} OUT",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    terminal.console().print(table)
