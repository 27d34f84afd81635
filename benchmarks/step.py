"""Where the time of an optimizer step of a recipe goes, and what torch.compile and the native kernels change.

    python benchmarks/step.py cifar10_mae cifar10_dino --variants eager compiled --threads 1 --clock cpu \\
        --json benchmarks/results/step_cpu.json

A step is what `selfvil pretrain` computes for one batch: forward, backward, clipping, AdamW, and the objective's
teacher. Images are random numbers of the recipe's sizes, so that no time is spent on data. Each round takes one step of
every variant, one after the other, so that other work on the machine affects all of them equally. Reported are medians
over the rounds, and the median of the ratios to the first variant within each round, with quartiles. All variants begin
with equal weights; their losses after the last round are printed, since a wrong result would make its time meaningless.

    eager, compiled     run.compile = none, or default: each block is compiled. The time of the first step is in the
                        record, which contains that of compiling.
    plain               eager, without the native CPU kernels

Phases are measured between synchronisations with the device. On a GPU that makes a step slower than in a run, where
the host prepares the next operations meanwhile: `--whole` measures the step alone.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from about import about

from selfvil import optim, runtime
from selfvil.allocator import kept_memory
from selfvil.build import build_objective, parameter_groups
from selfvil.data.loader import Batch
from selfvil.data.views import RandomCropFlip
from selfvil.engine.blocks import compile_blocks
from selfvil.objectives.base import Objective, Progress
from selfvil.ops.fused import SWITCH
from selfvil.ops.mlstm import OVERRIDE
from selfvil.recipe import Recipe, load

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VARIANTS = ("eager", "compiled", "plain")
PHASES = ("forward", "backward", "clipping", "AdamW", "teacher")


class Stepper:
    """One variant of a recipe's training. `take` takes a step and adds its seconds, by phase."""

    def __init__(self, recipe: Recipe, variant: str, batch: Batch, args: argparse.Namespace) -> None:
        self.recipe, self.variant, self.batch, self.args = recipe, variant, batch, args
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.objective: Objective = build_objective(recipe).to(self.device).train()
        self.optimizer = optim.adamw(parameter_groups(recipe, self.objective), recipe.optim.betas)
        if variant == "compiled":
            compile_blocks(self.objective, "default", self.device)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.step, self.loss, self.first = 0, 0.0, 0.0

    def take(self) -> None:
        recipe, spent = self.recipe, dict.fromkeys(PHASES, 0.0)
        progress = Progress(self.step, 1000, 100.0, seed=0)
        optim.set_rates(self.optimizer, 1e-4, 0.05, self.objective.lr_scales(progress))
        runtime.seed_step(0, self.step, 0)
        began, whole = time.perf_counter(), self.now()
        with self.phase("forward", spent), runtime.autocast(self.device, recipe.run.precision):
            output = self.objective(self.batch, progress)
        with self.phase("backward", spent):
            output.loss.backward()
        with self.phase("clipping", spent):
            optim.clip_gradients(self.objective.parameters(), recipe.optim.clip_norm, recipe.optim.clip_per_tensor)
        with self.phase("AdamW", spent):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with self.phase("teacher", spent):
            self.objective.after_step(progress)
        whole, self.loss = self.now() - whole, output.loss.item()
        if self.step == 0:  # which allocates memory, and compiles
            self.first = time.perf_counter() - began
        elif self.step > 1:
            for name, seconds in {**spent, "step": whole}.items():
                self.seconds[name].append(seconds)
        self.step += 1

    @contextmanager
    def phase(self, name: str, spent: dict[str, float]) -> Iterator[None]:
        if self.args.whole:
            yield
            return
        start = self.now()
        yield
        spent[name] = self.now() - start

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return CLOCKS[self.args.clock]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="packaged recipes by name")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all recipes, such as optim.batch_size=64")
    parser.add_argument("--variants", nargs="+", default=["eager", "compiled"], choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: CPU time of this process")
    parser.add_argument("--whole", action="store_true", help="measure no phases")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--return-memory", action="store_true", help="not as a run: freed memory returns to the system")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with nullcontext() if args.return_memory else kept_memory():
        rows = [row for name in args.recipes for row in measure(name, args)]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1) + "\n")


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    recipe = load(name, ["data.train=none", "run.out=unused", *args.set])
    batch = make_batch(recipe, args)
    steppers = [Stepper(recipe, variant, batch, args) for variant in args.variants]
    for _ in range(args.rounds + 2):
        for stepper in steppers:
            with kernels(stepper.variant != "plain"):
                stepper.take()
    rows = []
    for stepper in steppers:
        ours = steppers[0].seconds["step"]
        ratios = [theirs / first for theirs, first in zip(stepper.seconds["step"], ours, strict=True)]
        median = {phase: statistics.median(seconds) for phase, seconds in stepper.seconds.items()}
        rows.append(
            {
                "recipe": name, "variant": stepper.variant, "precision": recipe.run.precision,
                "images": len(batch.labels),
                "images_per_s": len(batch.labels) / median["step"], "seconds": median,
                "time_over_first": spread(ratios), "first_step_seconds": stepper.first, "loss": stepper.loss,
                "steps": stepper.seconds["step"],
            }
        )  # fmt: skip
        print_row(rows[-1])
    return rows


def make_batch(recipe: Recipe, args: argparse.Namespace) -> Batch:
    """A micro-batch of one process, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    images, channels = recipe.optim.batch_size // recipe.optim.accumulate, recipe.model.in_chans
    sizes = [(view.height, view.width) for view in build_objective(recipe).views() if isinstance(view, RandomCropFlip)]
    views = [torch.randn(images, channels, *size, generator=generator) for size in sizes]
    indices = torch.arange(images)
    return Batch(views, indices, indices, torch.zeros(images, dtype=torch.int64)).to(args.device)


@contextmanager
def kernels(native: bool) -> Iterator[None]:
    """In this context, the native CPU kernels are used or not. Sequences are short enough for the parallel form."""
    plain = {} if native else {SWITCH: "0", OVERRIDE: "parallel"}
    with patch.dict(os.environ, plain):
        yield


def spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": middle, "quartiles": [low, high]}


def print_row(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    phases = ", ".join(f"{name} {100 * seconds[name] / seconds['step']:.1f} %" for name in PHASES if seconds[name])
    low, high = row["time_over_first"]["quartiles"]
    print(
        f"{row['recipe']} {row['variant']}: {row['images_per_s']:,.0f} images/s, "
        f"{row['time_over_first']['median']:.2f} [{low:.2f}, {high:.2f}] of the first's time; {phases}; "
        f"first step {row['first_step_seconds']:.0f} s, loss {row['loss']:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
