"""Problems of a run, the metrics that show them, and the keys of the recipe to change.

`RULES` is the complete table: each rule has one number of the metrics and its healthy range. `collapse.py` applies it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from selfvil.diagnostics.wording import Case, count, first, number, setting, share

NO_LOW, NO_HIGH = -math.inf, math.inf

USUAL_LR = 0.04
"""The peak learning rate over the typical weight that is advised; the packaged recipes have 0.017 to 0.13."""

FEWEST_PROTOTYPES = 64
"""With fewer prototypes, the effective number of those in use is not judged."""

FEWEST_IMAGES = 16
"""With fewer images, ranks and spectra of features are too uncertain to be judged."""

FEWEST_STEPS = 30
"""Runs of fewer steps are not expected to learn."""

VISIBLE = 0.85
"""Mask ratio up to which the visible patches are enough to predict the masked ones."""


@dataclass(frozen=True)
class Rule:
    """One problem and how it is recognised.

    name: short, for run.json. symptom: description of the metric `value`. low, high: the healthy range, inclusive.
    happening, advice: for a `Case` in which the rule is broken, a description and what to change. source: the paper or
    the measurement behind the range. after, until: shares of the budget between which the rule is judged. patience:
    consecutive records that must be out of range. fewest_steps: shorter runs are not judged. follows: rules whose
    problems are causes of this one; it raises no alarm after one of them, or before they could be judged.
    """

    name: str
    symptom: str
    value: str
    low: float
    high: float
    happening: Callable[[Case], str]
    advice: Callable[[Case], str]
    source: str
    after: float = 0.0
    until: float = 1.0
    patience: int = 2
    fewest_steps: int = 1
    follows: tuple[str, ...] = ()

    def healthy(self, value: float) -> bool:
        return self.low <= value <= self.high

    def range(self) -> str:
        if self.low == NO_LOW:
            return f"up to {number(self.high)}"
        if self.high == NO_HIGH:
            return f"from {number(self.low)}"
        return f"{number(self.low)} to {number(self.high)}"

    def sentence(self, case: Case) -> str:
        return f"{self.name.replace('_', ' ')}: {self.happening(case)}; {self.advice(case)}"


CAUSES = ("high_learning_rate", "low_learning_rate", "no_ema", "dead_teacher")
COLLAPSES = (*CAUSES, "flat_teacher", "constant_teacher", "constant_targets", "constant_projections")
FEW_DIRECTIONS = ("few_dimensions", "steep_spectrum", "views_not_images")
"""Not judged under supervised training, which rightly leaves a direction for each class (Papyan et al., 2020)."""


# --- advice that depends on the settings -----------------------------------------------------------------------------


def lower_lr(case: Case) -> str:
    return case.scale_lr(1 / 3)


def learn_more(case: Case) -> str:
    """For a run that has not learned: change the learning rate if it is unusual, otherwise train longer."""
    peak = case.numbers.get("peak_relative_lr")
    if peak and not USUAL_LR / 4 <= peak <= 4 * USUAL_LR:
        return f"{case.scale_lr(USUAL_LR / peak)}, or train longer (the run has {count(case.total_steps, 'step')})"
    return (
        f"train longer (the run has {count(case.total_steps, 'step')}), try another {case.now('optim.base_lr')}, and "
        "check data.mean, data.std and the images themselves"
    )


def sharper_teacher(case: Case) -> str:
    keys = ["objective.teacher_temp", "objective.warmup_teacher_temp"]
    temperatures = {key: float(case.settings[key]) for key in keys if case.has(key)}
    if not temperatures:
        return lower_lr(case)
    target = 0.04 if max(temperatures.values()) > 0.06 else float(f"{max(temperatures.values()) / 2:.1g}")
    return " and ".join(filter(None, (case.lower(key, target) for key in temperatures)))


def softer_teacher(case: Case) -> str:
    centre = None
    if case.settings.get("objective.centring") != "sinkhorn":
        centre = case.lower("objective.center_momentum", 0.9)
    most = float(f"{0.7 * float(case.settings.get('objective.student_temp') or 0.1):.1g}")
    return first(centre, case.raised("objective.teacher_temp", most), lower_lr(case))


def larger_crops(case: Case) -> str:
    scales = {
        key: (case.settings[key], low)
        for key, low in (("objective.global_crop_scale", 0.5), ("objective.local_crop_scale", 0.2))
        if case.has(key) and case.settings[key][0] < low
    }
    if not scales:
        return lower_lr(case)
    return " and ".join(
        f"raise the lower end of {key} (now {setting(float(now[0]))}) to {setting(low)}"
        for key, (now, low) in scales.items()
    )


def momentum_for(case: Case) -> float:
    """A momentum of the teacher that averages over a twentieth of the run, at most DINO's."""
    return min(0.996, max(0.9, float(f"{1 - 20 / case.total_steps:.3g}")))


def clip(case: Case) -> str:
    return lower_lr(case) + ("" if case.has("optim.clip_norm") else ", and set optim.clip_norm to 1")


# Formatted by hand, to be read as a table.
# fmt: off
RULES = (
    # Causes, measured on the weights.
    Rule(
        "high_learning_rate", "learning rate over typical weight", "relative_lr", NO_LOW, 0.25,
        lambda c: f"each step moves the weights by up to {share(c.value)} of their size, so training cannot settle",
        lambda c: c.scale_lr(USUAL_LR / max(c.value, c.numbers.get("peak_relative_lr", 0))),
        "measured: 0.02 to 0.13 at the peak of the packaged recipes, 0.38 and more in runs at 30 times theirs",
        patience=1,
    ),
    Rule(
        "low_learning_rate", "peak learning rate over typical weight", "peak_relative_lr", 0.001, NO_HIGH,
        lambda c: f"each step moves the weights by at most {share(c.value)} of their size; 2 % to 13 % is usual",
        lambda c: c.scale_lr(USUAL_LR / max(c.value, 1e-12)),
        "measured: 0.017 to 0.13 in the packaged recipes, of which a hundredth learned nothing",
        patience=1,
    ),
    Rule(
        "no_ema", "steps by which the teacher lags", "teacher_lag", 0.5, NO_HIGH,
        lambda c: f"the teacher is only {count(c.value, 'step')} behind the student, which trains on its own outputs",
        lambda c: first(c.raised("objective.teacher_momentum", 0.99), lower_lr(c)),
        "a momentum m gives a lag of about m / (1 - m) steps; without one, DINO does not learn (its table 7)",
        after=0.02, until=0.5, patience=1,
    ),
    Rule(
        "dead_teacher", "distance the teacher has moved over the student's", "teacher_follows", 0.002, NO_HIGH,
        lambda c: f"the teacher has moved {share(c.value)} of the distance that its student has, so it does not learn",
        lambda c: first(c.lower("objective.teacher_momentum", momentum_for(c)), "train longer"),
        "measured: 0.01 and more in healthy runs of 40 steps and more, 0 with a momentum of 1",
        after=0.1, until=0.9, patience=1,
    ),
    # The teacher's distribution over prototypes.
    Rule(
        "flat_teacher", "entropy of the teacher, of ln K", "teacher_entropy", NO_LOW, 0.98,
        lambda c: f"the teacher's outputs are uniform (entropy {share(c.value)} of ln K), the same for every image",
        sharper_teacher,
        "DINO, figure 7: ln K is one of two collapses; measured: up to 0.87 healthy, 0.99 with a uniform student",
        after=0.1, follows=CAUSES,
    ),
    Rule(
        "constant_teacher", "prototypes in use", "prototypes", 8, NO_HIGH,
        lambda c: "the teacher gives nearly all images the same output "
        f"({count(c.value, 'prototype')} of {c.settings['objective.out_dim']:,} in use)",
        softer_teacher,
        "DINO, figure 7: the other collapse, without centring; measured: 35 and more healthy, 1 to 5 without it",
        after=0.02, follows=CAUSES,
    ),
    # I-JEPA's targets, and the projections of LeJEPA and VISReg.
    Rule(
        "constant_targets", "deviation of the targets between images", "target_std", 0.1, NO_HIGH,
        lambda c: "the teacher gives nearly all images the same features at the same place "
        f"(standard deviation {number(c.value)}; 1 if they have nothing in common)",
        lambda c: first(c.raised("objective.teacher_momentum", 0.99), lower_lr(c)),
        "0 by definition for features of the place alone, at most about 1; measured: 0.75 to 0.9 healthy",
        after=0.1, follows=CAUSES,
    ),
    Rule(
        "constant_projections", "deviation of the projections", "projection_std", 0.1, NO_HIGH,
        lambda c: "all images are projected to nearly the same point "
        f"(standard deviation {number(c.value)}; the loss aims at 1)",
        lambda c: first(
            c.raised("optim.batch_size", 64), c.raised("objective.regulariser_weight", 0.6),
            c.raised("objective.sigreg_weight", 0.05), lower_lr(c),
        ),
        "0 is collapse by definition; measured: 0.2 to 0.5 healthy, 0.03 without a regulariser, 0.05 of VISReg in 16s",
        after=0.1, follows=CAUSES,
    ),
    # The share that is learned: 0 for the best constant prediction, 1 for a perfect one.
    Rule(
        "mask_ratio", "share learned where most is masked", "explained_masked", 0.15, NO_HIGH,
        lambda c: f"{_learned(c.value)}: too little of an image remains to predict the rest from",
        lambda c: first(c.lower("objective.mask_ratio", 0.75), learn_more(c)),
        "measured: 0.27 to 0.77 healthy, 0.03 to 0.07 with one patch of 64 visible",
        after=0.5, fewest_steps=FEWEST_STEPS, follows=CAUSES,
    ),
    Rule(
        "not_learning", "share learned (0: one prediction for all images)", "explained", 0.0, NO_HIGH,
        lambda c: _learned(c.value),
        learn_more,
        "0 by definition for a network that ignores the image",
        after=0.75, patience=3, fewest_steps=FEWEST_STEPS, follows=(*COLLAPSES, "mask_ratio"),
    ),
    # Features of the exported network, on up to 96 images.
    Rule(
        "constant_features", "feature standard deviation", "feature_std", 0.05, NO_HIGH,
        lambda c: f"all images have nearly the same features (standard deviation {number(c.value)}; 1 is isotropic)",
        lambda c: f"{lower_lr(c)}, and check data.mean, data.std and the images themselves",
        "Chen and He, SimSiam (2021), figure 2: 0 is collapse; measured: 0.5 to 0.9 healthy, 0.09 without EMA",
        after=0.1, follows=COLLAPSES,
    ),
    Rule(
        "few_dimensions", "RankMe over its maximum", "rank_share", 0.05, NO_HIGH,
        lambda c: f"features use only {share(c.value)} of the dimensions that they could use (RankMe)",
        lambda c: lower_lr(c) + "".join(
            f", and {advice}" for advice in [c.raised("objective.teacher_momentum", 0.99)] if advice
        ),
        "Garrido et al., RankMe (2023); measured: 0.36 to 0.84 healthy, 0.10 of a ViT's class token, early under MAE",
        after=0.1, follows=COLLAPSES,
    ),
    Rule(
        "steep_spectrum", "α-ReQ", "alpha_req", 0.3, 4.5,
        lambda c: (
            "a few directions hold nearly all the variance of the features" if c.value > 1
            else "the features' variance is spread evenly, as in noise"
        ) + f" (spectral decay {number(c.value)}; near 1 is best)",
        lambda c: f"{lower_lr(c)} or raise {c.now('optim.weight_decay')}" if c.value > 1 else learn_more(c),
        "Agrawal et al., α-ReQ (2022): best near 1; measured: 1.2 to 2.2 healthy, 3.8 of a ViT's class token under MAE",
        after=0.1, follows=(*COLLAPSES, "few_dimensions"),
    ),
    Rule(
        "views_not_images", "LiDAR over its maximum", "lidar_share", 0.1, NO_HIGH,
        lambda c: "features distinguish views rather than images: "
        f"{share(c.value)} of the dimensions that could tell images apart do (LiDAR)",
        larger_crops,
        "Thilak et al., LiDAR (2023): a lower rank scores lower; measured: 0.47 to 0.62 healthy",
        after=0.1, follows=(*COLLAPSES, "few_dimensions"),
    ),
    # Gates and gradients.
    Rule(
        "stuck_gates", "largest share of saturated forget gates", "saturated", NO_LOW, 0.5,
        lambda c: f"{share(c.value)} of the forget gates of a block are stuck at 0 or 1, where they cannot learn",
        clip,
        "within 0.001 of 0 or 1 a gate passes 0.1 % of a gradient; measured: 0 healthy, 0.97 at 30 times the rate",
        follows=CAUSES,
    ),
    Rule(
        "no_memory", "shortest memory of a block, in tokens", "horizon", 1.0, NO_HIGH,
        lambda c: f"a block forgets within {count(c.value, 'token')}, so it processes each patch by itself",
        lambda c: f"{lower_lr(c)}; a new run starts with memories of 20 to 400 tokens",
        "forget-gate biases of 3 to 6, as published, are 20 to 400 tokens",
        follows=CAUSES,
    ),
    Rule(
        "no_gradient", "gradient of the patch embedding over that of the heads", "grad_reach", 1e-4, NO_HIGH,
        lambda c: f"almost no gradient reaches the first layer ({share(c.value)} of that of the heads)",
        lambda c: first(c.raised("model.init_values", 0.1), lower_lr(c)),
        "measured: 0.01 to 0.4 healthy, 0.0002 at 30 times the rate",
        follows=COLLAPSES,
    ),
    # Scores.
    Rule(
        "falling_score", "points below the best score so far", "score_drop", NO_LOW, 5.0,
        lambda c: f"k-NN or the linear probe is {count(c.value, 'point')} below its best: features become worse",
        lambda c: f"use the earlier checkpoint, shorten the budget, or {lower_lr(c)}",
        "the scatter of a k-NN score on 1,000 images is about 1.5 points",
        patience=1, follows=COLLAPSES,
    ),
)
# fmt: on


def _learned(explained: float) -> str:
    if explained < -0.02:
        return "predictions are worse than one prediction for all images"
    if explained < 0.005:
        return "predictions are no better than one prediction for all images"
    return f"predictions explain only {share(explained)} of what differs between images"
