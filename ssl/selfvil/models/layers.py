"""The building blocks of Vision-LSTM.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024), version 2: a 3 × 3 depthwise convolution, biases
everywhere, and blocks in pairs of which the second reads the image backwards. Version 1 differs in a causal convolution
along the sequence and in fewer biases. Layers of the published ablations read both ways, or rows and columns both ways.

No tensor is flipped for that. The published network flips the tokens and convolves the flipped grid; without the flip
the same comes of a kernel turned by 180° (a causal one: turned and padded on the right) and of an mLSTM that reads
from the end.

Shapes: B images, N = H·W patches on the full grid, K tokens of the sequence (kept patches, and extra tokens if there
are any), C channels of the block, E = 2·C inside it, h heads.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.models.convolution import convolve, depthwise_conv
from selfvil.models.order import Columns, Grid, steps_of
from selfvil.ops import fused, linear, mlstm

EXPANSION = 2
NUM_HEADS = 4
QKV_BLOCK = 4
"""Width of the diagonal blocks that the projections to q, k and v consist of."""
MERGED_BLOCK = 32
"""Most width of the blocks that are really multiplied: fewer products with zeros in them beat many tiny ones."""
MERGED_BLOCK_CONV = 16
"""The same where they are the groups of a convolution."""


class ResidualLayerNorm(nn.Module):
    """LayerNorm over the last axis whose weight is stored as its distance from 1, so that decay would pull it to 1."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)


class HeadNorm(ResidualLayerNorm):
    """The same for each head apart, and heads put back together: (B, h, N, E/h) to (B, N, E)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        weight = (1 + self.weight).to(x.dtype)
        return x * weight if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, weight)


class Linear(nn.Linear):
    """`nn.Linear`, faster in float32 on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BlockDiagonalLinear(nn.Module):
    """A linear map in which each `QKV_BLOCK` neighbouring channels mix among themselves, and the split into heads.

    The weight is (E / QKV_BLOCK, QKV_BLOCK, QKV_BLOCK), as published.
    """

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, h, N, E/h)."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # In half the time of products: oneDNN's convolutions read groups of channels where they lie, in a grid of
            # one row, while its products of bfloat16 copy each group first, and copy what comes out to all.
            weight = self.merged_weight(MERGED_BLOCK_CONV)
            y = F.conv2d(x.mT.unsqueeze(2), weight.flatten(0, 1)[..., None, None], self.bias, groups=len(weight))
            return y.squeeze(2).mT.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2).contiguous()
        weight = self.merged_weight(MERGED_BLOCK)
        groups, width, _ = weight.shape
        y = x.reshape(-1, groups, width).transpose(0, 1)  # (groups, B·N, width)
        y = y @ weight.mT if self.bias is None else torch.baddbmm(self.bias.view(groups, 1, width), y, weight.mT)
        y = y.view(NUM_HEADS, groups // NUM_HEADS, *x.shape[:2], width)
        return y.permute(2, 0, 3, 1, 4).flatten(3)

    def merged_weight(self, most: int) -> Tensor:
        """The same map with larger, partly empty blocks: (E / W, W, W), of a width W <= `most` that cuts no head."""
        head_dim = len(self.weight) * QKV_BLOCK // NUM_HEADS
        width = max(w for w in range(QKV_BLOCK, most + 1, QKV_BLOCK) if head_dim % w == 0)
        small = self.weight.view(-1, width // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK)
        diagonal = torch.diag_embed(small.permute(0, 2, 3, 1))  # (E / W, out, in, W / QKV_BLOCK, W / QKV_BLOCK)
        return diagonal.permute(0, 3, 1, 4, 2).reshape(-1, width, width)

    def folded_into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, E) and bias (O,) of this map followed by a linear one with `weight` (O, E)."""
        blocks = weight.unflatten(1, (-1, QKV_BLOCK))
        bias = weight.new_zeros(len(weight)) if self.bias is None else weight @ self.bias
        return torch.einsum("ogi,gij->ogj", blocks, self.weight).flatten(1), bias


class Reader(nn.Module):
    """One reading of a sequence: convolution, mLSTM, per-head norm and skip.

    Args:
        inner: width E of the tokens.
        conv: one of `selfvil.models.convolution.CONVS`.
        bias: of the projections and the norm; convolution and gates always have one.
    """

    def __init__(self, inner: int, *, conv: str | None = "2d", bias: bool = True) -> None:
        super().__init__()
        self.gap_aware = self.compact_conv = False
        self.conv = depthwise_conv(conv, inner)
        self.q_proj = BlockDiagonalLinear(inner, bias)
        self.k_proj = BlockDiagonalLinear(inner, bias)
        self.v_proj = BlockDiagonalLinear(inner, bias)
        self.igate = nn.Linear(3 * inner, NUM_HEADS)
        self.fgate = nn.Linear(3 * inner, NUM_HEADS)
        self.outnorm = HeadNorm(inner, bias=bias)
        self.skip = nn.Parameter(torch.ones(inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: small-init with the width outside the block, a forget gate that starts open."""
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(proj.weight, std=math.sqrt(2 * EXPANSION / (5 * self.skip.numel())))
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, NUM_HEADS))

    def read(
        self,
        x: Tensor,
        grid: Grid,
        keep: Tensor | None,
        places: Tensor | None,
        reverse: bool,
        gate: Tensor | None = None,
        on_forget_gates: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Sequence x (B, K, E) to the same shape, read from its last token if `reverse`; times SiLU of a gate.

        `on_forget_gates` is called with the forget gates' pre-activations (B, h, K).
        """
        fuse = fused.applies(x)
        if fuse and isinstance(self.conv, nn.Conv2d) and keep is None and places is None:
            conv = fused.conv_silu(x, self.conv.weight, self.conv.bias, grid, reverse)  # type: ignore[arg-type]
        else:
            conv = F.silu(self.convolve(x, grid, keep, places, reverse))
        if fuse:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            weights, biases = [p.weight for p in projections], [p.bias for p in projections]
            q, k, v, i, f = fused.project(conv, x, weights, biases, *self.gate_weights())
        else:
            i, f = self.gates(conv, x)
            q, k, v = self.q_proj(conv), self.k_proj(conv), self.v_proj(x)
        if on_forget_gates is not None:
            on_forget_gates(f)
        steps = steps_of(keep, places, grid[0] * grid[1]) if self.gap_aware and keep is not None else None
        h = mlstm(q, k, v, i, f, reverse=reverse, positions=steps)
        if fuse:
            norm = self.outnorm
            return fused.norm_skip_gate(h, conv, gate, norm.weight, norm.bias, self.skip, norm.eps)
        h = torch.addcmul(self.outnorm(h), self.skip.to(conv.dtype), conv)
        return h if gate is None else h * F.silu(gate)

    def convolve(self, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None, reverse: bool) -> Tensor:
        """Depthwise convolution of tokens (B, K, E), or x itself if there is none."""
        if self.conv is None:
            return x
        return convolve(self.conv, x, grid, keep, places, reverse=reverse, compact=self.compact_conv)

    def gates(self, conv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations (B, h, K), float32 or better, of the input and the forget gate.

        Biases are added after the step up to float32: the forget gate's are large beside what the tokens add.
        """
        conv_weight, x_weight, bias = self.gate_weights()
        gates = F.linear(conv, conv_weight) + F.linear(x, x_weight)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)) + bias
        i, f = gates.transpose(1, 2).chunk(2, dim=1)
        return i, f

    def gate_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (2 h, E) of both gates for the convolved and for the plain branch, and their bias (2 h,).

        The gates are linear in q, k and v, and these in the branches (B, K, E), so that folding the weights saves
        reading q, k, v once more.
        """
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        bias = torch.cat([self.igate.bias, self.fgate.bias])
        (wq, bq), (wk, bk), (wv, bv) = (
            proj.folded_into(w) for proj, w in zip((self.q_proj, self.k_proj, self.v_proj), weight.chunk(3, dim=1))
        )
        return wq + wk, wv, bias + bq + bk + bv


class ViLLayer(Reader):
    """The mLSTM layer of Vision-LSTM: up-projection, convolution, mLSTM, gate, down-projection.

    Between the projections the sequence may be read more than once, and what is read is summed: as published, each
    further reading has parameters of its own, or shares those of the first.

    Args:
        dim: width C of the tokens, a multiple of 8.
        reverse: read the tokens from the last to the first.
        directions: 1, 2 (both ways) or 4 (rows and columns, both ways).
        shared: all directions share parameters.
        conv: one of `selfvil.models.convolution.CONVS`.
        bias: of projections and norms, as in version 2; convolution and gates always have one.
        num_blocks: layers in the network, for the scale of the down-projection; None takes 1, as published.
    """

    def __init__(
        self,
        dim: int,
        *,
        reverse: bool = False,
        directions: int = 1,
        shared: bool = False,
        conv: str | None = "2d",
        bias: bool = True,
        num_blocks: int | None = None,
    ) -> None:
        inner = EXPANSION * dim
        if inner % (NUM_HEADS * QKV_BLOCK):
            raise ValueError(f"dim must be a multiple of {NUM_HEADS * QKV_BLOCK // EXPANSION}, got {dim}")
        super().__init__(inner, conv=conv, bias=bias)
        self.reverse = reverse
        self.directions = directions
        self.on_forget_gates: Callable[[int, Tensor], None] | None = None  # see `selfvil.monitor.gates`
        self.proj_up = Linear(dim, 2 * inner, bias=bias)
        self.further = nn.ModuleList(
            Reader(inner, conv=conv, bias=bias) for _ in range(0 if shared else directions - 1)
        )
        self.proj_down = Linear(inner, dim, bias=bias)
        nn.init.normal_(self.proj_up.weight, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.proj_down.weight, std=2 / (num_blocks or 1) / math.sqrt(dim))
        if bias:
            nn.init.zeros_(self.proj_up.bias)
            nn.init.zeros_(self.proj_down.bias)

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` is None), to the same shape.

        `places` says which tokens of the sequence are extra ones (see `selfvil.models.order`).
        """
        x, gate = self.proj_up(x).chunk(2, dim=-1)
        record = [self.on_forget_gates and partial(self.on_forget_gates, scan) for scan in range(self.directions)]
        h = self.read(x, grid, keep, places, self.reverse, gate if self.directions == 1 else None, record[0])
        if self.directions > 1:
            readers = [self, *(self.further or 3 * [self])]
            h = h + readers[1].read(x, grid, keep, places, not self.reverse, None, record[1])
            if self.directions == 4:
                columns = Columns(x, grid, keep, places)
                x = columns.from_rows(x)
                down, up = (
                    readers[scan].read(x, columns.grid, columns.keep, columns.places, scan == 3, None, record[scan])
                    for scan in (2, 3)
                )
                h = h + columns.to_rows(down + up)
            h = h * F.silu(gate)
        return self.proj_down(h)
