"""Maps of a network's features: their principal components as colours, and the influence of each patch on the readout.

Shapes: B images, H × W patches, C channels, D width of the readout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.colours import principal_colours

PROJECTIONS = 16


@torch.no_grad()
def pca_colours(backbone: nn.Module, images: Tensor) -> Tensor:
    """The first three principal components of all patch features as red, green and blue: (B, 3, H, W) in [0, 1].

    All images share one basis, so a colour has the same meaning in each.
    """
    (colours,) = principal_colours(_patch_features(backbone, images))
    return colours.permute(0, 3, 1, 2)


def readout_saliency(backbone: Any, images: Tensor) -> Tensor:
    """Sensitivity of the readout to the embedding of each patch: (B, H, W), divided by its maximum in each image.

    This is the Frobenius norm of the derivative of the readout (Bilateral Concat for a Vision-LSTM) with respect to the
    patch's embedding, estimated from `PROJECTIONS` random directions (Hutchinson, 1989). The gradient of the readout's
    norm is no alternative: after the final LayerNorm, the norm is almost constant. Occlusion of single tokens needs a
    forward pass for each, and changes the end tokens that Bilateral Concat uses.
    """
    adapter = adapt(backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _embeddings(backbone) as embeddings:
        rows = adapter.read_out(images, adapter.default_readout).float()  # (B, D)
        (embedding,) = embeddings
        squares = torch.zeros(embedding.shape[:-1], device=images.device)
        for _ in range(PROJECTIONS):
            direction = torch.randn(rows.shape[1], generator=generator).to(rows)
            (slope,) = torch.autograd.grad((rows @ direction).sum(), embedding, retain_graph=True)
            squares += slope.float().square().sum(dim=-1)
    saliency = squares.sqrt().view(len(images), *backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    return saliency / saliency.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def _patch_features(backbone: Any, images: Tensor) -> Tensor:
    """Features of the patches on their grid, (B, H, W, C), after the final norm, without prefix tokens.

    Raises UserError if the patches do not form a grid.
    """
    adapter = adapt(backbone)
    features = adapter.forward_features(images)
    grid = adapter.patch_grid(features, images)
    if grid is None:
        raise UserError(f"the patches of {adapter.name} do not form a grid")
    return adapter.split_tokens(features)[1].unflatten(1, grid)


@contextmanager
def _embeddings(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """In this context, the patch embeddings of each forward pass are detached, require gradients, and are collected."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = backbone.get_submodule("patch_embed").register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
