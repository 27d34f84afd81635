"""Projection heads: from one vector for each image to what an objective compares. They are dropped after pretraining.

Shapes: B images, D features of an image, K outputs or prototypes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.objectives import distributed


class ProjectionHead(nn.Module):
    """Three linear layers to a bottleneck, then its cosine with K prototypes (Caron et al., "DINO", 2021, appendix C).

    With `norm_last_layer` all prototypes have length 1; without it, lengths are learned, which the authors find better
    and less stable. The normalisation is explicit because modules with torch's old `weight_norm`, which lightly's head
    uses, cannot be deep-copied into a teacher.
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
        # torch's initialisation of a linear layer. The scale of a row has no effect on the output, but a larger row
        # turns less in an optimizer step.
        nn.init.kaiming_uniform_(self.last_layer, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) to logits (B, K): cosines, from -1 to 1, times the prototypes' lengths."""
        x = F.normalize(self.mlp(x).float(), dim=-1)
        prototypes = F.normalize(self.last_layer.float(), dim=-1) * self.last_layer_length
        return F.linear(x, prototypes)


class BatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy, 2015) with the statistics of the batches of all processes together.

    It has no running statistics: the head is dropped after pretraining and never evaluated. torch's SyncBatchNorm only
    works on GPUs. Processes must have batches of equal size.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D), float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - distributed.mean(x.mean(dim=0))
        variance = distributed.mean(centred.square().mean(dim=0))
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class MLPHead(nn.Module):
    """Three linear layers with batch norm and ReLU between them: the projector of LeJEPA and others."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) to vectors (B, K), in the dtype of computation."""
        return self.mlp(x)
