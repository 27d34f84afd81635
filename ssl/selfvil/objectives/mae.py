"""Masked autoencoder, for recurrent backbones too.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022): hide most patches, encode the others, decode all,
and minimise the error on the hidden ones. Two things differ for a backbone with a recurrence and a convolution:

- the kept tokens stay in row-major order (MAE shuffles them, which makes no difference to a transformer);
- the convolution has each kept token at its position on the full grid, and zeros at hidden positions.

With timm's `VisionTransformer` and `decoder: vit`, loss and gradients equal those of the published code.

Shapes: B images, N = H·W patches of the grid, K kept ones, R prefix tokens of a transformer, P = patch side, C
channels, D width of the decoder.
"""

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.models.blocks import ViLBlockPair
from selfvil.models.layout import TokenLayout, scatter_tokens
from selfvil.models.masking import kept_ids, sample_mask
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View, keyed_noise
from selfvil.objectives.crops import Scale
from selfvil.settings import Section


class MAESettings(Section):
    """Settings of the masked autoencoder; the defaults are the paper's, except for the ViL decoder."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that are hidden."""
    mask: Literal["random", "block", "row"] = "random"
    """Shape of masks: single patches (the paper's), overlapping rectangles, or whole rows of patches."""
    gap_aware: bool = False
    """ViL: between two kept patches, apply one forget gate for each hidden patch, so that a patch decays as in a pass
    over the whole image; false applies one forget gate from one kept patch to the next."""
    compact_conv: bool = False
    """ViL, for comparison: convolve kept patches as neighbours, in a row or, with model.conv: 2d, on a small grid of
    their own; false convolves them at their positions on the full grid, with zeros at hidden positions."""
    decoder: Literal["vil", "vit"] = "vil"
    """Blocks of the decoder: pairs of ViL blocks of the backbone's kind, or the published transformer layers."""
    decoder_dim: int = Field(512, ge=16, multiple_of=8)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(4, ge=1)
    """Number of pairs of ViL blocks, each of which costs about one transformer layer, or of transformer layers (8 as
    published)."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads in each transformer layer of the decoder; must divide decoder_dim."""
    normalise_targets: bool = True
    """Normalise the pixels of each target patch to mean 0 and standard deviation 1."""
    crop_scale: Scale = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false if a mirror image has another meaning, as with digits."""


class MAE(Objective):
    """Masked autoencoder around `backbone`: a `VisionLSTM`, or timm's `VisionTransformer` for comparison.

    Raises:
        UserError: the mask keeps no patch or hides none, or the backbone cannot drop tokens.
    """

    decoder_pos: Tensor

    def __init__(self, backbone: nn.Module, settings: MAESettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        adapter = adapt(backbone)
        self.grid = adapter.token_grid(image.size)
        require_disjoint_patches(self.grid, image)
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_keep = round(self.num_patches * (1 - settings.mask_ratio))
        if not 0 < self.num_keep < self.num_patches:
            raise UserError(
                f"objective.mask_ratio = {settings.mask_ratio} keeps {self.num_keep} of the {self.num_patches} patches "
                f"of a {image.size[0]}x{image.size[1]} image: at least one must be kept and one hidden"
            )

        if settings.normalise_targets and image.patch_size**2 * image.in_chans == 1:
            raise UserError("objective.normalise_targets = true, but a patch is a single value: set it to false")

        if settings.gap_aware:
            adapter.enable_gap_aware()
        if settings.compact_conv:
            adapter.enable_compact_conv()

        dim = settings.decoder_dim
        self.decoder_embed = nn.Linear(adapter.token_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        # Fixed, as published; mask tokens differ by their positions alone.
        self.register_buffer("decoder_pos", fixed_positions(self.grid, dim), persistent=False)
        self.decoder = nn.ModuleList(self._decoder_block() for _ in range(settings.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_head = nn.Linear(dim, image.patch_size**2 * image.in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _decoder_block(self) -> nn.Module:
        dim, heads = self.settings.decoder_dim, self.settings.decoder_heads
        if self.settings.decoder == "vil":
            return ViLBlockPair(dim, block=adapt(self.backbone).decoder_block)
        if dim % heads:
            raise UserError(f"objective.decoder_heads = {heads} does not divide objective.decoder_dim = {dim}")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm is annotated with a class, but calls it only
        block = Block(dim, heads, qkv_bias=True, norm_layer=norm)
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        return block

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views[0]
        keep, hidden = self.mask(batch.positions, progress, images.device)
        predicted = self.decode(self.encode(images, keep), keep)  # (B, N, P·P·C)
        error = (predicted - self.targets(images)).square().mean(dim=-1)  # (B, N)
        loss = (error * hidden).sum() / hidden.sum()
        return StepOutput(loss)

    def mask(self, positions: Tensor, progress: Progress, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids of the kept patches (B, K), ascending, and a mask (B, N) that is 1 where a patch is hidden."""
        noise = keyed_noise(progress.seed, positions, self.num_patches, device)
        hidden = sample_mask(self.settings.mask, noise, self.grid, self.num_patches - self.num_keep)
        return kept_ids(hidden, self.num_keep), hidden.to(noise.dtype)

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Kept tokens (B, K, C), after the prefix tokens (B, R, C) if backbone and decoder are transformers."""
        return adapt(self.backbone).encode_kept(images, keep, with_prefix=self.settings.decoder == "vit")

    def decode(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Predict every patch (B, N, P·P·C), float32 or better, from the tokens (B, R + K, C) of `encode`."""
        x = self.decoder_embed(latent)
        num_prefix = latent.shape[1] - keep.shape[1]
        prefix, x = x[:, :num_prefix], x[:, num_prefix:]  # only patches have positions
        x = scatter_tokens(x, keep, self.mask_token, self.num_patches) + self.decoder_pos.to(x.dtype)
        x = torch.cat([prefix, x], dim=1) if num_prefix else x
        for block in self.decoder:
            x = block(x, TokenLayout(self.grid)) if isinstance(block, ViLBlockPair) else block(x)
        predicted = self.decoder_head(self.decoder_norm(x))[:, num_prefix:]
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    def targets(self, images: Tensor) -> Tensor:
        """Pixels of each patch (B, N, P·P·C), normalised within the patch if `normalise_targets`."""
        return pixel_targets(images, self.image.patch_size, self.settings.normalise_targets)

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        images = batch.views[0]
        return self.targets(images).var(dim=0).mean() if len(images) > 1 else None

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of three: the image, its kept patches, and the image with predictions in place of hidden patches.

        If targets are normalised, predictions are shown with the mean and deviation of the true patch, which the
        network does not predict.
        """
        images = batch.views[0][:8].float()
        keep, hidden = self.mask(batch.positions[:8], progress, images.device)
        predicted = self.decode(self.encode(images, keep), keep).float()
        return reconstruction(images, hidden, predicted, self.image, self.settings.normalise_targets)


def require_disjoint_patches(grid: tuple[int, int], image: ImageSpec) -> None:
    """Raise UserError if patches overlap: the pixels of hidden ones would be visible in their neighbours."""
    if grid != (image.size[0] // image.patch_size, image.size[1] // image.patch_size):
        raise UserError(
            "model.stride makes patches overlap, and this objective predicts pixels of patches: set it to null"
        )


def fixed_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of column and row, (N, D), with the channels in the published order."""
    row_sin, column_sin, row_cos, column_cos = build_sincos2d_pos_embed(list(grid), dim).chunk(4, dim=-1)
    return torch.cat([column_sin, column_cos, row_sin, row_cos], dim=-1)


def pixel_targets(images: Tensor, patch_size: int, normalise: bool) -> Tensor:
    """Pixels of each patch (B, N, P·P·C), float32 or better; `normalise` each to mean 0 and standard deviation 1."""
    patches = patchify(images.to(torch.promote_types(images.dtype, torch.float32)), patch_size)
    if not normalise:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction(images: Tensor, hidden: Tensor, predicted: Tensor, image: ImageSpec, normalised: bool) -> Tensor:
    """Rows of three as an RGB picture (3, B·H, 3·W) in [0, 1]: image, its kept patches, hidden patches as predicted.

    Args:
        images: (B, C, H, W), float32.
        hidden: (B, N), 1 where a patch is hidden.
        predicted: (B, N, P·P·C).
        image: side of a patch, mean and deviation of the images.
        normalised: predictions are of normalised patches; they get the true patch's mean and deviation.
    """
    grid = (images.shape[2] // image.patch_size, images.shape[3] // image.patch_size)
    patches = patchify(images, image.patch_size)
    if normalised:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    hidden = hidden.unsqueeze(-1)
    columns = [
        unpatchify(tokens, grid, image.patch_size)
        for tokens in (patches, patches * (1 - hidden), patches * (1 - hidden) + predicted * hidden)
    ]
    rows = torch.cat([image.rgb(column) for column in columns], dim=-1)  # (B, 3, H, 3·W)
    return torch.cat(list(rows), dim=-2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H·P, W·P) into patches (B, H·W, P·P·C) in row-major order."""
    batch, chans, height, width = images.shape
    x = images.reshape(batch, chans, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: patches (B, H·W, P·P·C) to images (B, C, H·P, W·P)."""
    x = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
