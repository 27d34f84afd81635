"""Runs that are broken on purpose, and healthy ones beside them, on real images: what the doctor is tried on."""

from pathlib import Path

from selfvil.monitor.checkup import examine, open_run
from selfvil.monitor.collapse import Doctor
from selfvil.pretrain import pretrain
from selfvil.recipe import load

BROKEN = {
    "learning_rate": ("dino", ["optim.base_lr=0.12"]),  # 30 times the recipe's
    "no_ema": ("dino", ["objective.teacher_momentum=0"]),
    "dead_teacher": ("dino", ["objective.teacher_momentum=1"]),
    "flat_teacher": ("dino", ["objective.teacher_temp=0.099", "objective.warmup_teacher_temp=0.099"]),
    "constant_teacher": ("dino", ["objective.center_momentum=0.9999999"]),
    "mask_ratio": ("mae", ["objective.mask_ratio=0.99"]),
}
"""Name of the rule that must speak -> objective, and what breaks it. The settings refuse a teacher as flat as its
student and a centre that never moves: these are the nearest that they take."""

_DIGITS = {
    "dino": [
        "model.in_chans=1", "data.mean=[0.305]", "data.std=[0.376]", "model.img_size=16", "model.patch_size=4",
        "objective.out_dim=256", "objective.hidden_dim=256", "objective.local_crop_size=8", "objective.local_crops=2",
        "objective.teacher_temp=0.02", "objective.warmup_teacher_temp=0.02",  # digits are alike: 0.04 ends at ln K
        "objective.flip=false", "optim.batch_size=64",
    ],
    "mae": ["optim.batch_size=64", "optim.base_lr=8e-3"],  # the demo's rate for a step
}  # fmt: skip


def on_digits(objective: str, shards: Path, out: Path, *more: str) -> Doctor:
    """Train the demo's MAE or the DINO of CIFAR-10 on digits, made small, for 120 steps; and examine the run."""
    recipe = {"mae": "demo", "dino": "cifar10_dino"}[objective]
    return run(recipe, f"{shards}/digits-*.tar", out, "model.depth=2", "budget.steps=120", *_DIGITS[objective], *more)


def on_cifar10(shared_data: Path, out: Path, *more: str) -> Doctor:
    """Train by the DINO recipe of CIFAR-10 with a third of its depth for 120 steps; and examine the run."""
    train = f"{shared_data}/cifar10/cifar10-train-{{000000..000001}}.tar"
    return run("cifar10_dino", train, out, "model.depth=2", "objective.local_crops=2", "budget.steps=120", *more)


def run(recipe: str, train: str, out: Path, *more: str) -> Doctor:
    """Train by a packaged recipe on one thread, with a look every 10 steps; and examine the run."""
    settings = [
        f"data.train={train}", f"run.out={out}", "data.workers=0", "run.threads=1", "budget.epochs=null",
        "budget.samples=null", "monitor.log_every=10", "monitor.doctor_every=10", "monitor.tensorboard=false",
        "monitor.pictures_every=null", *more,
    ]  # fmt: skip
    pretrain(load(recipe, settings))
    return examine(open_run(out))
