"""From a backbone to what an objective compares: one vector an image, and its projection onto prototypes.

Shapes: B images, P prefix tokens (class token, registers), N patches in reading order, C channels, K prototypes.
"""

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn
from torch.distributed import nn as distributed_nn

from selfvil.errors import UserError
from selfvil.models.pooling import avg, bilateral_concat, middle_patch
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
"""From prefix tokens (B, P, C) and patches (B, N, C) to one vector an image, (B, C) or several of them side by side."""


def has_class_token(backbone: nn.Module) -> bool:
    """Whether the first prefix token is a class token, which the readouts called cls... need."""
    return getattr(backbone, "cls_token", None) is not None


def usable_readouts(backbone: nn.Module) -> list[str]:
    """Names of the readouts whose tokens `backbone` has: a class token for cls..., and registers alone for registers.

    A ViT's registers are left out: they were trained to hold what no readout should see (Darcet et al., "Vision
    Transformers Need Registers", 2024).
    """
    has = {"cls": has_class_token(backbone), "registers": bool(getattr(backbone, "num_registers", 0))}
    return [name for name in READOUTS if has.get(name.removesuffix("_mean"), True)]


def choose_readout(backbone: nn.Module, readout: str | None = None) -> tuple[str, int]:
    """Name and width of a readout for `backbone`; for None, the one its architecture is made for.

    A Vision-LSTM reads from both ends, so its first and last token have seen the whole image, unless it was built to
    be read from registers or a class token; a ViT has a class token.
    Raises UserError for an unknown readout, or one whose token the backbone lacks.
    """
    if readout is None:
        readout = "cls" if has_class_token(backbone) else "mean"
        if isinstance(backbone, VisionLSTM) and readout == "mean":
            readout = "registers" if backbone.global_pool == "registers" else "bilateral_concat"
    usable = usable_readouts(backbone)
    if readout not in usable:
        raise UserError(
            f"objective.readout = {readout!r} is not possible with {type(backbone).__name__}; "
            f"choose one of: {', '.join(usable)}"
        )
    token = torch.empty(1, 1, int(backbone.num_features))  # type: ignore[arg-type]  # a number, in timm
    prefix = token.expand(1, max(int(getattr(backbone, "num_prefix_tokens", 0)), 1), -1)
    return readout, READOUTS[readout](prefix, token).shape[1]


def read_out(backbone: nn.Module, images: Tensor, readout: str) -> Tensor:
    """Images (B, in_chans, H·P, W·P) to vectors (B, D), after the backbone's final norm, in the dtype it computes in.

    Raises UserError for a model without token features.
    """
    features = backbone.forward_features(images)  # type: ignore[operator]  # every timm model has it
    return READOUTS[readout](*split_tokens(backbone, features))


def split_tokens(backbone: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward_features` gives to prefix tokens (B, P, C), of which there may be none, and patches (B, N, C).

    Raises UserError for features of any other shape than timm's tokens and maps.
    """
    if features.ndim == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        patches = features.flatten(1, 2) if channels_last else features.flatten(2).mT
        return patches[:, :0], patches
    if features.ndim == 3:
        prefix, patches = features.tensor_split([getattr(backbone, "num_prefix_tokens", 0)], dim=1)
        return prefix, patches
    raise UserError(
        f"{type(backbone).__name__} gives features of shape {list(features.shape)}; expected tokens "
        f"(B, N, C) or a map (B, H, W, C) or (B, C, H, W)."
    )


def patch_grid(backbone: nn.Module, features: Tensor, images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches in what `forward_features` gives for `images`; None if they have no grid."""
    if features.ndim == 4:
        axis = 1 if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else 2
        return features.shape[axis], features.shape[axis + 1]
    embed: Any = getattr(backbone, "patch_embed", None)
    if features.ndim != 3 or not hasattr(embed, "dynamic_feat_size"):
        return None
    height, width = embed.dynamic_feat_size(images.shape[-2:])
    patches = features.shape[1] - getattr(backbone, "num_prefix_tokens", 0)
    return (height, width) if height * width == patches else None


def take_any_size(backbone: nn.Module) -> None:
    """Let `backbone` take images of any size that its patches divide, with positions resampled to their grid.

    A `VisionLSTM` does so by itself, as do networks without patches, such as ConvNeXt. One of timm's plain vision
    transformers is changed to what `dynamic_img_size=True` would have made of it; its parameters stay the same. Raises
    UserError for any other architecture.
    """
    embed: Any = getattr(backbone, "patch_embed", None)
    if isinstance(backbone, VisionLSTM) or (embed is None and hasattr(backbone, "forward_features")):
        return
    if not isinstance(backbone, VisionTransformer) or not isinstance(embed, PatchEmbed):
        raise UserError(
            f"{type(backbone).__name__} cannot take crops of several sizes: use a vil_* model, one of timm's plain "
            f"vision transformers (vit_*), or a network without patches, such as convnext_tiny"
        )
    backbone.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript alone
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC


class ProjectionHead(nn.Module):
    """Three linear layers down to a bottleneck, and its cosine with K prototypes (Caron et al., "DINO", 2021, app. C).

    With `norm_last_layer` all prototypes have length 1; without, lengths are learned: better and less stable, the
    authors say. The normalisation is written out because torch's old `weight_norm`, on which lightly's head rests,
    does not let itself be deep-copied into a teacher.

    Raises UserError for prototypes that the machine's memory cannot hold twice, for the student and for a teacher.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        needed, free = 2 * 4 * out_dim * bottleneck_dim, psutil.virtual_memory().available
        if needed > free:
            raise UserError(
                f"objective.out_dim = {out_dim} prototypes of {bottleneck_dim} numbers take {needed / 2**30:,.1f} GiB "
                f"in student and teacher, and {free / 2**30:,.1f} GiB are free: lower out_dim or bottleneck_dim"
            )
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        self.last_layer = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.last_layer_length = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # As torch starts a linear layer: its scale is not seen in the output, but sets how far a step turns the rows.
        nn.init.kaiming_uniform_(self.last_layer, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) to logits (B, K): cosines, from -1 to 1, times the prototypes' lengths."""
        x = F.normalize(self.mlp(x).float(), dim=-1)
        prototypes = F.normalize(self.last_layer.float(), dim=-1) * self.last_layer_length
        return F.linear(x, prototypes)


class BatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy, 2015) over the batches of all processes together, by the batch's own statistics.

    Without running ones: a head that is thrown away after pretraining has no use for them. torch's SyncBatchNorm works
    on GPUs alone. Processes must have batches of equal size.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D), float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - mean_of_processes(x.mean(dim=0))
        variance = mean_of_processes(centred.square().mean(dim=0))
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of what all processes call this with; gradients flow back to each of them."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x
    return distributed_nn.all_reduce(x) / distributed.get_world_size()


class MLPHead(nn.Module):
    """A perceptron of three linear layers with batch norm and ReLU between them: the projector of LeJEPA and others."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) to vectors (B, K), in the dtype it computes in."""
        return self.mlp(x)
