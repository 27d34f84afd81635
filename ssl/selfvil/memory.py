"""The memory of a training step: predicted by part, and refused where it cannot fit.

Two functions, for two questions:

- `require_memory` refuses a run before its first step. It counts only what a step certainly holds: what autograd saves,
  measured on one and two images, and gradients and moments; and what saving a checkpoint certainly holds: moments, and
  the copy that is written. So a refusal is certain, and a pass is not.
- `step_memory` predicts the peak, temporary tensors included, by running forward and backward on a few images and
  recording every allocation. Every tensor's size is linear in the number of images, so the memory held at each moment
  is extrapolated on its own, and the peak is the largest of these. It is right where the peak of many images falls at
  another moment than the peak of few.

Where an objective masks each image differently, both are as exact as the masks of a few images are typical.
"""

import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfvil import footprint
from selfvil.data.loader import Batch
from selfvil.data.views import preserved_randomness
from selfvil.divergence import BuffersBefore
from selfvil.errors import UserError
from selfvil.footprint import state_bytes, trained_bytes, update_bytes
from selfvil.machine import free_bytes, free_host_bytes, memory_limit
from selfvil.objectives.base import Objective, Progress, View

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FEW = (4, 6)
"""Images of the two passes from which larger micro-batches are extrapolated. Torch splits some sums into more parts at
each power of 2, so that passes over 2 and 4 images differ in a few allocations, and those over 4 and 6 do not."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process at the peak of a training step, by what holds them."""

    weights: int
    """Trained parameters; all buffers, and the copies of them that are kept for skipped steps."""
    teacher: int
    """Parameters that are not trained: a teacher's, and those of other frozen networks."""
    moments: int
    """AdamW's two moments of each trained parameter."""
    buckets: int
    """Copies of the gradients in which several processes of DDP exchange them."""
    batch: int
    """Crops of two micro-batches: the current one, and the next one while it arrives."""
    activations: int
    """What is held from the forward pass for the backward pass."""
    gradients: int
    """Gradients that exist at the moment of the peak."""
    temporary: int
    """Other tensors at the moment of the peak."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def require_memory(
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
    of_weights, free = update_bytes(objective, parts), free_bytes(device)
    if of_weights > free:
        raise UserError(
            f"gradients and moments of {trained_bytes(objective) / 2**30:,.1f} GiB of trained weights need "
            f"{of_weights / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free for a process on {device}: take a "
            "smaller model, or fewer prototypes (objective.out_dim) if the objective has them"
        )
    counts = (1, 2) if batch_size > 1 else (1,)
    try:
        with autocast, memory_limit(device):
            saved = [saved_bytes(objective, count, channels, device) for count in counts]
    except MemoryError:
        raise UserError(
            f"even {counts[-1]} image(s) with {len(objective.views())} crops of each need more than the "
            f"{free / 2**30:,.1f} GiB that are free for a process on {device}: lower model.img_size or the number of "
            "crops, raise model.patch_size, or take a smaller model"
        ) from None
    needed = saved[0] + (saved[-1] - saved[0]) * (batch_size - 1) + of_weights
    if needed > free:
        raise UserError(
            f"a micro-batch of {batch_size:,} images with {len(objective.views())} crops of each needs at least "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free for a process on {device}: lower "
            f"optim.batch_size or the number of crops, or raise optim.accumulate"
        )
    _require_copy(objective, device, parts)


def _require_copy(objective: Objective, device: torch.device, parts: int) -> None:
    """A checkpoint is copied to the memory of the machine, and written from there while training goes on."""
    copy, moments = state_bytes(objective), 0
    if device.type == "cpu":  # of all its processes
        moments = 2 * trained_bytes(objective) // parts * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if copy + moments > (free := free_host_bytes()):
        also = f", beside {moments / 2**30:,.1f} GiB of the optimizer's moments" if moments else ""
        raise UserError(
            f"a checkpoint is copied to memory before it is written, which needs {copy / 2**30:,.1f} GiB{also}; "
            f"{free / 2**30:,.1f} GiB are free on this machine: take a smaller model, or a machine with more memory"
        )


def saved_bytes(objective: Objective, count: int, channels: int, device: torch.device) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `count` images, weights not counted."""
    batch = blank_batch(objective.views(), count, channels).to(device)
    progress = Progress(step=0, total_steps=1, steps_per_epoch=1.0, seed=0)
    with preserved_randomness():
        return footprint.saved_bytes(objective, lambda: objective(batch, progress))


def step_memory(
    objective: Objective,
    micro_batch: int,
    channels: int,
    device: torch.device,
    autocast: AbstractContextManager,
    *,
    processes: int = 1,
    accumulate: int = 1,
) -> StepMemory:
    """Predict the peak of a training step on `micro_batch` images, in one of several processes of DDP.

    Forward and backward run on 4 and on 6 images, or on `micro_batch` where that is fewer. Pictures, the doctor and
    evaluations are not part of a step.

    Args:
        objective: on `device` already; its weights, buffers and gradients are left as they were.
        autocast: a context of the run's precision that can be entered several times.
        accumulate: micro-batches of a step; the gradients of the first exist while the next is computed.
    """
    counts = _FEW if micro_batch > _FEW[1] else (micro_batch,)
    passes = [_measure(objective, count, channels, device, autocast) for count in counts]
    if len(passes) == 2 and len(passes[0].held) != len(passes[1].held):
        # The first pass of a process also allocates what later ones reuse, such as constants: measure it again.
        passes[0] = _measure(objective, counts[0], channels, device, autocast)
    trained = trained_bytes(objective)
    held, gradients, forward_end = _extrapolate(passes, counts, micro_batch)
    if accumulate > 1:  # those of the first micro-batch exist all the time, and others are added to them
        held = [level - own + trained for level, own in zip(held, gradients)]
        gradients = [trained] * len(held)
    peak = max(range(len(held)), key=held.__getitem__)
    activations = min(forward_end, held[peak] - gradients[peak])
    frozen = sum(p.nbytes for p in objective.parameters() if not p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in objective.buffers())
    crops = sum(view.nbytes for view in blank_batch(objective.views(), 1, channels).views)
    return StepMemory(
        weights=trained + 2 * buffers,
        teacher=frozen,
        moments=2 * trained,
        buckets=trained if processes > 1 else 0,
        batch=2 * micro_batch * crops,
        activations=activations,
        gradients=gradients[peak],
        temporary=held[peak] - gradients[peak] - activations,
    )


@dataclass(frozen=True)
class _Pass:
    """Bytes during one forward and backward pass, after each allocation and release."""

    held: list[int]
    """All that the pass has allocated and not yet released."""
    gradients: list[int]
    """Of these, the gradients of parameters."""
    forward_end: int
    """Index of the end of the forward pass."""


def _measure(
    objective: Objective, count: int, channels: int, device: torch.device, autocast: AbstractContextManager
) -> _Pass:
    batch = blank_batch(objective.views(), count, channels).to(device)
    progress = Progress(step=0, total_steps=1, steps_per_epoch=1.0, seed=0)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    buffers = BuffersBefore(objective)

    def step() -> None:
        with autocast:
            loss = objective(batch, progress).loss
        footprint.mark("forward ends")
        loss.backward()

    hooks = [p.register_post_accumulate_grad_hook(lambda p: footprint.mark(str(p.nbytes))) for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with preserved_randomness():
            held, marks = footprint.allocated(step, device)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, before):
            parameter.grad = gradient
        objective.discard_step()
        buffers.restore()
    gradients = [0] * len(held)
    for name, index in marks:
        if name.isdigit():
            gradients[index] += int(name)
    ends = [index for name, index in marks if name == "forward ends"]
    return _Pass(held, list(itertools.accumulate(gradients)), ends[0])


def _extrapolate(passes: Sequence[_Pass], counts: Sequence[int], images: int) -> tuple[list[int], list[int], int]:
    """Bytes held and bytes of gradients at each moment of a pass over `images` images; and bytes when forward ends.

    passes: over `counts` images. Moments are paired by their order. Where that is impossible, since an operator works
    in slices and more images have more of them, only the peaks and the ends of forward are paired.
    """
    few, more = passes[0], passes[-1]
    if len(passes) == 1:
        return more.held, more.gradients, more.held[more.forward_end]
    share = (images - counts[0]) / (counts[1] - counts[0])

    def at_images(a: int, b: int) -> int:
        return round(a + (b - a) * share)

    end = at_images(few.held[few.forward_end], more.held[more.forward_end])
    if len(few.held) == len(more.held):
        return [at_images(a, b) for a, b in zip(few.held, more.held)], more.gradients, end
    peak = max(more.held)
    grown = at_images(max(few.held), peak) / max(1, peak)
    return [round(level * grown) for level in more.held], more.gradients, end


def blank_batch(views: Sequence[View], count: int, channels: int) -> Batch:
    """A batch of `count` identical black images after `views`."""
    blank: Any = np.zeros((64, 64, channels), np.float32)
    eight_bits = all(getattr(getattr(view, "normalise", None), "unit_scale", True) for view in views)
    if channels in _MODES and eight_bits:
        blank = Image.new(_MODES[channels], (64, 64))
    with preserved_randomness():
        crops = [view(blank) for view in views]
    numbers = torch.arange(count)
    return Batch([crop.expand(count, *crop.shape).contiguous() for crop in crops], numbers, numbers, numbers)
