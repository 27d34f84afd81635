"""Commands for recipes and runs: `selfvil pretrain`, `plan`, `recipes`, `explain`, `schema`, `doctor`, `report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from selfvil.errors import UserError
from selfvil.terminal import progress_bar


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
) -> None:
    """Pretrain by a recipe; on several devices, start it with accelerate launch or torchrun launch/pretrain.py.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and stop: exit status 75, and the same command continues.
    """
    from selfvil.recipe import load

    settings = load(recipe, overrides or ())  # before the slow import, so that errors are reported at once
    from selfvil.pretrain import pretrain
    from selfvil.stop import STOPPED

    summary = pretrain(settings)
    if summary.alarms and settings.monitor.on_collapse == "stop":
        raise typer.Exit(3)
    if not summary.finished:
        raise typer.Exit(STOPPED)


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the launch: its world size.")] = 1,
    trial: Annotated[bool, typer.Option("--trial/--no-trial", help="Take 3 steps on real images for the time.")] = True,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the first images' crops to this PNG; in a folder, to RECIPE.png.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Print what a recipe will do on this machine: steps, rates, memory, disk, time. Refuse recipes that cannot run."""
    from selfvil.files import require_writable, write_text
    from selfvil.recipe import load

    settings, name = load(recipe, overrides or ()), Path(recipe).stem
    target = picture / f"{name}.png" if picture is not None and picture.is_dir() else picture
    for file in (target, json_file):
        if file is not None:
            require_writable(file)
    from selfvil import terminal
    from selfvil.plan_report import report
    from selfvil.plan_table import print_report

    with terminal.activity() as tell:
        found = report(settings, name, processes, trial, target, tell)
    print_report(found, terminal.console())
    if target is not None:
        print(f"crops of the first images: {target}")
    if json_file is not None:
        write_text(json_file, json.dumps(found.as_json(), indent=1) + "\n")


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the packaged recipes, or print one."""
    from selfvil.packaged import find, packaged_recipes

    if name is not None:
        print(find(name).read_text(), end="")
        return
    for each, path in packaged_recipes().items():
        print(f"{each:20} {path.read_text().splitlines()[0].lstrip('# ')}")


def explain(key: Annotated[str, typer.Argument(help="A key such as optim.base_lr, or a section.")]) -> None:
    """Explain a recipe's key: meaning, type, default."""
    from selfvil.explain import explain

    print(explain(key))


def schema() -> None:
    """Print the JSON schema of a recipe, for completion in editors."""
    from selfvil.explain import schema

    print(json.dumps(schema(), indent=2))


def doctor(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the newest checkpoint.")] = False,
) -> None:
    """Examine a run for signs of collapse: what was measured, what is healthy, and what to change."""
    from selfvil import terminal
    from selfvil.diagnostics import checkup

    record = checkup.open_run(run)
    if record.cut:
        print(f"{run / 'metrics.jsonl'} ends with an incomplete line, as after a kill: it is left out")
    examined = checkup.examine(record)
    console = terminal.console()
    if checkup.rows(examined):
        console.print(checkup.as_table(examined, f"{run}, by its metrics"))
    else:
        print(checkup.NOTHING_JUDGED)
    if measure:
        signs = checkup.measure(record)
        console.print(checkup.signs_table(signs, f"{run}, its newest checkpoint on its training images"))
    for alarm in examined.alarms.values():
        print(f"step {alarm.step:,}: {alarm.sentence}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page; RUN/report.html, or report.html of several.")
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Also draw only the scores and the loss of one run, to this PNG.")
    ] = None,
) -> None:
    """Write one HTML page about a run, or a comparison of several: curves, scores, settings that differ, pictures."""
    from selfvil.monitor.pictures import loss_curve
    from selfvil.monitor.summary import print_summary
    from selfvil.records import read_record
    from selfvil.reporting.report import report

    if curve is not None and len(runs) > 1:
        raise UserError("--curve draws the loss curve of one run: give one RUN, or leave --curve out")
    with progress_bar("evaluating checkpoints") as progress:
        page = report(runs, out, progress)
    if len(runs) == 1 and read_record(runs[0]).summary:
        print_summary(runs[0])
    if curve is not None:
        print(f"loss curve: {loss_curve(runs[0], curve)}")
    print(f"report: {page}")
