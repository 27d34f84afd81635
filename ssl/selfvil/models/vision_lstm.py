"""Vision-LSTM (ViL), a timm model.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024): patches, learned positions, pairs of mLSTM blocks
that scan the image forwards and backwards, and a classifier on the first and last token. Version 2 is the default;
version 1 and the designs of the published ablations are arguments.

The grid of tokens is a value of the forward pass: any image size works whose sides are multiples of the patch.
Positions are resampled if the grid differs from the one they were made for.

Shapes: B images, H × W patches, N = H·W, K kept ones, R extra tokens (class token, registers), L = K + R tokens of the
sequence, C channels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from selfvil.models.blocks import TRAVERSALS, OverlappingPatchEmbed, ViLBlockPair
from selfvil.models.layers import ResidualLayerNorm
from selfvil.models.layout import Grid, TokenLayout, gather_tokens
from selfvil.models.pooling import CLASS_TOKEN_POOLINGS, POOLINGS, pooled_dim
from selfvil.models.positions import resample_positions, sincos_positions
from selfvil.models.published import checkpoint_filter_fn, is_published


class VisionLSTM(nn.Module):
    """The Vision-LSTM backbone and its classifier.

    Args:
        img_size: height and width in pixels (one number for both) for which positions are learned.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels; smaller than the patch, patches overlap. None takes the patch size.
        in_chans: channels of the images.
        num_classes: width of the classifier; 0 omits it.
        global_pool: a name from `selfvil.models.pooling.POOLINGS`, or "" for none. "middle_cls" and "token"
            add a class token.
        num_registers: learnable tokens inserted at even distances into the sequence; of a convolution on the grid, only
            the centre of the kernel is applied to them. global_pool = "registers" concatenates them.
        embed_dim: width C of the tokens.
        depth: number of block pairs; a half at the end is a single block, for published networks with an odd number
            of blocks.
        block: "gated", as published, or "mlp", which is faster (see `selfvil.models.mlp_block`).
        traversal: a name from `selfvil.models.blocks.TRAVERSALS`.
        conv: "2d", "causal1d" (version 1) or None; it precedes the mLSTM, or the whole block if it has an MLP.
        bias: of projections and norms in the blocks, and of the norm after them; False in version 1.
        norm_eps, fc_norm_eps: of the norm after the blocks and of `fc_norm`.
        fc_norm: a LayerNorm between pooling and classifier. None adds it when weights are loaded that have one, as the
            published files do.
        pos_embed: "learn", or "sincos" for fixed positions.
        pos_interpolation: how positions are resampled, see `selfvil.models.positions.INTERPOLATIONS`.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the positions are added.
        drop_path_rate: stochastic depth.
        drop_path_uniform: the same rate for every block, as published; else the rate rises linearly from 0 at the first
            pair.
        init_values: initial value of LayerScale; None omits LayerScale, as published.
        depth_scaled_init: divide the initial down-projections by the number of blocks, as in the paper that proposes
            this initialisation; the published networks were trained without it.
        block_options: further arguments of the blocks, see `selfvil.models.mlp_block.MLPBlock`.

    Attributes:
        gap_aware: each dropped patch between two kept ones makes the mLSTM forget once more. False by default; may be
            set at any time. Without dropped patches it changes nothing.
        compact_conv: convolutions place kept patches side by side, in a row or on a small grid, instead of at their
            positions in the image. False by default; may be set at any time. Without dropped patches it changes
            nothing.
    """

    output_fmt = "NHWC"
    pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "bilateral_concat",
        num_registers: int = 0,
        embed_dim: int = 192,
        depth: float = 12,
        block: str = "gated",
        traversal: str = "alternating",
        conv: str | None = "2d",
        bias: bool = True,
        norm_eps: float = 1e-6,
        fc_norm: bool | None = None,
        fc_norm_eps: float = 1e-5,
        pos_embed: str = "learn",
        pos_interpolation: str = "auto",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        init_values: float | None = None,
        depth_scaled_init: bool = False,
        **block_options: Any,
    ) -> None:
        super().__init__()
        if depth <= 0 or 2 * depth != int(2 * depth):
            raise ValueError(f"depth counts pairs of blocks: it must be a positive multiple of 0.5, got {depth}")
        if pos_embed not in ("learn", "sincos"):
            raise ValueError(f"pos_embed = {pos_embed!r} does not exist; choose one of: learn, sincos")
        class_token = global_pool in CLASS_TOKEN_POOLINGS
        if class_token and num_registers:
            raise ValueError(
                f"global_pool = {global_pool!r} uses a class token, which excludes registers: set num_registers to 0"
            )
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.num_registers = num_registers
        self.block = block
        self.num_prefix_tokens = 1 if class_token else num_registers
        self.head_hidden_size = pooled_dim(global_pool, embed_dim, num_registers)
        self.grad_checkpointing = False
        self.gap_aware = self.compact_conv = False
        self.pos_interpolation = pos_interpolation

        self.patch_embed = OverlappingPatchEmbed(img_size, patch_size, in_chans, embed_dim, stride)
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, embed_dim))
        else:
            self.register_buffer("pos_embed", sincos_positions(self.grid_size, embed_dim), persistent=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        num_pairs = math.ceil(depth)
        self.blocks = nn.ModuleList(
            ViLBlockPair(
                embed_dim,
                index=i,
                traversal=traversal,
                single=i + 1 > depth,
                block=block,
                drop_path=drop_path_rate if drop_path_uniform else drop_path_rate * i / max(num_pairs - 1, 1),
                init_values=init_values,
                conv=conv,
                bias=bias,
                num_blocks=int(2 * depth) if depth_scaled_init else None,
                **block_options,
            )
            for i in range(num_pairs)
        )
        scans = TRAVERSALS[traversal]
        self.scans_columns = scans.columns or scans.directions == 4
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(num_pairs)
        ]
        self.norm: nn.Module = ResidualLayerNorm(embed_dim, eps=norm_eps, bias=bias)
        self.fc_norm_eps = fc_norm_eps
        self.fc_norm_by_weights = fc_norm is None
        self.fc_norm = nn.LayerNorm(self.head_hidden_size, eps=fc_norm_eps) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()

        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # it has one
        for parameter in (self.pos_embed, self.cls_token, self.reg_token):
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, self.num_classes)
        nn.init.trunc_normal_(head.weight, std=2e-5)  # as in the fine-tuning of MAE
        nn.init.zeros_(head.bias)
        return head

    @property
    def grid_size(self) -> Grid:
        """Rows and columns of tokens for which positions are made: the grid of patches without overlap."""
        return self.patch_embed.grid_size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H·P, W·P) to class scores (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H·P, W·P) to normalised tokens on their grid, (B, H, W, C).

        With extra tokens: (B, R + N, C), extra tokens first.
        """
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        patches, extra = self._run_blocks(x.flatten(1, 2), grid, None)
        return patches.unflatten(1, grid) if extra is None else torch.cat([extra, patches], dim=1)

    def forward_tokens(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Run the blocks on patch embeddings, or only on the kept ones.

        Positions are added before any patch is dropped. Convolutions take kept patches at their positions on the grid
        and zeros elsewhere (but see `compact_conv`). Kept patches stay in the order of the full grid.

        Args:
            x: patch embeddings without positions, on the full grid, (B, N, C).
            grid: rows and columns of tokens, H × W = N.
            keep: ids (B, K) of the patches to keep, ascending; None keeps all.

        Returns:
            Patches after the final norm, (B, K, C), or (B, N, C) if `keep` is None; extra tokens are removed.
        """
        return self._run_blocks(x, grid, keep)[0]

    def _run_blocks(self, x: Tensor, grid: Grid, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches (B, K, C) and extra tokens (B, R, C), or None, after the final norm."""
        x, layout = self._embed(x, grid, keep)
        for block in self.blocks:
            x = self._run_block(block, x, layout)
        return layout.separate_extra(self.norm(x))

    def _embed(self, x: Tensor, grid: Grid, keep: Tensor | None) -> tuple[Tensor, TokenLayout]:
        """Patches (B, N, C) to the sequence of tokens (B, L, C) and its layout."""
        # Patches lie channel by channel in memory: all blocks get tokens in rows, and share one compiled graph.
        x = x.contiguous() + resample_positions(self.pos_embed, grid, self.pos_interpolation).flatten(1, 2)
        if keep is not None:
            x = gather_tokens(x, keep)
        x = self.pos_drop(x)
        layout = TokenLayout.of(
            x, grid, keep, num_extra=self.num_prefix_tokens,
            gap_aware=self.gap_aware, compact_conv=self.compact_conv, columns=self.scans_columns,
        )  # fmt: skip
        extra = self.reg_token if self.cls_token is None else self.cls_token
        if extra is not None:
            x = layout.insert_extra(x, extra.to(x.dtype).expand(x.shape[0], -1, -1))
        return x, layout

    def _run_block(self, block: nn.Module, x: Tensor, layout: TokenLayout) -> Tensor:
        return checkpoint(block, x, layout) if self.grad_checkpointing else block(x, layout)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The output of `forward_features` to class scores, or to the input of the classifier if `pre_logits`."""
        if self.global_pool:
            tokens = x.flatten(1, -2)
            extra, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            x = POOLINGS[self.global_pool](extra, patches)
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
        return_prefix_tokens: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Features after chosen block pairs, as timm's models return them.

        Args:
            x: images (B, in_chans, H·P, W·P).
            indices: the last n pairs if a number, the listed pairs, or all if None.
            norm: apply the final norm to each.
            stop_early: do not run the pairs after the last chosen one.
            output_fmt: "NCHW", "NHWC" or "NLC".
            intermediates_only: do not return the final features, those of `forward_features`.
            return_prefix_tokens: return pairs of features and extra tokens (B, R, C) if the network has extra tokens.

        Returns:
            The features of the chosen pairs; with the final features before them unless `intermediates_only`.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be NCHW, NHWC or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x, layout = self._embed(x.flatten(1, 2), grid, None)
        intermediates: list[Any] = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, layout)
            if index in take:
                y, prefix = layout.separate_extra(self.norm(x) if norm else x)
                if output_fmt != "NLC":
                    y = y.unflatten(1, grid)
                if output_fmt == "NCHW":
                    y = y.permute(0, 3, 1, 2).contiguous()
                intermediates.append((y, prefix) if return_prefix_tokens and prefix is not None else y)
        if intermediates_only:
            return intermediates
        patches, extra = layout.separate_extra(self.norm(x))
        return patches.unflatten(1, grid) if extra is None else torch.cat([extra, patches], dim=1), intermediates

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Features after block pairs, with the arguments of timm's and DINO's vision transformers.

        n: the last n pairs if a number, or the listed pairs. reshape: maps (B, C, H, W) instead of tokens (B, N, C).
        For the other arguments see `forward_intermediates`.
        """
        layers: Any = self.forward_intermediates(
            x, n if isinstance(n, int) else list(n), norm=norm, output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True, return_prefix_tokens=return_prefix_tokens,
        )  # fmt: skip
        return layers

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given pairs do not need; return their indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        if prune_head:
            self.fc_norm = nn.Identity().train(self.training)
            self.reset_classifier(0, "")
        return take

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Make positions for another image or patch size; learned positions are resampled from the current ones."""
        if isinstance(img_size, int):
            img_size = (img_size, img_size)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if isinstance(self.pos_embed, nn.Parameter):
            resampled = resample_positions(self.pos_embed.detach(), self.grid_size, self.pos_interpolation).clone()
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        else:
            self.pos_embed = sincos_positions(self.grid_size, self.embed_dim).to(self.pos_embed)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; also accepts the published files, and adds the norm after pooling if `fc_norm` is None.

        Raises UserError if a published file belongs to another network.
        """
        if is_published(state_dict):
            state_dict = checkpoint_filter_fn(state_dict, self)
        elif "fc_norm.weight" in state_dict and len(state_dict["fc_norm.weight"]) == self.head_hidden_size:
            self.add_fc_norm()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore
    def add_fc_norm(self) -> None:
        """Add the norm after pooling, unless it exists or `fc_norm` was False."""
        if self.fc_norm_by_weights and isinstance(self.fc_norm, nn.Identity):
            norm = nn.LayerNorm(self.head_hidden_size, eps=self.fc_norm_eps)
            self.fc_norm = norm.to(self.patch_embed.proj.weight).train(self.training)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier, or none for 0 classes; a new pooling, if any, drops `fc_norm` if the widths differ."""
        self.num_classes = num_classes
        if global_pool is not None:
            width = pooled_dim(global_pool, self.embed_dim, self.num_registers)
            if global_pool in CLASS_TOKEN_POOLINGS and self.cls_token is None:
                raise ValueError(f"global_pool = {global_pool!r} needs a class token, which this network does not have")
            if width != self.head_hidden_size:
                self.fc_norm = nn.Identity().train(self.training)
            self.global_pool, self.head_hidden_size = global_pool, width
        self.head = self._make_head().to(self.pos_embed).train(self.training)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, extra tokens, and parameters with one axis: norms (stored minus 1), LayerScale, skips, biases."""
        tokens = {"pos_embed", "cls_token", "reg_token"}
        return {name for name, param in self.named_parameters() if param.ndim <= 1 or name in tokens}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates; a block pair is one layer."""
        return {
            "stem": r"^pos_embed|^patch_embed|^cls_token|^reg_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
