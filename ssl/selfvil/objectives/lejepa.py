"""LeJEPA: crops of an image are projected to one point, and the points of all images to an isotropic Gaussian.

Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics" (2025,
arXiv 2511.08544). Crops are drawn towards the mean of an image's large ones. That all images might fall on one point is
kept off by SIGReg: along random directions, the characteristic function of the projections is compared with that of a
standard normal variable. There is no teacher, no centre, no temperature. Both terms are lightly's.

Shapes: B images, V crops of each (the first two are large), K dimensions of a projection.
"""

from typing import Literal

import torch
from lightly.loss import LeJEPALoss
from pydantic import Field
from torch import Tensor, distributed, nn

from selfvil.models.heads import MLPHead, choose_readout
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import (
    CropSettings,
    Readout,
    Scale,
    multi_crop,
    prepare_for_crops,
    read_crops,
    sheet_of_crops,
)


class LeJEPASettings(CropSettings):
    """Settings of LeJEPA; the defaults are those of the published code, with crops as DINO disturbs them.

    SIGReg sees the micro-batches of all processes together, and grows with their size: with optim.accumulate above 1 it
    sees smaller batches, which is not the same run.
    """

    name: Literal["lejepa"] = "lejepa"
    readout: Readout = None
    """Tokens that the head sees: first and last side by side, the mean of all, one of them, the class token, or all
    registers. null takes bilateral_concat for ViL, or registers or cls where model.global_pool says so; cls for ViT."""
    out_dim: int = Field(64, ge=1)
    """Width K of the projections that are made Gaussian."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the projector's two hidden layers."""
    sigreg_weight: float = Field(0.05, gt=0, lt=1)
    """Share of SIGReg in the loss; the rest is the distance between crops. The paper tries 0.01 to 0.1."""
    sigreg_directions: int = Field(1024, ge=1)
    """Random directions, new at every step, along which projections are compared with a Gaussian."""
    global_crop_scale: Scale = (0.3, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.3)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(6, ge=1, le=64)
    """Small crops of each image."""


class LeJEPA(Objective):
    """LeJEPA around `backbone`: a `VisionLSTM`, or for comparison timm's `VisionTransformer` or a convolutional
    network.

    Raises:
        UserError: small crops are not whole patches, the backbone cannot take crops of several sizes, or it has no
            token for the readout.
    """

    def __init__(self, backbone: nn.Module, settings: LeJEPASettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        prepare_for_crops(backbone, settings, image)
        self.readout, width = choose_readout(backbone, settings.readout)
        self.backbone = backbone
        self.head = MLPHead(width, settings.out_dim, settings.hidden_dim)
        self.loss = LeJEPALoss(
            settings.sigreg_weight, gather_distributed=True, sigreg_num_vectors=settings.sigreg_directions
        )

    def views(self) -> list[View]:
        return multi_crop(self.settings, self.image)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        projections = self.project(batch.views)
        with (
            # cos and sin of what bf16 has rounded, and in bf16 lightly could not even count a batch of 257
            torch.autocast(projections.device.type, enabled=False),
            # lightly draws directions from the global generator, at a point that dropped paths have moved; a step has
            # its own, the same on all processes, and dropped paths do not depend on them
            torch.random.fork_rng(devices=[projections.device] if projections.is_cuda else []),
        ):
            torch.manual_seed(progress.seed * 1_000_003 + progress.step)
            loss = self.loss(global_proj=projections[:2], local_proj=projections[2:])
        distance = (projections.detach() - projections[:2].detach().mean(dim=0)).square().mean()
        share = self.settings.sigreg_weight
        logs = {"distance": distance, "sigreg": (loss.detach() - (1 - share) * distance) / share}
        return StepOutput(loss, logs)

    def project(self, crops: list[Tensor]) -> Tensor:
        """Crops, each (B, C, H, W), to projections (V, B, K), float32 or better."""
        projections = self.head(torch.cat(read_crops(self.backbone, crops, self.readout))).unflatten(
            0, (len(crops), -1)
        )
        return projections.to(torch.promote_types(projections.dtype, torch.float32))

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor:
        """SIGReg of projections that are all 0: no other constant is nearer to a Gaussian, and crops do not differ.

        The characteristic function of a constant 0 is 1, so that no process needs the others' projections.
        """
        sigreg = self.loss.sigreg
        processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        images = len(batch.views[0]) * processes
        return self.settings.sigreg_weight * images * ((1 - sigreg.phi).square() @ sigreg.weights)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        return sheet_of_crops(batch.views, self.image)
