"""Several runs in the same processes, since starting them takes longer than a run: `torchrun` starts this file.

Beside its own files, each run leaves for each process what `recorded` writes, and under ZeRO and FSDP2
`held-RANK.json`: how many values of optimizer state this process held, and `divided-RANK.json`: the parameters of which
it held a part only. "spoil" in a case are arguments of `spoiled`. "whole" is `selfvil.engine.zero.WHOLE`, made small
enough for ZeRO-3 to divide a small network.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.distributed.tensor import DTensor

from runs import REPOSITORY, environment
from selfvil import pretrain
from selfvil.engine import ENGINES, Engine, zero
from selfvil.objectives.dino import DINO
from selfvil.recipe import Recipe, load


def torchrun(cases: list[dict], processes: int, folder: Path, **environ: str) -> None:
    """Run `cases` one after the other: {"recipe": name, "arguments": [...]}, optionally with "zero": DeepSpeed's stage,
    or "fsdp": true for FSDP2."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launched = subprocess.run(
        [*command, __file__, str(file)],
        cwd=REPOSITORY, env=environment(**environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr


def main() -> None:
    os.environ["FORK_LAUNCHED"] = "1"  # Accelerate then leaves the process group for the next run
    for case in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(case.get("zero"))
        os.environ["ACCELERATE_USE_FSDP"] = str(case.get("fsdp", False)).lower()
        recipe = load(case["recipe"], case["arguments"])
        whole = patch.object(zero, "WHOLE", case.get("whole", zero.WHOLE))
        counted = (patch.dict(ENGINES, {name: watched(recipe, ENGINES[name])}) for name in ("zero", "fsdp"))
        with recorded(recipe), whole, next(counted), next(counted), spoiled(**case.get("spoil", {})):
            pretrain.pretrain(recipe)


@contextmanager
def recorded(recipe: Recipe) -> Iterator[None]:
    """Write `seen-RANK-of-PROCESSES.jsonl` into the run: the ids of the images of each micro-batch, and its step."""
    original = pretrain.train_batches

    def recording(*args, rank, world_size, start_step, accumulate, **kwargs):
        batches = original(
            *args, rank=rank, world_size=world_size, start_step=start_step, accumulate=accumulate, **kwargs
        )
        with open(Path(recipe.run.out, f"seen-{rank}-of-{world_size}.jsonl"), "a") as file:
            for number, batch in enumerate(batches):
                file.write(json.dumps({"step": start_step + number // accumulate, "ids": batch.ids.tolist()}) + "\n")
                yield batch

    with patch.object(pretrain, "train_batches", recording):
        yield


@contextmanager
def spoiled(step: int = -1, rank: int = 0) -> Iterator[None]:
    """The loss of this step, counted from 0, is NaN in the last micro-batches of one process."""
    original = DINO.forward

    def forward(self, batch, progress):
        output = original(self, batch, progress)
        bad = self.training and progress.step == step and int(os.environ["RANK"]) == rank
        return output._replace(loss=output.loss * float("nan")) if bad else output

    with patch.object(DINO, "forward", forward):
        yield


def watched(recipe: Recipe, start: Callable[..., Engine]) -> Callable[..., Engine]:
    """An engine that also writes what this process holds, whenever the state is collected."""

    def started(*args: object) -> Engine:
        engine = start(*args)
        original = engine.optimizer_tensors

        def optimizer_tensors() -> dict[str, Tensor]:
            states = [value for state in engine.optimizer.state.values() for value in state.values()]
            held = sum(local(value).numel() for value in states if value.ndim)
            Path(recipe.run.out, f"held-{engine.rank}.json").write_text(str(held))
            parameters = engine.objective.named_parameters()
            divided = [name for name, value in parameters if local(value).numel() < engine.numel(value)]
            Path(recipe.run.out, f"divided-{engine.rank}.json").write_text(json.dumps(divided))
            return original()

        engine.optimizer_tensors = optimizer_tensors
        return engine

    return started


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
