"""VISReg: crops of an image are projected to one point; scale and shape of the points of all images are kept apart.

Wu, Balestriero and Levine, "VISReg: Variance-Invariance-Sketching Regularization for JEPA training" (2026,
arXiv 2606.02572). As in LeJEPA, one term moves each crop towards the mean of the image's large crops, and there is no
teacher. What avoids collapse are three terms that LeJEPA has in one: the *scale* pulls the standard deviation of every
dimension to 1; the *shape* compares the standardised projections, sorted along random directions, with the quantiles of
a normal variable (a sliced Wasserstein distance); the *centre* pulls the mean to 0. The scale's gradient stays constant
as the projections collapse to a point, where that of LeJEPA's SIGReg vanishes.

Shapes: B images, V crops of each (the first ones are large), K dimensions of a projection, S directions.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import (
    CropSettings,
    Readout,
    Scale,
    crop_features,
    crops_picture,
    multi_crop,
    prepare_for_crops,
)
from selfvil.objectives.distributed import gather_rows, process_count
from selfvil.objectives.heads import MLPHead


class VISRegSettings(CropSettings):
    """Settings of VISReg; the defaults are those of the published code, with the augmentation of DINO.

    The regulariser is computed on a micro-batch of all processes together: a run with optim.accumulate above 1 has
    smaller micro-batches and differs from a run without. A micro-batch should have 64 images or more: the quantiles of
    few points have less than unit variance, so the shape then pulls projections together that are small already.
    """

    name: Literal["visreg"] = "visreg"
    readout: Readout = None
    """Input of the head: the first and last patch concatenated, the mean of all patches, the first or the last patch,
    the class token, or all registers concatenated. null: for ViL bilateral_concat, or registers or cls if
    model.global_pool selects them; for ViT cls."""
    out_dim: int = Field(256, ge=1)
    """Width K of the projections. The published networks project to a third of the features' width."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the projector's two hidden layers."""
    regulariser_weight: float = Field(0.9, gt=0, lt=1)
    """Weight of scale, shape and centre in the loss; the distance between crops has 1 minus this weight. Published: 0.9
    on ImageNet, 0.6 on its subset of ten classes."""
    directions: int = Field(4096, ge=1)
    """Number of random directions, new at every step, along which projections are compared with a normal variable."""
    global_crops: int = Field(4, ge=2, le=16)
    """Number of large crops of each image."""
    global_crop_scale: Scale = (0.3, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.3)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(6, ge=0, le=64)
    """Number of small crops of each image."""


class VISReg(Objective):
    """VISReg around `backbone`: a `VisionLSTM`, or for comparison timm's `VisionTransformer` or a convolutional
    network.

    Raises:
        UserError: small crops are not whole patches, the backbone cannot take crops of several sizes, or it lacks the
            token of the readout.
    """

    def __init__(self, backbone: nn.Module, settings: VISRegSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        prepare_for_crops(backbone, settings, image)
        self.readout = adapt(backbone).resolve_readout(settings.readout)
        self.backbone = backbone
        self.head = MLPHead(adapt(backbone).readout_dim(self.readout), settings.out_dim, settings.hidden_dim)

    def check_batch(self, images: int) -> None:
        if images < 2:
            raise UserError(
                "objective visreg compares the images of a micro-batch of all processes, and this one has a single "
                "image: raise optim.batch_size, or lower optim.accumulate"
            )

    def views(self) -> list[View]:
        return multi_crop(self.settings, self.image, large=self.settings.global_crops)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        z = self.project(batch.views)  # (V, B, K)
        with torch.autocast(z.device.type, enabled=False):
            distance = (z - z[: self.settings.global_crops].mean(dim=0)).square().mean()
            rows = gather_rows(z.transpose(0, 1)).transpose(0, 1)
            found = regulariser(rows, self.random_directions(progress, z))
            weight = self.settings.regulariser_weight
            loss = weight * (found.scale + found.shape + found.centre) + (1 - weight) * distance
        logs = {"distance": distance, "scale": found.scale, "shape": found.shape, "centre": found.centre}
        logs["projection_std"] = found.std
        return StepOutput(loss, {name: value.detach() for name, value in logs.items()})

    def project(self, crops: list[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W), to projections (V, B, K), float32 or better."""
        features = torch.cat(crop_features(self.backbone, crops, self.readout))
        projections = self.head(features).unflatten(0, (len(crops), -1))
        return projections.to(torch.promote_types(projections.dtype, torch.float32))

    def random_directions(self, progress: Progress, like: Tensor) -> Tensor:
        """Unit vectors (K, S) that depend on the seed and the step only, so that all processes have the same."""
        generator = torch.Generator().manual_seed(progress.seed * 1_000_003 + progress.step)
        directions = torch.randn(self.settings.out_dim, self.settings.directions, generator=generator)
        return F.normalize(directions.to(like), dim=0)

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor:
        """Of projections that are all 0: the scale is 1, the shape is the variance of the quantiles, crops agree."""
        images = len(batch.views[0]) * process_count()
        quantiles = normal_quantiles(images, batch.views[0].new_zeros((), dtype=torch.float32))
        return self.settings.regulariser_weight * (1 + quantiles.square().mean())

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        return crops_picture(batch.views, self.image)


class Regulariser(NamedTuple):
    """The three terms, scalars, and `std`: the mean standard deviation of a dimension, without a gradient."""

    scale: Tensor
    shape: Tensor
    centre: Tensor
    std: Tensor


def regulariser(z: Tensor, directions: Tensor) -> Regulariser:
    """The terms of VISReg that avoid collapse, each the mean over crops.

    Args:
        z: projections (V, B, K), float32 or better, of all images of a micro-batch.
        directions: unit vectors (K, S).
    """
    mean = z.mean(dim=1, keepdim=True)
    centred = z - mean
    std = centred.norm(dim=1, keepdim=True) / z.shape[1] ** 0.5 + 1e-6  # the norm's gradient is 0 at 0, not NaN
    # The shape must not change the scale, so the gradient does not pass through the division.
    points = ((centred / std.detach()) @ directions).sort(dim=1).values  # (V, B, S)
    shape = (points - normal_quantiles(z.shape[1], z).unsqueeze(1)).square().mean()
    return Regulariser((std - 1).square().mean(), shape, mean.square().mean(), std.detach().mean())


def normal_quantiles(count: int, like: Tensor) -> Tensor:
    """The quantiles 1 / (count + 1), ..., count / (count + 1) of a standard normal variable, (count,)."""
    share = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
    return torch.special.ndtri(share).to(like)
