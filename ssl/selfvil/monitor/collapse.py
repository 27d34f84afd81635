"""The collapse doctor: what can go wrong in a run, how it shows, and which keys of the recipe to change.

`RULES` is the whole of its knowledge. A rule reads one number of metrics.jsonl; when that has left its healthy range,
the run says once what is happening. `Doctor` applies the rules to records as they are written, or, for `selfvil doctor
RUN`, as they are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfvil.recipe import Recipe


@dataclass(frozen=True)
class Rule:
    """One thing that can go wrong.

    name: short, for run.json. value: the number it reads, and symptom, what that is. low, high: the healthy range, its
    ends included. happening and advice: the sentence, with settings of the objective and the optimizer, {value} and
    other numbers of the metrics in braces. source: the paper, or the measurement behind the range. after, until: shares
    of the budget between which it is judged. patience: records in a row that must be out of range. follows: rules that
    explain this one; it is silent once one of them has spoken, and waits until they could have.
    """

    name: str
    symptom: str
    value: str
    low: float
    high: float
    happening: str
    advice: str
    source: str
    after: float = 0.0
    until: float = 1.0
    patience: int = 2
    follows: tuple[str, ...] = ()

    def healthy(self, value: float) -> bool:
        return self.low <= value <= self.high

    def range(self) -> str:
        if self.low == NO_LOW:
            return f"up to {self.high:g}"
        return f"from {self.low:g}" if self.high == NO_HIGH else f"{self.low:g} to {self.high:g}"


NO_LOW, NO_HIGH = -math.inf, math.inf

FEWEST_PROTOTYPES = 64
"""Of fewer it means nothing that few are in use: their effective number is not judged."""

SCORES = {"knn_20", "linear"}

CAUSES = ("learning_rate", "no_ema", "dead_teacher")
COLLAPSES = (*CAUSES, "flat_teacher", "constant_teacher")

# A table to be read, so laid out by hand.
# fmt: off
RULES = (
    # Causes, seen in the weights themselves.
    Rule(
        "learning_rate", "learning rate over typical weight", "relative_lr", NO_LOW, 0.25,
        "a step moves weights by up to {value:.0%} of their size, so that nothing learned lasts",
        "divide optim.base_lr (now {base_lr:g}) by 10 or more",
        "measured: 0.02 to 0.13 at the peak of the packaged recipes, 0.38 and more in runs at 30 times theirs",
        patience=1,
    ),
    Rule(
        "no_ema", "steps the teacher is behind", "teacher_lag", 0.5, NO_HIGH,
        "the teacher is only {value:.2f} steps behind its student, which so learns to repeat itself",
        "raise objective.teacher_momentum (now {teacher_momentum:g}) to 0.99 or more",
        "a momentum m keeps it about m / (1 - m) steps behind; without, DINO does not learn (its table 7)",
        after=0.02, until=0.5, patience=1,
    ),
    Rule(
        "dead_teacher", "way of the teacher over the student's", "teacher_follows", 0.01, NO_HIGH,
        "the teacher has gone {value:.1%} of its student's way, which so learns from a network that never learns",
        "lower objective.teacher_momentum (now {teacher_momentum:g}) to between 0.99 and 0.999",
        "measured: 0.04 and more from step 10 on in healthy runs, 0 with a momentum of 1",
        after=0.1, until=0.9, patience=1,
    ),
    # What a teacher says, as shares of ln K.
    Rule(
        "flat_teacher", "entropy of the teacher, of ln K", "teacher_entropy", NO_LOW, 0.98,
        "the teacher's answers are uniform ({value:.1%} of ln K) and say nothing of any image",
        "lower objective.teacher_temp and its warm-up (now {teacher_temp:g}; the student's is {student_temp:g})",
        "DINO, figure 7: at ln K, one of two collapses; measured: up to 0.87 healthy, 0.99 beside a student as flat",
        after=0.1, follows=CAUSES,
    ),
    Rule(
        "constant_teacher", "prototypes in use", "prototypes", 8, NO_HIGH,
        "the teacher gives nearly all images the same answer ({value:.1f} of {out_dim:,} prototypes in use)",
        "lower objective.center_momentum (now {center_momentum:g}) to 0.9, or raise objective.teacher_temp",
        "DINO, figure 7: without centring, the other; measured: 35 and more healthy, 1 to 5 without centring",
        after=0.02, follows=CAUSES,
    ),
    # What a prediction is worth.
    Rule(
        "mask_ratio", "share of the trivial loss explained", "explained", 0.15, NO_HIGH,
        "the prediction beats one answer for all images by only {value:.0%}: too little is seen to predict from",
        "lower objective.mask_ratio (now {mask_ratio:g}) to 0.75; if it is there, lengthen budget or raise base_lr",
        "measured: 0.27 to 0.77 healthy, 0.03 to 0.07 with one patch of 64 seen",
        after=0.5, follows=CAUSES,
    ),
    # Features of the network that would be exported, on up to 96 images.
    Rule(
        "constant_features", "feature standard deviation", "feature_std", 0.05, NO_HIGH,
        "all images have nearly the same features (a standard deviation of {value:.3f}; 1 is isotropic)",
        "lower optim.base_lr (now {base_lr:g}), and check data.mean, data.std and the images themselves",
        "Chen and He, SimSiam (2021), figure 2: 0 is collapse; measured: 0.5 to 0.9 healthy, 0.09 without EMA",
        after=0.1, follows=COLLAPSES,
    ),
    Rule(
        "few_dimensions", "RankMe over the most it can be", "rank_share", 0.15, NO_HIGH,
        "features have shrunk to {rankme:.1f} dimensions",
        "lower optim.base_lr (now {base_lr:g}); with a teacher, raise objective.teacher_momentum too",
        "Garrido et al., RankMe (2023); measured: 0.39 to 0.74 healthy, 0.06 to 0.10 at 30 times the rate, without EMA",
        after=0.1, follows=COLLAPSES,
    ),
    Rule(
        "steep_spectrum", "α-ReQ", "alpha_req", 0.3, 2.5,
        "a few directions hold nearly all the variance of the features, or none stands out (a decay of {value:.2f})",
        "lower optim.base_lr (now {base_lr:g}) or raise optim.weight_decay (now {weight_decay:g})",
        "Agrawal et al., α-ReQ (2022): best near 1; measured: 1.2 to 1.9 healthy, 2.8 to 3.7 at 30 times the rate",
        after=0.1, follows=(*COLLAPSES, "few_dimensions"),
    ),
    Rule(
        "views_not_images", "LiDAR over the most it can be", "lidar_share", 0.1, NO_HIGH,
        "features tell views apart rather than images ({lidar:.1f} dimensions distinguish images)",
        "raise the lower ends of objective.global_crop_scale and local_crop_scale, or lower optim.base_lr",
        "Thilak et al., LiDAR (2023): a lower rank scores lower; measured: 0.47 to 0.62 healthy",
        after=0.1, follows=(*COLLAPSES, "few_dimensions"),
    ),
    # Gates and gradients.
    Rule(
        "stuck_gates", "largest share of saturated forget gates", "saturated", NO_LOW, 0.5,
        "{value:.0%} of the forget gates of a block are stuck at 0 or 1, where they cannot learn",
        "lower optim.base_lr (now {base_lr:g}) and set optim.clip_norm (now {clip_norm})",
        "within 0.001 of 0 or 1 a gate passes 0.1 % of a gradient; measured: 0 healthy, 0.97 at 30 times the rate",
        follows=CAUSES,
    ),
    Rule(
        "no_memory", "shortest memory of a block, in tokens", "horizon", 1.0, NO_HIGH,
        "a block forgets within {value:.1f} tokens, so that it reads each patch by itself",
        "lower optim.base_lr (now {base_lr:g}); a new run starts with memories of 20 to 400 tokens",
        "forget-gate biases of 3 to 6, as published, are 20 to 400 tokens",
        follows=CAUSES,
    ),
    Rule(
        "no_gradient", "gradient of the patch embedding over that of the heads", "grad_reach", 1e-4, NO_HIGH,
        "next to nothing of the gradient reaches the first layer ({value:.0e} of the heads')",
        "raise model.init_values if it is set, or lower model.depth or optim.base_lr (now {base_lr:g})",
        "measured: 0.01 to 0.4 healthy, 0.0002 at 30 times the rate",
        follows=COLLAPSES,
    ),
    # Scores.
    Rule(
        "falling_score", "points below the best score so far", "score_drop", NO_LOW, 5.0,
        "k-NN or the linear probe is {value:.1f} points below its best: features get worse while the loss goes on",
        "take the earlier checkpoint, shorten budget, or lower optim.base_lr (now {base_lr:g})",
        "the scatter of a k-NN score on 1,000 images is about 1.5 points",
        patience=1, follows=COLLAPSES,
    ),
)
# fmt: on


@dataclass(frozen=True)
class Alarm:
    """A rule that was broken, when, by what value, and the sentence to say."""

    rule: Rule
    step: int
    value: float
    sentence: str


class Doctor:
    """Applies the rules to records in the order of their steps. takes_vitals: whether there are vital signs among them,
    for which what merely follows from a cause has to wait."""

    def __init__(self, recipe: Recipe, total_steps: int, takes_vitals: bool) -> None:
        self.total_steps = total_steps
        self.latest: dict[str, float] = {}
        self.alarms: dict[str, Alarm] = {}
        self._crossed: dict[str, int] = {}
        self._best: dict[str, float] = {}
        self._takes_vitals = takes_vitals
        self._settings: dict[str, Any] = recipe.optim.model_dump() | recipe.objective.model_dump()

    def see(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Judge what was recorded after `step` steps, all of it at once; returns the alarms that are new."""
        values = dict(values) | self._derived(values)
        self.latest |= values
        new = []
        for rule in RULES:
            if rule.value not in values or not rule.after <= step / self.total_steps <= rule.until:
                continue
            value = values[rule.value]
            self._crossed[rule.name] = 0 if rule.healthy(value) else self._crossed.get(rule.name, 0) + 1
            may_speak = rule.name not in self.alarms and not self._explained(rule) and not self._too_early(rule)
            if self._crossed[rule.name] >= rule.patience and may_speak:
                self.alarms[rule.name] = Alarm(rule, step, value, self._sentence(rule, value))
                new.append(self.alarms[rule.name])
        return new

    def _derived(self, values: Mapping[str, float]) -> dict[str, float]:
        """What rules read and no record holds: effective number of prototypes in use, and a score's fall."""
        found = {}
        if "teacher_spread" in values and self._settings.get("out_dim", 0) >= FEWEST_PROTOTYPES:
            found["prototypes"] = self._settings["out_dim"] ** values["teacher_spread"]
        for name in SCORES & values.keys():
            self._best[name] = max(values[name], self._best.get(name, 0.0))
            found["score_drop"] = max(self._best[name] - values[name], found.get("score_drop", 0.0))
        return found

    def verdict(self, rule: Rule) -> str:
        """In a few words, what is to be thought of the rule's latest value."""
        if rule.name in self.alarms:
            return f"ALARM at step {self.alarms[rule.name].step:,}"
        if rule.healthy(self.latest[rule.value]):
            return "healthy"
        if explained := self._explained(rule):
            return f"follows from {explained.replace('_', ' ')}"
        return "outside, but not when it is judged"

    def advice(self, rule: Rule) -> str:
        """Which keys to change."""
        return rule.advice.format_map(_Known(self._settings))

    def _explained(self, rule: Rule) -> str | None:
        return next((name for name in rule.follows if name in self.alarms), None)

    def _too_early(self, rule: Rule) -> bool:
        return bool(rule.follows) and self._takes_vitals and "relative_lr" not in self.latest

    def _sentence(self, rule: Rule, value: float) -> str:
        happening = rule.happening.format_map(_Known(self._settings | self.latest | {"value": value}))
        return f"{rule.name.replace('_', ' ')}: {happening}; {self.advice(rule)}"


class _Known(dict[str, Any]):
    """Settings and numbers by name; what there is none of reads as "not set" in any format."""

    def __missing__(self, key: str) -> "_NotSet":
        return _NotSet()


class _NotSet:
    def __format__(self, _: str) -> str:
        return "not set"
