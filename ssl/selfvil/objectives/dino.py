"""DINO: self-distillation with no labels.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021). A student sees two large and some
small crops of an image; its teacher, a running mean of the student, sees the large ones. For every pair of different
crops the student learns to say what the teacher says. The teacher's answers are sharpened by a low temperature, which
alone would end in one answer for all images, and centred, which alone would end in no answer for any.

Shapes: B images, V crops of each (the first two are large), K prototypes.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, distributed, nn

from selfvil.models.heads import ProjectionHead, choose_readout
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import CropSettings, Readout, multi_crop, prepare_for_crops, read_crops, sheet_of_crops
from selfvil.optim import cosine


class DINOSettings(CropSettings):
    """Settings of DINO; the defaults are those of the published code. An epoch is a pass over the training images."""

    name: Literal["dino"] = "dino"
    readout: Readout = None
    """Tokens that the head sees: first and last side by side, the mean of all, one of them, the class token, or all
    registers. null takes bilateral_concat for ViL, or registers or cls where model.global_pool says so; cls for ViT."""
    out_dim: int = Field(65536, ge=2)
    """Prototypes K: width of the head's output. Small sets of images need fewer."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the head's hidden layers."""
    bottleneck_dim: int = Field(256, ge=1)
    """Width of the vectors that are compared with the prototypes."""
    norm_last_layer: bool = True
    """Keep all prototypes at length 1; false learns their lengths, which is less stable."""
    freeze_last_layer_epochs: float = Field(1, ge=0)
    """Epochs at the start during which the prototypes do not move."""
    student_temp: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax after its warm-up; must be below the student's."""
    warmup_teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temp_epochs: int = Field(0, ge=0)
    """Epochs over which the teacher's temperature goes from the one to the other, in equal steps."""
    teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Share of itself that the teacher keeps at the first step; rises to 1 at the end, as a half cosine."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of itself that the centre of the teacher's outputs keeps at every step."""

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> "DINOSettings":
        for key in ("teacher_temp", "warmup_teacher_temp"):
            if getattr(self, key) >= self.student_temp:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is not below student_temp = {self.student_temp}: a teacher that is "
                    f"no sharper than its student teaches it nothing, and the outputs collapse"
                )
        return self


class DINO(Objective):
    """DINO around `backbone`: a `VisionLSTM`, or for comparison timm's `VisionTransformer` or a convolutional network.

    Raises:
        UserError: small crops are not whole patches, the backbone cannot take crops of several sizes, or it has no
            token for the readout.
    """

    networks: Mapping[str, str] = {"student": "backbone.", "teacher": "teacher.backbone."}
    export = "teacher"

    def __init__(self, backbone: nn.Module, settings: DINOSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        prepare_for_crops(backbone, settings, image)
        self.readout, width = choose_readout(backbone, settings.readout)
        self.backbone = backbone
        self.head = self.new_head(width)
        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        self.center = Center(settings.out_dim, settings.center_momentum)

    def new_head(self, width: int) -> ProjectionHead:
        """A head for vectors of that width, as the settings have it."""
        return ProjectionHead(
            width,
            self.settings.out_dim,
            hidden_dim=self.settings.hidden_dim,
            bottleneck_dim=self.settings.bottleneck_dim,
            norm_last_layer=self.settings.norm_last_layer,
        )

    def views(self) -> list[View]:
        return multi_crop(self.settings, self.image)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        temperature = self.teacher_temp(progress)
        student = self.logits(self.backbone, self.head, batch.views).float()  # (V, B, K)
        with torch.no_grad(), self._teachers_precision(student.device):
            teacher = self.logits(self.teacher.backbone, self.teacher.head, batch.views[:2]).float()  # (2, B, K)
        targets = self.center.softmax(teacher, temperature)
        answers = F.log_softmax(student / self.settings.student_temp, dim=-1)
        loss = cross_entropy_of_pairs(answers, targets)
        if self.training:  # a mere look at some images must leave no trace
            self.center.add(teacher)
        return StepOutput(loss, health(loss, answers, targets) | self.rates(progress, loss))

    def logits(self, backbone: nn.Module, head: nn.Module, crops: Sequence[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W), to their logits (V, B, K)."""
        return head(torch.cat(read_crops(backbone, crops, self.readout))).unflatten(0, (len(crops), -1))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        self.center.update()
        self.teacher.follow(self, self.teacher_momentum(progress))

    def discard_step(self) -> None:
        self.center.discard()

    # Schedules, as published: temperature by whole epochs, momentum by steps.

    def teacher_temp(self, progress: Progress) -> float:
        """Temperature of the teacher in the epoch of this step."""
        first, last = self.settings.warmup_teacher_temp, self.settings.teacher_temp
        epoch, epochs = int(progress.epoch), self.settings.warmup_teacher_temp_epochs
        return first + (last - first) * epoch / max(1, epochs - 1) if epoch < epochs else last

    def teacher_momentum(self, progress: Progress) -> float:
        """Share of itself that the teacher keeps after this step."""
        return cosine(progress.step, progress.total_steps, self.settings.teacher_momentum, 1.0)

    def rates(self, progress: Progress, like: Tensor) -> dict[str, Tensor]:
        """What the schedules say at this step, for the logs, as scalars like `like`."""
        values = {"teacher_temp": self.teacher_temp(progress), "teacher_momentum": self.teacher_momentum(progress)}
        return {name: like.new_full((), value) for name, value in values.items()}

    def tags(self) -> dict[str, str]:
        return {"head.last_layer": "last_layer", "head.last_layer_length": "last_layer"}

    def lr_scales(self, progress: Progress) -> dict[str, float]:
        # By learning rate, not by leaving gradients out as published: these a sharded optimizer still has.
        return {"last_layer": 0.0 if progress.epoch < self.settings.freeze_last_layer_epochs else 1.0}

    def _teachers_precision(self, device: torch.device) -> torch.autocast:
        """bf16 arithmetic wherever the student has it: by autocast, or by weights that are bf16 themselves."""
        weights_are_bf16 = next(self.backbone.parameters()).dtype == torch.bfloat16
        enabled = weights_are_bf16 or torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        return sheet_of_crops(batch.views, self.image)


# --- teacher and centre ----------------------------------------------------------------------------------------------


class StaysFloat32(nn.Module):
    """A module that may be moved, but not cast: bf16 would round the small steps of a running mean away."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        # What .to(), .bfloat16() and the like do to each tensor; DeepSpeed's bf16 mode does it to a whole objective.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class Teacher(StaysFloat32):
    """Copies of some of a student's networks that are never trained: a running mean of the student's parameters.

    They keep the names that they have in the student, and stay in evaluation mode, so that they neither drop paths nor
    depend on who shares their batch.
    """

    backbone: nn.Module
    head: nn.Module

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, copy.deepcopy(network))
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, in float32; buffers are copied."""
        students = [student.get_parameter(name).float() for name, _ in self.named_parameters()]
        torch._foreach_lerp_(list(self.parameters()), students, 1 - momentum)
        for name, mine in self.named_buffers():
            mine.copy_(student.get_buffer(name))


class Center(StaysFloat32):
    """Running mean of the teacher's logits, over whole global batches.

    Every row of logits of every micro-batch and process weighs the same in a step's mean, so the centre does not depend
    on how a batch is split.
    """

    value: Tensor

    def __init__(self, out_dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(out_dim))
        self.discard()

    def discard(self) -> None:
        """Drop what was added since the last update."""
        # No buffer: it is 0 between steps, and DDP, which overwrites buffers by those of rank 0, must not touch it.
        self._sum: Tensor | None = None
        self._count = 0

    def softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """Answers (..., K) of a teacher whose logits (..., K) are centred and sharpened."""
        return F.softmax((logits - self.value) / temperature, dim=-1)

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """Take note of a micro-batch's teacher logits (..., K); there may be none in it."""
        total = logits.float().flatten(0, -2).sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += logits.shape[:-1].numel()

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre towards the mean of all that was added since the last update, on all processes."""
        if self._sum is None:
            return
        total = torch.cat([self._sum, self._sum.new_tensor([self._count])])  # counts may differ between processes
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        mean, seen = total[:-1] / total[-1].clamp_min(1), total[-1] > 0
        self.value.lerp_(mean, (1 - self.momentum) * seen)
        self.discard()


def cross_entropy_of_pairs(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's and a different student's crop (paper, equation 3); a scalar.

    answers: the student's log-probabilities (V, B, K). targets: the teacher's probabilities (2, B, K), for the first
    two crops.
    """
    # Cross-entropy is linear in its target, so a small crop meets both large ones at once.
    wanted = [targets[1], targets[0]] + [targets[0] + targets[1]] * (len(answers) - 2)
    crops = torch.stack([-(p * log_q).sum(dim=-1).mean() for p, log_q in zip(wanted, answers)])
    return crops.sum() / (2 * len(answers) - 2)


@torch.no_grad()
def health(loss: Tensor, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Signs of collapse, each as a share of ln K, the entropy of a uniform answer.

    `teacher_entropy` near 1: no answer for any image. `teacher_spread`, the entropy of the mean answer of
    a micro-batch, near 0: the same answer for all; `teacher_entropy` near 0 alone says only that answers are sharp.
    `kl`, what remains of the loss when the teacher's own entropy is taken off, is what the student can still learn.
    """
    uniform = math.log(targets.shape[-1])
    teacher = torch.special.entr(targets).sum(dim=-1).mean()
    return {
        "teacher_entropy": teacher / uniform,
        "teacher_spread": torch.special.entr(targets.mean(dim=(0, 1))).sum() / uniform,
        "student_entropy": torch.special.entr(answers[:2].exp()).sum(dim=-1).mean() / uniform,
        "kl": (loss.detach() - teacher) / uniform,
    }
