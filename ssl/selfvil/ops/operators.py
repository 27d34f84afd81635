"""Operators with two entries: a function of Python for eager mode, and a custom operator of torch for graphs.

A custom operator is opaque to `torch.compile` and `torch.export`, and FlopCounterMode knows it by its name. But a call
with gradients takes up to half a millisecond of Python, mostly to flatten and to check its arguments: as long as the
kernels of a small network, while a GPU waits. In eager mode, a `torch.autograd.Function` calls the same function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


class Operator:
    """A function whose first argument is a tensor. It returns a tensor, or a tuple or a list of tensors.

    Second derivatives are not defined, and raise a RuntimeError.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._differentiable: Any = None
        self.custom = torch.library.custom_op(name, mutates_args=())(function)
        self.register_fake = self.custom.register_fake

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As that of `torch.library.custom_op`: gradients of a list of outputs come as one list."""
        self.custom.register_autograd(gradients, setup_context=setup_context)
        name, function = self._name, self._function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            ctx.listed = isinstance(output, list)
            return tuple(output) if ctx.listed else output

        def backward(ctx: Any, *d_outputs: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} has no second derivative: call backward or grad without create_graph=True")
            return gradients(ctx, list(d_outputs)) if ctx.listed else gradients(ctx, *d_outputs)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # Profilers show the name of the class.
        self._differentiable = type(name.replace("::", "_"), (torch.autograd.Function,), members)

    def __call__(self, *inputs: Any) -> Any:
        if not _eager(inputs[0]):
            return self.custom(*inputs)
        if self._differentiable is None or not torch.is_grad_enabled():
            return self._function(*inputs)
        return self._differentiable.apply(*inputs)


def custom_operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an `Operator` of a function, whose annotations are those that `torch.library.custom_op` reads."""
    return lambda function: Operator(name, function)


def _eager(x: Tensor) -> bool:
    """Whether operations are computed at once: no graph is recorded, and no mode sees them, such as one that counts."""
    return not torch.compiler.is_compiling() and type(x) in PLAIN and not torch._C._len_torch_dispatch_stack()
