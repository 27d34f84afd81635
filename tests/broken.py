"""Runs with a deliberate fault, and healthy ones of many kinds and sizes, on real images, to test the doctor.

python tests/broken.py             # all of them, as a table
python tests/broken.py dino        # those with one of the words in their name
pytest -m slow tests/test_doctor.py
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import runs
from selfvil.diagnostics.checkup import examine, open_run
from selfvil.diagnostics.collapse import Doctor
from selfvil.pretrain import pretrain
from selfvil.recipe import load


class Trial(NamedTuple):
    """A run. rule: the only one that must raise an alarm; None for a healthy run."""

    rule: str | None
    objective: str
    settings: tuple[str, ...]


def _trial(rule: str | None, objective: str, batch: int, steps: int, rate: float, *settings: str) -> Trial:
    """batch: images per step; rate: the peak learning rate."""
    size = (f"optim.batch_size={batch}", f"budget.steps={steps}", "optim.lr_scaling=none", f"optim.base_lr={rate}")
    return Trial(rule, objective, (*size, *settings))


_WIDE = ("model.embed_dim=96", "model.depth=2")
_DINO = (
    *_WIDE, "objective.flip=false", "objective.out_dim=256", "objective.hidden_dim=256",
    "objective.teacher_temp=0.02", "objective.warmup_teacher_temp=0.02",  # digits are alike: 0.04 ends at ln K
)  # fmt: skip
_VIT = ("model.name=vit_tiny_patch16_224", "model.num_heads=2", "model.traversal=null", "model.conv=null")

TRIALS = {
    # Healthy.
    "mae": _trial(None, "mae", 64, 120, 2e-3, "model.patch_size=2", *_WIDE),
    "mae, small batch": _trial(None, "mae", 8, 120, 2e-3),
    "mae, short": _trial(None, "mae", 40, 60, 4e-3),
    "mae, smoke test": _trial(None, "mae", 40, 12, 2e-3),
    "mae, quad": _trial(None, "mae", 40, 60, 4e-3, "model.traversal=quad_shared"),
    "mae, ViT": _trial(None, "mae", 40, 80, 1e-3, *_VIT),
    "simmim": _trial(None, "simmim", 40, 60, 4e-3, "objective.normalise_targets=false"),
    "simmim, small batch": _trial(None, "simmim", 8, 120, 4e-3, "objective.normalise_targets=false"),
    "autoregressive": _trial(None, "autoregressive", 40, 60, 4e-3),
    "autoregressive, small batch": _trial(None, "autoregressive", 16, 160, 4e-3),
    "dino": _trial(None, "dino", 64, 120, 1e-3, *_DINO),
    "dino, another seed": _trial(None, "dino", 64, 120, 1e-3, *_DINO, "run.seed=1"),
    "dino, small batch": _trial(None, "dino", 16, 150, 1e-3, *_DINO),
    "dino, smoke test": _trial(None, "dino", 40, 12, 1e-3),
    "ibot": _trial(None, "ibot", 40, 120, 1e-3, *_DINO),
    "dinov2": _trial(None, "dinov2", 40, 120, 1e-3, *_DINO),
    "lejepa": _trial(None, "lejepa", 40, 60, 2e-3),
    "lejepa, small batch": _trial(None, "lejepa", 16, 60, 2e-3),
    "visreg": _trial(None, "visreg", 40, 60, 4e-3),
    "ijepa": _trial(None, "ijepa", 40, 120, 2e-3, *_WIDE),
    "ijepa, small batch": _trial(None, "ijepa", 16, 200, 2e-3, *_WIDE),
    "ijepa, attention": _trial(
        None, "ijepa", 40, 120, 2e-3, *_WIDE, "objective.predictor=vit", "objective.predictor_heads=4"
    ),
    "distill": _trial(None, "distill", 40, 60, 2e-3),
    "distill, small batch": _trial(None, "distill", 8, 60, 2e-3),
    "supervised": _trial(None, "supervised", 40, 120, 2e-3),
    "supervised, small batch": _trial(None, "supervised", 8, 120, 1e-3),
    "supervised, smoke test": _trial(None, "supervised", 40, 12, 2e-3),
    "supervised, ViT": _trial(
        None, "supervised", 40, 240, 4e-3, *_VIT, "objective.mixup=0", "objective.cutmix=0",
        "objective.randaugment=null",
    ),
    "supervised, moving average": _trial(None, "supervised", 40, 120, 2e-3, "objective.ema_decay=0.9"),
    # Broken.
    "dino, 30 times the rate": _trial("high_learning_rate", "dino", 64, 120, 0.03, *_DINO),
    "dino without EMA": _trial("no_ema", "dino", 64, 120, 1e-3, *_DINO, "objective.teacher_momentum=0"),
    "dino, frozen teacher": _trial("dead_teacher", "dino", 64, 120, 1e-3, *_DINO, "objective.teacher_momentum=1"),
    # The settings refuse a teacher as flat as its student and a centre that never moves: these are the nearest.
    "dino, flat teacher": _trial(
        "flat_teacher", "dino", 64, 120, 1e-3, *_DINO, "objective.teacher_temp=0.099",
        "objective.warmup_teacher_temp=0.099",
    ),
    "dino without centre": _trial(
        "constant_teacher", "dino", 64, 120, 1e-3, *_DINO, "objective.center_momentum=0.9999999"
    ),
    "dino, too slow": _trial("not_learning", "dino", 40, 60, 3e-4),
    "visreg without its regulariser": _trial(
        "constant_projections", "visreg", 40, 60, 4e-3, "objective.regulariser_weight=1e-4"
    ),
    "visreg, small batch": _trial("constant_projections", "visreg", 16, 60, 4e-3),
    "lejepa without SIGReg": _trial("constant_projections", "lejepa", 40, 60, 4e-3, "objective.sigreg_weight=1e-5"),
    "ijepa without EMA": _trial("no_ema", "ijepa", 40, 120, 2e-3, *_WIDE, "objective.teacher_momentum=0",
                                "objective.teacher_momentum_schedule=constant"),
    "ijepa, frozen teacher": _trial("dead_teacher", "ijepa", 40, 120, 2e-3, *_WIDE, "objective.teacher_momentum=1"),
    "mae, 1 patch of 64 visible": _trial(
        "mask_ratio", "mae", 64, 120, 2e-3, "model.patch_size=2", *_WIDE, "objective.mask_ratio=0.99"
    ),
    "mae, too slow": _trial("not_learning", "mae", 40, 60, 2e-4),
    "simmim, too slow": _trial("not_learning", "simmim", 40, 60, 2e-4, "objective.normalise_targets=false"),
    "autoregressive, too slow": _trial("not_learning", "autoregressive", 40, 60, 2e-4),
    "supervised, 30 times the rate": _trial("high_learning_rate", "supervised", 40, 120, 0.06),
    "supervised, too slow": _trial("not_learning", "supervised", 40, 60, 2e-4),
    **{
        f"{objective}, a hundredth of the rate": _trial("low_learning_rate", objective, 40, 60, 2e-5)
        for objective in ("mae", "simmim", "autoregressive", "dino", "lejepa", "distill", "supervised")
    },
}  # fmt: skip


def run(trial: Trial, shards: Path, out: Path) -> Doctor:
    """Train, measure every 10 steps, and examine the run."""
    settings = ["monitor.log_every=10", "monitor.doctor_every=10", "run.checkpoint_every=1000", *trial.settings]
    pretrain(runs.small(trial.objective, shards, out, *settings))
    return examine(open_run(out))


def of_recipe(recipe: str, train: str, out: Path, *settings: str) -> Doctor:
    """Train by a packaged recipe, and examine the run."""
    pretrain(load(recipe, [train, f"run.out={out}", *settings]))
    return examine(open_run(out))


def main(*words: str) -> int:
    """Run all trials with one of `words` in their name, and print the alarms and the measured values."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        shards = runs.pack_digits(Path(folder))
        for number, (name, trial) in enumerate(TRIALS.items()):
            if words and not any(word in name for word in words):
                continue
            began = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                doctor = run(trial, shards, Path(folder, str(number)))
            expected = [] if trial.rule is None else [trial.rule]
            wrong += list(doctor.alarms) != expected
            values = " ".join(
                f"{key}={doctor.latest[key]:.3g}"
                for key in ("peak_relative_lr", "explained", "teacher_entropy", "teacher_spread", "prototypes",
                            "teacher_lag", "teacher_follows", "feature_std", "rank_share", "alpha_req", "lidar_share",
                            "target_std", "projection_std", "grad_reach")
                if key in doctor.latest
            )  # fmt: skip
            mark = "" if list(doctor.alarms) == expected else "WRONG "
            seconds = time.process_time() - began
            print(f"{mark}{name} | {', '.join(doctor.alarms) or 'no alarm'} | {seconds:.0f} s | {values}")
            sys.stdout.flush()
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:])))
