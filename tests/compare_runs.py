"""Proof that a change of the code changes no number: short runs of every recipe, before and after it.

    git worktree add ../before HEAD~1
    python tests/compare_runs.py record before.json --checkout ../before
    python tests/compare_runs.py record after.json
    python tests/compare_runs.py compare before.json after.json

Each run takes 8 steps of 16 digits at a small width, with the doctor on, and is recorded as its losses, its gradient
norms and the SHA-256 of the final weights (student, teacher, heads) and of the optimizer's state. Every packaged recipe
runs in one process; MAE, DINO and DINOv2 also run under two processes of DDP and of ZeRO 1 to 3. Both records must come
from the same machine: other processors round differently. The script needs nothing but a checkout's recipes, its
launch/pretrain.py and its checkpoints, so that it can run old and new code.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 8
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SEVERAL = ("demo", "cifar10_dino", "dinov2_vil_b")
"""Recipes that also run under each strategy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("--checkout", type=Path, default=REPOSITORY, help="the code to run; this checkout by default")
    record.add_argument("--only", nargs="+", default=[""], help="runs whose names contain one of these words")
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        args.out.write_text(json.dumps(record_all(args.checkout.resolve(), args.only), indent=1) + "\n")
    elif differing := differences(*(json.loads(path.read_text()) for path in (args.before, args.after))):
        sys.exit("\n".join(differing))


def record_all(checkout: Path, only: list[str]) -> dict[str, Any]:
    """Run name -> record, for every run of a checkout."""
    names = sorted(path.stem for path in (checkout / "recipes").glob("*.yaml"))
    several = [f"{name} {strategy}" for name in SEVERAL for strategy in STRATEGIES]
    wanted = names + [name for name in several if name == "demo zero3" or "zero3" not in name]  # ZeRO-3: no teacher
    wanted = [name for name in wanted if any(word in name for word in only)]
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        for number, name in enumerate(wanted):
            recipe, _, strategy = name.partition(" ")
            out = Path(folder) / f"run-{number}"
            launch(checkout, recipe, strategy, overrides(checkout, recipe, strategy, shards, out))
            records[name] = read_run(out)
            print(f"{name:32} {records[name]['loss'][-1]:.6f}  {records[name]['weights'][:12]}", flush=True)
    return records


def make_shards(folder: Path) -> Path:
    """Shards of digits, and the random teacher of distillation."""
    from runs import pack_digits, random_teacher

    random_teacher(folder)
    return pack_digits(folder)


def overrides(checkout: Path, recipe: str, strategy: str, shards: Path, out: Path) -> list[str]:
    text = (checkout / "recipes" / f"{recipe}.yaml").read_text()
    keys = {
        "data.train": f"{shards}/digits-*.tar", "data.workers": 0,
        "model.img_size": 32, "model.patch_size": 8, "model.embed_dim": 32, "model.depth": 2,
        "model.start_from": "null",
        "optim.batch_size": 16, "optim.min_lr": 0.0, "optim.accumulate": 2 if "accumulate:" in text else 1,
        "budget.epochs": "null", "budget.samples": "null", "budget.steps": STEPS,
        "run.out": out, "run.threads": 1, "run.checkpoint_every": 5,
        "monitor.log_every": 1, "monitor.tensorboard": "false", "monitor.pictures_every": "null",
        "monitor.doctor_every": "null" if strategy == "zero3" else 3,
    }  # fmt: skip
    objective = next(line.split()[1] for line in text.split("objective:")[1].splitlines() if "name:" in line)
    if objective in ("mae", "autoregressive"):
        keys |= {"objective.decoder_dim": 32, "objective.decoder_depth": 1}
    if objective == "autoregressive" or "decoder: vit" in text:
        keys["objective.decoder_heads"] = 2
    if objective == "ijepa":
        keys |= {"objective.predictor_dim": 32, "objective.predictor_depth": 1}
    if objective in ("dino", "ibot", "dinov2", "lejepa", "visreg"):
        keys |= {"objective.local_crop_size": 16, "objective.local_crops": 2, "objective.out_dim": 48}
        keys["objective.hidden_dim"] = 32
    if objective in ("dino", "ibot", "dinov2"):
        keys["objective.bottleneck_dim"] = 16
    if objective == "visreg":
        keys["objective.directions"] = 64
    if objective == "lejepa":
        keys["objective.sigreg_directions"] = 64
    if objective == "distill":
        keys |= {"objective.teacher": "test_vit", "objective.teacher_img_size": 48}
        keys["objective.teacher_weights"] = shards.parent / "test_vit.safetensors"
    return [f"{key}={value}" for key, value in keys.items()]


def launch(checkout: Path, recipe: str, strategy: str, arguments: list[str]) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(checkout / "ssl"), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": str(not strategy.startswith("zero")).lower(),
    }  # fmt: skip
    command = [sys.executable]
    if strategy:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if strategy.startswith("zero"):
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
    command += ["launch/pretrain.py", recipe, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")


def read_run(out: Path) -> dict[str, Any]:
    """Losses and gradient norms at each step, and digests of what the last checkpoint holds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line and "images_per_second" in line]
    assert len(steps) == STEPS, f"{out} logged {len(steps)} steps of {STEPS}"
    newest = max((out / "checkpoints").glob("step-*"))
    digests = {path.stem: digest(path) for path in newest.glob("*.safetensors")}
    return {
        "loss": [line["loss"] for line in steps],
        "grad_norm": [line["grad_norm"] for line in steps],
        "weights": digests.pop("objective"),
    } | digests


def digest(path: Path) -> str:
    """SHA-256 of a file's tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A sentence for each run and value that differs; runs that one side lacks are left out, and said to be."""
    found = []
    for name in before.keys() & after.keys():
        changed = [key for key in before[name] if before[name][key] != after[name].get(key)]
        if changed:
            found.append(f"{name}: {', '.join(changed)} differ")
    same = len(before.keys() & after.keys()) - len(found)
    print(f"{same} runs are equal, bit for bit; not compared: {sorted(before.keys() ^ after.keys()) or 'none'}")
    return sorted(found)


if __name__ == "__main__":
    main()
