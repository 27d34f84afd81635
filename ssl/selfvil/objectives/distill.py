"""Distillation: a backbone learns to predict the features of a trained one, for the image and for every patch.

The smooth absolute error of features normalised by a LayerNorm without weights is from Wei et al., "Contrastive
Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation" (2022); the cosine, and features of image
and patches together, are from Ranzinger et al., "AM-RADIO" (2024). Student and teacher get the same crop, as Beyer et
al., "Knowledge distillation: A good teacher is patient and consistent" (2022) recommend.

The teacher is not part of the objective's state: it never changes and has its own files, and it would make up most of a
checkpoint.

With `mask_ratio`, the student gets some of its patches as mask tokens and predicts the teacher's features of these, as
in Fang et al., "EVA" (2022); the teacher always gets the whole image.

Shapes: B images, N = H·W patches on the student's grid, C channels of the teacher.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.adapter import READOUTS, BackboneAdapter, adapt
from selfvil.models.masking import sample_mask
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.objectives.colours import feature_picture
from selfvil.objectives.crops import Readout, Scale, require_size
from selfvil.objectives.teacher import FrozenNetwork
from selfvil.settings import PathText, Section, Size
from selfvil.weights import Network, load_export, load_timm_file


class DistillSettings(Section):
    """Settings of distillation."""

    name: Literal["distill"] = "distill"
    teacher: PathText
    """Folder that `selfvil export` wrote, or the name of a timm model, such as vit_small_patch14_dinov2.lvd142m."""
    teacher_weights: PathText | None = None
    """With the name of a timm model: its weights, a safetensors file on this machine."""
    teacher_img_size: Size | None = None
    """Height and width to which images are resized for the teacher, in pixels; null: the same as for the student."""
    teacher_readout: Literal["bilateral_concat", "mean", "cls"] | None = None
    """Readout of the teacher's features of the image; null: cls if it has a class token, for ViL bilateral_concat."""
    readout: Readout = None
    """Readout of the student's features of the image; null: bilateral_concat for ViL and cls for ViT."""
    readout_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the image's features; 0 disables it."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the patches' features; 0 disables it."""
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """cosine: 1 minus the cosine; smooth_l1: smooth absolute error (beta 2) of targets normalised over channels."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the student's patches that are replaced by a mask token. Then the loss of patches is that of the masked
    ones; the loss of the image's features is the same. 0: no masks, and the loss of all patches."""
    mask: Literal["block", "random", "row"] = "block"
    """Shape of masks: overlapping rectangles, single patches, or rows of the grid."""
    crop_scale: Scale = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false if a mirror image has another meaning, as with digits."""

    @model_validator(mode="after")
    def _one_weight_is_positive(self) -> "DistillSettings":
        if not self.readout_weight and not self.patch_weight:
            raise ValueError("readout_weight and patch_weight are both 0, which leaves nothing to learn: raise one")
        if self.mask_ratio and not self.patch_weight:
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} masks patches, and patch_weight = 0 does not predict them: raise "
                "patch_weight, or set mask_ratio to 0"
            )
        return self


class Distill(Objective):
    """Distillation into `backbone`: a `VisionLSTM`, timm's `VisionTransformer`, or another with tokens or a map.

    Raises:
        UserError: there is no such teacher, its weights do not fit it, it cannot take the images, or one of the two
            networks lacks the tokens of the loss.
    """

    reads_weights = True

    def __init__(self, backbone: nn.Module, settings: DistillSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        require_size(backbone, image, image.size, "model.img_size")
        teacher = FrozenTeacher(settings, image)
        self._unregistered = (teacher,)  # in a tuple, so that torch does not register it as a part
        blank = torch.zeros(1, image.in_chans, *image.size)
        targets = teacher(blank)
        adapter = adapt(backbone)
        self.readout = adapter.resolve_readout(settings.readout)
        if settings.readout_weight:
            self.readout_head = nn.Linear(adapter.readout_dim(self.readout), targets[0].shape[-1])
        if settings.patch_weight:
            if targets[1] is None:
                raise UserError(
                    f"objective.patch_weight = {settings.patch_weight} needs a teacher with a grid of patches, which "
                    f"objective.teacher = {settings.teacher} does not have: set it to 0, or take another teacher"
                )
            with torch.no_grad():
                features = adapter.forward_features(blank)
            if adapter.patch_grid(features, blank) is None:
                raise UserError(
                    f"objective.patch_weight = {settings.patch_weight} needs a student with a grid of patches, which "
                    f"{adapter.name} does not have: set it to 0"
                )
            patches = adapter.split_tokens(features)[1]
            self.patch_head = nn.Linear(patches.shape[-1], targets[1].shape[1])
        if settings.mask_ratio:
            self._prepare_masks(adapter)

    def _prepare_masks(self, adapter: BackboneAdapter) -> None:
        self.grid = adapter.token_grid(self.image.size)  # refuses a backbone without patches
        num_patches = self.grid[0] * self.grid[1]
        self.num_hidden = round(num_patches * self.settings.mask_ratio)
        if not 0 < self.num_hidden < num_patches:
            raise UserError(
                f"objective.mask_ratio = {self.settings.mask_ratio} masks {self.num_hidden} of the {num_patches} "
                f"patches of the student: at least one must be masked and one left, or set mask_ratio to 0"
            )
        self.mask_token = nn.Parameter(torch.zeros(adapter.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def teacher(self) -> "FrozenTeacher":
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        self.teacher._apply(fn, recurse)  # it moves to the device of the student
        return super()._apply(fn, recurse)

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images, settings, adapter = batch.views[0], self.settings, adapt(self.backbone)
        target, target_map = self.teacher(images)
        masked = self.mask(batch.positions, progress, images.device) if settings.mask_ratio else None
        if masked is None:
            features = adapter.forward_features(images)
        else:
            features = adapter.masked_features(images, masked, self.mask_token)
        prefix, patches = adapter.split_tokens(features)
        losses: dict[str, Tensor] = {}
        if settings.readout_weight:
            predicted = self.readout_head(READOUTS[self.readout](prefix, patches))
            losses["readout_loss"] = settings.readout_weight * feature_loss(predicted, target, settings.loss)
        if settings.patch_weight and target_map is not None:
            grid = adapter.patch_grid(features, images)
            assert grid is not None  # checked in the constructor
            predicted, target_patches = self.patch_head(patches), resample_to_grid(target_map, grid)
            if masked is not None:
                predicted, target_patches = predicted[masked], target_patches[masked]
            losses["patch_loss"] = settings.patch_weight * feature_loss(predicted, target_patches, settings.loss)
        loss = torch.stack(list(losses.values())).sum()
        return StepOutput(loss, {name: value.detach() for name, value in losses.items()})

    def mask(self, positions: Tensor, progress: Progress, device: torch.device) -> Tensor:
        """Masks (B, N) bool, true where the student's patch is replaced: the same number in every image."""
        noise = keyed_noise(progress.seed, positions, self.grid[0] * self.grid[1], device)
        return sample_mask(self.settings.mask, noise, self.grid, self.num_hidden)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor | None:
        """Rows of four: the image, what the student sees of it, the teacher's features of the patches as colours, and
        the student's predictions. Of masked patches only, if there are masks. None if patches are not predicted.
        """
        if not self.settings.patch_weight:
            return None
        images, adapter = batch.views[0][:8], adapt(self.backbone)
        if self.settings.mask_ratio:
            masked = self.mask(batch.positions[:8], progress, images.device)
            features = adapter.masked_features(images, masked, self.mask_token)
        else:
            masked, features = None, adapter.forward_features(images)
        grid, target_map = adapter.patch_grid(features, images), self.teacher(images)[1]
        assert grid is not None
        assert target_map is not None  # both checked in the constructor
        predicted = self.patch_head(adapter.split_tokens(features)[1])
        targets = resample_to_grid(target_map, grid)
        every = torch.ones_like(targets[..., 0], dtype=torch.bool)
        # Lengths and scales of features are not predicted: by the cosine, or after a LayerNorm.
        targets, predicted = (F.layer_norm(each.float(), each.shape[-1:]) for each in (targets, predicted))
        seen, shown = (every, every) if masked is None else (~masked, masked)
        return feature_picture(images, seen, targets, predicted, shown, grid, self.image)

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        images, settings = batch.views[0], self.settings
        if len(images) < 2:
            return None
        target, target_map = self.teacher(images)
        loss = settings.readout_weight * constant_feature_loss(target, settings.loss)
        if settings.patch_weight and target_map is not None:
            loss = loss + settings.patch_weight * constant_feature_loss(target_map.movedim(1, -1), settings.loss)
        return loss


class FrozenTeacher(FrozenNetwork):
    """A trained backbone, frozen, that converts the student's images to its own normalisation and size."""

    factor: Tensor
    shift: Tensor

    def __init__(self, settings: DistillSettings, image: ImageSpec) -> None:
        backbone, normalisation, _ = load_teacher(settings)
        super().__init__(backbone=backbone)
        self.size = settings.teacher_img_size
        channels = len(normalisation.mean)
        if image.in_chans not in (1, channels):
            raise UserError(
                f"objective.teacher = {settings.teacher} takes images of {channels} channels, and model.in_chans is "
                f"{image.in_chans}: take another teacher"
            )
        adapter = adapt(backbone)
        if adapter.supports_any_img_size:
            adapter.enable_dynamic_img_size()
        student, teacher = (
            torch.tensor([mean, std]).view(2, -1, 1, 1)
            for mean, std in ((image.mean, image.std), (normalisation.mean, normalisation.std))
        )
        # They undo the student's normalisation and apply the teacher's; a grey image is broadcast to all channels.
        self.register_buffer("factor", student[1] / teacher[1])
        self.register_buffer("shift", (student[0] - teacher[0]) / teacher[1])
        try:
            features = adapter.forward_features(self.convert(torch.zeros(1, image.in_chans, *image.size)))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = self.size or image.size
            raise UserError(
                f"objective.teacher = {settings.teacher} cannot take images of {size[0]}x{size[1]} pixels ({error}): "
                f"set objective.teacher_img_size to a size that it takes"
            ) from None
        self.readout = adapter.resolve_readout(settings.teacher_readout, "objective.teacher_readout")
        adapter.split_tokens(features)  # refuses features that are not tokens

    def convert(self, images: Tensor) -> Tensor:
        """The student's images (B, chans, H, W) in the teacher's size and normalisation."""
        if self.size is not None and images.shape[-2:] != torch.Size(self.size):
            images = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
        return images * self.factor + self.shift

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, chans, height, width) to features of the image (B, D) and of the patches on a grid (B, C, H, W).

        The latter are None for a teacher without a grid.
        """
        adapter, images = adapt(self.backbone), self.convert(images)
        features = adapter.forward_features(images)
        prefix, patches = adapter.split_tokens(features)
        grid = adapter.patch_grid(features, images)
        patch_map = None if grid is None else patches.mT.unflatten(2, grid)
        return READOUTS[self.readout](prefix, patches), patch_map


def load_teacher(settings: DistillSettings) -> Network:
    """The teacher and the normalisation of its images. Raises UserError; nothing is downloaded."""
    name, weights = settings.teacher, settings.teacher_weights
    if Path(name).is_dir():
        if weights is not None:
            raise UserError(f"objective.teacher = {name} is an export with weights: leave teacher_weights out")
        return load_export(name)
    if not timm.is_model(name):
        raise UserError(
            f"objective.teacher = {name} is neither the folder of an export (`selfvil export RUN FOLDER`) nor a model "
            f"that timm knows"
        )
    if weights is None or not Path(weights).is_file() or Path(weights).suffix != ".safetensors":
        raise UserError(
            f"objective.teacher_weights = {weights} is no safetensors file on this machine: {name} needs one, such as "
            f"model.safetensors from its page on the Hugging Face hub"
        )
    try:
        return load_timm_file(name, weights)
    except UserError as error:
        raise UserError(f"objective.teacher_weights: {error}") from None


def resample_to_grid(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features on a grid (B, C, h, w) to those of each patch of another, (B, H·W, C); averaged if it is coarser."""
    if patches.shape[2:] != torch.Size(grid):
        patches = F.interpolate(patches.float(), grid, mode="bilinear", antialias=True)
    return patches.flatten(2).mT


def feature_loss(predicted: Tensor, target: Tensor, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """Mean loss of predicted features (..., C), whatever the scale of the target; a scalar, float32 or better."""
    predicted, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (predicted, target))
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
    return F.smooth_l1_loss(predicted, F.layer_norm(target, target.shape[-1:]), beta=2.0)


def constant_feature_loss(target: Tensor, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """Expected `feature_loss` of the best features (..., C) that are the same for all images; target is (B, ..., C).

    The best direction, or mean, is estimated from the same B images; the estimate is corrected for that.
    """
    count, target = len(target), target.float()
    if kind == "cosine":
        square = F.normalize(target, dim=-1).mean(dim=0).square().sum(dim=-1)
        return 1 - ((count * square - 1) / (count - 1)).clamp_min(0).sqrt().mean()
    target = F.layer_norm(target, target.shape[-1:])
    constant = target.mean(dim=0, keepdim=True).expand_as(target)
    return F.smooth_l1_loss(constant, target, beta=2.0) * count / (count - 1)
