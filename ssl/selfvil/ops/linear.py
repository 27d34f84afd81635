"""A linear map that is fast in float32 on CPUs, by oneDNN.

torch multiplies float32 matrices on x86 with MKL, which uses AVX-512 only on Intel processors. oneDNN, which torch
contains for its convolutions, uses it on all. On an AMD EPYC one thread reaches 235 instead of 105 GFLOP/s, with the
same float32 sums (`benchmarks/backbone.py` measures the effect on a network). All other cases use torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.ops.exporting import exporting
from selfvil.ops.operators import custom_operator

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MIN_WIDTH = 16
"""Narrower maps are limited by memory bandwidth and use torch."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, as `torch.nn.functional.linear`: (..., I), (O, I), (O,) to (..., O), with all gradients."""
    if (
        _HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape) >= MIN_WIDTH
        and x.numel()
        and not torch.is_autocast_enabled("cpu")
        and not exporting()
    ):
        return _onednn_linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


@custom_operator("selfvil::linear")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, I), (O, I), (O,) to (n, O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = _onednn_linear(dy, weight.T, None) if needs_x else None
    dweight = _onednn_linear(x.T, dy.T, None).T if needs_weight else None
    return dx, dweight, dy.sum(0) if needs_bias else None


_onednn_linear.register_autograd(_gradients, setup_context=_setup_context)
