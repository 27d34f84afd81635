"""The doctor on real runs: each broken one raises the alarm of its rule, and healthy ones of many kinds raise none.

About 10 minutes on one core: pytest -m slow tests/test_doctor.py
"""

import json

import pytest

import broken
import runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", broken.TRIALS)
def test_a_broken_run_raises_its_alarm_and_a_healthy_one_none(digit_shards, tmp_path, name):
    trial = broken.TRIALS[name]
    doctor = broken.run(trial, digit_shards, tmp_path / "run")
    assert list(doctor.alarms) == ([] if trial.rule is None else [trial.rule])


def test_there_are_twenty_healthy_runs_and_a_broken_one_for_each_rule_that_training_can_break():
    rules = [trial.rule for trial in broken.TRIALS.values()]
    assert rules.count(None) >= 20
    assert {"high_learning_rate", "low_learning_rate", "no_ema", "dead_teacher", "flat_teacher", "constant_teacher",
            "mask_ratio", "not_learning"} <= set(rules)  # fmt: skip
    assert {trial.objective for trial in broken.TRIALS.values() if trial.rule is None} == runs.PACKAGED.keys()


def test_two_processes_stop_together(digit_shards, tmp_path):
    """The first process raises the alarm after step 2; both stop a step later, when they agree, and save the state."""
    settings = ["objective.teacher_momentum=0", "monitor.doctor_every=2", "monitor.on_collapse=stop"]
    launched = runs.launch("dino", *runs.overrides("dino", digit_shards, tmp_path / "run", *settings), processes=2)
    assert launched.returncode != 0
    assert "no ema: " in launched.stdout
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert not summary["finished"]
    assert summary["step"] == 3
    assert summary["checkpoint"].endswith("step-00000003")


SHORT = ["data.workers=0", "run.threads=1", "budget.samples=null", "budget.steps=120", "model.depth=2",
         "objective.local_crops=2", "monitor.log_every=10", "monitor.doctor_every=10", "monitor.tensorboard=false",
         "monitor.pictures_every=null"]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings"), [
    (None, []), ("high_learning_rate", ["optim.base_lr=0.12"]), ("no_ema", ["objective.teacher_momentum=0"]),
    ("dead_teacher", ["objective.teacher_momentum=1"]),
    ("constant_teacher", ["objective.center_momentum=0.9999999"]),
])  # fmt: skip
def test_the_recipe_of_cifar10_shortened(shared_data, tmp_path, rule, settings):
    """Rules whose alarm is raised within 120 steps; a flat teacher takes longer with this recipe."""
    train = f"data.train={shared_data}/cifar10/cifar10-train-{{000000..000001}}.tar"
    assert list(broken.of_recipe("cifar10_dino", train, tmp_path / "run", *SHORT, *settings).alarms) == (
        [rule] if rule else []
    )
