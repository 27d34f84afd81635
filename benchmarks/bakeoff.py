"""Objectives and their settings under one equal budget on small images: k-NN, linear probe, few labels.

    python benchmarks/bakeoff.py --data ../shared/data/cifar10 --out runs/bakeoff --minutes 12
    python benchmarks/bakeoff.py --data ../shared/data/cifar10 --out runs/bakeoff --minutes 12 --rows mae simmim
    python benchmarks/bakeoff.py --data ../shared/data/cifar10 --out runs/ablations --minutes 4 --rows mae-ablations \
        --seeds 0 1 2 --frozen-only

A row is a packaged recipe with a few keys changed. It trains on one core, on as many images as that core processes in
the given minutes. Rates are measured once, at the start, by interleaving all rows. The budget is then a number of
images, which neither another row nor a busy machine can change. Then the network is evaluated: k-NN and linear probe on
all labels, and fine-tuning on 1 % of them. All results are kept under --out: a command that was stopped continues, and
finished rows are only printed. One process runs its rows one after the other, all rows of a seed before the next seed.
To use more cores, measure all rates with --rates-only, then start one process per core with its own --rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from selfvil.build import build_objective
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.objectives.base import Progress
from selfvil.optim import adamw, parameter_groups
from selfvil.recipe import load

REPOSITORY = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """A packaged recipe and its changed keys; `rate_of` names a row of the same speed, whose budget this row shares."""

    recipe: str
    changes: list[str]
    rate_of: str = ""


# 808,064 parameters; the ViL has 802,560.
VIT = ["model.name=vit_tiny_patch16_224", "model.embed_dim=128", "model.depth=4", "model.num_heads=4"]
# For a short run: the last layer learns from the first step, and batches are small, so that there are many steps.
SHORT = ["optim.batch_size=32", "optim.base_lr=16e-3", "objective.freeze_last_layer_epochs=0"]

BAKEOFF: dict[str, Row] = {
    "mae": Row("cifar10_mae", []),
    "simmim": Row("cifar10_simmim", []),
    "autoregressive": Row("cifar10_autoregressive", []),
    "dino": Row("cifar10_dino", SHORT),
    "ibot": Row("cifar10_ibot", SHORT),
    "lejepa": Row("cifar10_lejepa", []),
    "mae-vit": Row("cifar10_mae", [*VIT, "objective.decoder=vit", "objective.decoder_heads=4"]),
    "dino-vit": Row("cifar10_dino", [*SHORT, *VIT]),
}

# Ablations have half the depth, which leaves time for more, and smaller batches at the same learning rate per step.
SMALL = ["model.depth=3"]
SMALL_MAE = [*SMALL, "optim.batch_size=128", "optim.base_lr=8e-3"]
VIT_DECODER = ["objective.decoder=vit", "objective.decoder_heads=4"]
REGISTERS = ["model.global_pool=registers", "model.num_registers=4"]


def mae(*changes: str, rate_of: str = "") -> Row:
    return Row("cifar10_mae", [*SMALL_MAE, *changes], rate_of)


def two_crops(recipe: str, *changes: str) -> Row:
    return Row(recipe, [*SMALL, "objective.local_crops=2", *changes])


MAE_ABLATIONS = {
    "mae-base": mae(),
    "mae-ratio-0.5": mae("objective.mask_ratio=0.5"),
    "mae-ratio-0.6": mae("objective.mask_ratio=0.6"),
    "mae-mask-block": mae("objective.mask=block", rate_of="mae-base"),
    "mae-mask-row": mae("objective.mask=row", rate_of="mae-base"),
    "mae-gap-aware": mae("objective.gap_aware=true", rate_of="mae-base"),
    "mae-conv-compact": mae("objective.compact_conv=true"),
    "mae-conv-sequence": mae("model.conv=causal1d"),
    "mae-conv-sequence-compact": mae("model.conv=causal1d", "objective.compact_conv=true"),
    "mae-conv-none": mae("model.conv=none"),
    "mae-decoder-vit": mae(*VIT_DECODER),
    "mae-decoder-deep": mae("objective.decoder_depth=2"),
    "mae-decoder-wide": mae("objective.decoder_dim=128"),
}
"""Masks; convolution on the grid or the sequence, of all positions or of kept tokens only, or none; decoders."""

LAYERSCALE_ABLATIONS = {
    f"mae-layerscale-{scale}-lr-{rate}": mae(
        f"model.init_values={'null' if scale == 'none' else scale}", f"optim.base_lr={rate}", rate_of="mae-base"
    )
    for scale in ("none", "1e-5", "0.1")
    for rate in ("4e-3", "8e-3", "16e-3")
    if (scale, rate) != ("none", "8e-3")  # mae-base
}
READOUT_ABLATIONS = {
    "lejepa-readout-ends": two_crops("cifar10_lejepa"),
    "lejepa-readout-mean": two_crops("cifar10_lejepa", "objective.readout=mean"),
    "lejepa-readout-registers": two_crops("cifar10_lejepa", *REGISTERS),
    "dino-readout-ends": two_crops("cifar10_dino", *SHORT),
    "dino-readout-mean": two_crops("cifar10_dino", *SHORT, "objective.readout=mean"),
    "dino-readout-registers": two_crops("cifar10_dino", *SHORT, *REGISTERS),
}

GROUPS = {
    "bakeoff": BAKEOFF,
    "mae-ablations": MAE_ABLATIONS,
    "layerscale-ablations": LAYERSCALE_ABLATIONS,
    "readout-ablations": READOUT_ABLATIONS,
}
ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}

BASELINES = (
    "mae", "autoregressive", "mae-vit",
    "mae-base", "mae-conv-sequence", "mae-conv-none", "lejepa-readout-registers",
)  # fmt: skip
"""Rows whose network is also evaluated untrained: one for each architecture."""


class Column(NamedTuple):
    """Where its figures are: the file of a command, and the first words of the protocol, up to a comma."""

    file: str
    protocol: str


COLUMNS = {
    "k-NN, k = 20": Column("all", "k-NN, k = 20"),
    "linear probe": Column("all", "linear probe"),
    "fine-tuned, 1 % of labels": Column("finetune", "fine-tuning"),
}

ROUNDS = 9
ONE_CORE = ["run.threads=1", "data.workers=0", "monitor.pictures_every=null", "monitor.doctor_every=null"]
FINETUNE = ["labels_per_class=10", "epochs=40", "batch_size=20", "base_lr=8e-3", "layer_decay=0.9", "min_crop=0.5",
            "drop_path=0"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and scores")
    parser.add_argument("--minutes", type=float, required=True, help="budget of a row, on one core")
    parser.add_argument("--rows", nargs="+", default=["bakeoff"], choices=[*GROUPS, *ROWS], metavar="ROW",
                        help=f"rows, or groups of them: {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="fp32 where bf16 is no faster")
    parser.add_argument("--frozen-only", action="store_true", help="do not fine-tune")
    parser.add_argument("--rates-only", action="store_true", help="only measure the rate of each row")
    parser.add_argument("--json", type=Path, help="file to write the figures of finished rows to")
    parser.add_argument("--print-only", action="store_true", help="only print the finished rows")
    args = parser.parse_args()
    args.rows = [name for given in args.rows for name in GROUPS.get(given, [given])]
    args.data, args.out = args.data.resolve(), args.out.resolve()
    if not args.print_only:
        measure_rates(args)
        for seed, name in product(args.seeds, [] if args.rates_only else args.rows):
            train(args, name, seed)
            score(args, name, seed)
    print_table(args)
    if args.json:
        lines = ",\n".join(map(json.dumps, figures(args)))  # one for each figure, so that files can be compared
        args.json.write_text(f"[\n{lines}\n]\n")


def folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.out / name / f"seed-{seed}"


def budget(args: argparse.Namespace, name: str) -> int:
    """Images that the row trains on."""
    rate = json.loads((args.out / "rates.json").read_text())[ROWS[name].rate_of or name]
    return round(rate * 60 * args.minutes)


def measure_rates(args: argparse.Namespace) -> None:
    """Write the images per second of each row on one core into rates.json, for rows that are not measured yet.

    The steps of all rows are interleaved in one process, so that other work on the machine affects them equally. If
    some rows were measured before, the first of them is measured again, and the ratio of its two rates scales the new
    ones.
    """
    file = args.out / "rates.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    names = dict.fromkeys(ROWS[name].rate_of or name for name in args.rows)
    new, old = [name for name in names if name not in known], next(iter(known), None)
    if not new:
        return
    steppers = {name: steps(args, name) for name in [*new, *([old] if old else [])]}
    rounds = [{name: next(stepper) for name, stepper in steppers.items()} for _ in range(ROUNDS)]
    # The first round warms up.
    rates = {name: statistics.median(each[name] for each in rounds[1:]) for name in steppers}
    scale = known[old] / rates[old] if old else 1.0
    known |= {name: rates[name] * scale for name in new}
    file.write_text(json.dumps(known, indent=1) + "\n")


def steps(args: argparse.Namespace, name: str) -> Iterator[float]:
    """For each training step of a row: its rate in images per second."""
    torch.set_num_threads(1)
    recipe = load(ROWS[name].recipe, overrides(args, name, 0))
    objective, size = build_objective(recipe), recipe.optim.batch_size
    optimizer = adamw(parameter_groups(objective), recipe.optim.betas)
    shards = open_shards(recipe.data.train, image=recipe.data.image)
    batches = train_batches(shards, objective.views(), seed=0, batch_size=size, stop_step=ROUNDS)
    for step in range(ROUNDS):
        began, progress = time.perf_counter(), Progress(step, ROUNDS, len(shards) / size, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = objective(next(batches), progress).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress)
        yield size / (time.perf_counter() - began)


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    length = ["budget.epochs=null", f"budget.samples={budget(args, name)}"]
    run("launch/pretrain.py", ROWS[name].recipe, *overrides(args, name, seed), *length)


def overrides(args: argparse.Namespace, name: str, seed: int) -> list[str]:
    shards = f"data.train={args.data}/cifar10-train-{{000000..000001}}.tar"
    return [shards, *ONE_CORE, *ROWS[name].changes, f"run.seed={seed}", f"run.precision={args.precision}",
            f"run.out={folder(args, name, seed)}"]  # fmt: skip


def score(args: argparse.Namespace, name: str, seed: int) -> None:
    labelled = ["--train", f"{args.data}/cifar10-train-{{000000..000001}}.tar",
                "--test", f"{args.data}/cifar10-test-{{000000..000001}}.tar",
                "--workers", "0", "--precision", args.precision,
                *(["--baselines"] if name in BASELINES and seed == 0 else [])]  # fmt: skip
    commands = {"all": ["all", "probe_seeds=3"], "finetune": ["finetune", *FINETUNE, f"readout={readout(name)}"]}
    for kind, (command, *options) in commands.items():
        file = folder(args, name, seed).with_suffix(f".{kind}.json")
        if not file.exists() and not (kind == "finetune" and args.frozen_only):
            cli = str(Path(sys.executable).with_name("selfvil"))
            source = str(folder(args, name, seed))
            run(cli, "eval", command, source, *labelled, "--json", str(file), *options)


def readout(name: str) -> str:
    if "vit_tiny" in " ".join(ROWS[name].changes):
        return "cls"
    return "registers" if ROWS[name].changes[-2:] == REGISTERS else "bilateral_concat"


def run(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, check=True)


def figures(args: argparse.Namespace) -> list[dict]:
    """Every figure of the finished rows, with the settings and the time of its run."""
    found = []
    for name, seed in product(args.rows, args.seeds):
        run = folder(args, name, seed)
        for file in [run.with_suffix(f".{kind}.json") for kind in ("all", "finetune")]:
            if not file.exists():
                continue
            summary = json.loads((run / "run.json").read_text())
            about = {"row": name, "recipe": ROWS[name].recipe, "changes": " ".join(ROWS[name].changes), "seed": seed,
                     "training_seconds": summary["summary"]["seconds"], "trained_at": summary["launches"][-1]["commit"],
                     "precision": args.precision}  # fmt: skip
            columns = ("network", "protocol", "value", "deviation", "readout", "train_images", "test_images",
                       "samples_seen", "device", "versions", "commit")  # fmt: skip
            found += [about | {key: row[key] for key in columns} for row in json.loads(file.read_text())]
    return found


def print_table(args: argparse.Namespace) -> None:
    """Print finished rows in Markdown, each with its recipe and its changed keys.

    A deviation is that of runs from several seeds or, for a single run, of its probes.
    """
    print("| row | seeds | images seen | " + " | ".join(COLUMNS) + " | recipe |\n|" + "---|" * (len(COLUMNS) + 4))
    for name in args.rows:
        found: dict[str, list[list[dict]]] = {}
        for place, column in enumerate(COLUMNS.values()):
            for seed in args.seeds:
                file = folder(args, name, seed).with_suffix(f".{column.file}.json")
                for row in json.loads(file.read_text()) if file.exists() else []:
                    if f"{row['protocol']},".startswith(f"{column.protocol},"):
                        found.setdefault(row["network"], [[] for _ in COLUMNS])[place].append(row)
        for network, columns in found.items():
            own = network == "pretrained"
            runs = max(columns, key=len)
            cells = [name if own else f"{network} ({name})", str(len(runs)), f"{runs[0]['samples_seen']:,}" * own]
            recipe = " ".join([ROWS[name].recipe, *ROWS[name].changes]) * own
            print("|", " | ".join([*cells, *map(figure, columns), recipe]), "|")


def figure(rows: list[dict]) -> str:
    """Mean and deviation of the rows of several seeds, or value and deviation of a single row."""
    values = [row["value"] for row in rows]
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else rows[0]["deviation"]
    return f"{statistics.mean(values):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


if __name__ == "__main__":
    main()
