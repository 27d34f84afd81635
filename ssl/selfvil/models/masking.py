"""Tokens dropped or masked, grid kept: what a masked objective needs of a backbone, and the masks themselves.

`keep` (B, K) int64 always holds ascending token ids, so that what is left is still in reading order; `masked` (B, N)
bool is true where a patch is hidden.

Shapes: B images, N = H·W tokens on the full grid, K kept ones, R extra tokens (class, registers), C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.errors import UserError


def keep_from_noise(noise: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the tokens with the smallest noise; `noise` is (B, N). Ties go to the first."""
    return noise.argsort(dim=1, stable=True)[:, :num_keep].sort(dim=1).values


def random_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every patch by itself: MAE's mask."""
    return noise


def row_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whole rows of the grid, at random; the last one taken is cut where the count is full."""
    return noise[:, : grid[0]].repeat_interleave(grid[1], dim=1)


def block_scores(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rectangles laid over one another, as in BEiT (Bao et al., 2022), until the count is full.

    Each covers between a twelfth and a third of the grid, with sides in a ratio from 0.3 to 1 / 0.3. A patch is scored
    by the first rectangle that covers it, so that the last one is cut and the number of hidden patches is exact. As in
    BEiT, patches at the border are hidden less often. Four numbers make a rectangle; what none covers goes at random.
    """
    rows, columns = grid
    count = noise.shape[1] // 4
    if not count:
        return noise
    area, aspect, top, left = noise[:, : 4 * count].unflatten(1, (count, 4)).unsqueeze(-2).unbind(-1)  # (B, R, 1)
    area = rows * columns * (1 / 12 + area * (1 / 3 - 1 / 12))
    side = 0.3 ** (1 - 2 * aspect)  # uniform in the logarithm
    height = (area * side).sqrt().round().clamp(1, rows)
    width = (area / side).sqrt().round().clamp(1, columns)
    top, left = ((top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor())
    ids = torch.arange(rows * columns, device=noise.device)
    row, column = ids // columns, ids % columns
    covers = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (B, R, N)
    order = torch.arange(count, 0, -1, device=noise.device).view(-1, 1)
    scores = (covers * order).amax(dim=1)
    return torch.where(scores > 0, scores, noise)


MASKS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "random": random_scores,
    "block": block_scores,
    "row": row_scores,
}
"""What each kind of mask makes of uniform noise (B, N): scores (B, N), the highest of which are hidden."""


def sample_mask(kind: str, noise: Tensor, grid: tuple[int, int], num_hidden: int | Tensor) -> Tensor:
    """Masks (B, N), true where hidden, with exactly `num_hidden` hidden patches each.

    Args:
        kind: a name from `MASKS`.
        noise: uniform in [0, 1), (B, N), from `keyed_noise`, so that masks belong to samples and not to batches.
        grid: rows and columns of patches, H · W = N.
        num_hidden: one number for all images, or int64 (B,).
    """
    scores = MASKS[kind](noise, grid)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= noise.shape[1] - torch.as_tensor(num_hidden, device=noise.device).view(-1, 1)


def kept_ids(masked: Tensor, num_keep: int) -> Tensor:
    """Ids (B, num_keep), ascending, of the patches that `masked` (B, N) leaves; it must leave that many in each row."""
    return masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_keep]


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


def encode_kept(backbone: nn.Module, images: Tensor, keep: Tensor, with_prefix: bool = False) -> Tensor:
    """Encode only the kept patches of images (B, chans, H·P, W·P); returns their tokens (B, K, C), final norm included.

    Works for any backbone with `forward_tokens`, as `VisionLSTM`, and, for comparison, for timm's `VisionTransformer`,
    whose prefix tokens (class, registers) pass through the blocks and are cut off at the end, unless `with_prefix`
    asks for them: (B, R + K, C). Positions are added before anything is dropped.

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
    return encoder.norm(x)[:, 0 if with_prefix else prefix :]


def encode_masked(backbone: nn.Module, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """Encode all patches of images (B, chans, H·P, W·P), the masked ones as `mask_token`, for what is on the grid.

    Args:
        backbone: as for `encode_kept`.
        images: (B, chans, H·P, W·P).
        masked: (B, N) bool.
        mask_token: (C,), stands for the embedding of a masked patch; positions are added afterwards.

    Returns:
        Tokens of the patches (B, N, C), final norm included.

    Raises:
        UserError: as `encode_kept`.
    """
    features = masked_features(backbone, images, masked, mask_token)
    return features.flatten(1, -2)[:, -masked.shape[1] :]  # extra tokens come first, where there are any


def masked_features(backbone: nn.Module, images: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """As `encode_masked`, but all that `forward_features` gives, extra tokens included, for `forward_head` to read."""

    def replace(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return torch.where(masked.view(*embedded.shape[:-1], 1), mask_token.to(embedded.dtype), embedded)

    encoder = _takes_tokens(backbone)
    # A hook, because between the embedding and the blocks every backbone has its own way with positions and extra
    # tokens.
    hook = encoder.patch_embed.register_forward_hook(replace)
    try:
        return encoder.forward_features(images)
    finally:
        hook.remove()


def _takes_tokens(backbone: nn.Module) -> Any:
    if not hasattr(backbone, "forward_tokens") and not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{type(backbone).__name__} cannot leave tokens out: a masked objective needs a vil_* model or one of "
            "timm's plain vision transformers (vit_*)"
        )
    return backbone
