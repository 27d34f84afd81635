"""Records the forget gates of a Vision-LSTM during forward passes, and derives the horizon of its memory.

Shapes: B images, h heads, L tokens of the sequence (kept patches, and extra tokens if there are any).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvil.models.blocks import ViLBlockPair
from selfvil.models.layers import ViLLayer
from selfvil.models.mlp_block import MLSTMLayer

SATURATED = 7.0
"""Pre-activation whose forget gate is within 0.1 % of 0 or 1, with almost no gradient."""

Gates = Mapping[str, Sequence[Tensor]]
"""Name of a scan, such as 03_backward, to pre-activations (B, h, L), one tensor for each forward pass."""


@contextmanager
def record_forget_gates(backbone: nn.Module) -> Iterator[Gates]:
    """Record the forget gates' pre-activations of each mLSTM scan of `backbone` in all forward passes in this context.

    A scan is named by its block, counted from 0, and its direction: forward and backward along the rows, down and up
    along the columns. Directions that share parameters have separate entries. The mapping is empty for a network
    without forget gates. A forward pass that gradient checkpointing repeats during backward is not recorded again.

    In this context compiled functions run eagerly, so that nothing is compiled again.
    """
    gates: dict[str, list[Tensor]] = {}
    layers: list[ViLLayer | MLSTMLayer] = []
    for pair in (module for module in backbone.modules() if isinstance(module, ViLBlockPair)):
        for layer in (part for part in pair.modules() if isinstance(part, ViLLayer | MLSTMLayer)):
            names = [f"{len(layers):02d}_{direction}" for direction in _directions(layer, pair.columns)]
            gates |= {name: [] for name in names}
            layer.forget_gate_recorder = _recorder([gates[name] for name in names])
            layers.append(layer)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield gates
    finally:
        for layer in layers:
            layer.forget_gate_recorder = None


def _directions(layer: ViLLayer | MLSTMLayer, columns: bool) -> list[str]:
    """Names of a layer's scans in their order; `columns`: the whole layer runs on the transposed grid."""
    rows = ["backward", "forward"] if layer.reverse else ["forward", "backward"]
    names = [*rows, "down", "up"][: layer.directions]
    return [{"forward": "down", "backward": "up"}[name] for name in names] if columns else names


def _recorder(entries: Sequence[list[Tensor]]) -> Callable[[int, Tensor], None]:
    def record(scan: int, f: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:  # else gradient checkpointing repeats a pass during backward
            entries[scan].append(f.detach())

    return record


def horizons(gates: Sequence[Tensor]) -> Tensor:
    """Number of tokens after which the memory of each head (h,) decays to 1/e, by its mean decay; gates: (B, h, L)."""
    log_decay = [F.logsigmoid(f.float()).transpose(0, 1).flatten(1) for f in gates]
    return -1 / torch.cat(log_decay, dim=1).mean(dim=1)


def gate_vitals(gates: Gates) -> dict[str, float]:
    """`horizon/…` and `saturated/…` of each scan, the shortest `horizon` of all and the largest share `saturated`.

    A scan's horizon is the geometric mean of its heads'.
    """
    recorded = {name: passes for name, passes in gates.items() if passes}
    if not recorded:
        return {}
    tokens = {name: float(horizons(passes).log().mean().exp()) for name, passes in recorded.items()}
    shares = {name: _saturated(passes) for name, passes in recorded.items()}
    return (
        {"horizon": min(tokens.values()), "saturated": max(shares.values())}
        | {f"horizon/{name}": value for name, value in tokens.items()}
        | {f"saturated/{name}": value for name, value in shares.items()}
    )


def _saturated(passes: Sequence[Tensor]) -> float:
    return sum(float((f.abs() > SATURATED).sum()) for f in passes) / sum(f.numel() for f in passes)
