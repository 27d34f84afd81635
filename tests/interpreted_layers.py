"""The fused parts of a layer and the plain ones, for comparison in the process of `interpreted`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only


def conv(scan, inputs: dict[str, Tensor], fuse: bool, *, layout, reverse) -> tuple[Tensor, ...]:
    from selfvil.models.convolution import convolve
    from selfvil.ops import fused

    x, layout = inputs["xz"].chunk(2, -1)[0], on_device(layout, inputs["xz"])
    if fuse:
        return (fused.conv_silu(x, scan.conv.weight, scan.conv.bias, layout.places_grid, reverse, layout.placed),)
    return (F.silu(convolve(scan.conv, x, layout, reverse=reverse)),)


def add_conv(scan, inputs: dict[str, Tensor], fuse: bool, *, layout) -> tuple[Tensor, ...]:
    from selfvil.models.convolution import convolve
    from selfvil.ops import fused

    x, layout = inputs["c"], on_device(layout, inputs["c"])
    if fuse:
        return (fused.add_conv(x, scan.conv.weight, scan.conv.bias, layout.places_grid, layout.placed),)
    return (x + convolve(scan.conv, x, layout),)


def on_device(layout, x: Tensor):
    return tree_map_only(Tensor, lambda tensor: tensor.to(x.device), layout)


def project(scan, inputs: dict[str, Tensor], fuse: bool) -> tuple[Tensor, ...]:
    from selfvil.ops import fused

    c, x = inputs["c"], inputs["xz"].chunk(2, -1)[0]
    maps = (scan.q_proj, scan.k_proj, scan.v_proj)
    if fuse:
        return fused.project(c, x, [p.weight for p in maps], [p.bias for p in maps], *scan.gate_weights())
    return scan.q_proj(c), scan.k_proj(c), scan.v_proj(x), *scan.gates(c, x)


def norm(scan, inputs: dict[str, Tensor], fuse: bool, *, gated=True) -> tuple[Tensor, ...]:
    from selfvil.ops import fused

    h, c = inputs["h"].transpose(1, 2), inputs["c"]
    gate, head_norm = inputs["xz"].chunk(2, -1)[1] if gated else None, scan.outnorm
    if fuse:
        return (fused.norm_skip_gate(h, c, gate, head_norm.weight, head_norm.bias, scan.skip, head_norm.eps),)
    y = torch.addcmul(head_norm(h), scan.skip.to(c.dtype), c)
    return (y if gate is None else y * F.silu(gate),)


PARTS = {"conv": conv, "add_conv": add_conv, "project": project, "norm": norm}


def gradients(part: str, scan, inputs, fuse: bool, device="cpu", amp=None, **how) -> list[Tensor]:
    """The outputs of a part, and the gradients of inputs and parameters for fixed random gradients of the outputs."""
    scan = scan.to(device)
    inputs = {name: x.detach().clone().to(device).requires_grad_() for name, x in inputs.items()}
    with torch.autocast(device, dtype=amp, enabled=amp is not None):
        outputs = PARTS[part](scan, inputs, fuse, **how)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    grads = torch.autograd.grad(outputs, [*inputs.values(), *scan.parameters()], d_outputs, allow_unused=True)
    return [x.detach().cpu() for x in (*outputs, *(dx for dx in grads if dx is not None))]


def of_model(model, x: Tensor, keep: Tensor | None, fuse: bool, device="cpu", amp=None, compiled=False) -> list[Tensor]:
    """Tokens, and the gradients of the sum of their squares for x and all parameters that have one."""
    with fusing(fuse):
        model, x = model.to(device), x.detach().clone().to(device).requires_grad_()
        run = (
            torch.compile(model.forward_tokens, fullgraph=True, backend="aot_eager")
            if compiled
            else (model.forward_tokens)
        )
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            y = run(x, model.grid_size, keep)
        grads = torch.autograd.grad(y.double().square().sum(), [x, *model.parameters()], allow_unused=True)
        return [t.detach().cpu() for t in (y, *(dx for dx in grads if dx is not None))]


@contextmanager
def fusing(fuse: bool) -> Iterator[None]:
    """Switch fused operators on or off in this context."""
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
    """The forget gates' pre-activations of each scan in a forward pass."""
    from selfvil.diagnostics.gates import record_forget_gates
    from selfvil.ops import fused

    with fusing(fuse), torch.no_grad(), record_forget_gates(model) as gates:
        assert fused.applies(images) == fuse
        model(images)
    return dict(gates)


def check_operators(scan, inputs: dict[str, Tensor]) -> None:
    """Run `torch.library.opcheck` on each fused operator."""
    c, (x, z), h = inputs["c"], inputs["xz"].chunk(2, -1), inputs["h"].transpose(1, 2)
    head_norm, ops = scan.outnorm, torch.ops.selfvil
    maps = (scan.q_proj, scan.k_proj, scan.v_proj)
    of_norm = [head_norm.weight, head_norm.bias, scan.skip, head_norm.eps, h.dtype]
    folded = [t.detach().requires_grad_() for t in scan.gate_weights()]
    torch.library.opcheck(ops.norm_skip_gate.default, (h, c, z, *of_norm))
    torch.library.opcheck(ops.norm_skip_gate.default, (h, c, None, *of_norm))
    parameters, grid = (scan.conv.weight, scan.conv.bias), (2, x.shape[1])
    places = torch.arange(x.shape[1]).flip(0).repeat(len(x), 1) * 2
    token_at = torch.full((len(x), 2 * x.shape[1]), -1).scatter_(1, places, torch.arange(x.shape[1]).expand_as(places))
    torch.library.opcheck(ops.conv_silu.default, (x, *parameters, None, None, 1, x.shape[1], True, True))
    torch.library.opcheck(ops.conv_silu.default, (x, *parameters, places, token_at, *grid, True, True))
    torch.library.opcheck(ops.conv_silu.default, (x, *parameters, places, token_at, *grid, False, False))
    torch.library.opcheck(
        ops.project.default, (c, x, *(p.weight for p in maps), *(p.bias for p in maps), *folded)
    )  # fmt: skip
