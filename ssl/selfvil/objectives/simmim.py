"""SimMIM: predict the pixels of masked patches from a dense pass.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (2022): a learned token replaces masked patches, the
backbone encodes the whole grid, one linear layer predicts pixels, and the loss is the absolute error on masked ones.
No token is dropped, so a convolution has the same dense grid as after pretraining, at the cost of a full forward pass.

Shapes: B images, N = H·W patches of the grid, P = patch side, C channels.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.models.masking import sample_mask
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.objectives.crops import Scale
from selfvil.objectives.mae import pixel_targets, reconstruction, require_disjoint_patches
from selfvil.settings import Section


class SimMIMSettings(Section):
    """Settings of SimMIM; the defaults are the paper's for ViT-B."""

    name: Literal["simmim"] = "simmim"
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Share of the mask units that are hidden."""
    mask_unit: int = Field(2, ge=1)
    """Side of a mask unit in patches: the paper's unit of 32 pixels is 2 patches of 16."""
    normalise_targets: bool = False
    """Normalise the pixels of each target patch to mean 0 and standard deviation 1."""
    crop_scale: Scale = (0.67, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false if a mirror image has another meaning, as with digits."""


class SimMIM(Objective):
    """SimMIM around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: mask units do not tile the grid, the mask hides all units or none, or the backbone cannot mask
            tokens.
    """

    def __init__(self, backbone: nn.Module, settings: SimMIMSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        self.grid = adapt(backbone).token_grid(image.size)
        require_disjoint_patches(self.grid, image)
        unit = settings.mask_unit
        if self.grid[0] % unit or self.grid[1] % unit:
            raise UserError(
                f"objective.mask_unit = {unit} does not divide the grid of {self.grid[0]}x{self.grid[1]} patches: "
                "choose a divisor of both"
            )
        self.units = (self.grid[0] // unit, self.grid[1] // unit)
        num_units = self.units[0] * self.units[1]
        self.num_hidden = round(num_units * settings.mask_ratio)
        if not 0 < self.num_hidden < num_units:
            raise UserError(
                f"objective.mask_ratio = {settings.mask_ratio} hides {self.num_hidden} of the {num_units} mask units "
                f"of a {image.size[0]}x{image.size[1]} image: at least one must be hidden and one left"
            )
        if settings.normalise_targets and image.patch_size**2 * image.in_chans == 1:
            raise UserError("objective.normalise_targets = true, but a patch is a single value: set it to false")

        dim = adapt(backbone).token_dim
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.decoder_head = nn.Linear(dim, image.patch_size**2 * image.in_chans)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views[0]
        masked = self.mask(batch.positions, progress, images.device)
        targets = pixel_targets(images, self.image.patch_size, self.settings.normalise_targets)
        return StepOutput((self.predict(images, masked) - targets).abs()[masked].mean())

    def mask(self, positions: Tensor, progress: Progress, device: torch.device) -> Tensor:
        """Masks (B, N), true where a patch is hidden: whole units of patches."""
        noise = keyed_noise(progress.seed, positions, self.units[0] * self.units[1], device)
        masked = sample_mask("random", noise, self.units, self.num_hidden).unflatten(1, self.units)
        unit = self.settings.mask_unit
        return masked.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)

    def predict(self, images: Tensor, masked: Tensor) -> Tensor:
        """Pixels of every patch (B, N, P·P·C), float32 or better, predicted from the patches that are not masked."""
        predicted = self.decoder_head(adapt(self.backbone).encode_masked(images, masked, self.mask_token))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        targets = pixel_targets(batch.views[0], self.image.patch_size, self.settings.normalise_targets)
        count = len(targets)
        if count < 2:
            return None
        # The median minimises the absolute error. It is estimated from the same images, which explains the correction.
        return (targets - targets.median(dim=0).values).abs().mean() * count / (count - 1)

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of three: the image, the patches that are not masked, and masked patches as predicted."""
        images = batch.views[0][:8].float()
        masked = self.mask(batch.positions[:8], progress, images.device)
        predicted = self.predict(images, masked).float()
        return reconstruction(images, masked.float(), predicted, self.image, self.settings.normalise_targets)
