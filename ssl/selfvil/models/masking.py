"""Tokens dropped, grid kept: what a masked objective needs of a backbone.

`keep` (B, K) int64 always holds ascending token ids, so that what is left is still in reading order.

Shapes: B images, N = H·W tokens on the full grid, K kept ones, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.errors import UserError


def keep_from_noise(noise: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the tokens with the smallest noise; `noise` is (B, N). Ties go to the first."""
    return noise.argsort(dim=1, stable=True)[:, :num_keep].sort(dim=1).values


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens (B, K, C) of x (B, N, C)."""
    return x.flatten(0, 1).index_select(0, _flat_ids(keep, x.shape[1])).unflatten(0, keep.shape)


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
    canvas = fill.to(x.dtype).expand(x.shape[0], num_tokens, x.shape[-1]).flatten(0, 1)
    return canvas.index_copy(0, _flat_ids(keep, num_tokens), x.flatten(0, 1)).unflatten(0, (-1, num_tokens))


def _flat_ids(keep: Tensor, num_tokens: int) -> Tensor:
    """Ids (B·K,) of the kept tokens with images end to end: whole rows move several times faster than by gather."""
    first = torch.arange(0, keep.shape[0] * num_tokens, num_tokens, device=keep.device)
    return (keep + first.unsqueeze(1)).flatten()


def token_grid(backbone: nn.Module, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tokens for images whose height and width are the last two entries of `image_size`.

    Raises UserError for an architecture that `encode_kept` does not take.
    """
    height, width = image_size[-2:]
    return _takes_tokens(backbone).patch_embed.dynamic_feat_size((height, width))


def encode_kept(backbone: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """Encode only the kept patches of images (B, chans, H·P, W·P); returns their tokens (B, K, C), final norm included.

    Works for any backbone with `forward_tokens`, as `VisionLSTM`, and, for comparison, for timm's `VisionTransformer`,
    whose prefix tokens (class, registers) pass through the blocks and are cut off at the end. Positions are added
    before anything is dropped.

    Raises:
        UserError: any other architecture.
    """
    encoder = _takes_tokens(backbone)
    if not isinstance(encoder, VisionTransformer):
        x = encoder.patch_embed(images)
        return encoder.forward_tokens(x.flatten(1, 2), (x.shape[1], x.shape[2]), keep)

    prefix = encoder.num_prefix_tokens
    x = encoder._pos_embed(encoder.patch_embed(images))
    x = encoder.norm_pre(torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1))
    x = checkpoint_seq(encoder.blocks, x) if encoder.grad_checkpointing else encoder.blocks(x)
    return encoder.norm(x)[:, prefix:]


def _takes_tokens(backbone: nn.Module) -> Any:
    if not hasattr(backbone, "forward_tokens") and not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{type(backbone).__name__} cannot leave tokens out: a masked objective needs a vil_* model or one of "
            "timm's plain vision transformers (vit_*)"
        )
    return backbone
