"""The memory that `selfvil plan` predicts for a training step, compared with the peak of a real run.

    python benchmarks/memory.py --data ../shared/data/cifar10 --out benchmarks/results/memory_cpu.json

Each recipe runs for 2 steps on CIFAR-10 by `pretrain` in its own process, checkpoint included, without doctor, pictures
and evaluations. Its peak is measured in two ways:

- `measured`: the peak of torch's allocations since before the objective was built, recorded by torch's profiler at
  every allocation. The prediction is about the same quantity, tensors on any device, at its highest: in a step, or in
  the save at the end, which copies weights and moments.
- `rss`: in another process without the profiler, the peak of resident memory minus its value before `pretrain` was
  called, with all modules imported. It also includes memory that is not in tensors: buffers of oneDNN and MKL,
  libraries that are loaded later, decoded images, and memory that the allocator keeps. So it is larger; the difference
  matters most for small networks.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from about import about

STEPS = 2
RECIPES: dict[str, list[str]] = {
    "demo": ["model.in_chans=3", "data.mean=[0.4914, 0.4822, 0.4465]", "data.std=[0.247, 0.2435, 0.2616]"],
    "cifar10_mae": [],
    "cifar10_mae_mlp": [],
    "cifar10_dino": [],
    "cifar10_dino_mlp": [],
    "cifar10_ibot": [],
    "cifar10_ijepa": [],
    "cifar10_lejepa": [],
    "cifar10_lejepa_mlp": [],
    "cifar10_lejepa_long": [],
    "cifar10_visreg": [],
    "cifar10_simmim": [],
    "cifar10_autoregressive": [],
    "cifar10_finetune": ["model.start_from=null"],
    "mae_vil_b": ["optim.batch_size=8", "optim.accumulate=1"],
}
"""Packaged recipes and their changed keys; demo, a recipe for grey digits, gets the colours of CIFAR-10 here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10-train-000000.tar ...")
    parser.add_argument("--out", type=Path, help="file to write the figures to")
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu"
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(CHILDREN[args.child](arguments(args, args.only[0], Path(folder) / "run"))))
        return
    rows = []
    for name in args.only:
        row = {"recipe": name, "changes": RECIPES[name]}
        for what in CHILDREN:
            row |= child(args, name, what)
        row["predicted / measured"] = round(row["predicted"] / row["measured"], 3)
        rows.append(row)
        sizes = " ".join(f"{key} {row[key] / 1e6:,.1f} MB" for key in ("predicted", "measured", "rss"))
        print(f"{name:16} {sizes}  predicted / measured {row['predicted / measured']}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1) + "\n")


def arguments(args: argparse.Namespace, name: str, out: Path) -> list[str]:
    return [
        name, *RECIPES[name], f"data.train={args.data}/cifar10-train-000000.tar", "data.workers=0",
        f"budget.steps={STEPS}", f"run.out={out}", f"run.threads={args.threads}", "monitor.doctor_every=null",
        "monitor.pictures_every=null", "monitor.tensorboard=false",
    ]  # fmt: skip


def child(args: argparse.Namespace, name: str, what: str) -> dict:
    command = [sys.executable, __file__, "--data", str(args.data), "--threads", str(args.threads), "--only", name]
    done = subprocess.run([*command, "--child", what], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def predict(words: list[str]) -> dict:
    from selfvil.plan_report import report
    from selfvil.recipe import load

    found = report(load(words[0], words[1:]), words[0], trial=False)
    memory, copy = found.memory, found.disk.checkpoint
    saving = memory.weights + memory.teacher + memory.moments + copy
    return {"predicted": max(memory.total, saving), "step": memory.total, "copy": copy, "parts": vars(memory)}


def measure(words: list[str]) -> dict:
    from selfvil.footprint import allocated
    from selfvil.pretrain import pretrain
    from selfvil.recipe import load

    recipe = load(words[0], words[1:])
    levels, _ = allocated(lambda: pretrain(recipe), torch.device("cpu"))
    return {"measured": max(levels)}


def resident(words: list[str]) -> dict:
    from selfvil.pretrain import pretrain
    from selfvil.recipe import load

    recipe = load(words[0], words[1:])
    before = psutil.Process().memory_info().rss
    pretrain(recipe)
    return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


CHILDREN = {"predict": predict, "measure": measure, "rss": resident}


if __name__ == "__main__":
    main()
