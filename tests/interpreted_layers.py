"""A layer's fused parts and its plain ones, to be run side by side in the process of `interpreted`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(reader, inputs: dict[str, Tensor], fuse: bool, *, grid, reverse) -> tuple[Tensor, ...]:
    from selfvil.ops import fused

    x = inputs["xz"].chunk(2, -1)[0]
    if fuse:
        return (fused.conv_silu(x, reader.conv.weight, reader.conv.bias, grid, reverse),)
    return (F.silu(reader.convolve(x, grid, None, None, reverse)),)


def project(reader, inputs: dict[str, Tensor], fuse: bool) -> tuple[Tensor, ...]:
    from selfvil.ops import fused

    c, x = inputs["c"], inputs["xz"].chunk(2, -1)[0]
    maps = (reader.q_proj, reader.k_proj, reader.v_proj)
    if fuse:
        return fused.project(c, x, [p.weight for p in maps], [p.bias for p in maps], *reader.gate_weights())
    return reader.q_proj(c), reader.k_proj(c), reader.v_proj(x), *reader.gates(c, x)


def norm(reader, inputs: dict[str, Tensor], fuse: bool, *, gated=True) -> tuple[Tensor, ...]:
    from selfvil.ops import fused

    h, c = inputs["h"].transpose(1, 2), inputs["c"]
    gate, of_head = inputs["xz"].chunk(2, -1)[1] if gated else None, reader.outnorm
    if fuse:
        return (fused.norm_skip_gate(h, c, gate, of_head.weight, of_head.bias, reader.skip, of_head.eps),)
    y = torch.addcmul(of_head(h), reader.skip.to(c.dtype), c)
    return (y if gate is None else y * F.silu(gate),)


PARTS = {"conv": conv, "project": project, "norm": norm}


def gradients(part: str, reader, inputs, fuse: bool, device="cpu", amp=None, **how) -> list[Tensor]:
    """What the part gives, and the gradients, of one and the same of what it gives, of inputs and parameters."""
    reader = reader.to(device)
    inputs = {name: x.detach().clone().to(device).requires_grad_() for name, x in inputs.items()}
    with torch.autocast(device, dtype=amp, enabled=amp is not None):
        outputs = PARTS[part](reader, inputs, fuse, **how)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    found = torch.autograd.grad(outputs, [*inputs.values(), *reader.parameters()], d_outputs, allow_unused=True)
    return [x.detach().cpu() for x in (*outputs, *(dx for dx in found if dx is not None))]


def of_model(model, x: Tensor, keep: Tensor | None, fuse: bool, device="cpu", amp=None, compiled=False) -> list[Tensor]:
    """Tokens, and the gradients of the sum of their squares, of x and all parameters that have one."""
    with fusing(fuse):
        model, x = model.to(device), x.detach().clone().to(device).requires_grad_()
        run = (
            torch.compile(model.forward_tokens, fullgraph=True, backend="aot_eager")
            if compiled
            else (model.forward_tokens)
        )
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            y = run(x, model.grid_size, keep)
        found = torch.autograd.grad(y.double().square().sum(), [x, *model.parameters()], allow_unused=True)
        return [t.detach().cpu() for t in (y, *(dx for dx in found if dx is not None))]


@contextmanager
def fusing(fuse: bool) -> Iterator[None]:
    """Fused operators are on, or off, in this context."""
    before = os.environ.get("SELFVIL_FUSED")
    os.environ["SELFVIL_FUSED"] = str(int(fuse))
    try:
        yield
    finally:
        if before is None:
            del os.environ["SELFVIL_FUSED"]
        else:
            os.environ["SELFVIL_FUSED"] = before


def forget_gates(model, images: Tensor, fuse: bool) -> dict[str, list[Tensor]]:
    """The forget gates' pre-activations of each scan of a pass over images."""
    from selfvil.monitor.gates import record_forget_gates
    from selfvil.ops import fused

    with fusing(fuse), torch.no_grad(), record_forget_gates(model) as gates:
        assert fused.applies(images) == fuse
        model(images)
    return dict(gates)


def check_operators(reader, inputs: dict[str, Tensor]) -> None:
    """That each is a sound custom operator."""
    c, (x, z), h = inputs["c"], inputs["xz"].chunk(2, -1), inputs["h"].transpose(1, 2)
    of_head, ops = reader.outnorm, torch.ops.selfvil
    maps = (reader.q_proj, reader.k_proj, reader.v_proj)
    parameters = [of_head.weight, of_head.bias, reader.skip, of_head.eps, h.dtype]
    folded = [t.detach().requires_grad_() for t in reader.gate_weights()]
    torch.library.opcheck(ops.norm_skip_gate.default, (h, c, z, *parameters))
    torch.library.opcheck(ops.norm_skip_gate.default, (h, c, None, *parameters))
    torch.library.opcheck(ops.conv_silu.default, (x, reader.conv.weight, reader.conv.bias, 1, x.shape[1], True))
    torch.library.opcheck(
        ops.project.default, (c, x, *(p.weight for p in maps), *(p.bias for p in maps), *folded)
    )  # fmt: skip
