"""Objectives, and settings of them, with one equal budget on small images: k-NN, linear probe, few labels.

    python benchmarks/bakeoff.py --data ../shared/data/cifar10 --out runs/bakeoff --minutes 12
    python benchmarks/bakeoff.py --data ../shared/data/cifar10 --out runs/bakeoff --minutes 12 --rows mae simmim

A row is a packaged recipe with a few keys changed. It runs on one core, for as many images as that core does in the
given minutes; the rate is measured once, at the start, so that the budget is a number of images, and another row or a
busy machine cannot change it. Then the network is scored: k-NN and linear probe on all labels, and fine-tuned on 1 % of
them. Everything is kept under --out: a command that was stopped goes on where it stopped, and finished rows are only
printed. Rows in one process run one after the other; for more cores start one process for each with its own --rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from selfvil.monitor.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]

# 808,064 parameters, beside 802,560 of the ViL.
VIT = ["model.name=vit_tiny_patch16_224", "model.embed_dim=128", "model.depth=4", "model.num_heads=4"]
# In so short a run the last layer learns from the start, and steps are many and small.
SHORT = ["optim.batch_size=32", "optim.base_lr=16e-3", "objective.freeze_last_layer_epochs=0"]
MAE, DINO, IBOT, LEJEPA = ("cifar10_mae", []), ("cifar10_dino", SHORT), ("cifar10_ibot", SHORT), ("cifar10_lejepa", [])

ROWS: dict[str, tuple[str, list[str]]] = {
    "mae": MAE,
    "simmim": ("cifar10_simmim", []),
    "autoregressive": ("cifar10_autoregressive", []),
    "dino": DINO,
    "ibot": IBOT,
    "lejepa": LEJEPA,
    "mae-vit": (MAE[0], [*VIT, "objective.decoder=vit", "objective.decoder_heads=4"]),
    "dino-vit": (DINO[0], [*SHORT, *VIT]),
    # Ablations.
    "mae-ratio-0.5": (MAE[0], ["objective.mask_ratio=0.5"]),
    "mae-ratio-0.6": (MAE[0], ["objective.mask_ratio=0.6"]),
    "mae-gap-aware": (MAE[0], ["objective.gap_aware=true"]),
    "mae-conv-sequence": (MAE[0], ["model.conv=causal1d"]),
    "mae-conv-none": (MAE[0], ["model.conv=none"]),
    "mae-decoder-vit": (MAE[0], ["objective.decoder=vit", "objective.decoder_heads=4"]),
    "mae-layerscale-1e-5": (MAE[0], ["model.init_values=1e-5"]),
    "mae-layerscale-0.1": (MAE[0], ["model.init_values=0.1"]),
    "dino-readout-mean": (DINO[0], [*SHORT, "objective.readout=mean"]),
}
"""Name of a row -> a packaged recipe, and what is changed in it."""

BASELINES = ("mae", "autoregressive", "mae-vit")
"""Rows whose network is scored untrained too: one for each kind of network."""


class Column(NamedTuple):
    """Where its figures are: in the file of a command, under a protocol whose first words up to a comma are these."""

    file: str
    protocol: str


COLUMNS = {
    "k-NN, k = 20": Column("all", "k-NN, k = 20"),
    "linear probe": Column("all", "linear probe"),
    "fine-tuned, 1 % of labels": Column("finetune", "fine-tuning"),
}

ONE_CORE = ["run.threads=1", "data.workers=0", "monitor.pictures_every=null", "monitor.doctor_every=null"]
FINETUNE = ["--labels-per-class", "10", "--epochs", "40", "--batch-size", "20", "--base-lr", "8e-3",
            "--layer-decay", "0.9", "--min-crop", "0.5", "--drop-path", "0"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and scores")
    parser.add_argument("--minutes", type=float, required=True, help="budget of a row, on one core")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frozen-only", action="store_true", help="do not fine-tune")
    parser.add_argument("--rates-only", action="store_true", help="measure how fast each row is, and no more")
    parser.add_argument("--print-only", action="store_true", help="print the rows that are finished, and no more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.print_only:
        for name in args.rows:
            samples = budget(args, name)
            if not args.rates_only:
                train(args, name, f"budget.samples={samples}", args.out / name)
                score(args, name)
    print_table(args)


def budget(args: argparse.Namespace, name: str) -> int:
    """Images that the row trains on."""
    file = args.out / f"{name}-rate.json"
    if not file.exists():
        train(args, name, "budget.steps=30", args.out / f"{name}-rate", "monitor.log_every=5")
        rates = [record["images_per_second"] for record in read_metrics(args.out / f"{name}-rate" / "metrics.jsonl")]
        # The first has the start in it.
        file.write_text(json.dumps({"images_per_second": statistics.median(rates[1:])}))
    return round(json.loads(file.read_text())["images_per_second"] * 60 * args.minutes)


def train(args: argparse.Namespace, name: str, length: str, out: Path, *more: str) -> None:
    recipe, changes = ROWS[name]
    shards = f"data.train={args.data}/cifar10-train-{{000000..000001}}.tar"
    run("launch/pretrain.py", recipe, shards, *ONE_CORE, *changes, f"run.seed={args.seed}", f"run.out={out}", length,
        "budget.epochs=null", *(["budget.samples=null"] if "steps" in length else []), *more)  # fmt: skip


def score(args: argparse.Namespace, name: str) -> None:
    labelled = ["--train", f"{args.data}/cifar10-train-{{000000..000001}}.tar",
                "--test", f"{args.data}/cifar10-test-{{000000..000001}}.tar",
                "--workers", "0", "--precision", "bf16", *(["--baselines"] if name in BASELINES else [])]  # fmt: skip
    commands = {"all": ["all", "--probe-seeds", "3"], "finetune": ["finetune", *FINETUNE, "--readout", readout(name)]}
    for kind, (command, *options) in commands.items():
        file = args.out / f"{name}-{kind}.json"
        if not file.exists() and not (kind == "finetune" and args.frozen_only):
            cli = str(Path(sys.executable).with_name("selfvil"))
            run(cli, "eval", command, str(args.out / name), *options, *labelled, "--json", str(file))


def readout(name: str) -> str:
    return "cls" if "vit" in name and "decoder" not in name else "bilateral_concat"


def run(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, check=True)


def print_table(args: argparse.Namespace) -> None:
    """Finished rows in Markdown, each with its recipe and what is changed in it."""
    print("| row | images seen | " + " | ".join(COLUMNS) + " | recipe |\n|" + "---|" * (len(COLUMNS) + 3))
    for name in args.rows:
        figures: dict[str, list[str]] = {}
        seen = ""
        for place, kind in enumerate(COLUMNS.values()):
            file = args.out / f"{name}-{kind.file}.json"
            for row in json.loads(file.read_text()) if file.exists() else []:
                if f"{row['protocol']},".startswith(f"{kind.protocol},"):
                    network = name if row["network"] == "pretrained" else f"{row['network']} ({name})"
                    deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
                    figures.setdefault(network, [""] * len(COLUMNS))[place] = f"{row['value']:.2f}{deviation}"
                    seen = f"{row['samples_seen']:,}" if network == name else seen
        recipe = " ".join([ROWS[name][0], *ROWS[name][1]])
        for network, values in figures.items():
            own = network == name
            print("|", " | ".join([network, seen if own else "", *values, recipe if own else ""]), "|")


if __name__ == "__main__":
    main()
