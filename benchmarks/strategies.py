"""Memory and speed of each process under each strategy: DDP, ZeRO-1 to 3 and FSDP2, two processes on one machine.

    python benchmarks/strategies.py --data ../shared/data --json benchmarks/results/strategies_cpu.json

MAE on ViL-B with images of 64 pixels: 112 M weights and few activations, so that what is divided among the processes is
most of the memory. For each strategy, of process 0: the peaks of the resident set, while the run is prepared (which
needs whole weights, and their gradients once) and in the steps, over what it was before the weights existed, without
checkpoints; the bytes of weights and optimizer state that it holds between steps; seconds of a step; and the loss of
the last step, which must be the same for all. The allocator is told to give freed tensors back to the system at once
(MALLOC_MMAP_THRESHOLD_), so that the peak is of what is in use, not of what is kept for later.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch.distributed.tensor import DTensor

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folder cifar10")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    figures = {strategy: launch(strategy, args) for strategy in args.only}
    for strategy, figure in figures.items():
        print(strategy, json.dumps(figure))
    if args.json:
        from selfvil import runtime

        facts = {"torch": torch.__version__, "commit": runtime.commit(), "processes": 2}
        args.json.write_text(json.dumps(facts | {"strategies": figures}, indent=1) + "\n")


def launch(strategy: str, args: argparse.Namespace) -> dict[str, Any]:
    zero = strategy.startswith("zero")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "ACCELERATE_USE_CPU": str(not zero).lower(),
        "ACCELERATE_USE_DEEPSPEED": str(zero).lower(), "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1],
        "ACCELERATE_USE_FSDP": str(strategy == "fsdp").lower(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        command += ["--data", str(args.data), "--steps", str(args.steps), "--worker", folder]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "figures.json").read_text())


def work(args: argparse.Namespace) -> None:
    """One process of a run."""
    from selfvil import pretrain
    from selfvil.engine import Engine
    from selfvil.monitor.journal import Journal
    from selfvil.recipe import load
    from selfvil.saving import BackgroundSaver

    recipe = load("mae_vil_b", [
        f"data.train={args.data}/cifar10/cifar10-test-*.tar", f"run.out={args.worker}/run", "model.img_size=64",
        "data.workers=0", "optim.batch_size=4", "optim.min_lr=0", "optim.accumulate=1",
        "run.precision=fp32", f"budget.steps={args.steps}",
        "monitor.log_every=1", "monitor.doctor_every=null", "monitor.tensorboard=false", "monitor.pictures_every=null",
        "budget.epochs=null",
    ])  # fmt: skip
    figures: dict[str, Any] = {}
    seconds: list[float] = []

    def peak() -> int:
        """The largest resident set since the last call, in bytes (Linux)."""
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        return int(line.split()[1]) * 1024 - figures["before"]

    def prepare(*arguments: Any, **named: Any) -> Any:
        figures["before"] = psutil.Process().memory_info().rss
        return original(*arguments, **named)

    def log(self: Journal, step: int, *arguments: Any) -> None:
        seconds.append(self.clock.steps())
        if step == 1:  # the optimizer's state exists from here on
            ctypes.CDLL(None).malloc_trim(0)
            figures["peak_bytes_preparing"] = peak()
        write(self, step, *arguments)

    def start(self: BackgroundSaver, step: int, *arguments: Any) -> None:
        """In place of the save at the end: take the figures."""
        figures["peak_bytes_in_steps"] = peak()
        del figures["before"]

    def state(self: Engine) -> dict[str, Any]:
        def held(tensors: Any) -> int:
            return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)

        figures["weights_bytes"] = held(self.objective.parameters())
        states = (x for values in self.optimizer.state.values() for x in values.values())
        figures["optimizer_bytes"] = held(states)
        return {"objective": {}, "optimizer": {}}

    original, write = pretrain.prepare, Journal.log
    patches = [
        patch.object(pretrain, "prepare", prepare), patch.object(BackgroundSaver, "start", start),
        patch.object(Engine, "state", state), patch.object(Journal, "log", log),
    ]  # fmt: skip
    for each in patches:
        each.start()
    summary = pretrain.pretrain(recipe)
    if int(os.environ["RANK"]) == 0:
        steps = sorted(after - before for before, after in pairwise(seconds[1:]))
        figures |= {"loss": summary.loss, "seconds_per_step": round(steps[len(steps) // 2], 2)}
        (args.worker / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
