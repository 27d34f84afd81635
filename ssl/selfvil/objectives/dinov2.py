"""DINOv2: iBOT with balanced answers and images that keep their distance; and DINOv3's Gram anchoring.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023): heads of their own for images and
patches, Sinkhorn-Knopp in the place of the centre, and KoLeo, which spreads the images of a batch out. Siméoni et al.,
"DINOv3" (2025), section 4: in long runs patches lose what makes them alike or different, while images still gain; Gram
anchoring holds their similarities to those of an earlier, better network, and leaves the features free.

Shapes: B images, N patches, C channels, D width of the readout.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.heads import split_tokens, take_any_size
from selfvil.models.masking import token_grid
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.crops import Scale
from selfvil.objectives.dino import Teacher
from selfvil.objectives.ibot import IBOT, IBOTSettings
from selfvil.objectives.processes import join
from selfvil.settings import PathText
from selfvil.weights import load_pretrained


class DINOv2Settings(IBOTSettings):
    """Settings of DINOv2; the defaults are those of the published code, with the heads and balance of its large
    models. An epoch is a pass over the training images."""

    name: Literal["dinov2"] = "dinov2"  # type: ignore[assignment]  # the name tells an objective's settings apart
    out_dim: int = Field(65536, ge=2)
    """Prototypes K: width of the heads' outputs. Small sets of images need fewer."""
    norm_last_layer: bool = False
    """Keep all prototypes at length 1; false learns their lengths."""
    teacher_momentum: float = Field(0.992, ge=0, le=1)
    """Share of itself that the teacher keeps at the first step; rises to 1 at the end, as a half cosine."""
    global_crop_scale: Scale = (0.32, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.32)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(8, ge=0, le=64)
    """Small crops of each image."""
    shared_head: bool | None = False
    """One head for images and patches, or one for each. null shares it where the readout is as wide as a patch, as with
    cls or mean; bilateral_concat is twice as wide."""
    centring: Literal["softmax", "sinkhorn"] = "sinkhorn"
    """What keeps the teacher's answers apart: a running centre taken off, or Sinkhorn-Knopp, which balances the answers
    of a micro-batch of all processes among the prototypes and has no use for center_momentum."""
    koleo_weight: float = Field(0.1, ge=0)
    """Weight of KoLeo, by which every image of a micro-batch of all processes moves away from the one nearest to it."""
    gram_weight: float = Field(0.0, ge=0)
    """Weight of Gram anchoring; 0 leaves it out."""
    gram_from: PathText | None = None
    """Network whose similarities of patches are held on to: an export, a run or a checkpoint whose patches lie on the
    same grid, of any width, which must stay where it is until the run ends; null takes the run's own teacher as it is
    at gram_start."""
    gram_start: float = Field(0.0, ge=0, lt=1)
    """Share of the budget after which they are held on to."""
    gram_refreshes: int = Field(0, ge=0)
    """Times that the run's teacher takes the anchor's place, spread evenly from gram_start to the end (DINOv3: 3 times,
    after every 10,000 steps); 0 holds on to the same network throughout."""

    @model_validator(mode="after")
    def _something_to_hold_on_to(self) -> "DINOv2Settings":
        if self.gram_weight and self.gram_from is None and not self.gram_start:
            raise ValueError(
                f"gram_weight = {self.gram_weight} has nothing trained to hold on to: set gram_from to a finished run, "
                "or gram_start to the share of the budget after which the teacher is good enough"
            )
        if self.gram_refreshes and not self.gram_weight:
            raise ValueError(f"gram_refreshes = {self.gram_refreshes} without an anchor: set gram_weight, such as to 1")
        return self


class DINOv2(IBOT):
    """DINOv2 around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: as `IBOT`; or gram_from is no trained network, or of another grid or normalisation; or it is to be
            refreshed and of another architecture.
    """

    settings: DINOv2Settings
    brings = ("gram.",)

    def __init__(self, backbone: nn.Module, settings: DINOv2Settings, image: ImageSpec) -> None:
        super().__init__(backbone, settings, image)
        self.koleo = KoLeoLoss()
        if settings.gram_weight:
            anchor = backbone if settings.gram_from is None else self._finished(settings.gram_from)
            self.gram = Teacher(backbone=anchor)  # one that follows nobody

    def _finished(self, source: str) -> nn.Module:
        try:
            found = load_pretrained(source)
        except UserError as error:
            raise UserError(f"objective.gram_from: {error}") from None
        take_any_size(found.backbone)
        grid = token_grid(found.backbone, self.image.size)
        if grid != self.grid:
            raise UserError(
                f"objective.gram_from = {source} sees {grid[0]}x{grid[1]} patches where the recipe's model sees "
                f"{self.grid[0]}x{self.grid[1]}: take a run with the same model.patch_size"
            )
        shapes = [{name: x.shape for name, x in net.state_dict().items()} for net in (found.backbone, self.backbone)]
        if self.settings.gram_refreshes and shapes[0] != shapes[1]:
            raise UserError(
                f"objective.gram_refreshes = {self.settings.gram_refreshes} puts the run's teacher in the place of "
                f"gram_from = {source}, which is of another architecture than the recipe's model: set it to 0, or take "
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

    def more_losses(
        self, vectors: Tensor, patches: Tensor, large: Tensor, progress: Progress
    ) -> dict[str, tuple[float, Tensor]]:
        losses = {}
        if self.settings.koleo_weight:
            # The two crops of an image are meant to be near each other, so each has neighbours among its likes alone.
            with torch.autocast(large.device.type, enabled=False):  # which of two is nearer is lost in bf16
                values = [self.koleo(join(crop.float())) for crop in vectors.chunk(2)]
            losses["koleo"] = (self.settings.koleo_weight, values[0] + values[1])
        if self.settings.gram_weight and progress.step >= self._gram_step(progress):
            with torch.no_grad(), self._teachers_precision(large.device):
                anchor = self.gram.backbone.forward_features(large)  # type: ignore[operator]
            anchor = split_tokens(self.gram.backbone, anchor)[1]
            losses["gram"] = (self.settings.gram_weight, gram_distance(patches, anchor))
        return losses

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        if self.settings.gram_weight and progress.step + 1 in self._refresh_steps(progress):
            self.gram.follow(self.teacher, momentum=0.0)

    def _gram_step(self, progress: Progress) -> int:
        """The first step at which patches are held on to the anchor."""
        return math.ceil(self.settings.gram_start * progress.total_steps)

    def _refresh_steps(self, progress: Progress) -> set[int]:
        """Steps before which the anchor becomes the run's teacher as it is then."""
        first, parts = self._gram_step(progress), self.settings.gram_refreshes + 1
        again = {first + (progress.total_steps - first) * part // parts for part in range(1, parts)}
        return again | ({first} if self.settings.gram_from is None else set())


def gram_distance(patches: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosines between any two patches of an image (DINOv3, equation 2); a scalar.

    The paper has the squared Frobenius norm; the mean over images and over pairs of patches is that of its code, and
    keeps a weight's meaning on any grid.

    Args:
        patches: the student's, (B, N, C). anchor: the other network's of the same crops, (B, N, any C).
    """
    with torch.autocast(patches.device.type, enabled=False):  # a difference of products that are nearly the same
        ours, theirs = (F.normalize(x.float(), dim=-1) for x in (patches, anchor))
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)
