"""The rules, how they are applied, and what a run does when one is broken."""

import json
import string

import pytest
import timm

import runs
from selfvil.cli import main
from selfvil.monitor.collapse import CAUSES, RULES, Doctor
from selfvil.monitor.metrics import read_metrics
from selfvil.monitor.vitals import typical_weight
from selfvil.optim import peak_lr
from selfvil.recipe import load, packaged_recipes

BY_NAME = {rule.name: rule for rule in RULES}


def doctor(objective: str = "dino", takes_vitals: bool = True, *more: str) -> Doctor:
    return Doctor(load(runs.PACKAGED[objective], more), total_steps=1000, takes_vitals=takes_vitals)


def names(alarms) -> list[str]:
    return [alarm.rule.name for alarm in alarms]


LOOK = {"relative_lr": 0.01, "teacher_lag": 20.0, "teacher_follows": 0.5}
"""Of a healthy run."""


def test_every_rule_says_where_its_range_comes_from():
    assert len(BY_NAME) == len(RULES)
    for rule in RULES:
        assert rule.source
        assert rule.low < rule.high
        assert set(rule.follows) <= BY_NAME.keys() - {rule.name}


@pytest.mark.parametrize("objective", ["mae", "dino", "dinov2"])
def test_every_sentence_can_be_said_of_every_objective(objective):
    """Settings that an objective lacks read as such, and those that it has as they are."""
    for rule in RULES:
        value = rule.low / 2 if rule.high == float("inf") else rule.high * 2
        examiner = doctor(objective, False)
        step = max(1, round(1000 * max(rule.after, 0.4)))
        values = {rule.value: value} if rule.value != "prototypes" else {"teacher_spread": 0.0}
        for later in range(rule.patience):
            alarms = examiner.see(step + later, values)
        if rule.value == "prototypes" and objective == "mae":
            assert alarms == []
            continue
        (alarm,) = alarms
        assert alarm.sentence.startswith(rule.name.replace("_", " ") + ": ")
        assert "{" not in alarm.sentence
        assert any(f"{section}." in alarm.sentence for section in ("optim", "objective", "data"))
        fields = {name for _, name, _, _ in string.Formatter().parse(rule.advice) if name}
        assert ("not set" in examiner.advice(rule)) == (not fields <= examiner._settings.keys())


def test_one_record_out_of_range_is_no_alarm_and_an_alarm_is_raised_once():
    examiner = doctor()
    said = []
    for step, entropy in enumerate([0.99, 0.9, 0.99, 0.99, 0.99, 0.99, 0.9, 0.99, 0.99], start=500):
        said.append(names(examiner.see(step, LOOK | {"teacher_entropy": entropy})))
    assert said == [[], [], [], ["flat_teacher"], [], [], [], [], []]
    assert examiner.alarms["flat_teacher"].step == 503
    assert examiner.verdict(BY_NAME["flat_teacher"]) == "ALARM at step 503"


@pytest.mark.parametrize("cause", CAUSES)
def test_what_follows_from_a_cause_is_not_told_beside_it(cause):
    value = {"learning_rate": 1.0, "no_ema": 0.0, "dead_teacher": 0.0}[cause]
    broken = {BY_NAME[cause].value: value}
    examiner = doctor()
    for step in (300, 310, 320):
        examiner.see(step, LOOK | broken | {"teacher_entropy": 1.0, "feature_std": 0.0})
    assert list(examiner.alarms) == [cause]
    assert examiner.verdict(BY_NAME["flat_teacher"]) == f"follows from {cause.replace('_', ' ')}"


def test_what_may_follow_waits_for_the_first_look():
    """Metrics are written more often than vital signs are taken: the cause must have its say first."""
    collapsed = {"teacher_spread": 0.0}
    examiner = doctor()
    assert [names(examiner.see(step, collapsed)) for step in (100, 120, 140)] == [[], [], []]
    assert names(examiner.see(150, LOOK)) == []
    assert names(examiner.see(160, collapsed)) == ["constant_teacher"]
    without = doctor("dino", False)
    assert [names(without.see(step, collapsed)) for step in (100, 120)] == [[], ["constant_teacher"]]


def test_a_rule_is_judged_in_its_part_of_the_run():
    examiner = doctor("mae")
    for step in (100, 200, 300, 499):
        assert examiner.see(step, {"relative_lr": 0.0, "explained": 0.0}) == []
    examiner.see(500, {"explained": 0.0})
    assert names(examiner.see(510, {"explained": 0.0})) == ["mask_ratio"]
    late = doctor()
    assert late.see(990, LOOK | {"teacher_lag": 0.0}) == []
    assert late.verdict(BY_NAME["no_ema"]) == "outside, but not when it is judged"


def test_few_prototypes_are_not_judged():
    examiner = doctor("dino", False, "objective.out_dim=16")
    for step in (300, 310, 320):
        assert examiner.see(step, {"teacher_spread": 0.5}) == []


def test_a_run_without_ema_says_so_once_and_goes_on(digit_shards, tmp_path, capsys):
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


def test_a_run_that_stops_for_it_is_saved_and_says_so_by_its_status(digit_shards, tmp_path, capsys):
    def start(*more: str) -> int:
        settings = ["objective.teacher_momentum=0", "monitor.doctor_every=2", *more]
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", "cifar10_dino", *runs.overrides("dino", digit_shards, tmp_path / "run", *settings)])
        return ended.value.code or 0

    assert start("monitor.on_collapse=stop") == 3
    assert "stopped after step 3 (monitor.on_collapse = stop): the state is saved" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert not summary["finished"]
    assert summary["checkpoint"].endswith("step-00000003")
    assert start() == 0  # and goes on from there, warned
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "doctor"] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if "vil_b" not in name])
def test_no_packaged_recipe_learns_too_fast_and_each_would_at_thirty_times_its_rate(name):
    """vil_b, at 0.11 and 0.13 of its typical weight, is left out for its size."""
    recipe = load(name)
    backbone = timm.create_model(recipe.model.name, **recipe.model.create_kwargs())
    peak = peak_lr(recipe.optim.base_lr, recipe.optim.batch_size, recipe.optim.lr_scaling) / typical_weight(backbone)
    rule = BY_NAME["learning_rate"]
    assert rule.healthy(1.8 * peak)
    assert not rule.healthy(30 * peak / 1.8)
