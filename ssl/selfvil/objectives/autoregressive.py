"""Autoregressive pretraining: predict each cluster of patches from the clusters before it.

The clusters, and a decoder that attends to earlier tokens, are from Ren et al., "Autoregressive Pretraining with Mamba
in Vision" (ARM, 2024); normalised pixels as targets, and the use with transformers, are from El-Nouby et al., "Scalable
Pre-training of Large Autoregressive Image Models" (AIM, 2024). No input is masked, so each pass trains on all clusters
but the first.

A prediction must never depend on its target. A ViL scans patches row by row whatever the clusters are, as it does
downstream, so its token t depends on all patches up to t. The prediction of cluster c may therefore attend to token t
only if no patch up to t belongs to c or to a later cluster. A backbone that scans backwards, or whose convolution
covers later patches, is refused. A transformer attends to clusters up to its own, by an attention mask that is only
used here.

Shapes: B images, N = H·W patches of the grid, P = patch side, C channels, D width of the decoder.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import Mlp
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.crops import Scale
from selfvil.objectives.mae import fixed_positions, pixel_targets, reconstruction
from selfvil.settings import Section


class AutoregressiveSettings(Section):
    """Settings of the autoregressive objective."""

    name: Literal["autoregressive"] = "autoregressive"
    cluster: tuple[int, int] = (1, 1)
    """Rows and columns of patches in a cluster; the best of ARM are squares of 64 pixels in images of 192 pixels."""
    decoder_dim: int = Field(512, ge=16, multiple_of=8)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(4, ge=1)
    """Number of cross-attention layers in the decoder."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads in each layer of the decoder; must divide decoder_dim."""
    normalise_targets: bool = True
    """Normalise the pixels of each target patch to mean 0 and standard deviation 1."""
    crop_scale: Scale = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false if a mirror image has another meaning, as with digits."""


class CrossBlock(nn.Module):
    """Queries attend to a memory, not to each other; then an MLP. Both have a norm before them and a residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_query, self.norm_memory, self.norm_mlp = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        """x (B, Q, D), memory (B, N, D), visible (Q, N) bool, to (B, Q, D)."""
        heads = (self.num_heads, -1)
        query = self.query(self.norm_query(x)).unflatten(-1, heads).transpose(1, 2)
        key, value = self.key_value(self.norm_memory(memory)).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Autoregressive(Objective):
    """Next-cluster prediction around `backbone`: a causal `VisionLSTM`, or timm's `VisionTransformer`.

    Raises:
        UserError: clusters do not tile the grid, there is only one, or the backbone cannot be causal.
    """

    decoder_pos: Tensor
    cluster_of: Tensor
    visible: Tensor

    def __init__(self, backbone: nn.Module, settings: AutoregressiveSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        adapter = adapt(backbone)
        adapter.require_causal()
        self.grid = adapter.token_grid(image.size)
        (rows, columns), (high, wide), dim = self.grid, settings.cluster, settings.decoder_dim
        if high < 1 or wide < 1 or rows % high or columns % wide or (rows, columns) == (high, wide):
            raise UserError(
                f"objective.cluster = [{high}, {wide}] must divide the grid of {rows}x{columns} patches into two "
                "clusters or more"
            )
        if settings.normalise_targets and image.patch_size**2 * image.in_chans == 1:
            raise UserError("objective.normalise_targets = true, but a patch is a single value: set it to false")
        if dim % settings.decoder_heads:
            raise UserError(
                f"objective.decoder_heads = {settings.decoder_heads} does not divide objective.decoder_dim = {dim}"
            )

        ids = torch.arange(rows * columns, device="cpu")  # values, also where weights are counted on the meta device
        cluster_of = ids // columns // high * (columns // wide) + ids % columns // wide
        self.register_buffer("cluster_of", cluster_of, persistent=False)  # (N,)
        visible = adapter.latest_cluster(cluster_of) < cluster_of[cluster_of > 0, None]
        self.register_buffer("visible", visible, persistent=False)  # (Q, N)

        self.decoder_embed = nn.Linear(adapter.token_dim, dim)
        self.query_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("decoder_pos", fixed_positions(self.grid, dim), persistent=False)
        self.decoder = nn.ModuleList(CrossBlock(dim, settings.decoder_heads) for _ in range(settings.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_head = nn.Linear(dim, image.patch_size**2 * image.in_chans)
        nn.init.normal_(self.query_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def views(self) -> list[View]:
        image, settings = self.image, self.settings
        return [RandomCropFlip(image.size, settings.crop_scale, image.mean, image.std, flip=settings.flip)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views[0]
        targets = pixel_targets(images, self.image.patch_size, self.settings.normalise_targets)
        return StepOutput((self.predict(images) - targets[:, self.cluster_of > 0]).square().mean())

    def predict(self, images: Tensor) -> Tensor:
        """Pixels (B, Q, P·P·C), float32 or better, of the Q patches outside the first cluster, in row-major order."""
        memory = self.decoder_embed(adapt(self.backbone).encode_causal(images, self.cluster_of))
        positions = self.decoder_pos.to(memory.dtype)
        memory = memory + positions
        x = (self.query_token.to(memory.dtype) + positions[self.cluster_of > 0]).expand(len(images), -1, -1)
        for block in self.decoder:
            x = block(x, memory, self.visible)
        predicted = self.decoder_head(self.decoder_norm(x))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        images = batch.views[0]
        if len(images) < 2:
            return None
        targets = pixel_targets(images, self.image.patch_size, self.settings.normalise_targets)
        return targets[:, self.cluster_of > 0].var(dim=0).mean()

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of three: the image, its first cluster, and all later clusters as predicted from those before them."""
        images = batch.views[0][:8].float()
        later = (self.cluster_of > 0).expand(len(images), -1)
        pixels = self.predict(images).float()
        predicted = pixels.new_zeros(*later.shape, pixels.shape[-1])
        predicted[later] = pixels.flatten(0, 1)
        return reconstruction(images, later.float(), predicted, self.image, self.settings.normalise_targets)
