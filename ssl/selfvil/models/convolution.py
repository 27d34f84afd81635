"""Depthwise convolutions of tokens: 3 × 3 on the grid, or causal along the sequence (version 1).

For a scan from the last token to the first the kernel is flipped, not the tokens: the kernel is small.

Shapes: B images, L tokens of the sequence (kept patches and extra tokens), E channels. Where tokens stand:
`selfvil.models.layout`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.models.layout import TokenLayout

CONVS = ("2d", "causal1d", "none", None)
"""3 × 3 on the grid, 4 tokens along the sequence, or no convolution. "none" is None, for timm.create_model, which drops
arguments that are None."""


def depthwise_conv(kind: str | None, dim: int) -> nn.Conv2d | nn.Conv1d | None:
    """The convolution of `kind`, one of `CONVS`. Raises ValueError for another."""
    if kind == "2d":
        return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
    if kind == "causal1d":
        return nn.Conv1d(dim, dim, kernel_size=4, padding=3, groups=dim)
    if kind in CONVS:
        return None
    raise ValueError(f"conv = {kind!r} does not exist; choose one of: {', '.join(map(repr, CONVS))}")


def convolve(conv: nn.Conv2d | nn.Conv1d, x: Tensor, layout: TokenLayout, *, reverse: bool = False) -> Tensor:
    """Tokens x (B, L, E) to the same shape, with zeros in place of dropped patches.

    `reverse` flips the kernel: the result is that of flipping the sequence, convolving it, and flipping it back.
    """
    if isinstance(conv, nn.Conv2d):
        return _convolve_grid(conv, x, layout, reverse)
    return _convolve_sequence(conv, x, layout, reverse)


def _convolve_grid(conv: nn.Conv2d, x: Tensor, layout: TokenLayout, reverse: bool) -> Tensor:
    """3 × 3 on the grid. Extra tokens have no neighbours there: the centre of the kernel is applied to them."""
    patches, extra = layout.separate_extra(x)
    weight = conv.weight.flip(2, 3) if reverse else conv.weight
    # From channels-last tokens to NCHW and back only the strides change, not the memory.
    patches = layout.to_grid(patches).permute(0, 3, 1, 2)
    patches = F.conv2d(patches, weight, conv.bias, padding=conv.padding, groups=conv.groups)
    patches = layout.from_grid(patches.permute(0, 2, 3, 1))
    if extra is None:
        return patches
    extra = torch.addcmul(conv.bias, extra, conv.weight[:, 0, 1, 1])  # type: ignore[arg-type]  # it has a bias
    return layout.insert_extra(patches, extra)


def _convolve_sequence(conv: nn.Conv1d, x: Tensor, layout: TokenLayout, reverse: bool) -> Tensor:
    """Each token and the three before it in the order of the scan, extra tokens among them."""
    index = None if layout.compact_grid is not None else layout.full_index
    x = x if index is None else index.scatter(x)
    weight, padding = conv.weight.flip(2) if reverse else conv.weight, conv.kernel_size[0] - 1
    x = F.conv1d(x.mT, weight, conv.bias, padding=padding, groups=conv.groups)
    x = (x[..., padding:] if reverse else x[..., :-padding]).mT
    return x if index is None else index.gather(x)
