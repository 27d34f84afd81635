"""Tokens dropped, grid kept: what a masked objective needs of a backbone.

`keep` (B, K) int64 always holds ascending token ids, so that what is left is still in reading order.

Shapes: B images, N = H·W tokens on the full grid, K kept ones, C channels.
"""

from collections.abc import Sequence

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.vil import VisionLSTM


def keep_from_noise(noise: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the tokens with the smallest noise; `noise` is (B, N). Ties go to the first."""
    return noise.argsort(dim=1, stable=True)[:, :num_keep].sort(dim=1).values


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens (B, K, C) of x (B, N, C)."""
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, keep: Tensor, fill: Tensor, num_tokens: int) -> Tensor:
    """Put kept tokens x (B, K, C) back at their places among `num_tokens`, with `fill` everywhere else.

    Args:
        x: kept tokens (B, K, C).
        keep: their ids (B, K).
        fill: what stands where nothing was kept: (C,), or anything that broadcasts to (B, N, C).
        num_tokens: N.

    Returns:
        (B, N, C) in the dtype of x, differentiable in x and fill.
    """
    canvas = fill.to(x.dtype).expand(x.shape[0], num_tokens, x.shape[-1])
    return canvas.scatter(1, keep.unsqueeze(-1).expand_as(x), x)


def token_grid(backbone: nn.Module, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tokens for an image whose height and width are the last two entries of `image_size`."""
    height, width = image_size[-2:]
    return _tokens_only(backbone).patch_embed.dynamic_feat_size((height, width))


def encode_kept(backbone: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """Encode only the kept patches of images (B, 3, H·P, W·P); returns their tokens (B, K, C), final norm included.

    Works for `VisionLSTM` and, for comparison, for timm's `VisionTransformer`, whose prefix tokens (class, registers)
    pass through the blocks and are cut off at the end. Positions are added before anything is dropped.

    Raises:
        UserError: any other architecture.
    """
    backbone = _tokens_only(backbone)
    if isinstance(backbone, VisionLSTM):
        x = backbone.patch_embed(images)
        return backbone.forward_tokens(x.flatten(1, 2), tuple(x.shape[1:3]), keep)

    prefix = backbone.num_prefix_tokens
    x = backbone._pos_embed(backbone.patch_embed(images))
    x = backbone.norm_pre(torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1))
    x = checkpoint_seq(backbone.blocks, x) if backbone.grad_checkpointing else backbone.blocks(x)
    return backbone.norm(x)[:, prefix:]


def _tokens_only(backbone: nn.Module) -> VisionLSTM | VisionTransformer:
    if not isinstance(backbone, VisionLSTM | VisionTransformer):
        raise UserError(
            f"{type(backbone).__name__} cannot leave tokens out: a masked objective needs a vil_* model or one of "
            "timm's plain vision transformers (vit_*)"
        )
    return backbone
