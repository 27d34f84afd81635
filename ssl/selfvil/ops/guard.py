"""Checks the Triton kernels before they are used with a device, a dtype and a width for the first time.

Kernels are compiled for each device by each version of Triton, and no test can have run on all of them. So the first
use computes results and all gradients for small random tensors, and compares them with plain torch in float64. Where
they agree, a file in the cache folder of `cpu.build` records it for this device, version of Triton, version of torch
and content of the kernels' files, and later processes only look for the file. Where they do not agree, or a kernel
cannot be compiled, torch computes instead, and a warning with the reason asks for a report. A failure is not recorded:
it may have been for want of memory, so that each process checks again.

The kernels are those which the use compiles anyway, so that a check takes about a second more. Several processes may
check at the same time. A backend that is chosen by its name (SELFVIL_MLSTM=triton) is not checked.

Shapes: B images, N tokens, E channels, H heads of width D.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from selfvil.ops import triton_mlstm
from selfvil.ops.cpu.build import BuildError, cache_folder
from selfvil.ops.torch_mlstm import mlstm_torch

log = logging.getLogger(__name__)

LIMITS = {torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2, torch.float64: 1e-9}
"""Largest relative error: about ten times that of a correct kernel. Products of float32 may run in tf32."""

SOURCES = ("fused.py", "triton_kernels.py", "triton_mlstm.py", "triton_neighbours.py")
HEADS, SIDE = 4, 4
"""Heads, and rows of a block of the block-diagonal projections."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@torch.compiler.assume_constant_result
def mlstm_agrees(device: torch.device, dtype: torch.dtype, head_dim: int, form: str) -> bool:
    """Whether the mLSTM in Triton computes what torch does. Logs a warning if not.

    form: "triton" or "triton_chunkwise".
    """
    chunked = form == "triton_chunkwise"
    return _passes(f"mlstm-{form}", device, dtype, head_dim, lambda: _mlstm_errors(device, dtype, head_dim, chunked))


@torch.compiler.assume_constant_result
def layer_agrees(
    operators: tuple[Function, Function, Function], device: torch.device, dtype: torch.dtype, width: int
) -> bool:
    """Whether the Triton operators around the mLSTM compute what torch does. Logs a warning if not.

    operators: `conv_silu`, `project` and `norm_skip_gate` of `selfvil.ops.fused`, which imports this module.
    width: E; the heads are E / 4 wide.
    """
    return _passes("layer", device, dtype, width, lambda: _layer_errors(operators, device, dtype, width))


@torch.compiler.assume_constant_result
def conv_agrees(add_conv: Function, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """The same for `add_conv` of `selfvil.ops.fused` with tokens of E = `width` channels."""
    return _passes("convolution", device, dtype, width, lambda: _conv_errors(add_conv, device, dtype, width))


# --- what is compared ------------------------------------------------------------------------------------------------


def _mlstm_errors(device: torch.device, dtype: torch.dtype, width: int, chunked: bool) -> Iterator[tuple[str, float]]:
    """Two heads, and a last block of tokens that is not full; with chunks, two of them."""
    shape, random = (1, 2, triton_mlstm.CHUNK + 30 if chunked else 70, width), _Random(device, dtype)
    q, k = random(shape).abs(), random(shape).abs()  # scores of one sign: sums that cancel amplify rounding
    v, dh = random(shape), random(shape)
    i, f = random(shape[:3]).float(), random(shape[:3]).float() + 4
    for reverse in (False, True):
        yield from _compare(
            f"{'reverse' if reverse else 'forward'} scan",
            functools.partial(triton_mlstm.mlstm_triton, reverse=reverse, chunked=chunked),
            functools.partial(mlstm_torch, reverse=reverse, form="parallel"),
            {"q": q, "k": k, "v": v, "i": i, "log f": F.logsigmoid(f)},
            [dh],
        )


def _layer_errors(
    operators: tuple[Function, Function, Function], device: torch.device, dtype: torch.dtype, width: int
) -> Iterator[tuple[str, float]]:
    """Two images of 5 x 7 tokens; parameters are float32, as under autocast."""
    conv_silu, project, norm_skip_gate = operators
    random, grid = _Random(device, dtype), (5, 7)
    tokens = (2, 35, width)
    x, c, gate, dy = (random(tokens) for _ in range(4))
    weight = random((width, 1, 3, 3)).float()
    scale, bias, skip = (random((width,)).float() for _ in range(3))
    for reverse, kept in ((False, None), (True, None), (True, _kept(grid, device))):
        some = slice(None if kept is None else kept.shape[1])
        yield from _compare(
            f"{'flipped ' if reverse else ''}convolution{'' if kept is None else ' of kept tokens'}",
            functools.partial(conv_silu, grid=grid, reverse=reverse, placed=_placed(kept, grid)),
            functools.partial(_conv, grid=grid, reverse=reverse, kept=kept),
            {"x": x[:, some], "weight": weight, "bias": bias},
            [dy[:, some]],
        )
    head = (2, HEADS, 35, width // HEADS)
    weights = {f"weight of {name}": random((width // SIDE, SIDE, SIDE)).float() for name in "qkv"}
    biases = {f"bias of {name}": random((width,)).float() for name in "qkv"}
    gates = {f"weight of the gates for {name}": random((2 * HEADS, width)).float() / width**0.5 for name in "cx"}
    yield from _compare(
        "projections",
        lambda c, x, *p: project(c, x, p[:3], p[3:6], *p[6:]),
        _project,
        {"c": c, "x": x, **weights, **biases, **gates, "bias of the gates": random((2 * HEADS,)).float()},
        [*(random(head) for _ in range(3)), *(random(head[:3]).float() for _ in range(2))],
    )
    yield from _compare(
        "norm",
        lambda h, c, gate, *p: norm_skip_gate(h, c, gate, *p, 1e-5),
        _norm,
        {"h": random(head), "c": c, "gate": gate, "weight": scale, "bias": bias, "skip": skip},
        [dy],
    )


def _conv_errors(
    add_conv: Function, device: torch.device, dtype: torch.dtype, width: int
) -> Iterator[tuple[str, float]]:
    """Two images of 5 x 7 tokens, and of some of them."""
    random, grid = _Random(device, dtype), (5, 7)
    parameters = {"weight": random((width, 1, 3, 3)).float(), "bias": random((width,)).float()}
    for kept in (None, _kept(grid, device)):
        shape = (2, 35 if kept is None else kept.shape[1], width)
        yield from _compare(
            f"sum with the convolution{'' if kept is None else ' of kept tokens'}",
            functools.partial(add_conv, grid=grid, placed=_placed(kept, grid)),
            lambda x, weight, bias, kept=kept: x + _conv(x, weight, bias, grid, False, kept, silu=False),
            {"x": random(shape), **parameters},
            [random(shape)],
        )


def _kept(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Places (2, 20) on the grid."""
    random = torch.rand(2, math.prod(grid), generator=torch.Generator().manual_seed(0))
    return random.argsort(1)[:, :20].sort(1).values.to(device)


def _placed(kept: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    if kept is None:
        return None
    tokens = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return kept, kept.new_full((len(kept), math.prod(grid)), -1).scatter_(1, kept, tokens)


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], reverse: bool, kept: Tensor | None = None,
    silu: bool = True,
) -> Tensor:  # fmt: skip
    """On the grid, with zeros where no token is."""
    index = None if kept is None else kept.unsqueeze(2).expand_as(x)
    if index is not None:
        x = x.new_zeros(len(x), math.prod(grid), x.shape[2]).scatter(1, index, x)
    weight = weight.flip(2, 3) if reverse else weight
    y = F.conv2d(x.mT.unflatten(2, grid), weight, bias, padding=1, groups=len(bias)).flatten(2).mT
    y = y if index is None else y.gather(1, index)
    return F.silu(y) if silu else y


def _project(c: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    *_, c_gates, x_gates, gates_bias = parameters
    heads = [
        (torch.einsum("bngi,goi->bngo", branch.unflatten(2, (-1, SIDE)), weight).flatten(2) + bias)
        .unflatten(2, (HEADS, -1))
        .transpose(1, 2)
        for branch, weight, bias in zip((c, c, x), parameters[:3], parameters[3:6], strict=True)
    ]
    gates = c @ c_gates.mT + x @ x_gates.mT + gates_bias
    return *heads, *gates.mT.chunk(2, dim=1)


def _norm(h: Tensor, c: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    h = F.layer_norm(h, h.shape[-1:], eps=1e-5).transpose(1, 2).flatten(2)
    return (h * (1 + weight) + bias + skip * c) * F.silu(gate)


class _Random:
    """Normal random tensors of a dtype on a device, always the same; torch's own generators do not change."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)


def _compare(
    what: str, kernel: Function, plain: Function, inputs: dict[str, Tensor], gradients: Sequence[Tensor]
) -> Iterator[tuple[str, float]]:
    """What is compared, and its error relative to its norm, or to 1e-3 of the largest: results and input gradients."""
    got = _differentiated(kernel, list(inputs.values()), gradients)
    exact = _differentiated(plain, [x.double() for x in inputs.values()], [dy.double() for dy in gradients])
    results = [f"result {number}" for number in range(1, len(gradients) + 1)]
    least = 1e-3 * max(x.norm() for x in exact).item()
    for name, a, b in zip([*results, *(f"gradient of {name}" for name in inputs)], got, exact, strict=True):
        yield f"{what}: {name}", ((a.double() - b).norm() / max(b.norm().item(), least)).item()


def _differentiated(function: Function, inputs: list[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = [dy.to(y.dtype) for dy, y in zip(gradients, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, gradients)]


# --- once for each device and version --------------------------------------------------------------------------------


def _passes(
    name: str, device: torch.device, dtype: torch.dtype, width: int, errors: Callable[[], Iterator[tuple[str, float]]]
) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():  # nothing can be computed, as under a fake device
        return True
    kind = f"{name}-{str(dtype).removeprefix('torch.')}-{width}-{torch.backends.cuda.matmul.fp32_precision}"
    if (device, kind) not in _known:
        _known[device, kind] = _recorded(device, kind) or _check(name, kind, device, dtype, errors)
    return _known[device, kind]


_known: dict[tuple[torch.device, str], bool] = {}
_warned: set[str] = set()


def _check(
    name: str, kind: str, device: torch.device, dtype: torch.dtype, errors: Callable[[], Iterator[tuple[str, float]]]
) -> bool:
    try:
        # The use may be in a trace, without gradients, or under autocast.
        no_modes, no_autocast = _disable_current_modes(), torch.autocast(device.type, enabled=False)
        with no_modes, no_autocast, torch.inference_mode(False), torch.enable_grad():
            found = dict(errors())
        wrong = {what: error for what, error in found.items() if not error < LIMITS[dtype]}
        reason = ", ".join(f"{what} has a relative error of {error:.1e}" for what, error in list(wrong.items())[:3])
    except Exception as error:  # a compiler may fail in any way
        found, reason = {}, f"{type(error).__name__}: {str(error)[:300]}"
    if not reason:
        _record(device, kind, found)
        return True
    _warn(name, f"{', '.join(_identity(device))}, {str(dtype).removeprefix('torch.')}: {reason}")
    return False


def _warn(name: str, reason: str) -> None:
    """One warning for each name in a process, and not another for each dtype or width."""
    if name in _warned:
        return
    _warned.add(name)
    log.warning(
        "The Triton kernels of %s do not compute what torch does, and torch computes instead, which is slower. "
        "Please report this as an issue of selfvil, with this line: %s",
        name,
        reason,
    )


def _identity(device: torch.device) -> list[str]:
    import triton

    name = [str(device)]
    if device.type == "cuda":
        name = [torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    return [*name, f"triton {triton.__version__}", f"torch {torch.__version__}"]


def _recorded(device: torch.device, kind: str) -> bool:
    file = _file(device, kind)
    return file is not None and file.exists()


def _record(device: torch.device, kind: str, errors: dict[str, float]) -> None:
    file = _file(device, kind)
    if file is None:
        return
    with contextlib.suppress(OSError):  # then each process checks
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump({"device": _identity(device), "relative errors": errors}, stream, indent=1)
        os.replace(temporary, file)


def _file(device: torch.device, kind: str) -> Path | None:
    try:
        return cache_folder() / f"triton-{_key(device)}" / f"{kind}.json"
    except BuildError:  # there is no cache folder
        return None


@functools.cache
def _key(device: torch.device) -> str:
    here = Path(__file__).parent
    contents = [(here / name).read_bytes() for name in SOURCES]
    parts = [*(part.encode() for part in _identity(device)), str(torch.version.cuda).encode(), *contents]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
