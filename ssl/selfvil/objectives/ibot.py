"""iBOT: self-distillation of the whole image and of its masked patches.

Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer" (2022). DINO, with one more loss: some patches of
some large crops are masked for the student, which predicts the teacher's distribution for each of them. The teacher
gets the crops without masks; it is the tokenizer of a masked image model, trained together with it.

Shapes: B images, V crops of each (the first two are large), N = H·W patches of a large crop, M masked patches of a
micro-batch, C channels, K prototypes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import READOUTS, adapt
from selfvil.models.masking import sample_mask
from selfvil.objectives import sinkhorn
from selfvil.objectives.base import Batch, ImageSpec, Progress, StepOutput, keyed_noise
from selfvil.objectives.crops import Scale, crop_features, crops_picture
from selfvil.objectives.dino import DINO, DINOSettings, collapse_metrics, cross_entropy_of_pairs
from selfvil.objectives.teacher import Center, Teacher, teacher_autocast


class IBOTSettings(DINOSettings):
    """Settings of iBOT; the defaults are the paper's for ViT-S. An epoch is a pass over the training images."""

    name: Literal["ibot"] = "ibot"  # type: ignore[assignment]  # the name tells an objective's settings apart
    out_dim: int = Field(8192, ge=2)
    """Number of prototypes K, the width of the heads' outputs. Small data sets need fewer."""
    teacher_temp: float = Field(0.07, gt=0)
    """Temperature of the teacher's softmax after its warm-up, for images and patches; must be below student_temp."""
    warmup_teacher_temp_epochs: int = Field(30, ge=0)
    """Epochs over which the teacher's temperature changes from warmup_teacher_temp to teacher_temp, linearly."""
    global_crop_scale: Scale = (0.25, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.25)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(10, ge=0, le=64)
    """Number of small crops of each image."""
    shared_head: bool | None = None
    """Use one head for images and patches (true), or one for each (false). null shares it if the readout is as wide as
    a patch token, as with cls or mean; bilateral_concat is twice as wide."""
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    """How the targets avoid collapse: softmax subtracts a running mean from the teacher's logits; sinkhorn balances the
    targets of a micro-batch of all processes over the prototypes (Sinkhorn-Knopp) and ignores center_momentum."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the loss of patches; the loss of images has weight 1."""
    mask: Literal["block", "random", "row"] = "block"
    """Shape of masks: overlapping rectangles, single patches, or rows of the grid."""
    mask_share: float = Field(0.5, gt=0, le=1)
    """Probability that a large crop is masked."""
    mask_ratios: Scale = (0.1, 0.5)
    """Range of the share of patches that are masked in a masked crop."""


class IBOT(DINO):
    """iBOT around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: as `DINO`; or the masks hide no patch or all, or one head cannot serve images and patches.
    """

    settings: IBOTSettings

    def __init__(self, backbone: nn.Module, settings: IBOTSettings, image: ImageSpec) -> None:
        grid = adapt(backbone).token_grid(image.size)  # first, since it refuses a backbone without patches
        super().__init__(backbone, settings, image)
        self.grid = grid
        num_patches = self.grid[0] * self.grid[1]
        most = int(num_patches * settings.mask_ratios[1])
        if not 0 < most < num_patches:
            raise UserError(
                f"objective.mask_ratios = {list(settings.mask_ratios)} hides at most {most} of the {num_patches} "
                f"patches of a {image.size[0]}x{image.size[1]} crop: at least one must be hidden and one left"
            )
        dim, width = adapt(backbone).token_dim, adapt(backbone).readout_dim(self.readout)
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
                f"objective.centring = sinkhorn balances targets over a micro-batch, and one of {images} images on all "
                f"processes is too small: raise optim.batch_size, or lower optim.accumulate, until it has "
                f"{sinkhorn.FEWEST_IMAGES}, or set centring to softmax"
            )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        temperature = self.teacher_temp(progress)
        large, small = torch.cat(batch.views[:2]), batch.views[2:]
        masked = self.mask(batch.positions, progress)  # (2·B, N)
        ids = masked.flatten().nonzero().squeeze(1).to(large.device)

        with torch.no_grad(), teacher_autocast(self.backbone, large.device):
            features = adapt(self.teacher.backbone).forward_features(large)
            vectors, patches = self.vectors_and_patches(self.teacher.backbone, features)
            logits = self.teacher.head(vectors).float().unflatten(0, (2, -1))  # (2, B, K)
            patch_logits = self._patch_head(self.teacher)(patches.flatten(0, 1)[ids]).float()  # (M, K)
        targets = self.targets(logits, self.center, temperature)
        patch_targets = self.targets(patch_logits, self.patch_center, temperature)

        features = adapt(self.backbone).masked_features(large, masked.to(large.device), self.mask_token)
        vectors, patches = self.vectors_and_patches(self.backbone, features)
        all_vectors = torch.cat([vectors, *crop_features(self.backbone, small, self.readout)])
        log_probs = self.log_probs(self.head(all_vectors)).unflatten(0, (len(batch.views), -1))  # (V, B, K)
        patch_log_probs = self.log_probs(self._patch_head(self)(patches.flatten(0, 1)[ids]))  # (M, K)

        image_loss = cross_entropy_of_pairs(log_probs, targets)
        patch_loss = cross_entropy_of_patches(patch_log_probs, patch_targets, masked)
        loss = image_loss + self.settings.patch_weight * patch_loss
        logs = {"image_loss": image_loss.detach(), "patch_loss": patch_loss.detach()}
        for name, (weight, value) in self.extra_losses(vectors, patches, large, progress).items():
            loss = loss + weight * value
            logs[name] = value.detach()
        logs |= collapse_metrics(image_loss, log_probs, targets) | self.scheduled_values(progress, loss)
        return StepOutput(loss, logs)

    def mask(self, positions: Tensor, progress: Progress) -> Tensor:
        """Masks (2·B, N) of both large crops, the first crops of all images first; true where a patch is masked.

        They are on the CPU, where counting masked patches needs no synchronisation with a GPU. Whether a crop is
        masked, how much of it and where depends only on the seed and the position of its image.
        """
        num_patches = self.grid[0] * self.grid[1]
        noise = keyed_noise(progress.seed, positions, 2 * (2 + num_patches))
        whether, how_much, where = torch.cat(noise.chunk(2, dim=1)).split([1, 1, num_patches], dim=1)
        low, high = self.settings.mask_ratios
        hidden = (num_patches * (low + (high - low) * how_much)).long() * (whether < self.settings.mask_share)
        return sample_mask(self.settings.mask, where, self.grid, hidden)

    def vectors_and_patches(self, backbone: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """From features of 2·B large crops to the inputs of the head (2·B, D) and the patches (2·B, N, C)."""
        prefix, patches = adapt(backbone).split_tokens(features)
        return READOUTS[self.readout](prefix, patches), patches

    def log_probs(self, logits: Tensor) -> Tensor:
        """The student's log-probabilities (..., K)."""
        return F.log_softmax(logits.float() / self.settings.student_temp, dim=-1)

    def targets(self, logits: Tensor, center: Center, temperature: float) -> Tensor:
        """The teacher's probabilities (..., K) for its logits (..., K), which training adds to the centre."""
        if self.settings.centring == "sinkhorn":
            return sinkhorn.sinkhorn_knopp(logits.flatten(0, -2), temperature).view_as(logits)
        if self.training:  # evaluation must not update the centre
            center.add(logits)
        return center.softmax(logits, temperature)

    def extra_losses(
        self, vectors: Tensor, patches: Tensor, large: Tensor, progress: Progress
    ) -> dict[str, tuple[float, Tensor]]:
        """Further terms of the loss: weights and scalars by name.

        Args:
            vectors: inputs of the student's head for the large crops, (2·B, D).
            patches: the student's patch tokens of the large crops, (2·B, N, C).
            large: the large crops without masks, (2·B, C, H, W).
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
        tags = super().tags()
        return tags | {name.replace("head", self.patch_head_name, 1): tag for name, tag in tags.items()}

    def _patch_head(self, owner: nn.Module) -> nn.Module:
        """The student's or the teacher's head for patches."""
        return owner.get_submodule(self.patch_head_name)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """As DINO's, with masked patches in the mean colour of the images."""
        masked = self.mask(batch.positions, progress).unflatten(1, self.grid).unsqueeze(1).to(batch.views[0])
        masked = F.interpolate(masked, size=batch.views[0].shape[-2:])
        large = torch.cat(batch.views[:2]) * (1 - masked)  # images are normalised: 0 is their mean
        return crops_picture([*large.chunk(2), *batch.views[2:]], self.image)


def cross_entropy_of_patches(log_probs: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Mean over crops of the mean cross-entropy over a crop's masked patches (paper, equation 2); a scalar.

    A crop without masked patches counts as 0.

    log_probs: the student's log-probabilities (M, K), in the order of `masked`. targets: the teacher's probabilities
    (M, K). masked: (crops, N) bool.
    """
    weights = (masked / masked.sum(dim=1, keepdim=True).clamp_min(1))[masked].to(log_probs)
    return -((log_probs * targets).sum(dim=-1) * weights).sum() / len(masked)
