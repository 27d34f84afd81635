"""A fast block: an mLSTM at the width of the tokens, followed by an MLP.

The published block (`blocks.ViLBlock`) widens the tokens and computes everything around the mLSTM. This block is
divided like a transformer's, with the changes of xLSTM 7B (Beck et al., arXiv 2503.13427): queries and keys of half the
width, gates that are linear in the tokens and softly capped, a sigmoid output gate. A block of width C has the 12·C²
parameters of a transformer's. ViL's first author proposes the design (NX-AI/vision-lstm, issue 24); for images it was
not published before. With y = norm(x):

    x ← x + conv(x)                                     3 × 3 depthwise on the grid of tokens
    q, k, v = W y                                       of h heads
    i, f = cap · tanh((G y + b) / cap)
    x ← x + LayerScale(P (σ(O y) ∘ headnorm(mLSTM(q, k, v, i, f))))
    x ← x + LayerScale(MLP(norm(x)))

Every second block scans from the last token to the first. Neither tokens nor the kernel are flipped: the convolution
belongs to the block, not to a direction.

Shapes: B images, L tokens of the sequence (kept patches and extra tokens), C channels, h heads. Where tokens stand:
`selfvil.models.layout`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from selfvil.models.convolution import convolve, depthwise_conv
from selfvil.models.layers import HeadNorm, Linear, ResidualLayerNorm, native_linear, residual_factors
from selfvil.models.layout import TokenLayout
from selfvil.ops import fused, mlstm
from selfvil.ops.cpu import fused as cpu_fused
from selfvil.ops.cpu import layers as cpu_layers
from selfvil.ops.mlstm import gaps

HEAD_WIDTH = 64
"""Approximate width of a head where the number of heads is not given."""
MLPS: dict[str, int] = {"gelu": 1, "swiglu": 2}
"""Kinds of MLP, and the number of inputs of each hidden unit."""
OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


def default_heads(dim: int) -> int:
    """The number of heads whose width is nearest to `HEAD_WIDTH`, among those that divide `dim` into even widths."""
    possible = [heads for heads in range(1, dim // 2 + 1) if dim % (2 * heads) == 0] or [1]
    return min(possible, key=lambda heads: abs(math.log(dim / heads / HEAD_WIDTH)))


class MLPScan(nn.Module):
    """One mLSTM scan in one direction: projections to q, k, v and the gates, mLSTM, per-head norm.

    Args:
        dim: width C of the tokens.
        num_heads: h, a divisor of C.
        qk_ratio: width of q and k over that of v.
        gate_cap: bound of the gates' pre-activations; None leaves them unbounded.
        input_bias: initial bias of the input gate.
        bias: of the projection and the norm; the gates always have one.
    """

    def __init__(
        self, dim: int, *, num_heads: int, qk_ratio: float, gate_cap: float | None, input_bias: float, bias: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.gate_cap, self.input_bias = num_heads, gate_cap, input_bias
        self.qk_dim = num_heads * max(1, round(qk_ratio * dim / num_heads))
        self.qkv = Linear(dim, 2 * self.qk_dim + dim, bias=bias)
        self.gates = nn.Linear(dim, 2 * num_heads)
        self.outnorm = HeadNorm(dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small init; gates that do not depend on the tokens, with forget gate biases from 3 to 6."""
        _small_init(self.qkv)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[: self.num_heads] = self.input_bias
            self.gates.bias[self.num_heads :] = torch.linspace(3.0, 6.0, self.num_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens x (B, L, C) to q, k (B, h, L, D'), v (B, h, L, D), i and f (B, h, L); gates in float32 or better.

        The gates' biases are added after the conversion to float32: the forget gate's are large compared to the rest.
        """
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2).contiguous()
            for part in self.qkv(x).split([self.qk_dim, self.qk_dim, x.shape[-1]], dim=-1)
        )
        gates = F.linear(x, self.gates.weight)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32)) + self.gates.bias
        if self.gate_cap is not None:
            gates = self.gate_cap * torch.tanh(gates / self.gate_cap)
        i, f = gates.transpose(1, 2).chunk(2, dim=1)
        return q, k, v, i, f


class MLSTMLayer(nn.Module):
    """One or more mLSTM scans, whose sum is gated and projected.

    Scans after the first have parameters of their own, or share those of the first and its projections.

    Args:
        dim: width C of the tokens.
        reverse: scan from the last token to the first.
        directions: 1, 2 (both directions) or 4 (rows and columns, in both directions).
        shared: all directions share parameters.
        output_gate: a name from `OUTPUT_GATES`.
        bias: of projections and norms; the gates always have one.
        scan: further arguments of `MLPScan`.
    """

    def __init__(
        self, dim: int, *, reverse: bool, directions: int, shared: bool, output_gate: str, bias: bool, **scan: Any
    ) -> None:
        super().__init__()
        self.reverse, self.directions = reverse, directions
        self.forget_gate_recorder: Callable[[int, Tensor], None] | None = None  # set by `selfvil.diagnostics.gates`
        self.readings = nn.ModuleList(  # the scans; the name is that of the checkpoints
            MLPScan(dim, bias=bias, **scan) for _ in range(1 if shared else directions)
        )
        self.activation = OUTPUT_GATES[output_gate]
        self.output_gate = Linear(dim, dim, bias=bias)
        self.proj = Linear(dim, dim, bias=bias)
        _small_init(self.output_gate)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Sequence x (B, L, C) to the same shape."""
        h = self.scan(x, layout, range(min(self.directions, 2)))
        if self.directions == 4:
            h = h + layout.to_rows(self.scan(layout.to_columns(x), layout.columns, (2, 3)))
        return self.proj(h * self.activation(self.output_gate(x)))

    def scan(self, x: Tensor, layout: TokenLayout, directions: Sequence[int]) -> Tensor:
        """The sum over `directions`; odd ones run opposite to `reverse`."""
        shared = len(self.readings) == 1
        scans: list[Any] = [self.readings[0 if shared else direction] for direction in directions]
        projected = [scans[0].project(x)] * len(scans) if shared else [scan.project(x) for scan in scans]
        results = []
        for direction, scan, (q, k, v, i, f) in zip(directions, scans, projected, strict=True):
            if self.forget_gate_recorder is not None:
                self.forget_gate_recorder(direction, f)
            reverse = self.reverse ^ (direction % 2 == 1)
            h = mlstm(q, k, v, i, f, reverse=reverse, positions=layout.scan_positions)
            results.append(scan.outnorm(h))
        return results[0] if len(results) == 1 else results[0] + results[1]


class MLP(nn.Module):
    """Two linear maps with GELU, or SwiGLU (Shazeer, 2020, arXiv 2002.05202) with the same number of parameters."""

    def __init__(self, dim: int, ratio: float, kind: str, bias: bool) -> None:
        super().__init__()
        inputs = MLPS[kind]
        hidden = int(ratio * dim) if inputs == 1 else 8 * round(ratio * dim * 2 / 3 / 8)
        self.fc1 = Linear(dim, inputs * hidden, bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)
        self.is_gated = inputs == 2
        _small_init(self.fc1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not self.is_gated:
            return self.fc2(F.gelu(x))
        gate, x = x.chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * x)


class MLPBlock(nn.Module):
    """Convolution, mLSTM and MLP, each as a residual.

    Args:
        dim: width C of the tokens.
        reverse, directions, shared: the scans, see `MLSTMLayer`.
        drop_path: probability of skipping the mLSTM, and likewise the MLP, for a sample.
        init_values: initial value of LayerScale; None omits it.
        conv: the convolution before the mLSTM, one of `selfvil.models.convolution.CONVS`.
        bias: of projections and norms; the convolution and the gates always have one.
        num_blocks: layers in the network, for the scale of the projections back to the tokens; None takes 1.
        num_heads: a divisor of C; None takes heads of a width near 64.
        qk_ratio: width of q and k over that of v.
        mlp_ratio: hidden width of the MLP over C; SwiGLU takes two thirds of it, for the same number of parameters.
        mlp: "gelu" or "swiglu".
        output_gate: "sigmoid" or "silu".
        gate_cap: softly bounds the gates' pre-activations to ± this value; None leaves them unbounded.
        input_bias: initial bias of the input gate.

    Raises:
        ValueError: an argument is not one of its choices, or num_heads does not divide C.
    """

    def __init__(
        self,
        dim: int,
        *,
        reverse: bool = False,
        directions: int = 1,
        shared: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        conv: str | None = "2d",
        bias: bool = True,
        num_blocks: int | None = None,
        num_heads: int | None = None,
        qk_ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        output_gate: str = "sigmoid",
        gate_cap: float | None = 15.0,
        input_bias: float = -2.0,
    ) -> None:
        super().__init__()
        num_heads = default_heads(dim) if num_heads is None else num_heads
        for name, given, known in (("mlp", mlp, MLPS), ("output_gate", output_gate, OUTPUT_GATES)):
            if given not in known:
                raise ValueError(f"{name} = {given!r} does not exist; choose one of: {', '.join(known)}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide the width of the tokens, {dim}")
        for name, positive in (("qk_ratio", qk_ratio), ("mlp_ratio", mlp_ratio), ("gate_cap", gate_cap)):
            if positive is not None and positive <= 0:
                raise ValueError(f"{name} must be above 0, got {positive}")
        self.conv = depthwise_conv(conv, dim)
        self.norm1 = ResidualLayerNorm(dim, bias=bias)
        self.layer = MLSTMLayer(
            dim, reverse=reverse, directions=directions, shared=shared, output_gate=output_gate, bias=bias,
            num_heads=num_heads, qk_ratio=qk_ratio, gate_cap=gate_cap, input_bias=input_bias,
        )  # fmt: skip
        self.norm2 = ResidualLayerNorm(dim, bias=bias)
        self.mlp = MLP(dim, mlp_ratio, mlp, bias)
        self.ls1, self.ls2 = (nn.Identity() if init_values is None else LayerScale(dim, init_values) for _ in "12")
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        for projection in (self.layer.proj, self.mlp.fc2):
            _small_init(projection, 1 / (num_blocks or 1))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Sequence x (B, L, C) to the same shape."""
        x = self._convolve(x, layout)
        x = self._mix(x, layout)
        linear = self.mlp.fc1, self.mlp.fc2
        if not self.mlp.is_gated and native_linear(x, *linear):
            scale, weight, bias = residual_factors(x, linear[1], self.ls2, self.drop_path2)
            return cpu_layers.mlp(x, scale, self.norm2.arguments, (linear[0].weight, linear[0].bias), (weight, bias))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _convolve(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.conv is None:
            return x
        if isinstance(self.conv, nn.Conv2d) and layout.compact_grid is None:
            parameters, grid = (self.conv.weight, self.conv.bias), layout.places_grid
            if fused.adds_conv(x):
                return fused.add_conv(x, *parameters, grid, layout.placed)  # type: ignore[arg-type]  # it has a bias
            if cpu_fused.applies(x, 2):
                return cpu_fused.add_conv(x, *parameters, grid, layout.places)  # type: ignore[arg-type]
        # A convolution along the sequence has a direction, one on the grid has none.
        reverse = self.layer.reverse and isinstance(self.conv, nn.Conv1d)
        return x + convolve(self.conv, x, layout, reverse=reverse)

    def _mix(self, x: Tensor, layout: TokenLayout) -> Tensor:
        layer = self.layer
        scan: Any = layer.readings[0]
        linear = scan.qkv, layer.output_gate, layer.proj
        if (
            layer.directions == 1
            and layer.forget_gate_recorder is None
            and scan.outnorm.weight.numel() % (16 * scan.num_heads) == 0
            and native_linear(x, *linear)
        ):
            scale, weight, bias = residual_factors(x, layer.proj, self.ls1, self.drop_path)
            positions = layout.scan_positions
            return cpu_layers.mlstm_layer(
                x, scale, None if positions is None else gaps(positions, layer.reverse).float(), self.norm1.arguments,
                (scan.qkv.weight, scan.qkv.bias), (scan.gates.weight, scan.gates.bias),
                (layer.output_gate.weight, layer.output_gate.bias), scan.outnorm.arguments, (weight, bias),
                cap=scan.gate_cap, sigmoid=layer.activation is torch.sigmoid, reverse=layer.reverse,
            )  # fmt: skip
        return x + self.drop_path(self.ls1(layer(self.norm1(x), layout)))


def _small_init(linear: nn.Linear, scale: float = 1.0) -> None:
    """Weights with standard deviation sqrt(2 / (5 I)) for I inputs, as in xLSTM; biases 0."""
    nn.init.normal_(linear.weight, std=scale * math.sqrt(2 / (5 * linear.in_features)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
