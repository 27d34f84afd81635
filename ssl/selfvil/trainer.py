"""The training loop for evaluations that train a network; they may not import the loop or recipes.

score(source, train, test, {"finetune": settings}, trainer=Trainer())
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from selfvil import footprint, machine, memory, runtime
from selfvil.build import build_objective, open_training
from selfvil.errors import UserError
from selfvil.objectives.base import Objective
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe, parse
from selfvil.records import Summary

_CPU_MICRO_BATCH = 64  # images; more are slower on a CPU, and a fixed number makes results repeatable
_SHARE_OF_FREE = 0.5  # for tensors that autograd saves; the rest is for temporary tensors and data workers


class Trainer:
    """Runs recipes given as sections of plain values, on the processes of this launch.

    Every process calls each method. optim.accumulate is chosen so that a micro-batch fits into memory.
    """

    def begin(self, recipe: Mapping[str, Any], device: torch.device, processes: int = 1) -> nn.Module:
        """The backbone that a run of `recipe` begins with, on the CPU.

        Raises UserError if the recipe is wrong, does not fit its images, or needs more memory than is free.
        """
        settings, _ = open_training(parse(dict(recipe), "the fine-tuning"))
        with torch.random.fork_rng(devices=[]):
            objective = build_objective(settings)
            _micro_batches(objective.to(device), settings, device, processes)
        return objective.backbone.cpu()

    def run(self, recipe: Mapping[str, Any], device: torch.device, processes: int = 1) -> Summary:
        """Run `recipe`, or continue it where run.out holds a part of it. Raises UserError as `pretrain`."""
        settings, _ = open_training(parse(dict(recipe), "the fine-tuning"))
        with torch.random.fork_rng(devices=[]):
            objective = build_objective(settings, start=False).to(device)
            count = _micro_batches(objective, settings, device, processes)
        optim = settings.optim.model_copy(update={"accumulate": count})
        with runtime.on_device(device):
            return pretrain(settings.model_copy(update={"optim": optim}), summarise=False)


def _micro_batches(objective: Objective, recipe: Recipe, device: torch.device, processes: int) -> int:
    """Equal micro-batches of a step of one process, so that what autograd saves fits into half of the free memory.

    Measured with two images and with four. At most 64 images on a CPU. Raises UserError if the smallest do not fit.
    """
    share, channels = recipe.optim.batch_size // processes, recipe.model.in_chans
    least, (height, width) = 2 if getattr(objective, "mixup", None) else 1, recipe.model.img_size
    free = machine.free_bytes(device)
    try:
        with runtime.autocast(device, recipe.run.precision), machine.memory_limit(device):
            two, four = (memory.saved_bytes(objective, count, channels, device) for count in (2, 4))
    except MemoryError:
        raise UserError(
            f"four images of {height} x {width} pixels need more than the {free / 2**30:,.2f} GiB that are free on "
            f"{device}: use smaller images (img_size), or end other programs"
        ) from None
    each = max(1, (four - two) // 2)
    fixed = max(0, two - 2 * each) + footprint.update_bytes(objective)
    most = int((_SHARE_OF_FREE * free - fixed) / each)
    if most < least:
        raise UserError(
            f"fine-tuning on images of {height} x {width} pixels needs at least "
            f"{(least * each + fixed) / _SHARE_OF_FREE / 2**30:,.2f} GiB, and {free / 2**30:,.2f} GiB are free on "
            f"{device}: use smaller images (img_size), or end other programs"
        )
    most = min(most, _CPU_MICRO_BATCH) if device.type == "cpu" else most
    counts = (count for count in range(math.ceil(share / most), share + 1) if share % (count * least) == 0)
    return next(counts, 1)
