"""Fine-tuning on few labels: from a pretrained network and from scratch, at equal budget, and with long sequences.

    python benchmarks/finetune.py runs/cifar10_mae --train 'PATH/cifar10-train-000000.tar' \\
        --test 'PATH/cifar10-test-000000.tar' --out benchmarks/results/finetune_cpu.json

Each row is the mean over --seeds of the accuracy after fine-tuning by the same settings. From scratch, layers have
equal rates (layer_decay 1): lower rates for lower layers only help where these are trained already. "long" halves the
stride of the patches, which gives a sequence nearly four times as long.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from about import about

from selfvil.evaluate import settings
from selfvil.evaluate.score import score
from selfvil.models.adapter import adapt
from selfvil.timm_folder import atomic_folder, write_network
from selfvil.trainer import Trainer
from selfvil.weights import load_pretrained, model_arguments

FEW = {"labels_per_class": 100, "batch_size": 50, "base_lr": 8e-3, "min_crop": 0.5, "drop_path": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run, an export or a checkpoint")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    patch = load_pretrained(args.source).backbone.patch_embed.patch_size[0]
    rows = []
    for name, baseline, more in (
        ("pretrained", False, {"layer_decay": 0.9}),
        ("from scratch", True, {"layer_decay": 1.0}),
        ("pretrained, long sequences", False, {"layer_decay": 0.9, "stride": patch // 2}),
    ):
        rows.append({"network": name} | measure(args, FEW | more | {"epochs": args.epochs}, baseline))
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1) + "\n")


def measure(args: argparse.Namespace, values: dict, untrained: bool) -> dict:
    """Accuracy of the fine-tuned network with the head that its architecture is made for."""
    head = adapt(load_pretrained(args.source).backbone).default_readout
    chosen = {"finetune": settings("finetune", values | {"readout": head})}
    found = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows = score(
                new_network(args.source, seed, Path(folder) / "new") if untrained else args.source, args.train,
                args.test, chosen, workers=0, device=args.device, precision="bf16", seed=seed, trainer=Trainer(),
            )  # fmt: skip
        found += [row for row in rows if row.metric.startswith("finetune")]
    values = [row.value for row in found]
    return {
        "accuracy": round(statistics.mean(values), 2),
        "deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "samples_seen_in_pretraining": found[0].samples_seen,
        "train_images": found[0].train_images,
        "test_images": found[0].test_images,
        "seconds": round(statistics.mean(row.seconds for row in found), 1),
        "head": head,
        "settings": found[0].settings,
    }


def new_network(source: str, seed: int, folder: Path) -> Path:
    """An export of the same architecture, newly initialised."""
    network = load_pretrained(source, untrained=True, seed=seed)
    with atomic_folder(folder) as partial:
        write_network(
            partial, network.backbone, model_arguments(source), network.normalisation, {"samples_seen": 0}, ""
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
