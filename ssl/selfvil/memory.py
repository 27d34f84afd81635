"""Whether a step fits into memory, before the first one is tried.

What training keeps for the backward pass grows with the images of a micro-batch and the crops of each. It is measured,
not modelled: the objective runs on one image and on two, and what autograd saves is counted. The rest of a step
(temporary tensors, fragmentation) is left out, so a refusal is certain and a pass is not; where an objective masks each
image in its own way, up to what the masks of two images tell of the others'.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from PIL import Image

from selfvil import footprint
from selfvil.data.loader import Batch
from selfvil.data.views import preserved_randomness
from selfvil.errors import UserError
from selfvil.footprint import free_bytes, trained_bytes, update_bytes
from selfvil.objectives.base import Objective, Progress, View

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


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
    of_weights = update_bytes(objective, parts)
    needed = one + (two - one) * (batch_size - 1) + of_weights
    free = free_bytes(device)
    if of_weights > free:
        raise UserError(
            f"gradients and moments of {trained_bytes(objective) / 2**30:,.1f} GiB of trained weights need "
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
    batch = blank_batch(objective.views(), count, channels).to(device)
    progress = Progress(step=0, total_steps=1, steps_per_epoch=1.0, seed=0)
    with preserved_randomness():
        return footprint.saved_bytes(objective, lambda: objective(batch, progress))


def blank_batch(views: Sequence[View], count: int, channels: int) -> Batch:
    with preserved_randomness():
        crops = [view(Image.new(_MODES[channels], (64, 64))) for view in views]
    numbers = torch.arange(count)
    return Batch([crop.expand(count, *crop.shape).contiguous() for crop in crops], numbers, numbers, numbers)
