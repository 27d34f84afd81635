"""The rules, their application, and the effect of a broken rule on a run."""

import json
import re

import pytest
import timm

import runs
from selfvil.cli import main
from selfvil.diagnostics.collapse import Doctor
from selfvil.diagnostics.rules import CAUSES, FEWEST_STEPS, RULES
from selfvil.diagnostics.vitals import typical_weight
from selfvil.recipe import load, packaged_recipes
from selfvil.records import read_metrics

BY_NAME = {rule.name: rule for rule in RULES}


def doctor(objective: str = "dino", takes_vitals: bool = True, *more: str) -> Doctor:
    return Doctor(load(runs.PACKAGED[objective], more), total_steps=1000, takes_vitals=takes_vitals)


def names(alarms) -> list[str]:
    return [alarm.rule.name for alarm in alarms]


MEASURED = {"relative_lr": 0.01, "teacher_lag": 20.0, "teacher_follows": 0.5}
"""Of a healthy run."""


def test_every_rule_has_the_source_of_its_range():
    assert len(BY_NAME) == len(RULES)
    for rule in RULES:
        assert rule.source
        assert rule.low < rule.high
        assert set(rule.follows) <= BY_NAME.keys() - {rule.name}


def test_one_record_out_of_range_is_no_alarm_and_an_alarm_is_raised_once():
    examiner = doctor()
    said = []
    for step, entropy in enumerate([0.99, 0.9, 0.99, 0.99, 0.99, 0.99, 0.9, 0.99, 0.99], start=500):
        said.append(names(examiner.judge(step, MEASURED | {"teacher_entropy": entropy})))
    assert said == [[], [], [], ["flat_teacher"], [], [], [], [], []]
    assert examiner.alarms["flat_teacher"].step == 503
    assert examiner.verdict(BY_NAME["flat_teacher"]) == "ALARM at step 503"


@pytest.mark.parametrize("cause", CAUSES)
def test_an_effect_raises_no_alarm_beside_its_cause(cause):
    broken = {"high_learning_rate": {"relative_lr": 1.0}, "low_learning_rate": {"typical_weight": 100.0},
              "no_ema": {"teacher_lag": 0.0}, "dead_teacher": {"teacher_follows": 0.0}}[cause]  # fmt: skip
    examiner = doctor()
    for step in (300, 310, 320):
        examiner.judge(step, MEASURED | broken | {"teacher_entropy": 1.0, "feature_std": 0.0})
    assert list(examiner.alarms) == [cause]
    assert examiner.verdict(BY_NAME["flat_teacher"]) == f"follows from {cause.replace('_', ' ')}"


def test_an_effect_is_not_judged_before_the_first_vital_signs():
    """Metrics are written more often than vital signs are measured, and the cause must be judged first."""
    collapsed = {"teacher_spread": 0.0}
    examiner = doctor()
    assert [names(examiner.judge(step, collapsed)) for step in (100, 120, 140)] == [[], [], []]
    assert names(examiner.judge(150, MEASURED)) == []
    assert names(examiner.judge(160, collapsed)) == ["constant_teacher"]
    without = doctor("dino", False)
    assert [names(without.judge(step, collapsed)) for step in (100, 120)] == [[], ["constant_teacher"]]


def test_a_rule_is_judged_in_its_part_of_the_run():
    examiner = doctor("mae", True, "objective.mask_ratio=0.99")
    for step in (100, 200, 300, 499):
        assert examiner.judge(step, {"relative_lr": 0.0, "explained": 0.0}) == []
    examiner.judge(500, {"explained": 0.0})
    assert names(examiner.judge(510, {"explained": 0.0})) == ["mask_ratio"]
    late = doctor()
    assert late.judge(990, MEASURED | {"teacher_lag": 0.0}) == []
    assert late.verdict(BY_NAME["no_ema"]) == "out of range, but not judged at this time"


def test_few_prototypes_are_not_judged():
    examiner = doctor("dino", False, "objective.out_dim=16")
    for step in (300, 310, 320):
        assert examiner.judge(step, {"teacher_spread": 0.5}) == []


def test_a_run_without_ema_warns_once_and_continues(digit_shards, tmp_path, capsys):
    arguments = runs.overrides(
        "dino", digit_shards, tmp_path / "run", "objective.teacher_momentum=0", "monitor.doctor_every=2"
    )
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "cifar10_dino", *arguments])
    assert not ended.value.code
    said = [line for line in capsys.readouterr().out.splitlines() if "no ema: " in line]
    assert len(said) == 1
    assert said[0].startswith("step 2: ")
    assert "objective.teacher_momentum (now 0)" in said[0]
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert summary["finished"]
    assert summary["alarms"] == ["no_ema"]


def test_a_run_that_stops_at_an_alarm_is_saved_and_has_exit_status_3(digit_shards, tmp_path, capsys):
    def start(*more: str) -> int:
        settings = ["objective.teacher_momentum=0", "monitor.doctor_every=2", *more]
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", "cifar10_dino", *runs.overrides("dino", digit_shards, tmp_path / "run", *settings)])
        return ended.value.code or 0

    assert start("monitor.on_collapse=stop") == 3
    assert "stopped after step 2 (monitor.on_collapse = stop): the state is saved" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert not summary["finished"]
    assert summary["checkpoint"].endswith("step-00000002")
    assert start() == 0  # it resumes, with a warning
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "doctor"] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if not re.search(r"vil_(mlp_)?b", name)])
def test_the_rate_of_every_recipe_is_healthy_and_thirty_times_and_a_hundredth_of_it_are_not(name):
    """Networks of base size, at 0.11 and 0.13 of their typical weight, are left out for their size."""
    recipe = load(name)
    backbone = timm.create_model(recipe.model.name, **recipe.model.create_kwargs())
    peak = recipe.optim.peak_lr / typical_weight(backbone)
    too_high, too_low = BY_NAME["high_learning_rate"], BY_NAME["low_learning_rate"]
    assert too_high.healthy(1.8 * peak)
    assert not too_high.healthy(30 * peak / 1.8)
    assert too_low.healthy(peak / 5)
    assert not too_low.healthy(peak / 130)


def test_a_rate_that_is_too_low_for_the_batch_raises_an_alarm_with_a_better_rate():
    """For example the published rate for large batches with a small batch."""
    examiner = doctor("mae", True, "optim.base_lr=1.5e-4", "optim.batch_size=16")
    (alarm,) = examiner.judge(10, MEASURED | {"typical_weight": 0.05, "relative_lr": 1e-5})
    assert alarm.sentence == (
        "low learning rate: each step moves the weights by at most 0.019 % of their size; 2 % to 13 % is usual; "
        "raise optim.base_lr (now 0.00015) to 0.03"
    )
    for step in (600, 700, 1000):  # its effects raise no alarm
        assert examiner.judge(step, {"explained": -0.27}) == []
    assert examiner.verdict(BY_NAME["not_learning"]) == "follows from low learning rate"


def test_a_low_rate_is_accepted_for_trained_weights():
    examiner = doctor("mae", True, "optim.base_lr=1e-5", "model.start_from=weights")
    assert examiner.judge(10, MEASURED | {"typical_weight": 0.05}) == []


def test_a_student_at_ln_k_beside_a_sharp_teacher_is_not_learning():
    """Its loss is that of a uniform output for any teacher, or larger, as in a run with a low rate."""
    for kl in (1 - 0.51, 0.53):
        uniform = {"teacher_entropy": 0.51, "teacher_spread": 0.85, "kl": kl}
        examiner = doctor("dino")
        for step in (700, 800, 810):
            assert examiner.judge(step, MEASURED | uniform | {"kl": kl + 1e-6}) == []
        (alarm,) = examiner.judge(820, MEASURED | uniform | {"kl": kl + 1e-6})
        assert alarm.rule.name == "not_learning"
        assert "one prediction for all images" in alarm.sentence
    learned = doctor("dino")
    for step in (700, 800, 810, 1000):
        assert learned.judge(step, MEASURED | uniform | {"kl": 0.2}) == []
    assert learned.latest["explained"] == pytest.approx(0.29)


def test_a_short_run_is_judged_by_its_only_record_and_a_very_short_one_is_not():
    for total_steps, expected in ((FEWEST_STEPS, ["not_learning"]), (FEWEST_STEPS - 1, [])):
        examiner = Doctor(load("demo"), total_steps, takes_vitals=True)
        assert names(examiner.judge(total_steps, {"relative_lr": 1e-6, "explained": -0.2})) == expected


def test_ranks_of_few_images_are_not_judged():
    few = {"images": 8.0, "rank_share": 0.01, "lidar_share": 0.01, "alpha_req": 9.0}
    examiner = doctor()
    assert [names(examiner.judge(step, MEASURED | few)) for step in (500, 510)] == [[], []]
    assert names(examiner.judge(520, few | {"images": 32.0})) == []
    assert "few_dimensions" in names(examiner.judge(530, few | {"images": 32.0}))
