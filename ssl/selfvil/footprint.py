"""What a computation costs, measured on a few samples: memory and multiply-adds."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import selfvil.ops.cpu.fused  # noqa: F401 - registers operators that are counted below
from selfvil.ops.chunkwise import chunk_size
from selfvil.ops.cpu.mlstm import chunk_size as native_chunk_size

_MARK = "selfvil mark: "
_GRADIENT_AND_MOMENTS = 3  # tensors that AdamW's first step adds for each trained one


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps after `forward` for the backward pass, the weights of `module` not counted.

    `module` is in evaluation mode meanwhile, so that running means do not change.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operator that saved its own output with its graph would never be released

    training = module.training
    module.eval()
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward()
    finally:
        module.train(training)
    del output
    return sum(kept.values())


def allocated(work: Callable[[], object], device: torch.device) -> tuple[list[int], list[tuple[str, int]]]:
    """What torch allocates on `device` during `work`, and its peak, even inside an operator.

    Torch's profiler records each allocation where it is made. Memory that a library allocates by itself (oneDNN, MKL,
    cuBLAS) is not among it.

    Returns:
        Bytes held after each allocation and each release, above those held at the start; and the marks made by `mark`
        meanwhile, each with the index of the level at that moment.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences what the profiler prints, such as that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    kind = torch.device(device).type.upper()
    held, levels, marks = 0, [0], []
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type().name == kind:
            held += event.nbytes()
            levels.append(held)
        elif event.name().startswith(_MARK):
            marks.append((event.name().removeprefix(_MARK), len(levels) - 1))
    return levels, marks


def mark(name: str) -> None:
    """Mark this moment in what `allocated` records."""
    with record_function(_MARK + name):
        pass


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def update_bytes(module: nn.Module, parts: int = 1) -> int:
    """Bytes of the gradients and of AdamW's moments, divided among `parts` processes."""
    return _GRADIENT_AND_MOMENTS * trained_bytes(module) // parts


def state_bytes(module: nn.Module) -> int:
    """Bytes of a checkpoint: all weights and buffers, and AdamW's moments and step of each trained weight."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return sum(x.nbytes for x in module.state_dict().values()) + sum(2 * x.nbytes + 4 for x in trained)


# --- multiply-adds ---------------------------------------------------------------------------------------------------


def multiply_adds(work: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products, convolutions and mLSTM operators that `work` runs on the CPU.

    A multiply-add is 2 FLOPs. Elementwise operations, norms and scans are not counted, as is usual. The operators of
    `selfvil.ops` for GPUs have no formula here: count on the CPU, where the same products run.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        work()
    return counter.get_total_flops() // 2


Shape = tuple[int, ...]


def _mlstm_flops(q: Shape, k: Shape, v: Shape, i: Shape, f: Shape, reverse: bool, form: str, **_: Any) -> int:
    """D + D' for each pair of tokens: scores, and sums of values; chunkwise, chunks also use a state."""
    return _products(q, v, form, per_pair=q[3] + v[3], per_state=2)


def _mlstm_backward_flops(dh: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    """Scores again, and the gradients of scores, q, k and v; chunkwise, six products with states of D x D'."""
    return _products(q, v, rest[-1], per_pair=3 * q[3] + 2 * v[3], per_state=6)


def _products(q: Shape, v: Shape, form: str, per_pair: int, per_state: int) -> int:
    """FLOPs of an mLSTM on q (B, H, N, D) and v (B, H, N, D'): causal pairs, or whole squares of chunks and states."""
    batch, heads, tokens, width = q
    if form == "parallel":
        return batch * heads * tokens * (tokens + 1) * per_pair
    size = math.ceil(tokens / math.ceil(tokens / chunk_size(v[3])))
    return 2 * batch * heads * tokens * (size * per_pair + per_state * width * v[3])


def _native_flops(q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    return _native_products(q, v, per_pair=q[3] + v[3], per_state=2)


def _native_backward_flops(dh: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    return _native_products(q, v, per_pair=3 * q[3] + 2 * v[3], per_state=5)


def _native_products(q: Shape, v: Shape, per_pair: int, per_state: int) -> int:
    """The same by native kernels: causal pairs of chunks, and states between them if there are several."""
    batch, heads, tokens, width = q
    size = native_chunk_size(tokens, width, v[3])
    of_state = per_state * width * v[3] if size < tokens else 0
    return batch * heads * tokens * ((size + 1) * per_pair + 2 * of_state)


def _native_conv_flops(x: Shape, *rest: Any, **_: Any) -> int:
    return 2 * 9 * math.prod(x)


def _native_conv_backward_flops(dy: Shape, *rest: Any, **_: Any) -> int:
    return 2 * 2 * 9 * math.prod(dy)


def _native_project_flops(c: Shape, *rest: Any, **_: Any) -> int:
    """Blocks of 4 for q, k and v, and the gates from both branches; the gates' bias is the last shape."""
    return 2 * math.prod(c) * (3 * 4 + 2 * rest[-1][0])


def _native_project_backward_flops(*shapes: Any, **_: Any) -> int:
    c, x_gates = shapes[5], shapes[-1]
    return 2 * 2 * math.prod(c) * (3 * 4 + 2 * x_gates[0])


def _native_mlp_flops(x: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(x[:2]) * (math.prod(rest[3]) + math.prod(rest[5]))


def _native_mlp_backward_flops(dy: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(dy[:2]) * (math.prod(rest[3]) + math.prod(rest[4])) * (1 + rest[-1])


def _native_mlstm_layer_flops(x: Shape, *rest: Any, **_: Any) -> int:
    qkv, gates, out_gate, proj = (rest[n] for n in (4, 6, 8, 12))
    products = 2 * math.prod(x[:2]) * sum(map(math.prod, (qkv, gates, out_gate, proj)))
    return products + _native_flops(*_head_shapes(x, gates[0] // 2, (qkv[0] - x[2]) // 2, x[2]))


def _native_mlstm_layer_backward_flops(dy: Shape, *rest: Any, **_: Any) -> int:
    qkv, gates, out_gate, proj = (rest[n] for n in (4, 5, 6, 9))
    products = 2 * math.prod(dy[:2]) * sum(map(math.prod, (qkv, gates, out_gate, proj))) * (1 + rest[-1])
    return products + _native_backward_flops((), *_head_shapes(dy, gates[0] // 2, (qkv[0] - dy[2]) // 2, dy[2]))


def _native_gated_layer_flops(x: Shape, *rest: Any, **_: Any) -> int:
    up, gates, (inner,), down = (rest[n] for n in (5, 15, 21, 22))
    around = inner * (9 + 3 * 4 + 4 * gates[0])  # convolution, maps to q, k and v, gates
    products = 2 * math.prod(x[:2]) * (math.prod(up) + math.prod(down) + around)
    return products + _native_flops(*_head_shapes(x, gates[0], inner, inner))


def _native_gated_layer_backward_flops(dy: Shape, *rest: Any, **_: Any) -> int:
    up, gates, (inner,), down = (rest[n] for n in (5, 14, 18, 19))
    around = 2 * inner * (9 + 3 * 4 + 4 * gates[0])
    products = 2 * math.prod(dy[:2]) * ((math.prod(up) + math.prod(down)) * (1 + rest[-1]) + around)
    return products + _native_backward_flops((), *_head_shapes(dy, gates[0], inner, inner))


def _head_shapes(x: Shape, heads: int, of_q: int, of_v: int) -> tuple[Shape, Shape, Shape]:
    """Shapes of q, k and v for tokens x (B, N, C)."""
    q, v = ((x[0], heads, x[1], width // heads) for width in (of_q, of_v))
    return q, q, v


def _linear_flops(x: Shape, weight: Shape, bias: Shape | None, **_: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _convolution_backward_flops(dy: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """As many for each gradient, of x and of the weights, as for the convolution itself.

    Torch's own formula takes grouped weights for full ones: for a depthwise convolution, far too many.
    """
    transposed, mask = rest[4], rest[7]
    return 2 * math.prod(x if transposed else dy) * math.prod(weight[1:]) * (mask[0] + mask[1])


def _attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores, and sums of values, of q (B, H, N, D), k (B, H, M, D), v (B, H, M, D'). Torch has no formula for CPUs."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _attention_backward_flops(dh: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores again, and the gradients of scores, q, k and v."""
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.selfvil.mlstm: _mlstm_flops,
    torch.ops.selfvil.mlstm_backward: _mlstm_backward_flops,
    torch.ops.selfvil.mlstm_native: _native_flops,
    torch.ops.selfvil.mlstm_native_backward: _native_backward_flops,
    torch.ops.selfvil.native_conv: _native_conv_flops,
    torch.ops.selfvil.native_conv_backward: _native_conv_backward_flops,
    torch.ops.selfvil.native_mlp: _native_mlp_flops,
    torch.ops.selfvil.native_mlp_backward: _native_mlp_backward_flops,
    torch.ops.selfvil.native_mlstm_layer: _native_mlstm_layer_flops,
    torch.ops.selfvil.native_mlstm_layer_backward: _native_mlstm_layer_backward_flops,
    torch.ops.selfvil.native_gated_layer: _native_gated_layer_flops,
    torch.ops.selfvil.native_gated_layer_backward: _native_gated_layer_backward_flops,
    torch.ops.selfvil.native_project: _native_project_flops,
    torch.ops.selfvil.native_project_backward: _native_project_backward_flops,
    torch.ops.selfvil.linear: _linear_flops,
}
