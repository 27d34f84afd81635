"""Masked autoencoder for backbones that read tokens in order.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022): hide most patches, encode the rest, decode
them all, and learn from the error on the hidden ones. Two things are different for a recurrent, convolving backbone:

- the kept tokens stay in reading order (MAE shuffles them, which a transformer does not notice);
- the backbone's convolution sees each kept token at its true place on the grid, and zeros where tokens are hidden.

Shapes: B images, N = H·W patches of the grid, K kept ones, P = patch side, C channels, D width of the decoder.
"""

from typing import Literal

import torch
from pydantic import Field
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.blocks import ViLBlockPair
from selfvil.models.masking import encode_kept, keep_from_noise, scatter_tokens, token_grid
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.recipe import Section


class MAESettings(Section):
    """Settings of the masked autoencoder; the defaults are the paper's where ViL leaves them a meaning."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that are hidden."""
    decoder_dim: int = Field(512, ge=16, multiple_of=8)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(4, ge=1)
    """Pairs of ViL blocks in the decoder (a pair costs about one transformer layer)."""
    normalise_targets: bool = True
    """Predict each patch with its own mean taken off and its own deviation divided out."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false where a mirror image means something else, as with digits."""


class MAE(Objective):
    """Masked autoencoder around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: the mask leaves no patch to see or none to predict, or the backbone cannot drop tokens.
    """

    decoder_pos: Tensor

    def __init__(self, backbone: nn.Module, settings: MAESettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        self.grid = token_grid(backbone, image.size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_keep = round(self.num_patches * (1 - settings.mask_ratio))
        if not 0 < self.num_keep < self.num_patches:
            raise UserError(
                f"objective.mask_ratio = {settings.mask_ratio} keeps {self.num_keep} of the {self.num_patches} patches "
                f"of a {image.size[0]}x{image.size[1]} image: at least one must be kept and one hidden"
            )

        if settings.normalise_targets and image.patch_size**2 * image.in_chans == 1:
            raise UserError("objective.normalise_targets = true, but a patch is a single value: set it to false")

        dim = settings.decoder_dim
        self.decoder_embed = nn.Linear(int(backbone.embed_dim), dim)  # type: ignore[arg-type]  # a number, in timm
        self.mask_token = nn.Parameter(torch.zeros(dim))
        # Fixed positions, so that the decoder has no other way of knowing what belongs where.
        self.register_buffer("decoder_pos", build_sincos2d_pos_embed(list(self.grid), dim), persistent=False)
        self.decoder = nn.ModuleList(ViLBlockPair(dim) for _ in range(settings.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_head = nn.Linear(dim, image.patch_size**2 * image.in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views[0]
        keep, hidden = self.mask(batch.positions, progress, images.device)
        predicted = self.decode(encode_kept(self.backbone, images, keep), keep)  # (B, N, P·P·C)
        error = (predicted.float() - self.targets(images)).square().mean(dim=-1)  # (B, N)
        loss = (error * hidden).sum() / hidden.sum()
        return StepOutput(loss)

    def mask(self, positions: Tensor, progress: Progress, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids of the kept patches (B, K), ascending, and a mask (B, N) that is 1 where a patch is hidden."""
        noise = keyed_noise(progress.seed, positions, self.num_patches, device)
        keep = keep_from_noise(noise, self.num_keep)
        return keep, torch.ones_like(noise).scatter_(1, keep, 0.0)

    def decode(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Predict every patch (B, N, P·P·C) from the kept tokens (B, K, C)."""
        x = scatter_tokens(self.decoder_embed(latent), keep, self.mask_token, self.num_patches)
        x = x + self.decoder_pos.to(x.dtype)
        for pair in self.decoder:
            x = pair(x, self.grid)
        return self.decoder_head(self.decoder_norm(x))

    def targets(self, images: Tensor) -> Tensor:
        """Pixels of each patch (B, N, P·P·C), float32, normalised within the patch if the settings say so."""
        patches = patchify(images.float(), self.image.patch_size)
        if not self.settings.normalise_targets:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor:
        return self.targets(batch.views[0]).var(dim=0).mean()

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of three: the image, what the backbone sees of it, and the hidden patches filled in.

        Where targets are normalised, the prediction is put back on the true patch's mean and deviation: the network
        was never asked for those, and without them a good prediction looks like noise.
        """
        images = batch.views[0][:8].float()
        keep, hidden = self.mask(batch.positions[:8], progress, images.device)
        predicted = self.decode(encode_kept(self.backbone, images, keep), keep).float()
        patches = patchify(images, self.image.patch_size)
        if self.settings.normalise_targets:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        hidden = hidden.unsqueeze(-1)
        columns = [
            unpatchify(tokens, self.grid, self.image.patch_size)
            for tokens in (patches, patches * (1 - hidden), patches * (1 - hidden) + predicted * hidden)
        ]
        mean, std = (
            torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.image.mean, self.image.std)
        )
        rows = torch.cat([column * std + mean for column in columns], dim=-1)  # (B, C, H, 3·W)
        sheet = torch.cat(list(rows), dim=-2)[:3]
        return sheet.expand(3, -1, -1).clamp(0, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H·P, W·P) into patches (B, H·W, P·P·C) in reading order."""
    batch, chans, height, width = images.shape
    x = images.reshape(batch, chans, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: patches (B, H·W, P·P·C) to images (B, C, H·P, W·P)."""
    x = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
