"""DINOv2: iBOT with balanced targets and the KoLeo regulariser; and DINOv3's Gram anchoring.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023): separate heads for images and
patches, Sinkhorn-Knopp instead of the centre, and KoLeo, which spreads the features of a batch. Siméoni et al.,
"DINOv3" (2025), section 4: in long runs the similarities between patches degrade while the features of images still
improve; Gram anchoring keeps these similarities close to those of an earlier network, the anchor, and leaves the
features free.

Shapes: B images, N patches, C channels, D width of the readout.
"""

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.crops import Scale
from selfvil.objectives.distributed import gather_rows
from selfvil.objectives.ibot import IBOT, IBOTSettings
from selfvil.objectives.teacher import FrozenNetwork, teacher_autocast
from selfvil.settings import PathText
from selfvil.weights import load_pretrained


class DINOv2Settings(IBOTSettings):
    """Settings of DINOv2; the defaults are those of the published code for large models. An epoch is a pass over the
    training images."""

    name: Literal["dinov2"] = "dinov2"  # type: ignore[assignment]  # the name tells an objective's settings apart
    out_dim: int = Field(65536, ge=2)
    """Number of prototypes K, the width of the heads' outputs. Small data sets need fewer."""
    norm_last_layer: bool = False
    """Keep all prototypes at length 1; false learns their lengths."""
    teacher_momentum: float = Field(0.992, ge=0, le=1)
    """Momentum of the teacher's running mean at the first step."""
    global_crop_scale: Scale = (0.32, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.32)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(8, ge=0, le=64)
    """Number of small crops of each image."""
    shared_head: bool | None = False
    """Use one head for images and patches (true), or one for each (false). null shares it if the readout is as wide as
    a patch token, as with cls or mean; bilateral_concat is twice as wide."""
    centring: Literal["softmax", "sinkhorn"] = "sinkhorn"
    """How the targets avoid collapse: softmax subtracts a running mean from the teacher's logits; sinkhorn balances the
    targets of a micro-batch of all processes over the prototypes (Sinkhorn-Knopp) and ignores center_momentum."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of KoLeo, which moves each image of a micro-batch of all processes away from its nearest neighbour."""
    gram_weight: float = Field(0.0, ge=0)
    """Weight of Gram anchoring; 0 disables it."""
    gram_from: PathText | None = None
    """The anchor: an export, a run or a checkpoint with the same grid of patches, of any width. It is read again when
    the run resumes, so keep it until the run ends. null: the run's own teacher at gram_start."""
    gram_start: float = Field(0.0, ge=0, lt=1)
    """Share of the budget after which Gram anchoring begins."""
    gram_refreshes: int = Field(0, ge=0)
    """How many times the run's teacher replaces the anchor, at equal intervals from gram_start to the end (DINOv3: 3
    times, every 10,000 steps); 0 keeps the same anchor."""

    @model_validator(mode="after")
    def _anchor_is_trained(self) -> "DINOv2Settings":
        if self.gram_weight and self.gram_from is None and not self.gram_start:
            raise ValueError(
                f"gram_weight = {self.gram_weight} without a trained anchor: set gram_from to a finished run, "
                "or gram_start to the share of the budget after which the teacher is good enough"
            )
        if self.gram_refreshes and not self.gram_weight:
            raise ValueError(f"gram_refreshes = {self.gram_refreshes} without an anchor: set gram_weight, such as to 1")
        return self


class DINOv2(IBOT):
    """DINOv2 around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: as `IBOT`; or gram_from is not a trained network, or has another grid or normalisation; or it has
            another architecture and gram_refreshes is not 0.
    """

    settings: DINOv2Settings
    not_restored = ("gram.",)

    def __init__(self, backbone: nn.Module, settings: DINOv2Settings, image: ImageSpec) -> None:
        super().__init__(backbone, settings, image)
        self.koleo = KoLeoLoss()
        if settings.gram_weight:
            anchor = copy.deepcopy(backbone) if settings.gram_from is None else self._load_anchor(settings.gram_from)
            self.gram = FrozenNetwork(backbone=anchor)

    def _load_anchor(self, source: str) -> nn.Module:
        try:
            found = load_pretrained(source, num_classes=0)
        except UserError as error:
            raise UserError(f"objective.gram_from: {error}") from None
        anchor = adapt(found.backbone)
        anchor.enable_dynamic_img_size()
        grid = anchor.token_grid(self.image.size)
        if grid != self.grid:
            raise UserError(
                f"objective.gram_from = {source} has {grid[0]}x{grid[1]} patches and the recipe's model has "
                f"{self.grid[0]}x{self.grid[1]}: take a run with the same model.patch_size"
            )
        shapes = [{name: x.shape for name, x in net.state_dict().items()} for net in (found.backbone, self.backbone)]
        if self.settings.gram_refreshes and shapes[0] != shapes[1]:
            raise UserError(
                f"objective.gram_refreshes = {self.settings.gram_refreshes} replaces gram_from = {source} by the run's "
                "teacher, but it is of another architecture than the recipe's model: set gram_refreshes to 0, or take "
                "a run of the same model"
            )
        theirs, ours = found.normalisation, (tuple(self.image.mean), tuple(self.image.std))
        if (theirs.mean, theirs.std) != ours:
            raise UserError(
                f"objective.gram_from = {source} was trained on images of mean {list(theirs.mean)} and deviation "
                f"{list(theirs.std)}: set data.mean and data.std to these, or take another run"
            )
        return found.backbone

    def check_batch(self, images: int) -> None:
        super().check_batch(images)
        if self.settings.koleo_weight and images < 2:
            raise UserError(
                f"objective.koleo_weight = {self.settings.koleo_weight} moves each image away from its neighbour in a "
                "micro-batch, and one of a single image has none: raise optim.batch_size, lower optim.accumulate, or "
                "set koleo_weight to 0"
            )

    def extra_losses(
        self, vectors: Tensor, patches: Tensor, large: Tensor, progress: Progress
    ) -> dict[str, tuple[float, Tensor]]:
        losses = {}
        if self.settings.koleo_weight:
            # The two crops of an image should be close, so neighbours are searched among first, or second, crops only.
            with torch.autocast(large.device.type, enabled=False):  # bf16 is too coarse to find the nearest neighbour
                values = [self.koleo(gather_rows(crop.float())) for crop in vectors.chunk(2)]
            losses["koleo"] = (self.settings.koleo_weight, values[0] + values[1])
        if self.settings.gram_weight and progress.step >= self._gram_step(progress):
            anchor = adapt(self.gram.backbone)
            with torch.no_grad(), teacher_autocast(self.backbone, large.device):
                features = anchor.forward_features(large)
            losses["gram"] = (self.settings.gram_weight, gram_distance(patches, anchor.split_tokens(features)[1]))
        return losses

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        if self.settings.gram_weight and progress.step + 1 in self._refresh_steps(progress):
            self.gram.copy_from(self.teacher)

    def _gram_step(self, progress: Progress) -> int:
        """The first step with Gram anchoring."""
        return math.ceil(self.settings.gram_start * progress.total_steps)

    def _refresh_steps(self, progress: Progress) -> set[int]:
        """Steps before which the run's teacher is copied to the anchor."""
        first, parts = self._gram_step(progress), self.settings.gram_refreshes + 1
        again = {first + (progress.total_steps - first) * part // parts for part in range(1, parts)}
        return again | ({first} if self.settings.gram_from is None else set())


def gram_distance(patches: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosines between any two patches of an image (DINOv3, equation 2); a scalar.

    The paper has the squared Frobenius norm; the mean over images and over pairs of patches is that of its code, and
    makes the weight independent of the grid.

    Args:
        patches: the student's tokens (B, N, C).
        anchor: the anchor's tokens of the same crops, (B, N, any C).
    """
    with torch.autocast(patches.device.type, enabled=False):  # a difference of nearly equal products
        student, other = (F.normalize(x.float(), dim=-1) for x in (patches, anchor))
        return F.mse_loss(student @ student.mT, other @ other.mT)
