"""Networks that are not trained by gradients: frozen ones, and a teacher that is a running mean of a student.

`TeacherSettings` has the momentum of that mean and its schedule, for all objectives with such a teacher.

`Center` is the running mean of a teacher's outputs, by which DINO and iBOT avoid collapse. All of them keep float32
values whatever the precision of the student, because bf16 rounds away the small steps of a running mean.

Shapes: B images, K prototypes.
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfvil.objectives import distributed
from selfvil.optim import Progress, cosine
from selfvil.settings import Section


class TeacherSettings(Section):
    """Settings of a teacher that is a running mean (EMA) of its student."""

    teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher's running mean at the first step."""
    teacher_momentum_end: float = Field(1.0, ge=0, le=1)
    """Momentum of the teacher's running mean at the end of the run."""
    teacher_momentum_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the momentum changes from teacher_momentum to teacher_momentum_end: cosine, as half a cosine (DINO); linear
    (I-JEPA); constant keeps teacher_momentum and ignores teacher_momentum_end."""

    def momentum_at(self, progress: Progress) -> float:
        """Momentum of the teacher's running mean after this step."""
        first, last = self.teacher_momentum, self.teacher_momentum_end
        if self.teacher_momentum_schedule == "constant":
            return first
        if self.teacher_momentum_schedule == "linear":
            return first + (last - first) * progress.step / progress.total_steps
        return cosine(progress.step, progress.total_steps, first, last)


class StaysFloat32(nn.Module):
    """A module that moves between devices, but that `.bfloat16()`, `.to(dtype)` and the like do not cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        # torch applies .to() and the like to each tensor here; DeepSpeed's bf16 mode casts a whole objective so.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class FrozenNetwork(StaysFloat32):
    """Networks without gradients, always in evaluation mode: no stochastic depth, no statistics of the batch.

    The networks are attributes under the given names, and belong to this module from then on.
    """

    backbone: nn.Module

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)

    @torch.no_grad()
    def copy_from(self, other: nn.Module) -> None:
        """Copy parameters and buffers from `other`, which has networks of the same names and architectures."""
        for name, parameter in self.named_parameters():
            parameter.copy_(other.get_parameter(name))
        self._copy_buffers(other)

    def _copy_buffers(self, other: nn.Module) -> None:
        for name, buffer in self.named_buffers():
            buffer.copy_(other.get_buffer(name))


class Teacher(FrozenNetwork):
    """Copies of some of a student's networks, whose parameters are a running mean of the student's.

    The copies have the names of the student's networks. Parameters are updated one by one as they are, so a sharded
    teacher (DTensors) follows a student that is sharded alike without any communication.
    """

    head: nn.Module

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__(**{name: copy.deepcopy(network) for name, network in networks.items()})

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, in float32; buffers are copied."""
        students = [student.get_parameter(name).float() for name, _ in self.named_parameters()]
        torch._foreach_lerp_(list(self.parameters()), students, 1 - momentum)
        self._copy_buffers(student)


def teacher_autocast(student: nn.Module, device: torch.device) -> torch.autocast:
    """Autocast to bf16 if the student computes in bf16, by autocast or because its weights are bf16."""
    weights_are_bf16 = next(student.parameters()).dtype == torch.bfloat16
    return torch.autocast(
        device.type, torch.bfloat16, enabled=weights_are_bf16 or torch.is_autocast_enabled(device.type)
    )


class Center(StaysFloat32):
    """Running mean of a teacher's logits, updated once for each optimizer step.

    Every row of logits in every micro-batch and process has the same weight in a step's mean, so the centre does not
    depend on how a batch is split.
    """

    value: Tensor

    def __init__(self, out_dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(out_dim))
        self.discard()

    def discard(self) -> None:
        """Drop what was added since the last update."""
        # Not a buffer: it is empty between steps, and DDP would overwrite it by the buffer of rank 0.
        self._sum: Tensor | None = None
        self._count = 0

    def softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """Centred and sharpened probabilities (..., K) of the teacher's logits (..., K)."""
        return F.softmax((logits - self.value) / temperature, dim=-1)

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """Add the teacher's logits (..., K) of a micro-batch, which may have no rows, to the mean of this step."""
        total = logits.float().flatten(0, -2).sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += logits.shape[:-1].numel()

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre towards the mean of all logits added since the last update, in all processes."""
        if self._sum is None:
            return
        # The count is summed as well, since it may differ between processes.
        total = distributed.sum_(torch.cat([self._sum, self._sum.new_tensor([self._count])]))
        mean, has_rows = total[:-1] / total[-1].clamp_min(1), total[-1] > 0
        self.value.lerp_(mean, (1 - self.momentum) * has_rows)
        self.discard()
