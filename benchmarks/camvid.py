"""Dense features on CamVid: what pretraining without labels adds to mean IoU, by seed.

    python benchmarks/camvid.py --data ../shared/data --work camvid --json benchmarks/results/camvid_cpu.json
    python benchmarks/camvid.py ... --seeds 0 1 2 --pretrain budget.samples=20000 --segment short_side=240

For each seed: a recipe is pretrained on the photographs and the training images of CamVid, without labels, and
`selfvil eval segment` scores the run, the same network untrained, and raw pixels on CamVid's val. A score that is
already in --work is not computed again, and an unfinished run is resumed. The table gives means and deviations over the
seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from about import about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders photos and camvid")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and scores")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--recipe", default="camvid_lejepa")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--segment", nargs="*", default=[], help="settings of the evaluation")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.device = "cpu"
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = [row for seed in args.seeds for row in scores(args, seed)]
    shown = table(rows)
    figures = {"about": about(args), "summary": shown, "rows": rows}
    args.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    for line in shown:
        print(f"{line['protocol']:30} {line['network']:12} {line['mean']:6.2f} ± {line['deviation']:.2f}")


def scores(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The rows of `selfvil eval segment --json` for one seed, which is that of the run, the fits and the baseline."""
    run, out = args.work / f"seed{seed}", args.work / f"seed{seed}.json"
    camvid, photos = args.data / "camvid", args.data / "photos"
    if not out.exists():
        data = f"data.train=[{photos}/photos-*.tar,{camvid}/camvid-train-*.tar]"
        selfvil(
            "pretrain", args.recipe, data, f"run.out={run}", f"run.seed={seed}", f"run.threads={args.threads}",
            *args.pretrain,
        )  # fmt: skip
        selfvil(
            "eval", "segment", run, "--train", f"{camvid}/camvid-train-*.tar", "--test", f"{camvid}/camvid-val-*.tar",
            "--image", "jpg", "--baselines", "--seed", seed, "--precision", args.precision, "--json", f"{out}.part",
            "ignore=[11,255]", f"out={args.work / f'pictures{seed}'}", *args.segment,
        )  # fmt: skip
        Path(f"{out}.part").rename(out)
    return json.loads(out.read_text())


def selfvil(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "selfvil", *map(str, words)], check=True)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation of the mean IoU over seeds, for each protocol and network."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["protocol"], row["network"]), []).append(row["value"])
    return [
        {"protocol": protocol, "network": network, "mean": statistics.mean(values), "seeds": len(values),
         "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}
        for (protocol, network), values in sorted(groups.items())
    ]  # fmt: skip


if __name__ == "__main__":
    main()
