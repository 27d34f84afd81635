"""Starting the command, by its name and as a module; what it imports, and what importing the package does."""

import subprocess
import sys
from pathlib import Path

import pytest

import selfvil

HEAVY = "torch", "timm", "pydantic", "rich", "accelerate"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*words], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("module", ["selfvil", "selfvil.cli"])
def test_the_package_and_its_cli_module_are_the_command(module):
    done = run(sys.executable, "-m", module, "pretrain", "no_such_recipe")
    assert done.returncode == 2
    assert "no recipe no_such_recipe" in done.stderr


def test_help_imports_nothing_heavy():
    """Half a second instead of five, without torch. The test checks imports, not times."""
    script = Path(sys.executable).parent / "selfvil"
    done = run(sys.executable, "-X", "importtime", str(script), "--help")
    assert done.returncode == 0
    assert "pretrain" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "selfvil.cli" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m"], ["python", "-X", "dev", "-m", "selfvil", "--help"], True),
        (["-m"], ["python", "-m", "selfvil.cli"], True),
        (["-m"], ["python", "-m", "training.selfvil"], False),
        (["-m"], ["python", "-m"], False),
        ([str(Path(sys.executable).parent / "selfvil"), "--help"], [], True),
        (["scripts/selfvil"], [], False),  # somebody's own script of that name
        (["train.py", "-m", "selfvil"], ["python", "train.py", "-m", "selfvil"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_models_are_registered_except_by_the_command(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert selfvil._is_the_command() == expected
