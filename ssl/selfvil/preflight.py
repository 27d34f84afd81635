"""Checks before a run begins that need the data set, the machine or an account, beside those of the recipe itself."""

import os
import re
from typing import Any

import psutil

from selfvil.errors import UserError
from selfvil.recipe import Recipe

WORKER_BYTES = 0.7e9
"""Memory of a process that decodes and augments, about."""


def check_batch(batch_size: int, num_images: int) -> None:
    """Raises UserError if a step would need images more than once."""
    if batch_size > num_images:
        raise UserError(
            f"optim.batch_size = {batch_size:,} is more than the {num_images:,} images of data.train, so that a step "
            f"would hold images more than once: lower it to at most {num_images:,}, or give more images"
        )


def workers_warning(workers: int, processes: int, cores: int | None = None, free: int | None = None) -> str | None:
    """A sentence where the data workers of all `processes` of this machine exceed its cores or its free memory.

    cores, free: for tests; those of this machine otherwise, free in bytes.
    """
    cores = cores or len(os.sched_getaffinity(0))
    free = psutil.virtual_memory().available if free is None else free
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
            f"monitor.wandb = {project[:80]!r} is no name of a Weights & Biases project: expected 1 to 128 characters "
            r"without / \ # ? % :"
        )
    try:
        import wandb
    except ImportError:
        raise UserError(
            "monitor.wandb is set, but wandb is not installed: pip install 'selfvil[wandb]', or monitor.wandb=null"
        ) from None
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return  # needs no account
    module: Any = wandb
    if not (os.environ.get("WANDB_API_KEY") or module.api.api_key):
        raise UserError(
            "monitor.wandb is set, but nobody is logged in to Weights & Biases here: run `wandb login`, or set "
            "WANDB_MODE=offline, or monitor.wandb=null"
        )
