"""iBOT: self-distillation of the whole image and of its masked patches.

Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer" (2022). DINO, and more: some patches of some of the
large crops that the student sees are masked, and it learns to say of each what its teacher, who sees them, says. So
the teacher is the tokenizer of a masked image model, and learns along with it.

Shapes: B images, V crops of each (the first two are large), N = H·W patches of a large crop, M masked patches of a
micro-batch, C channels, K prototypes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.heads import READOUTS, split_tokens
from selfvil.models.masking import masked_features, sample_mask, token_grid
from selfvil.objectives import sinkhorn
from selfvil.objectives.base import Batch, ImageSpec, Progress, StepOutput, keyed_noise
from selfvil.objectives.crops import Scale, read_crops, sheet_of_crops
from selfvil.objectives.dino import DINO, Center, DINOSettings, Teacher, cross_entropy_of_pairs, health


class IBOTSettings(DINOSettings):
    """Settings of iBOT; the defaults are the paper's for ViT-S. An epoch is a pass over the training images."""

    name: Literal["ibot"] = "ibot"  # type: ignore[assignment]  # the name tells an objective's settings apart
    out_dim: int = Field(8192, ge=2)
    """Prototypes K: width of the heads' outputs. Small sets of images need fewer."""
    teacher_temp: float = Field(0.07, gt=0)
    """Temperature of the teacher's softmax after its warm-up, for images and patches; must be below the student's."""
    warmup_teacher_temp_epochs: int = Field(30, ge=0)
    """Epochs over which the teacher's temperature goes from the one to the other, in equal steps."""
    global_crop_scale: Scale = (0.25, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.25)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(10, ge=0, le=64)
    """Small crops of each image."""
    shared_head: bool | None = None
    """One head for images and patches, or one for each. null shares it where the readout is as wide as a patch, as with
    cls or mean; bilateral_concat is twice as wide."""
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    """What keeps the teacher's answers apart: a running centre taken off, or Sinkhorn-Knopp, which balances the answers
    of a micro-batch of all processes among the prototypes and has no use for center_momentum."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the patches' loss beside the images'."""
    mask: Literal["block", "random", "row"] = "block"
    """Masked patches: rectangles laid over one another, single patches, or rows of the grid."""
    mask_share: float = Field(0.5, gt=0, le=1)
    """Probability that patches of a large crop are masked at all."""
    mask_ratios: Scale = (0.1, 0.5)
    """Range of the share of patches that are masked in such a crop."""


class IBOT(DINO):
    """iBOT around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: as `DINO`; or the masks hide no patch or all, or one head cannot serve images and patches.
    """

    settings: IBOTSettings

    def __init__(self, backbone: nn.Module, settings: IBOTSettings, image: ImageSpec) -> None:
        grid = token_grid(backbone, image.size)  # first, since it refuses what has no patches to mask
        super().__init__(backbone, settings, image)
        self.grid = grid
        num_patches = self.grid[0] * self.grid[1]
        most = int(num_patches * settings.mask_ratios[1])
        if not 0 < most < num_patches:
            raise UserError(
                f"objective.mask_ratios = {list(settings.mask_ratios)} hides at most {most} of the {num_patches} "
                f"patches of a {image.size[0]}x{image.size[1]} crop: at least one must be hidden and one left"
            )
        dim, width = int(backbone.embed_dim), self.head.mlp[0].in_features  # type: ignore[arg-type]
        if settings.shared_head and dim != width:
            raise UserError(
                f"objective.shared_head = true, but the readout {self.readout} is {width} wide and a patch {dim}: "
                "choose the readout mean, first or last, or set shared_head to false"
            )
        shared = settings.shared_head is not False and dim == width
        self.patch_head_name = "head" if shared else "patch_head"
        if not shared:
            self.patch_head = self.new_head(dim)
            self.teacher = Teacher(backbone=self.backbone, head=self.head, patch_head=self.patch_head)
        self.patch_center = Center(settings.out_dim, settings.center_momentum)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def check_batch(self, images: int) -> None:
        if self.settings.centring == "sinkhorn" and images < sinkhorn.FEWEST_IMAGES:
            raise UserError(
                f"objective.centring = sinkhorn balances answers over a micro-batch, and one of {images} images on all "
                f"processes is too small: raise optim.batch_size, or lower optim.accumulate, until it has "
                f"{sinkhorn.FEWEST_IMAGES}, or set centring to softmax"
            )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        temperature = self.teacher_temp(progress)
        large, small = torch.cat(batch.views[:2]), batch.views[2:]
        masked = self.mask(batch.positions, progress)  # (2·B, N)
        ids = masked.flatten().nonzero().squeeze(1).to(large.device)

        with torch.no_grad(), self._teachers_precision(large.device):
            vectors, patches = self.read(self.teacher.backbone, self.teacher.backbone.forward_features(large))  # type: ignore[operator]
            logits = self.teacher.head(vectors).float().unflatten(0, (2, -1))  # (2, B, K)
            patch_logits = self._patch_head(self.teacher)(patches.flatten(0, 1)[ids]).float()  # (M, K)
        targets = self.targets(logits, self.center, temperature)
        patch_targets = self.targets(patch_logits, self.patch_center, temperature)

        features = masked_features(self.backbone, large, masked.to(large.device), self.mask_token)
        vectors, patches = self.read(self.backbone, features)
        every = torch.cat([vectors, *read_crops(self.backbone, small, self.readout)])
        answers = self.answers(self.head(every)).unflatten(0, (len(batch.views), -1))  # (V, B, K)
        patch_answers = self.answers(self._patch_head(self)(patches.flatten(0, 1)[ids]))  # (M, K)

        image_loss = cross_entropy_of_pairs(answers, targets)
        patch_loss = cross_entropy_of_patches(patch_answers, patch_targets, masked)
        loss = image_loss + self.settings.patch_weight * patch_loss
        logs = {"image_loss": image_loss.detach(), "patch_loss": patch_loss.detach()}
        for name, (weight, value) in self.more_losses(vectors, patches, large, progress).items():
            loss = loss + weight * value
            logs[name] = value.detach()
        return StepOutput(loss, logs | health(image_loss, answers, targets) | self.rates(progress, loss))

    def mask(self, positions: Tensor, progress: Progress) -> Tensor:
        """Masks (2·B, N) of both large crops, the first of all images first; true where a patch is hidden.

        They are on the CPU, where counting what they hide need not wait for a GPU. Whether a crop is masked, how much
        of it and where depends on the seed and its image's position alone.
        """
        num_patches = self.grid[0] * self.grid[1]
        noise = keyed_noise(progress.seed, positions, 2 * (2 + num_patches))
        whether, how_much, where = torch.cat(noise.chunk(2, dim=1)).split([1, 1, num_patches], dim=1)
        low, high = self.settings.mask_ratios
        hidden = (num_patches * (low + (high - low) * how_much)).long() * (whether < self.settings.mask_share)
        return sample_mask(self.settings.mask, where, self.grid, hidden)

    def read(self, backbone: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features of 2·B large crops to what the head sees of them (2·B, D), and their patches (2·B, N, C)."""
        prefix, patches = split_tokens(backbone, features)
        return READOUTS[self.readout](prefix, patches), patches

    def answers(self, logits: Tensor) -> Tensor:
        """The student's log-probabilities (..., K)."""
        return F.log_softmax(logits.float() / self.settings.student_temp, dim=-1)

    def targets(self, logits: Tensor, center: Center, temperature: float) -> Tensor:
        """The teacher's probabilities (..., K), in the shape of its logits, whose centre takes note of them."""
        if self.settings.centring == "sinkhorn":
            return sinkhorn.sinkhorn_knopp(logits.flatten(0, -2), temperature).view_as(logits)
        if self.training:  # a mere look at some images must leave no trace
            center.add(logits)
        return center.softmax(logits, temperature)

    def more_losses(
        self, vectors: Tensor, patches: Tensor, large: Tensor, progress: Progress
    ) -> dict[str, tuple[float, Tensor]]:
        """What else is minimised: weights and scalars by name.

        Args:
            vectors: what the student's head sees of the large crops (2·B, D). patches: the student's (2·B, N, C).
            large: the crops themselves, without masks.
        """
        return {}

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        self.patch_center.update()
        super().after_step(progress)

    def discard_step(self) -> None:
        self.patch_center.discard()
        super().discard_step()

    def tags(self) -> dict[str, str]:
        theirs = {name.replace("head", self.patch_head_name, 1): tag for name, tag in super().tags().items()}
        return super().tags() | theirs

    def _patch_head(self, owner: nn.Module) -> nn.Module:
        """The student's or the teacher's head for patches."""
        return owner.get_submodule(self.patch_head_name)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """As DINO's, with what is masked of the large crops in the images' mean colour."""
        masked = self.mask(batch.positions, progress).unflatten(1, self.grid).unsqueeze(1).to(batch.views[0])
        masked = F.interpolate(masked, size=batch.views[0].shape[-2:])
        large = torch.cat(batch.views[:2]) * (1 - masked)  # images are normalised: 0 is their mean
        return sheet_of_crops([*large.chunk(2), *batch.views[2:]], self.image)


def cross_entropy_of_patches(answers: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Mean over crops of the mean cross-entropy over a crop's masked patches; 0 for those without (paper, equation 2).

    answers: the student's log-probabilities (M, K), in the order of `masked`. targets: the teacher's probabilities
    (M, K). masked: (crops, N) bool.
    """
    weights = (masked / masked.sum(dim=1, keepdim=True).clamp_min(1))[masked].to(answers)
    return -((answers * targets).sum(dim=-1) * weights).sum() / len(masked)
