"""What objectives and evaluations ask of a backbone, answered once for each family of architectures.

`adapt(backbone)` chooses the form: `ViLAdapter` for a `VisionLSTM`, `ViTAdapter` for timm's `VisionTransformer`,
`PatchlessAdapter` for networks without patches such as ConvNeXt and ResNet, and `BackboneAdapter` for any other timm
network. A form that does not support an operation raises a UserError. Supporting another family is one class and one
line in `adapt`. An adapter holds a reference to its backbone and nothing else: it costs nothing to make and is never
part of an objective's state.

Shapes: B images, R prefix tokens (class token, registers), N = H·W patches in row-major order, K kept patches, C
channels of a token, D width of a readout.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import Format, PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.layers import ViLLayer
from selfvil.models.layout import gather_tokens
from selfvil.models.mlp_block import MLSTMLayer
from selfvil.models.pooling import avg, bilateral_concat, middle_patch
from selfvil.models.positions import resample_positions
from selfvil.models.published import our_names
from selfvil.models.vision_lstm import VisionLSTM

READOUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bilateral_concat": lambda prefix, patches: bilateral_concat(patches),
    "mean": lambda prefix, patches: avg(patches),
    "first": lambda prefix, patches: patches[:, 0],
    "last": lambda prefix, patches: patches[:, -1],
    "middle_patch": lambda prefix, patches: middle_patch(patches),
    "first_last_mean": lambda prefix, patches: torch.cat([bilateral_concat(patches), avg(patches)], dim=1),
    "cls": lambda prefix, patches: prefix[:, 0],
    "cls_mean": lambda prefix, patches: torch.cat([prefix[:, 0], avg(patches)], dim=1),
    "registers": lambda prefix, patches: prefix.flatten(1),
    "registers_mean": lambda prefix, patches: torch.cat([prefix.flatten(1), avg(patches)], dim=1),
}
"""From prefix tokens (B, R, C) and patches (B, N, C) to one vector for each image, (B, D): one token, a mean, or
several of these concatenated."""

CLASSIFIERS = {"bilateral_concat": "bilateral_concat", "cls": "token", "registers": "registers", "mean": "avg"}
"""Readouts that a timm network's own classifier can have -> its argument `global_pool`."""


class BackboneAdapter:
    """Any timm network: its features, its readouts, and what its files hold. It can neither drop nor mask patches."""

    supports_any_img_size = False
    """Whether `enable_dynamic_img_size` works."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @property
    def name(self) -> str:
        """Class of the network, for messages."""
        return type(self.backbone).__name__

    # --- tokens ------------------------------------------------------------------------------------------------------

    @property
    def has_patches(self) -> bool:
        """Whether images are cut into patches of a fixed side, so that only multiples of it are valid image sizes."""
        return getattr(self.backbone, "patch_embed", None) is not None

    @property
    def token_dim(self) -> int:
        """Channels C of a token."""
        return int(self.backbone.num_features)

    @property
    def num_prefix_tokens(self) -> int:
        return int(getattr(self.backbone, "num_prefix_tokens", 0))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to features after the final norm, in the network's own format."""
        return self.backbone.forward_features(images)

    def split_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split what `forward_features` returns into prefix tokens (B, R, C), R may be 0, and patches (B, N, C).

        Raises UserError for features of any other shape than timm's tokens and maps.
        """
        if features.ndim == 4:
            patches = features.flatten(1, 2) if self._channels_last else features.flatten(2).mT
            return patches[:, :0], patches
        if features.ndim == 3:
            prefix, patches = features.tensor_split([self.num_prefix_tokens], dim=1)
            return prefix, patches
        raise UserError(
            f"{self.name} gives features of shape {list(features.shape)}; expected tokens "
            f"(B, N, C) or a map (B, H, W, C) or (B, C, H, W)."
        )

    def patch_grid(self, features: Tensor, images: Tensor) -> tuple[int, int] | None:
        """Rows and columns of patches in the `features` of `images`; None if the patches do not form a grid."""
        if features.ndim == 4:
            axis = 1 if self._channels_last else 2
            return features.shape[axis], features.shape[axis + 1]
        embed: Any = getattr(self.backbone, "patch_embed", None)
        if features.ndim != 3 or not hasattr(embed, "dynamic_feat_size"):
            return None
        height, width = embed.dynamic_feat_size(images.shape[-2:])
        return (height, width) if height * width == features.shape[1] - self.num_prefix_tokens else None

    @property
    def _channels_last(self) -> bool:
        return getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"

    # --- readouts ----------------------------------------------------------------------------------------------------

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token, which the readouts cls and cls_mean need."""
        return getattr(self.backbone, "cls_token", None) is not None

    @property
    def default_readout(self) -> str:
        """The readout that the architecture is designed for; pretraining and classifiers use it."""
        return "cls" if self.has_class_token else "mean"

    @property
    def frozen_readout(self) -> str:
        """The default readout for frozen features: the designed one and the mean of the patches, concatenated."""
        combined = {"mean": "mean", "bilateral_concat": "first_last_mean"}
        return combined.get(self.default_readout, f"{self.default_readout}_mean")

    def usable_readouts(self) -> list[str]:
        """Names of the readouts whose tokens the network has: cls... needs a class token, registers... registers.

        A ViT's registers are excluded: they are trained to hold information that no readout needs (Darcet et al.,
        "Vision Transformers Need Registers", 2024).
        """
        has = {"cls": self.has_class_token, "registers": bool(getattr(self.backbone, "num_registers", 0))}
        return [name for name in READOUTS if has.get(name.removesuffix("_mean"), True)]

    def resolve_readout(self, readout: str | None, key: str = "objective.readout") -> str:
        """`readout`, or the default one for None.

        key: the recipe key that the readout comes from. Raises UserError for an unknown readout, or one whose token the
        network lacks.
        """
        if readout is None:
            return self.default_readout
        usable = self.usable_readouts()
        if readout not in usable:
            raise UserError(f"{key} = {readout!r} is not possible with {self.name}; choose one of: {', '.join(usable)}")
        return readout

    def classifier_readouts(self) -> list[str]:
        """Readouts that a classifier of this network can have: the default one first, and the mean of the patches."""
        return list(dict.fromkeys([self.default_readout, "mean"]))

    def readout_dim(self, readout: str) -> int:
        """Width D of a readout."""
        token = torch.empty(1, 1, self.token_dim)
        return READOUTS[readout](token.expand(1, max(self.num_prefix_tokens, 1), -1), token).shape[1]

    def read_out(self, images: Tensor, readout: str) -> Tensor:
        """Images (B, in_chans, height, width) to vectors (B, D), after the final norm, in the dtype of computation.

        Raises UserError for a network without token features.
        """
        return READOUTS[readout](*self.split_tokens(self.forward_features(images)))

    def last_blocks(self, images: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Prefix tokens and patches, as of `split_tokens`, after each of the last `count` blocks and the final norm.

        First to last, so the last ones are those of `forward_features`; fewer where the network has fewer blocks, and
        one for a network whose blocks give no tokens of one width. A ViL block is a pair of layers.
        """
        return [self.split_tokens(self.forward_features(images))]

    # --- image size --------------------------------------------------------------------------------------------------

    def enable_dynamic_img_size(self) -> None:
        """Make the network take images of any size that its patches divide; its parameters stay the same.

        Raises UserError for an architecture that cannot.
        """
        raise UserError(
            f"{self.name} cannot take crops of several sizes: use a vil_* model, one of timm's plain "
            f"vision transformers (vit_*), or a network without patches, such as convnext_tiny"
        )

    # --- dropped and masked patches ----------------------------------------------------------------------------------

    def token_grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches for images whose height and width are the last two entries of `image_size`."""
        raise self._no_tokens()

    def encode_kept(self, images: Tensor, keep: Tensor, with_prefix: bool = False) -> Tensor:
        """Encode only some patches; positions are added before the others are dropped.

        Args:
            images: (B, in_chans, height, width).
            keep: ids (B, K) of the patches to keep, ascending, int64.
            with_prefix: also return a transformer's prefix tokens, before the patches.

        Returns:
            Tokens of the kept patches (B, K, C), or (B, R + K, C), after the final norm.
        """
        raise self._no_tokens()

    def encode_masked(self, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """As `masked_features`, but only the tokens of the patches, (B, N, C)."""
        features = self.masked_features(images, masked, mask_token)
        return features.flatten(1, -2)[:, -masked.shape[1] :]  # prefix tokens come first

    def masked_features(self, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """`forward_features` with the embeddings of masked patches replaced; positions are added afterwards.

        Args:
            images: (B, in_chans, height, width).
            masked: (B, N) bool, true where the patch is replaced.
            mask_token: (C,), the replacement.
        """
        raise self._no_tokens()

    def _no_tokens(self) -> UserError:
        return UserError(
            f"{self.name} cannot leave tokens out: a masked objective needs a vil_* model or one of "
            "timm's plain vision transformers (vit_*)"
        )

    # --- causal encoding ---------------------------------------------------------------------------------------------

    def require_causal(self) -> None:
        """Raise UserError unless the network can encode each patch without those of later clusters."""
        raise self._not_causal()

    def latest_cluster(self, cluster_of: Tensor) -> Tensor:
        """The latest cluster (N,) that the token of each patch in `encode_causal` depends on; cluster_of is (N,)."""
        raise self._not_causal()

    def encode_causal(self, images: Tensor, cluster_of: Tensor) -> Tensor:
        """Tokens of the patches (B, N, C), each of which depends on no cluster after `latest_cluster`.

        cluster_of: (N,) int64, the cluster of each patch.
        """
        raise self._not_causal()

    def _not_causal(self) -> UserError:
        return UserError(
            f"{self.name} does not read patches in order: the autoregressive objective needs a vil_* "
            "model or one of timm's plain vision transformers (vit_*)"
        )

    # --- options of masked pretraining -------------------------------------------------------------------------------

    @property
    def decoder_block(self) -> str:
        """Kind of ViL block that suits a decoder of this network's tokens."""
        return "gated"

    def enable_gap_aware(self) -> None:
        """Apply one forget gate for each dropped patch. Raises UserError for a network without forget gates."""
        raise UserError(
            f"objective.gap_aware = true, but {self.name} does not forget: set it to false, or take a vil_* model"
        )

    def enable_compact_conv(self) -> None:
        """Convolve kept patches side by side. Raises UserError for a network without a convolution on its tokens."""
        raise UserError(
            f"objective.compact_conv = true, but this {self.name} has no convolution among its "
            "tokens: set it to false, or take a vil_* model with model.conv = 2d or causal1d"
        )

    # --- weights -----------------------------------------------------------------------------------------------------

    def backbone_weights(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Weights from a published file under this network's names, without the classifier."""
        classifier = getattr(self.backbone, "pretrained_cfg", {}).get("classifier", "head")
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        return {name: w for name, w in weights.items() if not name.startswith(tuple(f"{head}." for head in heads))}

    def resample_pos_embed(self, pos_embed: Tensor) -> Tensor:
        """Position embeddings that were learned for another image size, resampled to this network's grid."""
        return pos_embed

    def extra_arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`, beyond those that made this network, that a copy of it now needs."""
        return {}


class PatchlessAdapter(BackboneAdapter):
    """Networks without patches, such as ConvNeXt and ResNet: they take any image that is large enough."""

    supports_any_img_size = True

    def enable_dynamic_img_size(self) -> None:
        pass


class TokenAdapter(BackboneAdapter):
    """What ViL and ViT share: one token for each patch, which can be dropped or masked."""

    def token_grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        height, width = image_size[-2:]
        return self.backbone.patch_embed.dynamic_feat_size((height, width))

    def last_blocks(self, images: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        found = self.backbone.forward_intermediates(
            images, indices=min(count, len(self.backbone.blocks)), norm=True, output_fmt="NLC",
            intermediates_only=True, return_prefix_tokens=True,
        )  # fmt: skip
        pairs = (each if isinstance(each, tuple) else (each, each[:, :0]) for each in found)
        return [(prefix, patches) for patches, prefix in pairs]

    def masked_features(self, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        def replace(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            return torch.where(masked.view(*embedded.shape[:-1], 1), mask_token.to(embedded.dtype), embedded)

        # A hook, because each backbone adds positions and prefix tokens in its own way after the patch embedding.
        hook = self.backbone.patch_embed.register_forward_hook(replace)
        try:
            return self.backbone.forward_features(images)
        finally:
            hook.remove()

    def extra_arguments(self) -> dict[str, Any]:
        # The default depends on the pooling, and loading weights may have added the norm to a VisionLSTM.
        return {"fc_norm": not isinstance(self.backbone.fc_norm, nn.Identity)}


class ViLAdapter(TokenAdapter):
    """`VisionLSTM`. It takes images of any size that its patches divide without being changed."""

    supports_any_img_size = True
    backbone: VisionLSTM

    def enable_dynamic_img_size(self) -> None:
        pass

    @property
    def default_readout(self) -> str:
        """The first and last token, since together they depend on the whole image whatever the direction of a scan;
        or the class token or the registers, if the network is built with that pooling."""
        if self.has_class_token:
            return "cls"
        return "registers" if self.backbone.global_pool == "registers" else "bilateral_concat"

    def encode_kept(self, images: Tensor, keep: Tensor, with_prefix: bool = False) -> Tensor:
        return self._encode(images, keep)

    def _encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.backbone.patch_embed(images)
        return self.backbone.forward_tokens(x.flatten(1, 2), (x.shape[1], x.shape[2]), keep)

    def require_causal(self) -> None:
        layers = [module for module in self.backbone.modules() if isinstance(module, ViLLayer | MLSTMLayer)]
        if any(layer.reverse or layer.directions > 1 for layer in layers):
            raise UserError(
                "the autoregressive objective needs a backbone that reads forwards only, or its input would contain "
                "what it predicts: set model.traversal = unidirectional"
            )
        if any(isinstance(module, nn.Conv2d) for module in self.backbone.blocks.modules()):
            raise UserError(
                "the autoregressive objective cannot use a convolution on the grid, whose kernel covers later patches: "
                "set model.conv = causal1d, or none"
            )
        if self.backbone.patch_embed.proj.stride != self.backbone.patch_embed.proj.kernel_size:
            raise UserError("the autoregressive objective cannot use overlapping patches: leave out the stride")

    def latest_cluster(self, cluster_of: Tensor) -> Tensor:
        return cluster_of.cummax(dim=0).values  # a recurrence depends on all patches before it

    def encode_causal(self, images: Tensor, cluster_of: Tensor) -> Tensor:
        return self._encode(images)

    @property
    def decoder_block(self) -> str:
        return self.backbone.block

    def enable_gap_aware(self) -> None:
        self.backbone.gap_aware = True

    def enable_compact_conv(self) -> None:
        if not any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in self.backbone.blocks.modules()):
            super().enable_compact_conv()
        self.backbone.compact_conv = True

    def backbone_weights(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        parts = {f"{name}.": self.backbone.get_submodule(name) for name in ("head", "fc_norm")}
        absent = tuple(prefix for prefix, part in parts.items() if not part.state_dict())
        return {name: value for name, value in our_names(weights).items() if not name.startswith(absent)}

    def resample_pos_embed(self, pos_embed: Tensor) -> Tensor:
        if pos_embed.ndim != 4:
            return pos_embed
        return resample_positions(pos_embed, self.backbone.grid_size, self.backbone.pos_interpolation)


class ViTAdapter(TokenAdapter):
    """timm's `VisionTransformer`, for comparison."""

    backbone: VisionTransformer

    @property
    def supports_any_img_size(self) -> bool:  # type: ignore[override]  # hybrids with another embedding do not
        return isinstance(self.backbone.patch_embed, PatchEmbed)

    def enable_dynamic_img_size(self) -> None:
        """Change the network to what `dynamic_img_size=True` would have built."""
        if not self.supports_any_img_size:
            super().enable_dynamic_img_size()
        embed: Any = self.backbone.patch_embed
        self.backbone.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript alone
        embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC

    def encode_kept(self, images: Tensor, keep: Tensor, with_prefix: bool = False) -> Tensor:
        vit, prefix = self.backbone, self.num_prefix_tokens
        x = vit._pos_embed(vit.patch_embed(images))
        x = vit.norm_pre(torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1))
        x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x)
        return vit.norm(x)[:, 0 if with_prefix else prefix :]

    def require_causal(self) -> None:
        pass  # an attention mask makes it causal

    def latest_cluster(self, cluster_of: Tensor) -> Tensor:
        return cluster_of

    def encode_causal(self, images: Tensor, cluster_of: Tensor) -> Tensor:
        # Prefix tokens, which precede all clusters, attend to each other only.
        prefix = self.num_prefix_tokens
        order = torch.cat([cluster_of.new_full((prefix,), -1), cluster_of])
        return self.backbone.forward_features(images, attn_mask=order <= order.unsqueeze(1))[:, prefix:]

    def resample_pos_embed(self, pos_embed: Tensor) -> Tensor:
        vit, prefix = self.backbone, 0 if self.backbone.no_embed_class else self.num_prefix_tokens
        if math.isqrt(patches := pos_embed.shape[1] - prefix) ** 2 != patches:  # timm resamples square grids only
            return pos_embed
        return resample_abs_pos_embed(pos_embed, list(vit.patch_embed.grid_size), num_prefix_tokens=prefix)


def adapt(backbone: nn.Module) -> BackboneAdapter:
    """The adapter of a backbone: the one place that tells architectures apart."""
    if isinstance(backbone, VisionLSTM):
        return ViLAdapter(backbone)
    if isinstance(backbone, VisionTransformer):
        return ViTAdapter(backbone)
    if getattr(backbone, "patch_embed", None) is None and hasattr(backbone, "forward_features"):
        return PatchlessAdapter(backbone)
    return BackboneAdapter(backbone)
