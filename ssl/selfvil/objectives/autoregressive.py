"""Autoregressive pretraining: predict the next cluster of patches from those already read.

Ren et al., "Autoregressive Pretraining with Mamba in Vision" (ARM, 2024), for clusters and for a decoder that attends
to what was read; El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models" (AIM, 2024), for pixels
normalised within each patch and for transformers. Nothing is masked from the input, so each pass trains on all clusters
but the first.

The one thing that must hold is that a prediction never depends on what it predicts. A ViL reads patches row by row
whatever the clusters are, here as downstream, so that its token t knows of all patches up to t. A prediction of cluster
c may therefore listen to token t only if no patch up to t belongs to c or to a later cluster. A backbone that reads
backwards, or convolves with its neighbours to come, is refused. A transformer attends to clusters up to its own, under
a mask that is dropped downstream.

Shapes: B images, N = H·W patches of the grid, P = patch side, C channels, D width of the decoder.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.layers import ViLLayer
from selfvil.models.masking import token_grid
from selfvil.models.mlp_block import MLSTMLayer
from selfvil.objectives.base import Batch, ImageSpec, Objective, Progress, StepOutput, View
from selfvil.objectives.mae import fixed_positions, pixel_targets, reconstruction
from selfvil.settings import Section


class AutoregressiveSettings(Section):
    """Settings of the autoregressive objective."""

    name: Literal["autoregressive"] = "autoregressive"
    cluster: tuple[int, int] = (1, 1)
    """Rows and columns of patches that are predicted together; ARM's best is a square of 64 of 192 pixels."""
    decoder_dim: int = Field(512, ge=16, multiple_of=8)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(4, ge=1)
    """Layers of cross-attention in the decoder."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads in each of them; they divide decoder_dim."""
    normalise_targets: bool = True
    """Predict each patch with its own mean taken off and its own deviation divided out."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the share of an image's area that a random crop covers."""
    flip: bool = True
    """Flip half of the crops left to right; false where a mirror image means something else, as with digits."""


class CrossBlock(nn.Module):
    """Queries attend to a memory, and to nothing of each other; then an MLP. Both with norms before and residuals."""

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
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.proj(heard.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Autoregressive(Objective):
    """Next-cluster prediction around `backbone`: a causal `VisionLSTM`, or timm's `VisionTransformer`.

    Raises:
        UserError: clusters do not tile the grid or there is but one, or the backbone does not read causally.
    """

    decoder_pos: Tensor
    cluster_of: Tensor
    visible: Tensor

    def __init__(self, backbone: nn.Module, settings: AutoregressiveSettings, image: ImageSpec) -> None:
        super().__init__()
        self.settings, self.image = settings, image
        self.backbone = backbone
        _must_be_causal(backbone)
        self.grid = token_grid(backbone, image.size)
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

        ids = torch.arange(rows * columns)
        cluster_of = ids // columns // high * (columns // wide) + ids % columns // wide
        # The latest cluster that each token knows of: a recurrence knows of all patches before it.
        known = cluster_of if isinstance(backbone, VisionTransformer) else cluster_of.cummax(dim=0).values
        self.register_buffer("cluster_of", cluster_of, persistent=False)  # (N,)
        self.register_buffer("visible", known < cluster_of[cluster_of > 0, None], persistent=False)  # (Q, N)

        self.decoder_embed = nn.Linear(int(backbone.embed_dim), dim)  # type: ignore[arg-type]  # a number, in timm
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
        """Pixels (B, Q, P·P·C), float32 or better, of the Q patches outside the first cluster, in reading order."""
        memory = self.decoder_embed(self.encode(images))
        positions = self.decoder_pos.to(memory.dtype)
        memory = memory + positions
        x = (self.query_token.to(memory.dtype) + positions[self.cluster_of > 0]).expand(len(images), -1, -1)
        for block in self.decoder:
            x = block(x, memory, self.visible)
        predicted = self.decoder_head(self.decoder_norm(x))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of the patches (B, N, C), none of which knows of a later cluster than it may."""
        backbone: Any = self.backbone
        if not isinstance(backbone, VisionTransformer):
            x = backbone.patch_embed(images)
            return backbone.forward_tokens(x.flatten(1, 2), (x.shape[1], x.shape[2]))
        # Prefix tokens, before all clusters, attend to each other only.
        prefix = backbone.num_prefix_tokens
        order = torch.cat([self.cluster_of.new_full((prefix,), -1), self.cluster_of])
        return backbone.forward_features(images, attn_mask=order <= order.unsqueeze(1))[:, prefix:]

    @torch.no_grad()
    def trivial_loss(self, batch: Batch) -> Tensor | None:
        images = batch.views[0]
        if len(images) < 2:
            return None
        targets = pixel_targets(images, self.image.patch_size, self.settings.normalise_targets)
        return targets[:, self.cluster_of > 0].var(dim=0).mean()

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor:
        """Rows of three: the image, its first cluster, and each further one as predicted from those before it."""
        images = batch.views[0][:8].float()
        later = (self.cluster_of > 0).expand(len(images), -1)
        found = self.predict(images).float()
        predicted = found.new_zeros(*later.shape, found.shape[-1])
        predicted[later] = found.flatten(0, 1)
        return reconstruction(images, later.float(), predicted, self.image, self.settings.normalise_targets)


def _must_be_causal(backbone: nn.Module) -> None:
    """Raise UserError unless no token of `backbone` knows of a patch after it."""
    if isinstance(backbone, VisionLSTM):
        layers = [module for module in backbone.modules() if isinstance(module, ViLLayer | MLSTMLayer)]
        if any(layer.reverse or layer.directions > 1 for layer in layers):
            raise UserError(
                "the autoregressive objective needs a backbone that reads forwards only, or it would see what it "
                "predicts: set model.traversal = unidirectional"
            )
        if any(isinstance(module, nn.Conv2d) for module in backbone.blocks.modules()):
            raise UserError(
                "the autoregressive objective cannot use a convolution on the grid, which sees patches to come: set "
                "model.conv = causal1d, or none"
            )
        if backbone.patch_embed.proj.stride != backbone.patch_embed.proj.kernel_size:
            raise UserError("the autoregressive objective cannot use overlapping patches: leave out the stride")
    elif not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{type(backbone).__name__} does not read patches in order: the autoregressive objective needs a vil_* "
            "model or one of timm's plain vision transformers (vit_*)"
        )
