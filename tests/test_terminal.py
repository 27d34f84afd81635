"""Text is printed literally: a path such as runs/mae[v2] keeps its brackets."""

import json
import re
import time
from pathlib import Path

import pytest
from rich.table import Table

from selfvil import terminal
from selfvil.monitor.console import EVERY, ProgressLine, duration
from selfvil.monitor.summary import print_summary

PACKAGE = Path(terminal.__file__).parent
NAME = "runs/mae[v2] :smile: [/bold]"


def test_tables_and_their_titles_keep_brackets(capsys):
    table = Table(title=NAME)
    table.add_column(NAME)
    table.add_row(NAME)
    terminal.console().print(table)
    assert capsys.readouterr().out.count(NAME) == 3


def test_the_summary_of_a_run_keeps_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    run = tmp_path / "mae[v2]"
    run.mkdir()
    summary = {"run": str(run), "alarms": [], "seconds": 4.0, "loss": 1.0, "step": 3,
               "total_steps": 3, "finished": True, "samples": 12,
               "images_per_second": 2.0, "checkpoint": f"{run}/checkpoints/step-00000003"}  # fmt: skip
    launch = {"processes": 1, "device": "cpu", "commit": "abc", "versions": {"selfvil": "0"}}
    (run / "run.json").write_text(json.dumps({"launches": [launch], "summary": summary}))
    print_summary(run)
    out = capsys.readouterr().out
    assert out.count("mae[v2]") == 3  # title, checkpoint, next command


def test_the_progress_bar_prints_messages_literally(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    line = ProgressLine(0, 10, enabled=True)
    line.print_line(f"stopped: {NAME}")
    line.close()
    assert f"stopped: {NAME}" in capsys.readouterr().out


def test_an_activity_is_shown_on_a_terminal_only(monkeypatch, capsys):
    for forced in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", forced)
        with terminal.activity() as tell:
            tell(f"opening {NAME}")
            time.sleep(0.3)  # rich draws 12 times a second
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.count(f"opening {NAME}") >= 1 if forced else found.err == ""


def test_every_console_prints_literally():
    """rich's Console interprets markup by default; only `terminal` creates one."""
    direct = re.compile(r"\bConsole\(|from rich import print|rich\.print\(")
    for path in PACKAGE.rglob("*.py"):
        if path.name != "terminal.py":
            assert not direct.search(path.read_text()), f"{path}: use selfvil.terminal.console()"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_estimated_after_two_steps(capsys):
    """The first step, which starts the workers, does not count: 99 steps of 2 s, not of 16."""
    clock = Clock()
    line = ProgressLine(5, 106, enabled=True, clock=clock)
    clock.now += 30 - 1e-3
    line.step(6)
    assert capsys.readouterr().out == ""
    clock.now += 2
    line.step(7)
    assert capsys.readouterr().out.splitlines()[0] == "about 3 min left"


@pytest.mark.parametrize("seconds_of_a_step", [0.5, 70.0])
def test_lines_are_printed_by_time_and_not_by_steps(capsys, seconds_of_a_step):
    clock, printed = Clock(), []
    line = ProgressLine(0, 240, enabled=True, clock=clock)
    for step in range(1, 241):
        clock.now += seconds_of_a_step
        line.step(step)
        if step % 5 == 0:
            line.log(step, 0.25, 40)
        if out := capsys.readouterr().out:
            printed.append((clock.now, out))
    lines = [out for _, out in printed if "step" in out]
    assert len(lines) == (4 if seconds_of_a_step < EVERY else 240)
    assert "loss 0.2500 · 40 images/s · about" in lines[2 if seconds_of_a_step < EVERY else 6]
    assert lines[-1].strip() == "step     240/240 · loss 0.2500 · 40 images/s · done"


def test_other_processes_print_nothing(capsys):
    clock = Clock()
    line = ProgressLine(0, 3, enabled=False, clock=clock)
    for step in range(1, 4):
        clock.now += 100
        line.step(step)
        line.log(step, 1.0, 1.0)
    line.print_line("hello")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(39.6, "40 s"), (700, "12 min"), (12_000, "3 h 20 min"), (187_300, "2 days 4 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
