"""The environment of a run: processes, devices, precision, seeds, versions. Processes are connected by Accelerate.

Supported: one CPU process, several CPU processes (torchrun and gloo), one GPU, several GPUs (DDP), and DeepSpeed on any
number of them (`selfvil.engine.zero`).
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    compare_versions,
)

from selfvil.allocator import kept_memory
from selfvil.errors import UserError, redact
from selfvil.machine import usable_cores
from selfvil.version import __version__

T = TypeVar("T")

DEEPSPEED_FLOOR = "0.18.5"
"""The oldest version that was found to compute what DDP computes (tests/engine/test_strategies.py)."""

log = logging.getLogger("selfvil")


@contextmanager
def undisturbed() -> Iterator[None]:
    """In this context, changes of process-wide settings are temporary: Accelerate's state, torch's threads and RNGs.
    Memory that steps free is kept for the next ones (`kept_memory`).

    A notebook can therefore train, evaluate, and train again with other settings. Accelerate refuses to change the
    precision in its state, so the context begins with an empty one.
    """
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before, threads = [dict(state) for state in shared], torch.get_num_threads()
    for state in shared:
        state.clear()
    try:
        with kept_memory(), torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        torch.set_num_threads(threads)
        for state, values in zip(shared, before):
            state.clear()
            state.update(values)


def start(
    precision: Literal["fp32", "bf16"], accumulate: int, threads: int | None = None, timeout: timedelta | None = None
) -> Accelerator:
    """Connect the processes of this launch, and return the Accelerator.

    Args:
        precision, accumulate: of the recipe. Under DeepSpeed, `selfvil.engine.zero` applies both.
        threads: CPU threads of each process; None keeps the launcher's setting.
        timeout: of a collective; None takes the default of the backend.

    Raises:
        UserError: several processes were started and each would silently train a separate run; or the strategy is not
            supported, not installed, or would silently be ignored by Accelerate.
    """
    refuse_strategy(os.environ)
    deepspeed = requests_strategy(os.environ, "DEEPSPEED")
    backend = _deepspeed_on_cpu() if deepspeed and not torch.cuda.is_available() else {}
    try:
        with unset_variable("ACCELERATE_USE_FSDP"):  # `selfvil.engine.fsdp` shards; Accelerate connects the processes
            accelerator = Accelerator(
                mixed_precision="bf16" if precision == "bf16" and not deepspeed else "no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout, **backend)],
                # The loop divides the loss. By the launcher's setting, Accelerate would divide it a second time.
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
            f"this launch requests {accelerator.distributed_type.value}, which selfvil {__version__} does not "
            f"support: use one process, several CPU processes, several GPUs (DDP) or DeepSpeed"
        )
    for sentence in overridden_settings(os.environ, precision, accumulate) if accelerator.is_main_process else []:
        log.warning(sentence)
    if precision == "bf16" and accelerator.is_main_process and not bf16_in_hardware():
        log.warning(
            "this processor has no bfloat16 instructions: run.precision=fp32 is faster on it, and many times where a "
            "network or objective has layers without native kernels"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if (used := torch.get_num_threads()) > 1 and accelerator.device.type == "cpu" and accelerator.is_local_main_process:
        cores, processes = usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shares, ours = psutil.cpu_percent(interval=0.3, percpu=True), os.sched_getaffinity(0)
        busy = sum(share for core, share in enumerate(shares) if core in ours) / 100  # by other processes
        if warning := threads_warning(busy, cores, used, processes):
            log.warning(warning)
    return accelerator


def bf16_in_hardware() -> bool:
    """Whether this machine has bfloat16 instructions; a CPU without them is up to 11 times slower than in float32."""
    if torch.cuda.is_available():
        return True
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: unknown
        return True


def threads_warning(busy: float, cores: int, threads: int, processes: int) -> str | None:
    """A warning if threads of this launch will share cores with other processes, which use `busy` of `cores`.

    Threads synchronise by busy waiting, so that one without a core delays the others: next to two other processes on
    two cores, two threads had between 0.2 and 1 times the speed of one.
    """
    if busy + threads * processes <= cores + 0.5:
        return None
    return (
        f"{busy:.1f} of {cores} cores are used by other processes, and {processes} x {threads} threads that share "
        f"cores with them can be several times slower than one: if this load remains, stop and set run.threads=1"
    )


def refuse_strategy(environ: Mapping[str, str]) -> None:
    """Raise UserError for a strategy that is not supported or installed, or that Accelerate would ignore."""
    if requests_strategy(environ, "MEGATRON_LM"):
        raise UserError(
            f"this launch requests MEGATRON_LM (ACCELERATE_USE_MEGATRON_LM), which selfvil {__version__} does not "
            f"support, and which Accelerate would silently ignore on CPUs: use DDP, FSDP2 or DeepSpeed"
        )
    if not requests_strategy(environ, "DEEPSPEED"):
        return
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or "LOCAL_RANK" not in environ:
        raise UserError(
            "this launch requests DeepSpeed, but Accelerate would silently train without it: start it by accelerate "
            "launch or torchrun, and without ACCELERATE_USE_CPU, on CPUs too (ACCELERATE_USE_DEEPSPEED=true torchrun "
            "--nproc_per_node N launch/pretrain.py ...)"
        )
    if missing := [package for package in ("deepspeed", "transformers") if find_spec(package) is None]:
        raise UserError(f"DeepSpeed needs {' and '.join(missing)}, not installed: pip install 'selfvil[deepspeed]'")
    if compare_versions("deepspeed", "<", DEEPSPEED_FLOOR):
        raise UserError(
            f"DeepSpeed {version('deepspeed')} is too old (0.18.0 loses accumulated micro-batches under "
            f"ZeRO-2): install {DEEPSPEED_FLOOR} or newer, pip install 'selfvil[deepspeed]'"
        )


def overridden_settings(environ: Mapping[str, str], precision: str, accumulate: int) -> list[str]:
    """A sentence for each setting of the launcher that differs from the recipe, which overrides it."""
    ours = {
        "MIXED_PRECISION": ("run.precision", precision),
        "GRADIENT_ACCUMULATION_STEPS": ("optim.accumulate", str(accumulate)),
    }
    return [
        f"ACCELERATE_{name} = {asked} is overridden by the recipe's {key} = {value}"
        for name, (key, value) in ours.items()
        if (asked := environ.get(f"ACCELERATE_{name}", "no")) not in ("no", value)
    ]


def requests_strategy(environ: Mapping[str, str], strategy: str) -> bool:
    return environ.get(f"ACCELERATE_USE_{strategy}", "").lower() == "true"


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """In this context, a launch is on the CPU if `device` is; DeepSpeed chooses its device itself."""
    name, before = "ACCELERATE_USE_CPU", os.environ.get("ACCELERATE_USE_CPU")
    if device.type == "cpu" and not requests_strategy(os.environ, "DEEPSPEED"):
        os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def unset_variable(name: str) -> Iterator[None]:
    """In this context, the environment variable `name` is not set."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _deepspeed_on_cpu() -> dict[str, str]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Otherwise its shared-memory extension is compiled at the first start: a minute or more, and it needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {"backend": "gloo"}  # otherwise it finds no backend, and runs as one process


def refuse_split_launch(environ: Mapping[str, str], num_processes: int) -> None:
    """Raise UserError, with the command that works, if the processes of a launch are not connected."""
    launched = int(environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes == 1:
        raise UserError(
            f"torchrun started {launched} processes, but each would train alone: on CPUs set ACCELERATE_USE_CPU=true "
            f"(ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} launch/pretrain.py ...)"
        )
    on_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and num_processes == 1 and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        raise UserError(
            "accelerate launch was to start several CPU processes and started one (it needs MPI for more): use "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N launch/pretrain.py ..., or --num_processes 1"
        )


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """A new autocast context of a run's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one optimizer step of one process.

    The random values of a step (stochastic depth, dropout) then do not depend on earlier steps, so a resumed run has
    the same ones, without the generator's state in the checkpoint.
    """
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, stream: int) -> int:
    """A different seed, from 0 to 2^63, for each optimizer step and `stream` (a rank, a layer)."""
    return ((seed * 1_000_003 + step) * 65_537 + stream) % 2**63


def describe(accelerator: Accelerator, strategy: str) -> dict[str, Any]:
    """Device, processes, versions, commit and command, to be reported with any result."""
    packages = ["torchvision", "timm", "lightly", "accelerate", "webdataset", "safetensors", "numpy"]
    if strategy.startswith("zero"):
        packages.append("deepspeed")
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "strategy": strategy,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"selfvil": __version__, "torch": torch.__version__} | {name: _version(name) for name in packages},
        "commit": commit(),
        "command": redact(" ".join(sys.argv)),
    }


def device_name(device: torch.device) -> str:
    """Name of a device, such as `NVIDIA H100 80GB HBM3` or `x86_64 CPU, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {usable_cores()} cores"


def commit() -> str | None:
    """Commit of the checkout of this package, marked if it has uncommitted changes; None for an installed package."""
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
