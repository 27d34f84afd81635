"""Trains a recipe, in turns that each end after some minutes, or a few steps of it under every strategy.

    python benchmarks/train.py cifar10_mae_gpu --out runs/mae --minutes 7.5 --set data.train='shards/*.tar'
    python benchmarks/train.py cifar10_mae_gpu --out runs/all --scaling --set budget.epochs=null budget.steps=300

One turn is one launch by torchrun with a process for each GPU. Where the run is not finished after it, the exit status
is 75, and the same command continues. --scaling: instead, new runs in folders of --out, of one process and of one for
each GPU by DDP, ZeRO-2 and FSDP2, which must have the same loss. Images per second are those of run.json, without the
first launch's preparation; the peak memory is that which torch has allocated on the GPU of process 0.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from selfvil.records import read_record

REPOSITORY = Path(__file__).resolve().parents[1]
UNFINISHED = 75
STRATEGIES: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
}


def main() -> None:
    if sys.argv[1] == "--worker":
        work(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a packaged recipe, or a file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, or of the runs")
    parser.add_argument("--minutes", type=float, help="of a turn")
    parser.add_argument("--scaling", action="store_true", help="one process, and all GPUs under each strategy")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpus = torch.cuda.device_count() if args.device == "cuda" else 1
    if args.scaling:
        plans = [("ddp", 1), *((strategy, gpus) for strategy in STRATEGIES if gpus > 1)]
        rows = []
        for strategy, processes in plans:
            out = args.out / f"{strategy}-{processes}"
            shutil.rmtree(out, ignore_errors=True)  # of an earlier turn
            rows.append(launch(strategy, processes, out, args))
            write(rows, args)
    else:
        rows = [launch("ddp", max(1, gpus), args.out, args)]
        write(rows, args)
    failed = not all(row["ended"] for row in rows)
    sys.exit(1 if failed else 0 if all(row["finished"] for row in rows) else UNFINISHED)


def work(peak: Path, arguments: list[str]) -> None:
    """One process of a launch, which never returns. Process 0 writes the memory that it has allocated to `peak`."""
    from selfvil.cli import main

    try:
        main(["pretrain", *arguments])
    finally:
        if os.environ.get("RANK", "0") == "0" and torch.cuda.is_available():
            peak.write_text(str(torch.cuda.max_memory_allocated()))


def launch(strategy: str, processes: int, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one launch. ended: it recorded its end, finished or paused; otherwise it has failed."""
    pause = [f"budget.pause_minutes={args.minutes}"] if args.minutes else []
    peak = out.parent / f"{out.name}.peak"
    peak.parent.mkdir(parents=True, exist_ok=True)
    peak.unlink(missing_ok=True)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), __file__, "--worker", str(peak)]
    command += [args.recipe, *args.set, f"run.out={out}", *pause]
    environment = os.environ | STRATEGIES[strategy] | {"ACCELERATE_USE_CPU": str(args.device == "cpu").lower()}
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, env=environment)  # torchrun's status does not tell a pause from a failure
    record = read_record(out)
    summary, ended = record.summary, bool(record.launches and record.launches[-1].get("ended"))
    return {
        "recipe": Path(args.recipe).stem,
        "strategy": strategy,
        "processes": processes,
        "ended": ended,
        "seconds": round(time.perf_counter() - start, 1),
        "step": summary and summary.step,
        "total_steps": summary and summary.total_steps,
        "images_per_second": summary and summary.images_per_second,
        "loss": summary and summary.loss,
        "finished": bool(summary and summary.finished),
        "peak_gib": round(int(peak.read_text()) / 2**30, 2) if peak.exists() else None,
    }


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
