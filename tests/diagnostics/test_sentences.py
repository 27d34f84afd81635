"""The doctor's sentences are sensible at every value and for all settings: readable numbers, effective advice."""

import functools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
from selfvil.diagnostics.checkup import rows
from selfvil.diagnostics.collapse import Doctor
from selfvil.diagnostics.rules import FEW_DIRECTIONS, NO_HIGH, NO_LOW, RULES
from selfvil.diagnostics.wording import Case, count, number, share
from selfvil.recipe import Recipe, load

STEPS = 1000
CHANGE = re.compile(r"(lower|raise) (?:the lower end of )?[\w.]+ \(now (\S+)\) to (\S+?)(?=[;,) ]|$)")


@functools.cache
def recipe(objective: str) -> Recipe:
    teacher = ["objective.teacher=test_vit"] if objective == "distill" else []
    return load(runs.PACKAGED[objective], teacher)


def around(low: float, high: float) -> st.SearchStrategy[float]:
    """Values from tiny to huge, and many close to the ends of a healthy range."""
    borders = [border for border in (low, high) if math.isfinite(border)]
    near = [st.floats(border - abs(border) / 10 - 1e-6, border + abs(border) / 10 + 1e-6) for border in borders]
    return st.one_of(st.floats(-1e6, 1e6), st.floats(-1, 1), st.floats(1e-12, 1e12), *near)


SHARES = st.floats(1e-6, 1 - 1e-6)
SETTINGS = {
    "base_lr": st.floats(1e-12, 1e3), "clip_norm": st.none() | st.floats(0.01, 10), "batch_size": st.integers(1, 65536),
    "weight_decay": st.floats(0, 10), "lr_scaling": st.sampled_from(["linear", "sqrt", "none"]),
}  # fmt: skip
OBJECTIVE = {
    "mask_ratio": SHARES, "teacher_momentum": st.floats(0, 1), "center_momentum": SHARES,
    "out_dim": st.integers(2, 65536), "centring": st.sampled_from(["softmax", "sinkhorn"]),
}  # fmt: skip


PROTOTYPES = ["dino", "dinov2", "ibot"]
WITH_TEACHER = [*PROTOTYPES, "ijepa"]
OBJECTIVES_OF = {
    "teacher_lag": WITH_TEACHER, "teacher_follows": WITH_TEACHER, "teacher_entropy": PROTOTYPES,
    "prototypes": PROTOTYPES, "explained_masked": ["mae", "simmim"], "lidar_share": [*PROTOTYPES, "lejepa", "visreg"],
    "target_std": ["ijepa"], "projection_std": ["lejepa", "visreg"],
}  # fmt: skip
"""Objectives that have the number; all objectives for a number that is not listed."""


@st.composite
def cases(draw) -> tuple[Recipe, str, float, dict[str, float], int]:
    """A recipe, a rule, a value that breaks it, other numbers, and a number of steps."""
    rule = draw(st.sampled_from(RULES))
    objectives = OBJECTIVES_OF.get(rule.value, sorted(runs.PACKAGED))
    if rule.name in FEW_DIRECTIONS:  # features that only separate classes have few directions
        objectives = [name for name in objectives if name != "supervised"]
    base = recipe(draw(st.sampled_from(objectives)))
    objective = {key: draw(how) for key, how in OBJECTIVE.items() if hasattr(base.objective, key)}
    if hasattr(base.objective, "student_temp"):
        objective["student_temp"] = draw(st.floats(1e-3, 10))
        objective["teacher_temp"] = objective["student_temp"] * draw(SHARES)
        objective["warmup_teacher_temp"] = objective["student_temp"] * draw(SHARES)
    if hasattr(base.objective, "global_crop_scale"):
        for key in ("global_crop_scale", "local_crop_scale"):
            objective[key] = tuple(sorted((draw(SHARES), draw(SHARES))))
    changed = base.model_copy(update={
        "objective": base.objective.model_copy(update=objective),
        "optim": base.optim.model_copy(update={key: draw(how) for key, how in SETTINGS.items()}),
        "model": base.model.model_copy(update={"init_values": draw(st.none() | st.floats(1e-8, 10))}),
    })  # fmt: skip
    value = draw(around(rule.low, rule.high).filter(lambda value: not rule.healthy(value)))
    if rule.value not in ("explained", "explained_masked", "alpha_req"):
        value = abs(value)
        if rule.healthy(value):
            value = rule.low / 2 if rule.low != NO_LOW else rule.high * 2
    if rule.value == "peak_relative_lr":
        value = max(value, 1e-9)  # a learning rate is above 0
    typical = draw(st.none() | st.floats(1e-6, 10))
    numbers = {} if typical is None else {"typical_weight": typical, "relative_lr": draw(st.floats(1e-12, 1e3))}
    return changed, rule.name, value, numbers, draw(st.integers(30, 1_000_000))


def check_sentence(sentence: str) -> None:
    assert not re.search(r"\d[eE][+]?\d", sentence), sentence  # 1.87e+03
    assert not re.search(r"-\d[\d.,]* ?(%|times|steps|tokens|points)", sentence), sentence  # by only -27%
    assert not re.search(r"\b(nan|inf|None|not set|null)\b|[{}]", sentence), sentence
    assert not re.search(r"\d\.\d{11}", sentence), sentence
    assert len(sentence) < 400, sentence
    for verb, now, to in CHANGE.findall(sentence):
        assert (float(to) < float(now)) if verb == "lower" else (float(to) > float(now)), sentence


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_rule_has_a_sensible_sentence_at_every_value(case):
    """By the code of a run: the records, the derived numbers, the alarm and the table."""
    changed, name, value, numbers, total_steps = case
    rule = {rule.name: rule for rule in RULES}[name]
    doctor = Doctor(changed, total_steps, takes_vitals=False)
    doctor._derived = lambda values: {}  # the value is drawn, and not computed
    peak = numbers and {"peak_relative_lr": changed.optim.base_lr / numbers["typical_weight"]}
    doctor.latest = numbers | peak | {"feature_std": 0.5}
    step = min(total_steps, math.ceil(total_steps * min(rule.until, max(rule.after, 0.3))))
    step = step if step / total_steps <= rule.until else step - 1
    for _ in range(rule.patience):
        alarms = doctor.judge(step, {rule.value: value})
    sentences = [alarm.sentence for alarm in alarms if alarm.rule is rule]
    assert len(sentences) == 1
    check_sentence(sentences[0])
    assert sentences[0].startswith(name.replace("_", " ") + ": ")
    assert re.search(r"\b(optim|objective|data|model)\.\w+|train longer", sentences[0])
    for row in rows(doctor):
        assert not re.search(r"\de[+-]?\d", row[1] + row[2]), row


@given(st.floats(-1e300, 1e300) | st.just(math.nan) | st.just(math.inf))
def test_a_number_has_no_exponent_and_three_digits(value):
    text = number(value)
    assert "e" not in re.sub(r"[a-z]{3,}", "", text)
    if math.isfinite(value) and 1e-6 <= abs(value) < 1e15:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006)
        assert text.count("0") < len(text) or value == 0


@pytest.mark.parametrize(("text", "expected"), [
    (number(1870.4), "1,870"), (number(0.0123456), "0.0123"), (number(999.6), "1,000"), (number(0), "0"),
    (number(3.0), "3"), (number(-0.27), "-0.27"), (share(0.38), "38 %"), (share(0.0005), "0.05 %"),
    (share(19.2), "19.2 times"), (count(1.0, "token"), "1 token"), (count(0.4, "token"), "0.4 tokens"),
    (count(60, "step"), "60 steps"),
])  # fmt: skip
def test_numbers_as_people_write_them(text, expected):
    assert text == expected


def test_no_advice_to_set_a_value_that_is_already_set():
    case = Case(0.1, {"objective.mask_ratio": 0.75}, {}, STEPS)
    assert case.lower("objective.mask_ratio", 0.75) is None
    assert case.raised("objective.mask_ratio", 0.75) is None
    assert case.lower("objective.out_dim", 8) is None
    assert Case(0.1, {"objective.mask_ratio": 0.99}, {}, STEPS).lower("objective.mask_ratio", 0.75) == (
        "lower objective.mask_ratio (now 0.99) to 0.75"
    )


def test_ranges_are_plain_numbers():
    assert {rule.range() for rule in RULES if rule.high == NO_HIGH} >= {"from 0.5", "from 8", "from 0.0001"}
    assert not any("e-" in rule.range() for rule in RULES)
