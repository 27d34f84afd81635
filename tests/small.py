"""Small networks and batches of random views, for tests of objectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

MODELS = ["vil_nano_patch4_32", "vit_tiny_patch16_224", "vil_mlp_nano_patch4_32"]
SIZE = (16, 24)
"""Of images, in pixels: 4 x 6 patches."""


@dataclass
class Views:
    """The attributes of a batch that objectives use."""

    views: list[Tensor]
    positions: Tensor


def network(name: str = MODELS[0], **kwargs) -> nn.Module:
    kwargs = {"embed_dim": 32, "depth": 2, "img_size": SIZE, "patch_size": 4, "num_classes": 0} | kwargs
    return timm.create_model(name, **kwargs | ({"num_heads": 2} if name.startswith("vit") else {}))


def random_views(sizes: Sequence[tuple[int, int]], count: int, *, first: int = 0, seed: int = 1) -> Views:
    """Views of these sizes of `count` of 20 samples, which do not depend on the first sample of the batch."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(20, 3, *size, generator=generator)[first : first + count] for size in sizes]
    return Views(views, torch.arange(first, first + count))


def nodes_before(y: Tensor) -> set[Any]:
    """The nodes of autograd that lead to y."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found
