"""Vision-LSTM (ViL), a timm model.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024), version 2: patches, learned positions, pairs of
mLSTM blocks that read the image forwards and backwards, and a classifier on the first and last token.

The grid of tokens is a value of the forward pass: any image whose sides the patch divides will do. Positions are
resampled to the grid where it differs from the one they were made for.

Shapes: B images, H × W tokens, N = H·W, K kept ones, C channels.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from selfvil.models.blocks import ViLBlockPair
from selfvil.models.layers import Grid, ResidualLayerNorm
from selfvil.models.masking import gather_tokens
from selfvil.models.pooling import POOLINGS, pooled_dim
from selfvil.models.positions import resample_positions


class VisionLSTM(nn.Module):
    """The Vision-LSTM backbone and its classifier.

    Args:
        img_size: height and width in pixels (one number for both) for which positions are learned.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "bilateral_concat", "bilateral_avg", "avg", or "" for none.
        embed_dim: width C of the tokens.
        depth: number of block pairs.
        fc_norm: a LayerNorm between pooling and classifier. The published checkpoints have one, as `legacy_norm`.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the positions are added.
        drop_path_rate: stochastic depth, the same for every block, as published.
        init_values: initial value of LayerScale; None leaves LayerScale out, as published.
        depth_scaled_init: start the down-projections smaller by the number of blocks, as the initialisation's source
            has it; the published networks were trained without.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "bilateral_concat",
        embed_dim: int = 192,
        depth: int = 12,
        fc_norm: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        depth_scaled_init: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = pooled_dim(global_pool, embed_dim)
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,  # type: ignore[arg-type]  # timm takes pairs too
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            ViLBlockPair(
                embed_dim,
                drop_path=drop_path_rate,
                init_values=init_values,
                num_blocks=2 * depth if depth_scaled_init else None,
            )
            for _ in range(depth)
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm: nn.Module = ResidualLayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(self.head_hidden_size) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()

        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # it has one
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, self.num_classes)
        nn.init.trunc_normal_(head.weight, std=2e-5)  # as MAE's fine-tuning starts its classifier
        nn.init.zeros_(head.bias)
        return head

    @property
    def grid_size(self) -> Grid:
        """Rows and columns of tokens for which positions are learned."""
        return self.patch_embed.grid_size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H·P, W·P) to class scores (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H·P, W·P) to normalised tokens on their grid, (B, H, W, C)."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        return self.forward_tokens(x.flatten(1, 2), grid).unflatten(1, grid)

    def forward_tokens(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Run the blocks on patch embeddings, or on the kept ones alone.

        Positions are added before any token is dropped; the convolutions see the kept tokens at their places on the
        grid and zeros elsewhere; the order of reading is that of the full grid.

        Args:
            x: patch embeddings without positions, on the full grid, (B, N, C).
            grid: rows and columns of tokens, H × W = N.
            keep: ids (B, K) of the tokens to keep, ascending; None keeps all.

        Returns:
            Tokens after the final norm, (B, K, C), or (B, N, C) if `keep` is None.
        """
        x = self._add_positions(x, grid, keep)
        for block in self.blocks:
            x = self._run_block(block, x, grid, keep)
        return self.norm(x)

    def _add_positions(self, x: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        x = x + resample_positions(self.pos_embed, grid).flatten(1, 2)
        if keep is not None:
            x = gather_tokens(x, keep)
        return self.pos_drop(x)

    def _run_block(self, block: nn.Module, x: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, x, grid, keep)
        return block(x, grid, keep)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, H, W, C) to class scores, or to what the classifier sees if `pre_logits`."""
        if self.global_pool:
            x = POOLINGS[self.global_pool](x.flatten(1, 2))
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen block pairs, as timm's models give them.

        Args:
            x: images (B, in_chans, H·P, W·P).
            indices: the last n pairs if a number, those listed, or all if None.
            norm: apply the final norm to each.
            stop_early: do not run the pairs after the last one asked for.
            output_fmt: "NCHW", "NHWC" or "NLC".
            intermediates_only: leave out the final features (B, H, W, C).
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be NCHW, NHWC or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = self._add_positions(x.flatten(1, 2), grid, None)
        intermediates = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, grid, None)
            if index in take:
                y = self.norm(x) if norm else x
                if output_fmt != "NLC":
                    y = y.unflatten(1, grid)
                if output_fmt == "NCHW":
                    y = y.permute(0, 3, 1, 2).contiguous()
                intermediates.append(y)
        if intermediates_only:
            return intermediates
        return self.norm(x).unflatten(1, grid), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what the given pairs do not need; returns their indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Learn positions for another image or patch size from now on, starting from the present ones resampled."""
        if isinstance(img_size, int):
            img_size = (img_size, img_size)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_positions(self.pos_embed.detach(), self.grid_size).clone()
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, or none for 0 classes; a new pooling if given, which drops `fc_norm` if widths differ."""
        self.num_classes = num_classes
        if global_pool is not None:
            width = pooled_dim(global_pool, self.embed_dim)
            if width != self.head_hidden_size:
                self.fc_norm = nn.Identity()
            self.global_pool, self.head_hidden_size = global_pool, width
        self.head = self._make_head().to(self.pos_embed)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, and everything with one axis: norms (stored as 1 + w), LayerScale, skips, biases."""
        return {name for name, param in self.named_parameters() if param.ndim <= 1} | {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates; a block pair is one layer."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
