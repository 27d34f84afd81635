"""LeJEPA: the crops of an image are projected to one point, and the points of all images to an isotropic Gaussian.

Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics" (2025,
arXiv 2511.08544). One term of the loss moves each crop towards the mean of the image's large crops. The other, SIGReg,
avoids collapse to one point: along random directions, it compares the characteristic function of the projections with
that of a standard normal variable. There is no teacher, no centre and no temperature. Both terms are lightly's.

Shapes: B images, V crops of each (the first two are large), K dimensions of a projection.
"""

from typing import Literal

import torch
from lightly.loss import LeJEPALoss
from pydantic import Field
from torch import Tensor, nn

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
from selfvil.objectives.distributed import process_count
from selfvil.objectives.heads import MLPHead


class LeJEPASettings(CropSettings):
    """Settings of LeJEPA; the defaults are those of the published code, with the augmentation of DINO.

    SIGReg is computed on a micro-batch of all processes together, and grows with its size: a run with optim.accumulate
    above 1 has smaller micro-batches and differs from a run without.
    """

    name: Literal["lejepa"] = "lejepa"
    readout: Readout = None
    """Input of the head: the first and last patch concatenated, the mean of all patches, the first or the last patch,
    the class token, or all registers concatenated. null: for ViL bilateral_concat, or registers or cls if
    model.global_pool selects them; for ViT cls."""
    out_dim: int = Field(64, ge=1)
    """Width K of the projections, whose distribution becomes Gaussian."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the projector's two hidden layers."""
    sigreg_weight: float = Field(0.05, gt=0, lt=1)
    """Weight of SIGReg in the loss; the distance between crops has 1 minus this weight. The paper tries 0.01 to 0.1."""
    sigreg_directions: int = Field(1024, ge=1)
    """Number of random directions, new at every step, along which projections are compared with a Gaussian."""
    global_crop_scale: Scale = (0.3, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.3)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(6, ge=1, le=64)
    """Number of small crops of each image."""


class LeJEPA(Objective):
    """LeJEPA around `backbone`: a `VisionLSTM`, or for comparison timm's `VisionTransformer` or a convolutional
    network.

    Raises:
        UserError: small crops are not whole patches, the backbone cannot take crops of several sizes, or it lacks the
            token of the readout.
    """

    def __init__(self, backbone: nn.Module, settings: LeJEPASettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        prepare_for_crops(backbone, settings, image)
        self.readout = adapt(backbone).resolve_readout(settings.readout)
        self.backbone = backbone
        width = adapt(backbone).readout_dim(self.readout)
        self.head = MLPHead(width, settings.out_dim, settings.hidden_dim)
        self.loss = LeJEPALoss(
            settings.sigreg_weight, gather_distributed=True, sigreg_num_vectors=settings.sigreg_directions
        )

    def views(self) -> list[View]:
        return multi_crop(self.settings, self.image)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        projections = self.project(batch.views)
        with (
            # bf16 is too coarse for cos and sin of projections, and lightly's count of a batch of 257 is wrong in it.
            torch.autocast(projections.device.type, enabled=False),
            # lightly samples directions from the global generator, whose state depends on this process's stochastic
            # depth. Directions must be the same on all processes, so each step has its own seed for them.
            torch.random.fork_rng(devices=[projections.device] if projections.is_cuda else []),
        ):
            torch.manual_seed(progress.seed * 1_000_003 + progress.step)
            loss = self.loss(global_proj=projections[:2], local_proj=projections[2:])
        distance = (projections.detach() - projections[:2].detach().mean(dim=0)).square().mean()
        share = self.settings.sigreg_weight
        logs = {"distance": distance, "sigreg": (loss.detach() - (1 - share) * distance) / share}
        logs["projection_std"] = projections.detach().std(dim=1, correction=0).mean()
        return StepOutput(loss, logs)

    def project(self, crops: list[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W), to projections (V, B, K), float32 or better."""
        features = torch.cat(crop_features(self.backbone, crops, self.readout))
        projections = self.head(features).unflatten(0, (len(crops), -1))
        return projections.to(torch.promote_types(projections.dtype, torch.float32))

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor:
        """SIGReg of projections that are all 0: the constant with the least SIGReg, and crops do not differ.

        The characteristic function of a constant 0 is 1, so no process needs the others' projections.
        """
        sigreg = self.loss.sigreg
        images = len(batch.views[0]) * process_count()
        return self.settings.sigreg_weight * images * ((1 - sigreg.phi).square() @ sigreg.weights)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        return crops_picture(batch.views, self.image)
