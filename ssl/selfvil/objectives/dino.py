"""DINO: self-distillation with no labels.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021). The student gets two large and some
small crops of an image; its teacher, a running mean of the student, gets the large ones. For every pair of different
crops the student predicts the teacher's distribution over prototypes. The teacher's distribution is sharpened by a low
temperature, which alone would collapse to the same prototype for all images, and centred, which alone would collapse to
the uniform distribution.

Shapes: B images, V crops of each (the first two are large), K prototypes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfvil.models.adapter import adapt
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import CropSettings, Readout, crop_features, crops_picture, multi_crop, prepare_for_crops
from selfvil.objectives.heads import ProjectionHead
from selfvil.objectives.teacher import Center, Teacher, TeacherSettings, teacher_autocast


class DINOSettings(CropSettings, TeacherSettings):
    """Settings of DINO; the defaults are those of the published code. An epoch is a pass over the training images."""

    name: Literal["dino"] = "dino"
    readout: Readout = None
    """Input of the head: the first and last patch concatenated, the mean of all patches, the first or the last patch,
    the class token, or all registers concatenated. null: for ViL bilateral_concat, or registers or cls if
    model.global_pool selects them; for ViT cls."""
    out_dim: int = Field(65536, ge=2)
    """Number of prototypes K, the width of the head's output. Small data sets need fewer."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the head's hidden layers."""
    bottleneck_dim: int = Field(256, ge=1)
    """Width of the head's last hidden layer, whose output is compared with the prototypes."""
    norm_last_layer: bool = True
    """Keep all prototypes at length 1; false learns their lengths, which is less stable."""
    freeze_last_layer_epochs: float = Field(1, ge=0)
    """Epochs at the start of training during which the prototypes are frozen."""
    student_temp: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax after its warm-up; must be below student_temp."""
    warmup_teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temp_epochs: int = Field(0, ge=0)
    """Epochs over which the teacher's temperature changes from warmup_teacher_temp to teacher_temp, linearly."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the running mean of the teacher's logits that is subtracted from them."""

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> "DINOSettings":
        for key in ("teacher_temp", "warmup_teacher_temp"):
            if getattr(self, key) >= self.student_temp:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is not below student_temp = {self.student_temp}: unless the "
                    f"teacher's outputs are sharper than the student's, they collapse to the uniform distribution"
                )
        return self


class DINO(Objective):
    """DINO around `backbone`: a `VisionLSTM`, or for comparison timm's `VisionTransformer` or a convolutional network.

    Raises:
        UserError: small crops are not whole patches, the backbone cannot take crops of several sizes, or it lacks the
            token of the readout.
    """

    networks: Mapping[str, str] = {"student": "backbone.", "teacher": "teacher.backbone."}
    export = "teacher"

    def __init__(self, backbone: nn.Module, settings: DINOSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        prepare_for_crops(backbone, settings, image)
        self.readout = adapt(backbone).resolve_readout(settings.readout)
        self.backbone = backbone
        self.head = self.new_head(adapt(backbone).readout_dim(self.readout))
        self.teacher = Teacher(backbone=self.backbone, head=self.head)
        self.center = Center(settings.out_dim, settings.center_momentum)

    def new_head(self, width: int) -> ProjectionHead:
        """A head with the settings' sizes for vectors of that width."""
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
        with torch.no_grad(), teacher_autocast(self.backbone, student.device):
            teacher = self.logits(self.teacher.backbone, self.teacher.head, batch.views[:2]).float()  # (2, B, K)
        targets = self.center.softmax(teacher, temperature)
        log_probs = F.log_softmax(student / self.settings.student_temp, dim=-1)
        loss = cross_entropy_of_pairs(log_probs, targets)
        if self.training:  # evaluation must not update the centre
            self.center.add(teacher)
        return StepOutput(loss, collapse_metrics(loss, log_probs, targets) | self.scheduled_values(progress, loss))

    def logits(self, backbone: nn.Module, head: nn.Module, crops: Sequence[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W), to their logits (V, B, K)."""
        return head(torch.cat(crop_features(backbone, crops, self.readout))).unflatten(0, (len(crops), -1))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        self.center.update()
        self.teacher.follow(self, self.settings.momentum_at(progress))

    def discard_step(self) -> None:
        self.center.discard()

    # Schedules, as published: the temperature changes once an epoch, the momentum at every step.

    def teacher_temp(self, progress: Progress) -> float:
        """Temperature of the teacher in the epoch of this step."""
        first, last = self.settings.warmup_teacher_temp, self.settings.teacher_temp
        epoch, epochs = int(progress.epoch), self.settings.warmup_teacher_temp_epochs
        return first + (last - first) * epoch / max(1, epochs - 1) if epoch < epochs else last

    def schedules(self, progress: Progress) -> dict[str, float]:
        return {"teacher_temp": self.teacher_temp(progress), "teacher_momentum": self.settings.momentum_at(progress)}

    def scheduled_values(self, progress: Progress, like: Tensor) -> dict[str, Tensor]:
        """`schedules` at this step, for the logs: scalars of the dtype and device of `like`."""
        return {name: like.new_full((), value) for name, value in self.schedules(progress).items()}

    def tags(self) -> dict[str, str]:
        return {"head.last_layer": "last_layer", "head.last_layer_length": "last_layer"}

    def lr_scales(self, progress: Progress) -> dict[str, float]:
        # By the learning rate; the published code drops gradients, which a sharded optimizer does not allow.
        return {"last_layer": 0.0 if progress.epoch < self.settings.freeze_last_layer_epochs else 1.0}

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        return crops_picture(batch.views, self.image)


def cross_entropy_of_pairs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's crop and another crop of the student (paper, equation 3).

    log_probs: the student's log-probabilities (V, B, K). targets: the teacher's probabilities (2, B, K), for the first
    two crops. Returns a scalar.
    """
    # Cross-entropy is linear in its target, so the targets of a small crop are summed first.
    summed = [targets[1], targets[0]] + [targets[0] + targets[1]] * (len(log_probs) - 2)
    crops = torch.stack([-(p * log_q).sum(dim=-1).mean() for p, log_q in zip(summed, log_probs)])
    return crops.sum() / (2 * len(log_probs) - 2)


@torch.no_grad()
def collapse_metrics(loss: Tensor, log_probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Signs of collapse, each as a share of ln K, the entropy of the uniform distribution.

    `teacher_entropy`, the mean entropy of the targets, near 1: targets are uniform for every image. `teacher_spread`,
    the entropy of the mean target of a micro-batch, near 0: targets are the same for all images. `teacher_entropy` near
    0 alone only means that targets are sharp. `kl`, the loss minus the entropy of the targets, is what the student can
    still learn.
    """
    uniform = math.log(targets.shape[-1])
    teacher = torch.special.entr(targets).sum(dim=-1).mean()
    return {
        "teacher_entropy": teacher / uniform,
        "teacher_spread": torch.special.entr(targets.mean(dim=(0, 1))).sum() / uniform,
        "student_entropy": torch.special.entr(log_probs[:2].exp()).sum(dim=-1).mean() / uniform,
        "kl": (loss.detach() - teacher) / uniform,
    }
