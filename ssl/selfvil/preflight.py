"""Checks before a run begins that need its networks, the machine or an account; a recipe checks its own values.

The loop and `selfvil plan` call the same functions here, and those of `selfvil.plan` for steps and images.
"""

import os
import re
from typing import Any

import torch

from selfvil.data.render import require_renderable
from selfvil.errors import UserError
from selfvil.machine import free_host_bytes, usable_cores
from selfvil.memory import require_memory
from selfvil.objectives.base import Objective
from selfvil.plan import Plan
from selfvil.recipe import Recipe
from selfvil.runtime import autocast

WORKER_BYTES = 0.7e9
"""Memory of a process that decodes and augments, about."""


def check_objective(objective: Objective, recipe: Recipe, plan: Plan, device: torch.device, parts: int = 1) -> None:
    """Check that a micro-batch is large enough for the objective, can be augmented as the recipe has it, and fits.

    Args:
        objective: on `device`; it is left as it was.
        parts: processes among which gradients and optimizer state are divided, as by ZeRO.

    Raises:
        UserError: with the keys to change.
    """
    objective.check_batch(plan.micro_batch * plan.processes)
    objective.check_micro_batch(plan.micro_batch)
    if recipe.data.augment == "device":
        require_renderable(objective.views())
    context = autocast(device, recipe.run.precision)
    require_memory(objective, plan.micro_batch, recipe.model.in_chans, device, context, parts)


def workers_warning(workers: int, processes: int, cores: int | None = None, free: int | None = None) -> str | None:
    """A warning if the data workers of all `processes` of this machine exceed its cores or its free memory; or None.

    cores, free: for tests; by default those of this machine, `free` in bytes.
    """
    cores = cores or usable_cores()
    free = free_host_bytes() if free is None else free
    total = workers * processes
    needed = total * WORKER_BYTES
    if total <= cores and needed <= free:
        return None
    fits = max(0, min(cores // processes, int(free / WORKER_BYTES) // processes))
    return (
        f"data.workers = {workers} for each of {processes} process(es) are {total} workers on {cores} cores, with "
        f"about {needed / 1e9:.1f} GB of memory (free: {free / 1e9:.1f} GB): set data.workers={fits}"
    )


def check_wandb(recipe: Recipe) -> None:
    """Check that Weights & Biases can be used, before anything is computed.

    Raises UserError if it is not installed, the project's name is impossible, or nobody is logged in.
    """
    project = recipe.monitor.wandb
    if project is None:
        return
    if not project or len(project) > 128 or re.search(r"[/\\#?%:]", project):
        raise UserError(
            f"monitor.wandb = {project[:80]!r} cannot be the name of a Weights & Biases project: expected 1 to 128 "
            r"characters without / \ # ? % :"
        )
    try:
        import wandb
    except ImportError:
        raise UserError(
            "monitor.wandb is set, but wandb is not installed: pip install 'selfvil[wandb]', or monitor.wandb=null"
        ) from None
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return  # these modes need no account
    module: Any = wandb
    if not (os.environ.get("WANDB_API_KEY") or module.api.api_key):
        raise UserError(
            "monitor.wandb is set, but no account is logged in to Weights & Biases on this machine: run `wandb login`, "
            "or set WANDB_MODE=offline, or monitor.wandb=null"
        )
