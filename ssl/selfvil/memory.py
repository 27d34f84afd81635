"""Whether a step fits into memory, before the first one is tried.

What training keeps for the backward pass grows with the images of a micro-batch and the crops of each. It is measured,
not modelled: the objective runs on one image and on two, and what autograd saves is counted. The rest of a step
(temporary tensors, fragmentation) is left out, so a refusal is certain and a pass is not; where an objective masks each
image in its own way, up to what the masks of two images tell of the others'.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch
from PIL import Image
from torch import Tensor

from selfvil.data.loader import Batch
from selfvil.data.views import preserved_randomness
from selfvil.errors import UserError
from selfvil.objectives.base import Objective, Progress, View

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GRADIENT_AND_MOMENTS = 3  # tensors that AdamW's first step adds for each trained one


def need_memory(
    objective: Objective,
    batch_size: int,
    channels: int,
    device: torch.device,
    autocast: AbstractContextManager,
    parts: int = 1,
) -> None:
    """Refuse a micro-batch of `batch_size` images that this process cannot hold.

    Args:
        objective: on `device` already; it is left as it was. autocast: a fresh context of the run's precision.
        parts: processes among which gradients and optimizer state are divided, as by ZeRO.

    Raises:
        UserError: with what is needed, what is free, and the keys to change.
    """
    with autocast:
        one, two = (saved_bytes(objective, count, channels, device) for count in (1, 2))
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    of_weights = _GRADIENT_AND_MOMENTS * trained // parts
    needed = one + (two - one) * (batch_size - 1) + of_weights
    free = free_bytes(device)
    if of_weights > free:
        raise UserError(
            f"gradients and moments of {trained / 2**30:,.1f} GiB of trained weights need "
            f"{of_weights / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free for a process on {device}: take a "
            "smaller model, or fewer prototypes (objective.out_dim) if the objective has them"
        )
    if needed > free:
        raise UserError(
            f"a micro-batch of {batch_size:,} images with {len(objective.views())} crops of each needs at least "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free for a process on {device}: lower "
            f"optim.batch_size or the number of crops, or raise optim.accumulate"
        )


def saved_bytes(objective: Objective, count: int, channels: int, device: torch.device) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `count` images, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = _blank_batch(objective.views(), count, channels).to(device)
    progress = Progress(step=0, total_steps=1, steps_per_epoch=1.0, seed=0)
    training = objective.training
    objective.eval()  # a mere look: running means do not move
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), preserved_randomness():
            output = objective(batch, progress)
    finally:
        objective.train(training)
    del output
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its share of the machine's or container's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:  # a container's limit is not seen in the machine's figures
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _blank_batch(views: Sequence[View], count: int, channels: int) -> Batch:
    with preserved_randomness():
        crops = [view(Image.new(_MODES[channels], (64, 64))) for view in views]
    numbers = torch.arange(count)
    return Batch([crop.expand(count, *crop.shape).contiguous() for crop in crops], numbers, numbers, numbers)
