"""A block that is fast by design: an mLSTM at the width of the tokens, and an MLP after it.

The published block (`blocks.ViLBlock`) widens the tokens and does all of its work around the mLSTM. This one divides it
as a transformer does, with the changes of xLSTM 7B (Beck et al., arXiv 2503.13427): queries and keys of half the width,
gates that are linear in the tokens and capped softly, a sigmoid output gate. A block of width C has the 12·C²
parameters of a transformer's. ViL's first author names the design (NX-AI/vision-lstm, issue 24); for images it was not
published before. With y = norm(x):

    x ← x + conv(x)                                     3 × 3 depthwise on the grid of tokens
    q, k, v = W y                                       of h heads
    i, f = cap · tanh((G y + b) / cap)
    x ← x + LayerScale(P (σ(O y) ∘ headnorm(mLSTM(q, k, v, i, f))))
    x ← x + LayerScale(MLP(norm(x)))

Every second block reads from the last token. No tensor of tokens is flipped for it, and no kernel: the convolution
belongs to the block, not to a direction.

Shapes: B images, K tokens of the sequence (kept patches of a grid, and extra tokens if there are any), C channels, h
heads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from selfvil.models.convolution import convolve, depthwise_conv
from selfvil.models.layers import HeadNorm, Linear, ResidualLayerNorm
from selfvil.models.order import Columns, Grid, steps_of
from selfvil.ops import mlstm

HEAD_WIDTH = 64
"""Width of a head, about, where the number of heads is not given."""
MLPS: dict[str, int] = {"gelu": 1, "swiglu": 2}
"""Kinds of MLP, and the inputs that each hidden unit has."""
OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


def default_heads(dim: int) -> int:
    """The number of heads whose width is nearest to `HEAD_WIDTH`, among those that divide `dim` into even widths."""
    possible = [heads for heads in range(1, dim // 2 + 1) if dim % (2 * heads) == 0] or [1]
    return min(possible, key=lambda heads: abs(math.log(dim / heads / HEAD_WIDTH)))


class Reading(nn.Module):
    """One reading of the tokens: their projections to q, k, v and the gates, and the norm of what is read.

    Args:
        dim: width C of the tokens.
        num_heads: h, a divisor of C.
        qk_ratio: width of q and k over that of v.
        gate_cap: bound of the gates' pre-activations; None leaves them free.
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
        """Small init; gates that do not yet depend on the tokens, the forget gate's open, from 3 to 6."""
        _small_init(self.qkv)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[: self.num_heads] = self.input_bias
            self.gates.bias[self.num_heads :] = torch.linspace(3.0, 6.0, self.num_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens x (B, K, C) to q, k (B, h, K, D'), v (B, h, K, D), i and f (B, h, K), the gates in float32 or better.

        The gates' biases are added after the step up to float32: the forget gate's are large beside what tokens add.
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
    """Reads the tokens in one or more directions, gates the sum of what is read, and projects it.

    Further readings have parameters of their own, or share all those of the first, and then its products too.

    Args:
        dim: width C of the tokens.
        reverse: read the tokens from the last to the first.
        directions: 1, 2 (both ways) or 4 (rows and columns, both ways).
        shared: all directions share parameters.
        output_gate: a name from `OUTPUT_GATES`.
        reading: further arguments of `Reading`.
    """

    def __init__(
        self, dim: int, *, reverse: bool, directions: int, shared: bool, output_gate: str, bias: bool, **reading: Any
    ) -> None:
        super().__init__()
        self.reverse, self.directions = reverse, directions
        self.gap_aware = False
        self.on_forget_gates: Callable[[int, Tensor], None] | None = None  # see `selfvil.monitor.gates`
        self.readings = nn.ModuleList(Reading(dim, bias=bias, **reading) for _ in range(1 if shared else directions))
        self.activation = OUTPUT_GATES[output_gate]
        self.output_gate = Linear(dim, dim, bias=bias)
        self.proj = Linear(dim, dim, bias=bias)
        _small_init(self.output_gate)

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x (B, K, C) to the same shape. For the other arguments see `selfvil.models.order`."""
        h = self.read(x, grid, keep, places, range(min(self.directions, 2)))
        if self.directions == 4:
            columns = Columns(x, grid, keep, places)
            by_columns = self.read(columns.from_rows(x), columns.grid, columns.keep, columns.places, (2, 3))
            h = h + columns.to_rows(by_columns)
        return self.proj(h * self.activation(self.output_gate(x)))

    def read(self, x: Tensor, grid: Grid, keep: Tensor | None, places: Tensor | None, scans: Sequence[int]) -> Tensor:
        """The sum over `scans`, of which every second one reads the other way."""
        steps = steps_of(keep, places, grid[0] * grid[1]) if self.gap_aware and keep is not None else None
        shared = len(self.readings) == 1
        readings: list[Any] = [self.readings[0 if shared else scan] for scan in scans]
        projected = [readings[0].project(x)] * len(scans) if shared else [reading.project(x) for reading in readings]
        found = []
        for scan, reading, (q, k, v, i, f) in zip(scans, readings, projected, strict=True):
            if self.on_forget_gates is not None:
                self.on_forget_gates(scan, f)
            reverse = self.reverse ^ (scan % 2 == 1)
            found.append(reading.outnorm(mlstm(q, k, v, i, f, reverse=reverse, positions=steps)))
        return found[0] if len(found) == 1 else found[0] + found[1]


class MLP(nn.Module):
    """Two linear maps and GELU, or SwiGLU (Shazeer, "GLU variants improve transformer", 2020) of as many parameters."""

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
        reverse, directions, shared: how it reads, see `MLSTMLayer`.
        drop_path: probability of leaving out the mLSTM, and the MLP, for a sample.
        init_values: initial value of LayerScale; None leaves it out.
        conv: before the mLSTM, one of `selfvil.models.convolution.CONVS`.
        bias: of projections and norms; convolution and gates always have one.
        num_blocks: layers in the network, for the scale of the projections back to the tokens; None takes 1.
        num_heads: a divisor of C; None takes heads about 64 wide.
        qk_ratio: width of q and k over that of v.
        mlp_ratio: hidden width of the MLP over C; a SwiGLU takes two thirds of it, and as many parameters.
        mlp: "gelu" or "swiglu".
        output_gate: "sigmoid" or "silu".
        gate_cap: the gates' pre-activations are capped softly to ± this; None leaves them free.
        input_bias: initial bias of the input gate.

    Raises:
        ValueError: an argument is none of those named, or heads do not divide C.
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
        self.compact_conv = False
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
        for projection in (self.layer.proj, self.mlp.fc2):
            _small_init(projection, 1 / (num_blocks or 1))

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x (B, K, C), the kept tokens of `grid` in order (all of them if `keep` is None), to the same shape."""
        if self.conv is not None:
            # Only along a sequence does a convolution know a direction.
            reverse = self.layer.reverse and isinstance(self.conv, nn.Conv1d)
            x = x + convolve(self.conv, x, grid, keep, places, reverse=reverse, compact=self.compact_conv)
        x = x + self.drop_path(self.ls1(self.layer(self.norm1(x), grid, keep, places)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _small_init(linear: nn.Linear, scale: float = 1.0) -> None:
    """Weights of standard deviation sqrt(2 / (5 I)) for I inputs, as xLSTM's, and no bias."""
    nn.init.normal_(linear.weight, std=scale * math.sqrt(2 / (5 * linear.in_features)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
