"""The doctor on real runs: six that are broken on purpose, each named by its own rule, and three healthy ones, silent.

About 10 minutes on one core: pytest -m slow tests/test_doctor.py
"""

import json

import pytest

import broken
import runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", broken.BROKEN)
def test_a_broken_run_is_named(digit_shards, tmp_path, name, seed):
    objective, settings = broken.BROKEN[name]
    doctor = broken.on_digits(objective, digit_shards, tmp_path / "run", f"run.seed={seed}", *settings)
    assert list(doctor.alarms) == [name]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_a_healthy_run_is_left_in_peace(digit_shards, tmp_path, objective, seed):
    doctor = broken.on_digits(objective, digit_shards, tmp_path / "run", f"run.seed={seed}")
    assert not doctor.alarms


def test_the_recipe_of_cifar10_is_healthy_when_shortened(shared_data, tmp_path):
    assert not broken.on_cifar10(shared_data, tmp_path / "run").alarms


def test_two_processes_stop_together(digit_shards, tmp_path):
    """The first process finds it; both stop at the next line of log, with the state saved."""
    settings = ["objective.teacher_momentum=0", "monitor.doctor_every=2", "monitor.on_collapse=stop"]
    launched = runs.launch("dino", *runs.overrides("dino", digit_shards, tmp_path / "run", *settings), processes=2)
    assert launched.returncode != 0
    assert "no ema: " in launched.stdout
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert not summary["finished"]
    assert summary["step"] == 4
    assert summary["checkpoint"].endswith("step-00000004")


@pytest.mark.parametrize("name", ["learning_rate", "no_ema", "dead_teacher", "constant_teacher"])
def test_a_broken_run_on_cifar10_is_named(shared_data, tmp_path, name):
    """Those that show within 120 steps; a flat teacher takes longer here."""
    assert list(broken.on_cifar10(shared_data, tmp_path / "run", *broken.BROKEN[name][1]).alarms) == [name]
