"""What the loop costs beside the training itself, and how long a save holds it up.

    python benchmarks/loop.py overhead --data ../shared/data --json benchmarks/results/loop_cpu.json
    python benchmarks/loop.py save --json benchmarks/results/loop_cpu.json

    python benchmarks/loop.py overhead --recipe cifar10_dino --data ../shared/data --steps 30

overhead: steps of a recipe as a real run takes them, with its logging and doctor. Everything outside of forward,
backward, optimizer (clipping and teacher included) and waiting for data is the loop's. Saves are left out, as they are
from a run's images per second.

save: the state of `mae_vil_b` (weights and both moments) is saved in the background. The loop continues when `start`
returns, which should take no longer than copying the state within memory; the same copy, alone, is measured beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from selfvil import pretrain as loop
from selfvil import runtime
from selfvil.build import build_objective
from selfvil.engine.ddp import DDP
from selfvil.recipe import load
from selfvil.saving import BackgroundSaver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "save"])
    parser.add_argument("--recipe", default="cifar10_mae")
    parser.add_argument("--data", type=Path, help="folder with the folder cifar10")
    parser.add_argument("--train", help="instead of --data: shards to train on")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5, help="saves")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = overhead(args) if args.what == "overhead" else save(args.rounds)
    figures |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "commit": runtime.commit()}
    print(json.dumps(figures, indent=1))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.what: figures}, indent=1) + "\n")


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the time of a step, from the third step on."""
    steps, train = args.steps, args.train or f"{args.data}/cifar10/cifar10-train-*.tar"
    spent: dict[str, float] = defaultdict(float)
    began: list[float] = []

    def timed(name: str, work: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                if began:
                    spent[name] += time.perf_counter() - start

        return call

    def batches(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        for number in range(steps):
            if number == 2:  # the first two include the start of the workers
                began.append(time.perf_counter())
            yield timed("data", next)(made)

    original = loop.train_batches
    with tempfile.TemporaryDirectory() as folder:
        budget = ["budget.epochs=null", "budget.samples=null", f"budget.steps={steps}"]
        recipe = load(args.recipe, [
            f"data.train={train}", f"run.out={folder}/run", *budget, "run.checkpoint_every=1000000",
            "monitor.tensorboard=false", "monitor.pictures_every=null", *args.set,
        ])  # fmt: skip
        objective = type(build_objective(recipe))
        methods = {"forward": "forward", "backward": "backward", "clip_gradients": "optimizer", "update": "optimizer"}
        patches = [patch.object(DDP, name, timed(part, getattr(DDP, name))) for name, part in methods.items()]
        patches += [patch.object(objective, "after_step", timed("optimizer", objective.after_step))]
        patches += [patch.object(loop, "train_batches", batches)]
        # The last save, and what follows it, is no part of a step.
        ended: list[float] = []
        patches += [patch.object(BackgroundSaver, "start", lambda *_: ended.append(time.perf_counter()))]
        for each in patches:
            each.start()
        try:
            loop.pretrain(recipe)
        finally:
            for each in patches:
                each.stop()
    total = ended[0] - began[0]
    shares = {name: round(seconds / total, 4) for name, seconds in spent.items()}
    return {
        "recipe": args.recipe,
        "seconds_per_step": round(total / (steps - 2), 4),
        "shares": shares,
        "loop": round(1 - sum(shares.values()), 4),
    }


def save(rounds: int) -> dict[str, Any]:
    """Seconds, medians: until the loop continues, for a copy of the state, and for the whole save."""
    with tempfile.TemporaryDirectory() as folder:
        objective = build_objective(load("mae_vil_b", ["data.train=none", f"run.out={folder}"]))
        weights = {name: tensor.detach() for name, tensor in objective.state_dict().items()}
        trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
        moments = {
            f"{name}|{key}": torch.randn_like(p) for name, p in trained.items() for key in ("exp_avg", "exp_avg_sq")
        }
        state = {"objective": weights, "optimizer": moments}
        size = sum(x.nbytes for group in state.values() for x in group.values())
        saver = BackgroundSaver(Path(folder) / "checkpoints", 2, None, lambda step, tensors: None)
        until, copies, whole = [], [], []
        for step in range(1, rounds + 1):
            start = time.perf_counter()
            copied = [x.clone() for group in state.values() for x in group.values()]
            copies.append(time.perf_counter() - start)
            del copied
            start = time.perf_counter()
            saver.start(step, state, {"step": step})
            until.append(time.perf_counter() - start)
            saver.wait()
            whole.append(time.perf_counter() - start)
    medians = [round(statistics.median(values), 3) for values in (until, copies, whole)]
    return dict(zip(("until_training_continues", "copy_alone", "whole_save"), medians)) | {
        "gigabytes": round(size / 1e9, 2)
    }


if __name__ == "__main__":
    main()
