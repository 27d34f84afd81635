"""Where a run takes place: processes, devices, precision. Accelerate does the work; this file asks it.

Supported here: one CPU process, several CPU processes (torchrun and gloo), one GPU, several GPUs (DDP), and DeepSpeed
on any number of them (see `selfvil.zero` for what of it).
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    compare_versions,
    gather_object,
)

from selfvil.errors import UserError
from selfvil.version import __version__

T = TypeVar("T")

DEEPSPEED_FLOOR = "0.18.5"  # the oldest that was seen to compute what DDP computes, as tests/test_deepspeed.py asks

log = logging.getLogger("selfvil")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the process as it was, so that a notebook can train, evaluate and train again with other settings.

    Accelerate keeps its settings in state shared by the whole process, which a second run with another precision may
    not change: each run gets state of its own, and what was there before is put back. So are torch's number of threads
    and its random generators.
    """
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before, threads = [dict(state) for state in shared], torch.get_num_threads()
    for state in shared:
        state.clear()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        torch.set_num_threads(threads)
        for state, values in zip(shared, before):
            state.clear()
            state.update(values)


def start(
    precision: Literal["fp32", "bf16"], accumulate: int, threads: int | None = None, timeout: timedelta | None = None
) -> Accelerator:
    """The Accelerator of this launch; `threads` CPU threads for each process (None: as the launcher set them).

    precision and accumulate are the recipe's. Under DeepSpeed, `selfvil.zero` sees to both. timeout bounds how long a
    process waits for the others in a collective (None: the backend's default).

    Raises:
        UserError: several processes were asked for, and each would silently have trained a run of its own; or a
            strategy that is not supported, not installed, or that Accelerate would silently leave out.
    """
    refuse_strategy(os.environ)
    deepspeed = _asks_for(os.environ, "DEEPSPEED")
    backend = _deepspeed_on_cpu() if deepspeed and not torch.cuda.is_available() else {}
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" and not deepspeed else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout, **backend)],
            # The loop divides the loss; told by its environment to accumulate, Accelerate would divide it once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:
        if not deepspeed:
            raise
        raise UserError(f"these DeepSpeed settings cannot be used: {' '.join(str(error).split())}") from error
    refuse_split_launch(os.environ, accelerator.num_processes)
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"this launch asks for {accelerator.distributed_type.value}, which selfvil {__version__} does not train "
            f"under: use one process, several CPU processes, several GPUs (DDP) or DeepSpeed"
        )
    for sentence in overruled(os.environ, precision, accumulate) if accelerator.is_main_process else []:
        log.warning(sentence)
    if precision == "bf16" and accelerator.is_main_process and not bf16_in_hardware():
        log.warning("this processor has no bfloat16 instructions: run.precision=fp32 is many times faster on it")
    if threads is not None:
        torch.set_num_threads(threads)
    if (used := torch.get_num_threads()) > 1 and accelerator.device.type == "cpu" and accelerator.is_local_main_process:
        cores, processes = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        busy = cores * psutil.cpu_percent(interval=0.3) / 100  # seconds; what others do while we wait
        if crowding := crowded(busy, cores, used, processes):
            log.warning(crowding)
    return accelerator


def bf16_in_hardware() -> bool:
    """Whether this machine multiplies bfloat16 by instructions for it; a CPU without them is up to 11 times slower in
    bfloat16 than in float32."""
    if torch.cuda.is_available():
        return True
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: unknown
        return True


def crowded(busy: float, cores: int, threads: int, processes: int) -> str | None:
    """A warning, if threads of this launch will share cores with others: `busy` of `cores` are in use already.

    They wait for each other in loops, so that one without a core holds up the rest: beside two other processes on two
    cores, two threads made between 0.2 and 1 times the steps of one.
    """
    if busy + threads * processes <= cores + 0.5:
        return None
    return (
        f"{busy:.1f} of {cores} cores are busy with other work, and {processes} x {threads} threads that wait for each "
        f"other can be several times slower there than one: if it stays so, stop and set run.threads=1"
    )


def refuse_strategy(environ: Mapping[str, str]) -> None:
    """Refuse a strategy that is not supported or installed, or that Accelerate would leave out. Raises UserError."""
    for name in ("FSDP", "MEGATRON_LM"):
        if _asks_for(environ, name):
            raise UserError(
                f"this launch asks for {name} (ACCELERATE_USE_{name}), which selfvil {__version__} does not train "
                f"under, and which Accelerate on CPUs would silently leave out: use DDP or DeepSpeed"
            )
    if not _asks_for(environ, "DEEPSPEED"):
        return
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or "LOCAL_RANK" not in environ:
        raise UserError(
            "this launch asks for DeepSpeed, but Accelerate would silently train without it: start it by accelerate "
            "launch or torchrun, and without ACCELERATE_USE_CPU, on CPUs too (ACCELERATE_USE_DEEPSPEED=true torchrun "
            "--nproc_per_node N launch/pretrain.py ...)"
        )
    if missing := [package for package in ("deepspeed", "transformers") if find_spec(package) is None]:
        raise UserError(f"DeepSpeed needs {' and '.join(missing)}, not installed: pip install 'selfvil[deepspeed]'")
    if compare_versions("deepspeed", "<", DEEPSPEED_FLOOR):
        raise UserError(
            f"DeepSpeed {version('deepspeed')} is too old (0.18.0 was seen to lose accumulated micro-batches under "
            f"ZeRO-2): install {DEEPSPEED_FLOOR} or newer, pip install 'selfvil[deepspeed]'"
        )


def overruled(environ: Mapping[str, str], precision: str, accumulate: int) -> list[str]:
    """A sentence for each setting of the launcher that says otherwise than the recipe, which has the last word."""
    ours = {
        "MIXED_PRECISION": ("run.precision", precision),
        "GRADIENT_ACCUMULATION_STEPS": ("optim.accumulate", str(accumulate)),
    }
    return [
        f"ACCELERATE_{name} = {asked} gives way to the recipe's {key} = {value}"
        for name, (key, value) in ours.items()
        if (asked := environ.get(f"ACCELERATE_{name}", "no")) not in ("no", value)
    ]


def _asks_for(environ: Mapping[str, str], strategy: str) -> bool:
    return environ.get(f"ACCELERATE_USE_{strategy}", "").lower() == "true"


def _deepspeed_on_cpu() -> dict[str, str]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Its shared memory would be compiled when it first starts, for a minute or more, by a compiler there may not be.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {"backend": "gloo"}  # else it finds no backend, and believes that it is alone


def refuse_split_launch(environ: Mapping[str, str], num_processes: int) -> None:
    """Refuse a launch whose processes do not know of each other. Raises UserError with the command that works."""
    launched = int(environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes == 1:
        raise UserError(
            f"torchrun started {launched} processes, but each would train alone: on CPUs set ACCELERATE_USE_CPU=true "
            f"(ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} launch/pretrain.py ...)"
        )
    on_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and num_processes == 1 and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        raise UserError(
            "accelerate launch was asked for several CPU processes and started one (it needs MPI for more): use "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N launch/pretrain.py ..., or --num_processes 1"
        )


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """A fresh context of the run's precision, for calls that go round the prepared model, which has its own."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def agree(accelerator: Accelerator, value: T) -> T:
    """The main process's `value`, on every process."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on at least one process; a collective when there are several."""
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total.item())


def gather_lists(accelerator: Accelerator, values: list[T]) -> list[T]:
    """The values of all processes, those of the first one first; a collective when there are several."""
    return values if accelerator.num_processes == 1 else gather_object(values)


def agreed_reason(accelerator: Accelerator, reason: str | None) -> str | None:
    """Why to stop, on every process: the reason of the first process that has one, None if none has. A collective."""
    if not any_process(accelerator, reason is not None) or accelerator.num_processes == 1:
        return reason
    reasons = enumerate(gather_object([reason]))
    rank, first = next((rank, reason) for rank, reason in reasons if reason is not None)
    return first if rank == 0 else f"{first} at process {rank}"


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of `work`, which the main process alone does, on every process; a collective.

    Raises:
        UserError: `work` raised it; every process raises it, so that none is left waiting.
    """
    result: tuple[T | None, str | None] = (None, None)
    if accelerator.is_main_process:
        try:
            result = (work(), None)
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            result = (None, str(error))
    value, message = agree(accelerator, result)
    if message is not None:
        raise UserError(message)
    return cast(T, value)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one optimizer step of one process.

    What is drawn within a step (stochastic depth, dropout) then depends on nothing that went before, so a resumed run
    draws the same without any generator's state in the checkpoint.
    """
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, stream: int) -> int:
    """A seed of its own for each optimizer step and `stream` (a rank, a layer), from 0 to 2^63."""
    return ((seed * 1_000_003 + step) * 65_537 + stream) % 2**63


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """Device, processes, versions, code commit and command: what a figure must be reported with."""
    packages = ["torchvision", "timm", "lightly", "accelerate", "webdataset", "safetensors", "numpy"]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        packages.append("deepspeed")
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"selfvil": __version__, "torch": torch.__version__} | {name: _version(name) for name in packages},
        "commit": commit(),
        "command": " ".join(sys.argv),
    }


def device_name(device: torch.device) -> str:
    """Such as `NVIDIA H100 80GB HBM3` or `x86_64 CPU, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """Commit of the checkout this package runs from, marked when it has uncommitted changes; None if installed."""
    folder = Path(__file__).parent
    if "site-packages" in folder.parts:
        return None
    try:
        text = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
