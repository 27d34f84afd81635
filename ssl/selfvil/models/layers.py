"""The building blocks of Vision-LSTM.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024), version 2: a 3 × 3 depthwise convolution, biases
everywhere, and blocks in pairs of which the second reads the image backwards.

No tensor is flipped for that. The published network flips the tokens and convolves the flipped grid; without the flip
the same comes of a kernel turned by 180° and of an mLSTM that reads from the end.

Shapes: B images, N = H·W tokens on the full grid, K kept ones, C channels of the block, E = 2·C inside it, h heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.models.masking import gather_tokens, scatter_tokens
from selfvil.ops import linear, mlstm

Grid = tuple[int, int]
"""Rows and columns of tokens."""

EXPANSION = 2
NUM_HEADS = 4
QKV_BLOCK = 4
"""Width of the diagonal blocks that the projections to q, k and v consist of."""
MERGED_BLOCK = 32
"""Most width of the blocks that are really multiplied: fewer products with zeros in them beat many tiny ones."""


class ResidualLayerNorm(nn.Module):
    """LayerNorm over the last axis whose weight is stored as its distance from 1, so that decay would pull it to 1."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)


class HeadNorm(ResidualLayerNorm):
    """The same for each head apart, and heads put back together: (B, h, N, E/h) to (B, N, E)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        return torch.addcmul(self.bias.to(x.dtype), x, (1 + self.weight).to(x.dtype))


class Linear(nn.Linear):
    """`nn.Linear`, faster in float32 on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BlockDiagonalLinear(nn.Module):
    """A linear map in which each `QKV_BLOCK` neighbouring channels mix among themselves, and the split into heads.

    The weight is (E / QKV_BLOCK, QKV_BLOCK, QKV_BLOCK), as published.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, h, N, E/h)."""
        weight = self.merged_weight()
        groups, width, _ = weight.shape
        bias = self.bias.view(groups, 1, width)
        y = torch.baddbmm(bias, x.reshape(-1, groups, width).transpose(0, 1), weight.mT)  # (groups, B·N, width)
        y = y.view(NUM_HEADS, groups // NUM_HEADS, *x.shape[:2], width)
        return y.permute(2, 0, 3, 1, 4).flatten(3)

    def merged_weight(self) -> Tensor:
        """The same map with larger, partly empty blocks: (E / W, W, W), of a width W that no head's border cuts."""
        head_dim = self.bias.numel() // NUM_HEADS
        width = max(w for w in range(QKV_BLOCK, MERGED_BLOCK + 1, QKV_BLOCK) if head_dim % w == 0)
        small = self.weight.view(-1, width // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK)
        diagonal = torch.diag_embed(small.permute(0, 2, 3, 1))  # (E / W, out, in, W / QKV_BLOCK, W / QKV_BLOCK)
        return diagonal.permute(0, 3, 1, 4, 2).reshape(-1, width, width)

    def folded_into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, E) and bias (O,) of this map followed by a linear one with `weight` (O, E)."""
        blocks = weight.unflatten(1, (-1, QKV_BLOCK))
        return torch.einsum("ogi,gij->ogj", blocks, self.weight).flatten(1), weight @ self.bias


class ViLLayer(nn.Module):
    """The mLSTM layer of Vision-LSTM: up-projection, convolution, mLSTM, gate, down-projection.

    Args:
        dim: width C of the tokens, a multiple of 8.
        reverse: read the tokens from the last to the first.
        num_blocks: layers in the network, for the scale of the down-projection; None takes 1, as published.
    """

    def __init__(self, dim: int, *, reverse: bool = False, num_blocks: int | None = None) -> None:
        super().__init__()
        inner = EXPANSION * dim
        if inner % (NUM_HEADS * QKV_BLOCK):
            raise ValueError(f"dim must be a multiple of {NUM_HEADS * QKV_BLOCK // EXPANSION}, got {dim}")
        self.dim = dim
        self.reverse = reverse
        self.num_blocks = num_blocks or 1
        self.proj_up = Linear(dim, 2 * inner)
        self.conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner)
        self.q_proj = BlockDiagonalLinear(inner)
        self.k_proj = BlockDiagonalLinear(inner)
        self.v_proj = BlockDiagonalLinear(inner)
        self.igate = nn.Linear(3 * inner, NUM_HEADS)
        self.fgate = nn.Linear(3 * inner, NUM_HEADS)
        self.outnorm = HeadNorm(inner)
        self.skip = nn.Parameter(torch.ones(inner))
        self.proj_down = Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: small-init, Wang-init for the way down, a forget gate that starts open."""
        small = math.sqrt(2 / (5 * self.dim))
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(module.weight, std=small)
            nn.init.zeros_(module.bias)
        nn.init.normal_(self.proj_down.weight, std=2 / self.num_blocks / math.sqrt(self.dim))
        nn.init.zeros_(self.proj_down.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, NUM_HEADS))

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` (B, K) is None), to the same shape."""
        x, gate = self.proj_up(x).chunk(2, dim=-1)
        conv = F.silu(self.convolve(x, grid, keep))
        i, f = self.gates(conv, x)
        h = mlstm(self.q_proj(conv), self.k_proj(conv), self.v_proj(x), i, f, reverse=self.reverse)
        h = torch.addcmul(self.outnorm(h), self.skip.to(conv.dtype), conv)
        return self.proj_down(h * F.silu(gate))

    def convolve(self, x: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """Depthwise 3 × 3 convolution of tokens (B, K, E) at their places on the grid, zeros where none was kept."""
        weight = self.conv.weight.flip(2, 3) if self.reverse else self.conv.weight
        if keep is not None:
            x = scatter_tokens(x, keep, x.new_zeros(()), grid[0] * grid[1])
        # Tokens last to channels last is a change of strides, not of memory.
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, self.conv.bias, padding=self.conv.padding, groups=self.conv.groups)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        return x if keep is None else gather_tokens(x, keep)

    def gates(self, conv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations (B, h, K), float32 or better, of the input and the forget gate.

        They are linear in q, k and v, and these in the convolved and the plain branch (B, K, E), so that folding the
        weights saves reading q, k, v once more. Biases are added after the step up to float32: the forget gate's are
        large beside what the tokens add.
        """
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        bias = torch.cat([self.igate.bias, self.fgate.bias])
        (wq, bq), (wk, bk), (wv, bv) = (
            proj.folded_into(w) for proj, w in zip((self.q_proj, self.k_proj, self.v_proj), weight.chunk(3, dim=1))
        )
        gates = F.linear(conv, wq + wk) + F.linear(x, wv)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)) + (bias + bq + bk + bv)
        i, f = gates.transpose(1, 2).chunk(2, dim=1)
        return i, f
