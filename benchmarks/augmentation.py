"""Images per second that a core can prepare, with augmentation in the worker or on the device, and the device's speed.

    python benchmarks/augmentation.py cifar10_mae cifar10_dino --train 'shards/*.tar' --json benchmarks/results/x.json

For the views of each recipe, from the same shards, three speeds are measured: a core that decodes and augments
(`data.augment: workers`), a core that decodes and draws random numbers (`device`), and the device that renders the
views from these numbers, copies included. Each round times all three on a new batch, one after the other, so that other
work on the machine affects them equally; the median over the rounds is reported with its quartiles. Before that, both
ways must give the same views: the differences of one batch, in levels of 255, are reported too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from about import about

from selfvil.build import build_objective
from selfvil.data.index import Shards, open_shards
from selfvil.data.loader import Batch, train_batches
from selfvil.data.views import RandomCropFlip
from selfvil.recipe import load

WORKERS, DRAWS, RENDERS = "a core, augmenting", "a core, drawing", "the device, rendering"
FURTHEST = 1.0  # levels; a larger mean difference cannot come from rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="packaged recipes by name, such as cifar10_mae or dino_vil_t")
    parser.add_argument("--train", required=True, help="shards to read images from, as data.train")
    parser.add_argument("--batch", type=int, default=256, help="images in each timed batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for rendering on a CPU")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(name, args) for name in args.recipes]
    print_table(rows, args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"about": about(args, pillow=PIL.__version__, numpy=np.__version__), "rows": rows}, indent=2)
            + "\n"
        )


def measure(name: str, args: argparse.Namespace) -> dict:
    recipe = load(name, [f"data.train={args.train}", "run.out=unused"])
    shards, channels = open_shards(recipe.data.train, image=recipe.data.image), recipe.model.in_chans
    views = [view for view in build_objective(recipe).views() if isinstance(view, RandomCropFlip)]

    def batch(step: int, augment: str) -> Batch:
        return one_batch(shards, views, step, args.batch, channels, augment)

    differences = compare(batch(0, "workers"), batch(0, "device").to(args.device), views)
    if not differences["mean"] < FURTHEST:
        sys.exit(f"{name}: both ways differ by {differences['mean']:.1f} levels, so timings would be meaningless")
    seconds: dict[str, list[float]] = {WORKERS: [], DRAWS: [], RENDERS: []}
    for step in range(1, args.rounds + 1):
        taken, _ = timed(lambda step=step: batch(step, "workers"))
        seconds[WORKERS].append(taken)
        taken, drawn = timed(lambda step=step: batch(step, "device"))
        seconds[DRAWS].append(taken)
        taken, _ = timed(lambda drawn=drawn: drawn.to(args.device))
        seconds[RENDERS].append(taken)
    return {
        "recipe": name,
        "views": [[view.height, view.width] for view in views],
        "images_per_s": {way: spread([args.batch / taken for taken in times]) for way, times in seconds.items()},
        "drawing_over_augmenting": spread([a / b for a, b in zip(seconds[WORKERS], seconds[DRAWS], strict=True)]),
        "difference_in_levels": differences,
        "seconds": seconds,
    }


def one_batch(shards: Shards, views: list[RandomCropFlip], step: int, size: int, channels: int, augment: str) -> Batch:
    batches = train_batches(
        shards, views, seed=0, batch_size=size, start_step=step, stop_step=step + 1, channels=channels, augment=augment
    )  # fmt: skip
    return next(batches)


def compare(workers: Batch, device: Batch, views: list[RandomCropFlip]) -> dict:
    """Largest and mean difference over all views, in levels, and the share of differences over half a level."""
    levels = []
    for view, ours, theirs in zip(views, device.views, workers.views, strict=True):
        differences = (ours.cpu() - theirs).abs() / torch.from_numpy(view.normalise.factor)
        levels.append(differences.flatten())
    together = torch.cat(levels)
    return {
        "largest": round(together.max().item(), 2),
        "mean": round(together.mean().item(), 5),
        "share": round((together > 0.5).float().mean().item(), 5),
    }


def timed(work: Callable[[], Batch]) -> tuple[float, Batch]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    batch = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, batch


def spread(values: list[float]) -> dict:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]}


def print_table(rows: list[dict], args: argparse.Namespace) -> None:
    print(f"images/s on {about(args)['device']}, batches of {args.batch}: median [quartiles]")
    for row in rows:
        print(f"{row['recipe']}: {len(row['views'])} views of {sorted({tuple(view) for view in row['views']})}")
        for way, speed in row["images_per_s"].items():
            low, high = speed["quartiles"]
            print(f"    {way:24} {speed['median']:10,.0f} [{low:,.0f}, {high:,.0f}]")
        ratio, levels = row["drawing_over_augmenting"]["median"], row["difference_in_levels"]
        print(
            f"    a core prepares {ratio:.1f} times as many; both ways differ by {levels['mean']:.3f} levels of 255 on "
            f"average, {levels['largest']:.0f} at most"
        )


if __name__ == "__main__":
    main()
