"""Distillation: a backbone learns to give the features of a trained one, for the image and for every patch.

Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation" (2022) have the
smooth absolute error of features that a norm without weights has whitened; Ranzinger et al., "AM-RADIO" (2024), the
cosine, and features of image and patches together. Student and teacher see the same crop, which is what makes a
teacher patient (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022).

The teacher is no part of the objective's state: it has files of its own, it never changes, and a checkpoint that held
it would be mostly that.

Shapes: B images, N = H·W patches on the student's grid, C channels of the teacher.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.heads import READOUTS, choose_readout, patch_grid, split_tokens, take_any_size, usable_readouts
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import Readout, Scale, need_size
from selfvil.objectives.dino import StaysFloat32
from selfvil.settings import PathText, Section, Size
from selfvil.weights import Normalisation, check_single_file, load_export


class DistillSettings(Section):
    """Settings of distillation."""

    name: Literal["distill"] = "distill"
    teacher: PathText
    """Folder that `selfvil export` wrote, or the name of a timm model, such as vit_small_patch14_dinov2.lvd142m."""
    teacher_weights: PathText | None = None
    """With the name of a timm model: its weights, a safetensors file on this machine."""
    teacher_img_size: Size | None = None
    """Height and width to which images are resized for the teacher, in pixels; null shows it the student's."""
    teacher_readout: Literal["bilateral_concat", "mean", "cls"] | None = None
    """The teacher's tokens that stand for the image; null takes cls where there is one, for ViL bilateral_concat."""
    readout: Readout = None
    """The student's tokens that stand for the image; null takes bilateral_concat for ViL and cls for ViT."""
    readout_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the image's features; 0 leaves it out."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the loss of the patches' features; 0 leaves it out."""
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """1 - cosine; or the absolute error, smooth up to 2, of targets with mean 0 and deviation 1 over their channels."""
    crop_scale: Scale = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false where a mirror image means something else, as with digits."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> "DistillSettings":
        if not self.readout_weight and not self.patch_weight:
            raise ValueError("readout_weight and patch_weight are both 0, which leaves nothing to learn: raise one")
        return self


class Distill(Objective):
    """Distillation into `backbone`: a `VisionLSTM`, timm's `VisionTransformer`, or another that gives tokens or a map.

    Raises:
        UserError: there is no such teacher, its weights do not fit it, it cannot take the images, or one of the two
            lacks the tokens that are to be learned.
    """

    def __init__(self, backbone: nn.Module, settings: DistillSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        need_size(backbone, image, image.size, "model.img_size")
        teacher = FrozenTeacher(settings, image)
        self._unregistered = (teacher,)  # in a tuple, so that torch does not find it
        blank = torch.zeros(1, image.in_chans, *image.size)
        targets = teacher(blank)
        self.readout, width = choose_readout(backbone, settings.readout)
        if settings.readout_weight:
            self.readout_head = nn.Linear(width, targets[0].shape[-1])
        if settings.patch_weight:
            if targets[1] is None:
                raise UserError(
                    f"objective.patch_weight = {settings.patch_weight} asks for a teacher with a grid of patches, "
                    f"which objective.teacher = {settings.teacher} has not: set it to 0, or take another teacher"
                )
            with torch.no_grad():
                features = backbone.forward_features(blank)  # type: ignore[operator]  # every timm model has it
            if patch_grid(backbone, features, blank) is None:
                raise UserError(
                    f"objective.patch_weight = {settings.patch_weight} asks for a student with a grid of patches, "
                    f"which {type(backbone).__name__} has not: set it to 0"
                )
            patches = split_tokens(backbone, features)[1]
            self.patch_head = nn.Linear(patches.shape[-1], targets[1].shape[1])

    @property
    def teacher(self) -> "FrozenTeacher":
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        self.teacher._apply(fn, recurse)  # it goes to the device of the student
        return super()._apply(fn, recurse)

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images, settings = batch.views[0], self.settings
        wanted, wanted_map = self.teacher(images)
        features: Tensor = self.backbone.forward_features(images)  # type: ignore[operator]
        prefix, patches = split_tokens(self.backbone, features)
        losses: dict[str, Tensor] = {}
        if settings.readout_weight:
            found = self.readout_head(READOUTS[self.readout](prefix, patches))
            losses["readout_loss"] = settings.readout_weight * feature_loss(found, wanted, settings.loss)
        if settings.patch_weight and wanted_map is not None:
            grid = patch_grid(self.backbone, features, images)
            assert grid is not None  # as found when this was built
            wanted_patches = onto_grid(wanted_map, grid)
            losses["patch_loss"] = settings.patch_weight * feature_loss(
                self.patch_head(patches), wanted_patches, settings.loss
            )
        loss = torch.stack(list(losses.values())).sum()
        return StepOutput(loss, {name: value.detach() for name, value in losses.items()})

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        images, settings = batch.views[0], self.settings
        if len(images) < 2:
            return None
        wanted, wanted_map = self.teacher(images)
        loss = settings.readout_weight * constant_feature_loss(wanted, settings.loss)
        if settings.patch_weight and wanted_map is not None:
            loss = loss + settings.patch_weight * constant_feature_loss(wanted_map.movedim(1, -1), settings.loss)
        return loss


class FrozenTeacher(StaysFloat32):
    """A trained backbone as it is, in evaluation mode, without gradients, in a normalisation of its own."""

    factor: Tensor
    shift: Tensor

    def __init__(self, settings: DistillSettings, image: ImageSpec) -> None:
        super().__init__()
        self.size = settings.teacher_img_size
        self.backbone, normalisation = load_teacher(settings)
        channels = len(normalisation.mean)
        if image.in_chans not in (1, channels):
            raise UserError(
                f"objective.teacher = {settings.teacher} takes images of {channels} channels, and model.in_chans is "
                f"{image.in_chans}: take another teacher"
            )
        if isinstance(self.backbone, VisionTransformer):
            take_any_size(self.backbone)
        self.requires_grad_(False).train(False)
        ours, theirs = (
            torch.tensor([mean, std]).view(2, -1, 1, 1)
            for mean, std in ((image.mean, image.std), (normalisation.mean, normalisation.std))
        )
        # What undoes the student's normalisation and applies the teacher's; a grey image becomes one of all channels.
        self.register_buffer("factor", ours[1] / theirs[1])
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1])
        try:
            features = self.features(torch.zeros(1, image.in_chans, *image.size))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = self.size or image.size
            raise UserError(
                f"objective.teacher = {settings.teacher} cannot take images of {size[0]}x{size[1]} pixels ({error}): "
                f"set objective.teacher_img_size to a size that it takes"
            ) from None
        readout = settings.teacher_readout
        if readout is not None and readout not in (usable := usable_readouts(self.backbone)):
            raise UserError(
                f"objective.teacher_readout = {readout!r} is not possible with {type(self.backbone).__name__}; "
                f"choose one of: {', '.join(usable)}"
            )
        split_tokens(self.backbone, features)  # refuses what are no tokens
        self.readout, _ = choose_readout(self.backbone, readout)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def present(self, images: Tensor) -> Tensor:
        """Images (B, chans, H, W) as the student sees them, to what the teacher is used to."""
        if self.size is not None and images.shape[-2:] != torch.Size(self.size):
            images = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
        return images * self.factor + self.shift

    def features(self, images: Tensor) -> Tensor:
        return self.backbone.forward_features(self.present(images))  # type: ignore[operator]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, chans, H, W) to features of the image (B, D) and, on its grid, of the patches (B, C, H, W)."""
        presented = self.present(images)
        features: Tensor = self.backbone.forward_features(presented)  # type: ignore[operator]
        prefix, patches = split_tokens(self.backbone, features)
        grid = patch_grid(self.backbone, features, presented)
        patch_map = None if grid is None else patches.mT.unflatten(2, grid)
        return READOUTS[self.readout](prefix, patches), patch_map


def load_teacher(settings: DistillSettings) -> tuple[nn.Module, Normalisation]:
    """The teacher of some settings, and how its images were presented. Raises UserError; nothing is downloaded."""
    name, weights = settings.teacher, settings.teacher_weights
    if Path(name).is_dir():
        if weights is not None:
            raise UserError(f"objective.teacher = {name} is an export with weights: leave teacher_weights out")
        network = load_export(name)
        return network.backbone, network.normalisation
    if not timm.is_model(name):
        raise UserError(
            f"objective.teacher = {name} is neither the folder of an export (`selfvil export RUN FOLDER`) nor a model "
            f"that timm knows"
        )
    if weights is None or not Path(weights).is_file() or Path(weights).suffix != ".safetensors":
        raise UserError(
            f"objective.teacher_weights = {weights} is no safetensors file on this machine: {name} needs one, as its "
            f"page on the Hugging Face hub offers it (model.safetensors)"
        )
    check_single_file(Path(weights))
    source = {"source": "", "file": weights, "custom_load": False}
    try:  # with its classifier: asked to leave that out, timm loads whatever fits, and says nothing of the rest
        backbone: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except Exception as error:  # timm, torch and safetensors have each their own
        raise UserError(
            f"objective.teacher_weights = {weights} are no weights of {name}: {' '.join(str(error).split())[:300]}"
        ) from None
    backbone.reset_classifier(0)
    known = backbone.pretrained_cfg
    return backbone, Normalisation(tuple(known["mean"]), tuple(known["std"]), tuple(known["input_size"][1:]))


def onto_grid(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features on a grid (B, C, h, w) to those of each patch of another, (B, H·W, C); averaged where it is coarser."""
    if patches.shape[2:] != torch.Size(grid):
        patches = F.interpolate(patches.float(), grid, mode="bilinear", antialias=True)
    return patches.flatten(2).mT


def feature_loss(found: Tensor, wanted: Tensor, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """Mean loss of features (..., C), of any scale where they are `wanted`; a scalar, float32 or better."""
    found, wanted = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (found, wanted))
    if kind == "cosine":
        return 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
    return F.smooth_l1_loss(found, F.layer_norm(wanted, wanted.shape[-1:]), beta=2.0)


def constant_feature_loss(wanted: Tensor, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """Expected `feature_loss` of the best features (..., C) that are the same for all images; wanted is (B, ..., C).

    The best direction, or mean, is estimated from the same B images, and the estimate is corrected for that.
    """
    count, wanted = len(wanted), wanted.float()
    if kind == "cosine":
        square = F.normalize(wanted, dim=-1).mean(dim=0).square().sum(dim=-1)
        return 1 - ((count * square - 1) / (count - 1)).clamp_min(0).sqrt().mean()
    wanted = F.layer_norm(wanted, wanted.shape[-1:])
    constant = wanted.mean(dim=0, keepdim=True).expand_as(wanted)
    return F.smooth_l1_loss(constant, wanted, beta=2.0) * count / (count - 1)
