"""Vision-LSTM (ViL), a timm model.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024), version 2: patches, learned positions, pairs of
mLSTM blocks that read the image forwards and backwards, and a classifier on the first and last token.

The grid of tokens is a value of the forward pass: any image whose sides the patch divides will do. Positions are
resampled to the grid where it differs from the one they were made for.

Shapes: B images, H × W tokens, N = H·W, K kept ones, C channels.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from selfvil.models.layers import Grid, ResidualLayerNorm, ViLBlockPair
from selfvil.models.masking import gather_tokens
from selfvil.models.pooling import POOLINGS, pooled_dim


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


def resample_positions(pos_embed: Tensor, grid: Grid) -> Tensor:
    """Positions (1, H, W, C) on another grid, by bicubic interpolation; smoothed only where the grid shrinks.

    Growing is interpolated as in the published code, whose fine-tuned checkpoints rely on it.
    """
    old = tuple(pos_embed.shape[1:3])
    if old == tuple(grid):
        return pos_embed
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    shrinks = grid[0] < old[0] or grid[1] < old[1]
    x = pos_embed.to(dtype).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(grid), mode="bicubic", antialias=shrinks)
    return x.permute(0, 2, 3, 1).to(pos_embed.dtype)


# Names of version 2 in the order of their replacement: first those inside the published files, brought to those of the
# published modules, then these brought to ours.
_PUBLISHED_NAMES = [
    (r"\.xlstm\.", ".layer."),
    (r"xlstm\.", ""),
    (r"\.xlstm_norm\.", ".norm."),
    (r"\.conv1d\.", ".conv."),
    (r"^post_blocks_norm\.", "norm."),
    (r"^head\.0\.", "legacy_norm."),
    (r"^head\.1\.", "head."),
    (r"^pos_embed\.embed$", "pos_embed"),
    (r"^legacy_norm\.", "fc_norm."),
    (r"\.rowwise_from_top_left\.", ".first."),
    (r"\.rowwise_from_bot_right\.", ".second."),
    (r"\.mlstm_cell\.", "."),
    (r"\.learnable_skip$", ".skip"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionLSTM) -> dict[str, Tensor]:
    """Bring a state dict to the names and the grid of `model`.

    Takes our own, that of the published VisionLSTM2 module, and the content of the published version-2 files
    (`{"state_dict": ...}` with other names). Positions are resampled to the grid of `model`; the published norm after
    pooling is left out where `model` has none.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if "pos_embed" not in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    if isinstance(model.fc_norm, nn.Identity):
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("fc_norm.")}
    if "pos_embed" in state_dict:
        state_dict = {**state_dict, "pos_embed": resample_positions(state_dict["pos_embed"], model.grid_size)}
    return state_dict


def _our_name(name: str) -> str:
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    # The files count blocks, not pairs of them: blocks.3.norm is blocks.1.second.norm.
    return re.sub(
        r"^blocks\.(\d+)\.(?=norm|layer)",
        lambda m: f"blocks.{int(m[1]) // 2}.{('first', 'second')[int(m[1]) % 2]}.",
        name,
    )


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


_PUBLISHED = "https://ml.jku.at/research/vision_lstm/download/"

default_cfgs = generate_default_cfgs(
    {
        "vil_tiny_patch16_224.nxai_e800_in1k": _cfg(_PUBLISHED + "vil2_tiny16_e800_in1k.th"),
        "vil_tiny_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_tiny16_e400_in1k.th"),
        "vil_small_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_small16_e400_in1k.th"),
        "vil_base_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_base16_e400_in1k.th"),
        "vil_nano_patch4_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32)),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionLSTM:
    return build_model_with_cfg(
        VisionLSTM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _create_published(variant: str, pretrained: bool, **kwargs: Any) -> VisionLSTM:
    # The published weights were trained with a norm after Bilateral Concat; new networks go without. A configuration
    # that is no tag of ours comes from a folder or the hub, and says itself what it needs.
    published = pretrained and isinstance(kwargs.get("pretrained_cfg"), str | None)
    has_norm = published and kwargs.get("global_pool", "bilateral_concat") == "bilateral_concat"
    return _create(variant, pretrained, **{"fc_norm": has_norm, **kwargs})


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T: 6 M parameters, 1.5 GMAC at 224 px."""
    return _create_published("vil_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, **kwargs})


@register_model
def vil_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S: 23 M parameters, 5.1 GMAC at 224 px."""
    return _create_published("vil_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, **kwargs})


@register_model
def vil_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B: 89 M parameters, 18.6 GMAC at 224 px."""
    return _create_published("vil_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 12, **kwargs})


@register_model
def vil_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """A small ViL for 32 × 32 images and for tests; not a published size."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6}
    return _create("vil_nano_patch4_32", pretrained, **{**sizes, **kwargs})
