"""The collapse doctor: applies the rules of `rules.py` to a run's metrics, during the run or in `selfvil doctor RUN`.

When a number leaves its healthy range, an alarm is raised once, with what happens and what to change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfvil.diagnostics.rules import FEW_DIRECTIONS, FEWEST_IMAGES, FEWEST_PROTOTYPES, RULES, VISIBLE, Rule
from selfvil.diagnostics.wording import Case
from selfvil.recipe import Recipe

SCORES = {"knn_20", "linear"}

_NEED_IMAGES = ("rank_share", "alpha_req", "lidar_share")


@dataclass(frozen=True)
class Alarm:
    """A broken rule, the step and the value, and the sentence for the user."""

    rule: Rule
    step: int
    value: float
    sentence: str


class Doctor:
    """Applies the rules to records in the order of their steps.

    takes_vitals: whether the run records vital signs; then a rule with causes is not judged before the first of them.
    """

    def __init__(self, recipe: Recipe, total_steps: int, takes_vitals: bool) -> None:
        self.total_steps = total_steps
        self.latest: dict[str, float] = {}
        self.alarms: dict[str, Alarm] = {}
        self._recipe = recipe
        self._crossed: dict[str, int] = {}
        self._judged: dict[str, int] = {}
        self._best: dict[str, float] = {}
        self._takes_vitals = takes_vitals
        sections = {"model": recipe.model, "data": recipe.data, "objective": recipe.objective, "optim": recipe.optim}
        self._settings: dict[str, Any] = {
            f"{name}.{key}": value for name, section in sections.items() for key, value in section
        }

    def judge(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Judge all values recorded after `step` steps together, and return the new alarms."""
        values = dict(values) | self._derived(values)
        self.latest |= values
        if values.get("images", FEWEST_IMAGES) < FEWEST_IMAGES:
            values = {name: value for name, value in values.items() if name not in _NEED_IMAGES}
        new = []
        for rule in RULES:
            if rule.value not in values or not self._judges(rule, step):
                continue
            value = values[rule.value]
            self._judged[rule.name] = self._judged.get(rule.name, 0) + 1
            # No record follows the last step: an alarm then needs only that all records so far are out of range.
            patience = min(rule.patience, self._judged[rule.name]) if step >= self.total_steps else rule.patience
            self._crossed[rule.name] = 0 if rule.healthy(value) else self._crossed.get(rule.name, 0) + 1
            may_alarm = rule.name not in self.alarms and not self._explained(rule) and not self._too_early(rule)
            if self._crossed[rule.name] >= patience and may_alarm:
                self.alarms[rule.name] = Alarm(rule, step, value, rule.sentence(self._case(value)))
                new.append(self.alarms[rule.name])
        return new

    def _judges(self, rule: Rule, step: int) -> bool:
        if rule.name in FEW_DIRECTIONS and "objective.classes" in self._settings:
            return False
        return self.total_steps >= rule.fewest_steps and rule.after <= step / self.total_steps <= rule.until

    def _derived(self, values: Mapping[str, float]) -> dict[str, float]:
        """Numbers that rules need and records do not contain."""
        found = {}
        if "typical_weight" in values and self._recipe.model.start_from is None:  # trained weights need smaller steps
            optim = self._recipe.optim
            peak = optim.peak_lr
            found["peak_relative_lr"] = peak / values["typical_weight"]
        if {"kl", "teacher_entropy"} <= values.keys():
            # Centring and Sinkhorn-Knopp make the teacher's mean output uniform. The best constant prediction is then
            # the uniform one, with a loss of ln K. The sum of `kl` and the entropy is the loss over ln K.
            found["explained"] = 1 - values["teacher_entropy"] - values["kl"]
        explained = found.get("explained", values.get("explained"))
        if explained is not None and self._settings.get("objective.mask_ratio", 0) > VISIBLE:
            found["explained_masked"] = explained
        if "teacher_spread" in values and self._settings.get("objective.out_dim", 0) >= FEWEST_PROTOTYPES:
            found["prototypes"] = self._settings["objective.out_dim"] ** values["teacher_spread"]
        for name in SCORES & values.keys():
            self._best[name] = max(values[name], self._best.get(name, 0.0))
            found["score_drop"] = max(self._best[name] - values[name], found.get("score_drop", 0.0))
        return found

    def verdict(self, rule: Rule) -> str:
        """The judgement of the rule's latest value, in a few words."""
        if rule.name in self.alarms:
            return f"ALARM at step {self.alarms[rule.name].step:,}"
        if rule.healthy(self.latest[rule.value]):
            return "healthy"
        if explained := self._explained(rule):
            return f"follows from {explained.replace('_', ' ')}"
        return "out of range, but not judged at this time"

    def advice(self, rule: Rule) -> str:
        """The keys to change, for a broken rule."""
        return rule.advice(self._case(self.alarms[rule.name].value))

    def _case(self, value: float) -> Case:
        return Case(value, self._settings, dict(self.latest), self.total_steps)

    def _explained(self, rule: Rule) -> str | None:
        return next((name for name in rule.follows if name in self.alarms), None)

    def _too_early(self, rule: Rule) -> bool:
        return bool(rule.follows) and self._takes_vitals and "relative_lr" not in self.latest
