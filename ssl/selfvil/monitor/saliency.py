"""What a network makes of an image, token by token: features as colours, and which tokens its readout listens to.

Shapes: B images, H × W patches, C channels, D width of the readout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfvil.models.heads import choose_readout, read_out

PROJECTIONS = 16


@torch.no_grad()
def pca_colours(backbone: nn.Module, images: Tensor) -> Tensor:
    """The three principal components of all patch features of `images` as red, green and blue: (B, 3, H, W) in [0, 1].

    One basis serves all images, so that a colour means the same in each. Each component is scaled to its 2nd and 98th
    percentile.
    """
    from sklearn.decomposition import PCA

    features = _patch_features(backbone, images).float().cpu()
    components = torch.from_numpy(PCA(3, random_state=0).fit_transform(features.flatten(0, 2).numpy())).float()
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.unflatten(0, features.shape[:3]).permute(0, 3, 1, 2)


def readout_saliency(backbone: Any, images: Tensor) -> Tensor:
    """How much the readout moves when the embedding of a patch does: (B, H, W), 1 for the largest of each image.

    That is the Frobenius norm of the derivative of the readout (Bilateral Concat for a Vision-LSTM) by each patch's
    embedding, from `PROJECTIONS` random directions (Hutchinson, 1989). The gradient of the readout's own norm would
    not do: after the final LayerNorm that norm hardly changes. Leaving tokens out would need a pass for each of them,
    and would move the ends that Bilateral Concat reads.
    """
    readout, _ = choose_readout(backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _embeddings(backbone) as embeddings:
        rows = read_out(backbone, images, readout).float()  # (B, D)
        (embedding,) = embeddings
        squares = torch.zeros(embedding.shape[:-1], device=images.device)
        for _ in range(PROJECTIONS):
            direction = torch.randn(rows.shape[1], generator=generator).to(rows)
            (slope,) = torch.autograd.grad((rows @ direction).sum(), embedding, retain_graph=True)
            squares += slope.float().square().sum(dim=-1)
    saliency = squares.sqrt().view(len(images), *backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    return saliency / saliency.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def _patch_features(backbone: Any, images: Tensor) -> Tensor:
    """Features of the patches alone on their grid, (B, H, W, C), after the final norm."""
    features = backbone.forward_features(images)
    if features.ndim == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    return patches.unflatten(1, backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))


@contextmanager
def _embeddings(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the patch embeddings of each pass are leaves, so that gradients stop at them, and stand in the list."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = backbone.get_submodule("patch_embed").register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
