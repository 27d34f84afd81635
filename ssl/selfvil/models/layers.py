"""The building blocks of Vision-LSTM.

Alkin et al., "Vision-LSTM: xLSTM as Generic Vision Backbone" (2024), version 2: a 3 × 3 depthwise convolution, biases
everywhere, and blocks in pairs, the second of which scans the image from its last token to its first. Version 1 differs
in a causal convolution along the sequence and in fewer biases. Layers of the published ablations scan in both
directions, or rows and columns in both directions.

No tensor of tokens is flipped. The published network flips the tokens and convolves the flipped grid. A kernel rotated
by 180° (a causal one: flipped and padded on the right) and an mLSTM that starts at the end give the same result.

Shapes: B images, L tokens of the sequence (kept patches and extra tokens), C channels of the block, E = 2·C inside it,
h heads. Where tokens stand: `selfvil.models.layout`.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from selfvil.models.convolution import convolve, depthwise_conv
from selfvil.models.layout import TokenLayout
from selfvil.ops import fused, linear, mlstm
from selfvil.ops.cpu import fused as cpu_fused
from selfvil.ops.cpu import gated as cpu_gated
from selfvil.ops.cpu import products as cpu_products
from selfvil.ops.mlstm import OVERRIDE, gaps

EXPANSION = 2
NUM_HEADS = 4
QKV_BLOCK = 4
"""Width of the diagonal blocks in the projections to q, k and v."""
MERGED_BLOCK = 32
"""Maximum width of the blocks that are multiplied: few products that include zeros are faster than many small ones."""
MERGED_BLOCK_CONV = 16
"""The same where the blocks are the groups of a convolution."""


class ResidualLayerNorm(nn.Module):
    """LayerNorm over the last axis; its weight is stored minus 1, so that weight decay pulls it to 1."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, float]:
        """Weight minus 1, bias and eps."""
        return self.weight, self.bias, self.eps


class HeadNorm(ResidualLayerNorm):
    """LayerNorm over each head, whose results are concatenated: (B, h, L, E/h) to (B, L, E)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        weight = (1 + self.weight).to(x.dtype)
        return x * weight if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, weight)


class Linear(nn.Linear):
    """`nn.Linear`, faster in float32 on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BlockDiagonalLinear(nn.Module):
    """A linear map by a block-diagonal matrix, with blocks of width `QKV_BLOCK`, and the split into heads.

    The weight is (E / QKV_BLOCK, QKV_BLOCK, QKV_BLOCK), as published.
    """

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) to (B, h, L, E/h)."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # Takes half the time of matrix products. oneDNN's convolution reads groups of channels in place, on a grid
            # of one row; its bfloat16 products first copy each group, and then copy the result.
            weight = self.merged_weight(MERGED_BLOCK_CONV)
            y = F.conv2d(x.mT.unsqueeze(2), weight.flatten(0, 1)[..., None, None], self.bias, groups=len(weight))
            return y.squeeze(2).mT.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2).contiguous()
        weight = self.merged_weight(MERGED_BLOCK)
        groups, width, _ = weight.shape
        y = x.reshape(-1, groups, width).transpose(0, 1)  # (groups, B·L, width)
        y = y @ weight.mT if self.bias is None else torch.baddbmm(self.bias.view(groups, 1, width), y, weight.mT)
        y = y.view(NUM_HEADS, groups // NUM_HEADS, *x.shape[:2], width)
        return y.permute(2, 0, 3, 1, 4).flatten(3)

    def merged_weight(self, max_width: int) -> Tensor:
        """The same map with larger blocks that include zeros, (E / W, W, W); W <= `max_width` divides a head width."""
        head_dim = len(self.weight) * QKV_BLOCK // NUM_HEADS
        width = max(w for w in range(QKV_BLOCK, max_width + 1, QKV_BLOCK) if head_dim % w == 0)
        small = self.weight.view(-1, width // QKV_BLOCK, QKV_BLOCK, QKV_BLOCK)
        diagonal = torch.diag_embed(small.permute(0, 2, 3, 1))  # (E / W, out, in, W / QKV_BLOCK, W / QKV_BLOCK)
        return diagonal.permute(0, 3, 1, 4, 2).reshape(-1, width, width)

    def folded_into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, E) and bias (O,) of the product of this map and a linear map with `weight` (O, E)."""
        blocks = weight.unflatten(1, (-1, QKV_BLOCK))
        bias = weight.new_zeros(len(weight)) if self.bias is None else weight @ self.bias
        return torch.einsum("ogi,gij->ogj", blocks, self.weight).flatten(1), bias


class GatedScan(nn.Module):
    """One mLSTM scan in one direction: convolution, projections, mLSTM, per-head norm and skip.

    Args:
        inner: width E of the tokens.
        conv: one of `selfvil.models.convolution.CONVS`.
        bias: of the projections and the norm; the convolution and the gates always have one.
    """

    def __init__(self, inner: int, *, conv: str | None = "2d", bias: bool = True) -> None:
        super().__init__()
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
        """Initialise as published: small-init with the width outside the block, forget gates near 1."""
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(proj.weight, std=math.sqrt(2 * EXPANSION / (5 * self.skip.numel())))
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, NUM_HEADS))

    def scan(
        self,
        x: Tensor,
        layout: TokenLayout,
        reverse: bool,
        gate: Tensor | None = None,
        forget_gate_recorder: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Sequence x (B, L, E) to the same shape, scanned from its last token if `reverse`; times SiLU of `gate`.

        `forget_gate_recorder` is called with the forget gates' pre-activations (B, h, L).
        """
        native = not (on_gpu := fused.applies(x)) and cpu_fused.applies(x, NUM_HEADS)
        kernels = fused if on_gpu else cpu_fused
        fuse = on_gpu or native
        if fuse and isinstance(self.conv, nn.Conv2d) and layout.compact_grid is None:
            on_grid = layout.places_grid, reverse, layout.placed if on_gpu else layout.places
            conv = kernels.conv_silu(x, self.conv.weight, self.conv.bias, *on_grid)
        else:
            conv = F.silu(x if self.conv is None else convolve(self.conv, x, layout, reverse=reverse))
        if fuse:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            weights, biases = [p.weight for p in projections], [p.bias for p in projections]
            q, k, v, i, f = kernels.project(conv, x, weights, biases, *self.gate_weights())
        else:
            i, f = self.gates(conv, x)
            q, k, v = self.q_proj(conv), self.k_proj(conv), self.v_proj(x)
        if forget_gate_recorder is not None:
            forget_gate_recorder(f)
        h = mlstm(q, k, v, i, f, reverse=reverse, positions=layout.scan_positions)
        if fuse:
            norm = self.outnorm
            return kernels.norm_skip_gate(h, conv, gate, norm.weight, norm.bias, self.skip, norm.eps)
        h = torch.addcmul(self.outnorm(h), self.skip.to(conv.dtype), conv)
        return h if gate is None else h * F.silu(gate)

    def gates(self, conv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations (B, h, L) of the input and the forget gate, in float32 or better.

        Biases are added after the conversion to float32: the forget gate's are large compared to the rest.
        """
        conv_weight, x_weight, bias = self.gate_weights()
        gates = F.linear(conv, conv_weight) + F.linear(x, x_weight)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)) + bias
        i, f = gates.transpose(1, 2).chunk(2, dim=1)
        return i, f

    def gate_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (2 h, E) of both gates for the convolved and for the plain branch, and their bias (2 h,).

        The gates are linear in q, k and v, and these are linear in the branches (B, L, E): with the weights multiplied
        first, q, k and v need not be loaded from memory again.
        """
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        bias = torch.cat([self.igate.bias, self.fgate.bias])
        (wq, bq), (wk, bk), (wv, bv) = (
            proj.folded_into(w) for proj, w in zip((self.q_proj, self.k_proj, self.v_proj), weight.chunk(3, dim=1))
        )
        return wq + wk, wv, bias + bq + bk + bv


class ViLLayer(GatedScan):
    """The mLSTM layer of Vision-LSTM: up-projection, convolution, mLSTM, gate, down-projection.

    Between the projections there may be several scans, whose results are summed. As published, each scan after the
    first has parameters of its own, or shares those of the first.

    Args:
        dim: width C of the tokens, a multiple of 8.
        reverse: scan from the last token to the first.
        directions: 1, 2 (both directions) or 4 (rows and columns, in both directions).
        shared: all directions share parameters.
        conv: one of `selfvil.models.convolution.CONVS`.
        bias: of projections and norms, as in version 2; the convolution and the gates always have one.
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
        self.forget_gate_recorder: Callable[[int, Tensor], None] | None = None  # set by `selfvil.diagnostics.gates`
        self.proj_up = Linear(dim, 2 * inner, bias=bias)
        self.further = nn.ModuleList(  # the scans after the first; the name is that of the checkpoints
            GatedScan(inner, conv=conv, bias=bias) for _ in range(0 if shared else directions - 1)
        )
        self.proj_down = Linear(inner, dim, bias=bias)
        nn.init.normal_(self.proj_up.weight, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.proj_down.weight, std=2 / (num_blocks or 1) / math.sqrt(dim))
        if bias:
            nn.init.zeros_(self.proj_up.bias)
            nn.init.zeros_(self.proj_down.bias)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Sequence x (B, L, C) to the same shape."""
        x, gate = self.proj_up(x).chunk(2, dim=-1)
        recorder = self.forget_gate_recorder
        record = [recorder and partial(recorder, direction) for direction in range(self.directions)]
        h = self.scan(x, layout, self.reverse, gate if self.directions == 1 else None, record[0])
        if self.directions > 1:
            scans = [self, *(self.further or 3 * [self])]
            h = h + scans[1].scan(x, layout, not self.reverse, None, record[1])
            if self.directions == 4:
                x = layout.to_columns(x)
                down, up = (
                    scans[number].scan(x, layout.columns, number == 3, None, record[number]) for number in (2, 3)
                )
                h = h + layout.to_rows(down + up)
            h = h * F.silu(gate)
        return self.proj_down(h)

    def runs_native(self, x: Tensor, layout: TokenLayout) -> bool:
        """Whether `add_native` supports tokens x (B, L, C)."""
        return (
            self.directions == 1
            and self.forget_gate_recorder is None
            and isinstance(self.conv, nn.Conv2d)
            and layout.compact_grid is None
            and self.skip.numel() % (16 * NUM_HEADS) == 0
            and native_linear(x, self.proj_up, self.proj_down)
        )

    def add_native(
        self, x: Tensor, layout: TokenLayout, norm: ResidualLayerNorm, scale: Tensor | None, *down: Tensor | None
    ) -> Tensor:
        """x (B, L, C) plus `scale` (B,) times the layer of norm(x), with weight and bias `down`, by native kernels."""
        assert self.conv is not None
        positions = layout.scan_positions
        return cpu_gated.gated_layer(
            x, scale, None if positions is None else gaps(positions, self.reverse).float(),
            layout.places, layout.places_grid,
            norm=norm.arguments, up=(self.proj_up.weight, self.proj_up.bias), conv=(self.conv.weight, self.conv.bias),  # type: ignore[arg-type]
            projections=[(p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj)],
            gates=(self.igate.weight, self.fgate.weight, self.igate.bias, self.fgate.bias),
            head_norm=self.outnorm.arguments, skip=self.skip, down=down, reverse=self.reverse,  # type: ignore[arg-type]
        )  # fmt: skip


def native_linear(x: Tensor, *maps: nn.Module) -> bool:
    """Whether native kernels replace these maps of tokens x, which are not of other types, by LoRA for example, and
    the mLSTM."""
    return (
        all(type(linear) is Linear for linear in maps)
        and cpu_products.applies(x, *(linear.weight for linear in maps))  # type: ignore[arg-type]
        and os.environ.get(OVERRIDE) in (None, "", "native")
    )


def residual_factors(
    x: Tensor, linear: nn.Linear, layer_scale: nn.Module, drop_path: nn.Module
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Factors (B,) of stochastic depth, None for 1, and weight and bias of `linear` times LayerScale."""
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if isinstance(layer_scale, LayerScale):
        weight = layer_scale.gamma.unsqueeze(1) * weight
        bias = None if bias is None else layer_scale.gamma * bias
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return None, weight, bias
    return drop_path(x.new_ones(len(x), 1, 1)).flatten(), weight, bias
