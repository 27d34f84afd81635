"""Features of patches as colours, for pictures of what a network predicts.

Shapes: B images, N = H·W patches of the grid, C channels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.models.layout import Grid
from selfvil.objectives.base import ImageSpec


def principal_colours(features: Tensor, *others: Tensor) -> list[Tensor]:
    """The first three principal components of features (..., C) as red, green and blue, each (..., 3) in [0, 1].

    All are shown in the basis of `features`, and on its scale from the 2nd to the 98th percentile of each component, so
    that a colour has the same meaning in all of them. What is not finite counts as 0.
    """
    from sklearn.decomposition import PCA

    both = (features, *others)
    rows = [each.detach().flatten(0, -2).double().cpu().nan_to_num(0.0, 0.0, 0.0).numpy() for each in both]
    with np.errstate(invalid="ignore"):  # shares of a variance of 0, which are not used
        basis = PCA(min(3, *rows[0].shape), random_state=0).fit(rows[0])
    components = [torch.from_numpy(basis.transform(each)) for each in rows]
    low, high = torch.quantile(components[0], torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = [((each - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float() for each in components]
    return [
        F.pad(each, (0, 3 - each.shape[1])).unflatten(0, of.shape[:-1]).to(of.device) for each, of in zip(colours, both)
    ]


def feature_picture(
    images: Tensor, seen: Tensor, targets: Tensor, predicted: Tensor, shown: Tensor, grid: Grid, image: ImageSpec
) -> Tensor:
    """Rows of four as an RGB picture (3, B·height, 4·width) in [0, 1]: image, what the network sees of it, the features
    that it shall predict, and its predictions, as colours of one basis.

    Args:
        images: (B, channels, height, width), normalised.
        seen: (B, N) bool, the patches that the network sees.
        targets: features of every patch (B, N, C).
        predicted: predictions for every patch (B, N, C); only those of `shown` are used.
        shown: (B, N) bool, the patches that are predicted. Elsewhere the last two columns are black.
        grid: rows and columns of the patches.
        image: how images are shown.
    """
    size = images.shape[-2:]

    def on_pixels(values: Tensor) -> Tensor:
        """(B, N, c) to (B, c, height, width)."""
        return F.interpolate(values.float().mT.unflatten(2, grid), size)

    rgb = image.rgb(images)
    # The basis is that of the targets of every patch, because those of small blocks may be of one thing only.
    colours = principal_colours(targets, predicted)
    features = [on_pixels(each * shown.unsqueeze(-1)) for each in colours]
    rows = torch.cat([rgb, rgb * on_pixels(seen.unsqueeze(-1)), *features], dim=-1)
    return torch.cat(list(rows), dim=-2)
