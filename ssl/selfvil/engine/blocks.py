"""The repeated blocks of an objective's networks, which are compiled and, under FSDP2, gathered one at a time."""

import torch
from torch import nn

from selfvil.errors import UserError


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of all networks in `module`: pairs of blocks of a Vision-LSTM, layers of a timm network, and
    those of a decoder or predictor."""
    names = ("blocks", "decoder", "predictor")
    lists = (getattr(child, name, None) for child in module.modules() for name in names)
    return [block for blocks in lists if isinstance(blocks, nn.ModuleList | nn.Sequential) for block in blocks]


def compile_blocks(module: nn.Module, mode: str, device: torch.device) -> None:
    """Compile every block of `module` in place; names in its state dict do not change.

    Equal blocks share a graph. Each crop size has its own: with dynamic sizes, torch 2.14's inductor fails on these
    blocks ("cannot determine truth value of Relational", when it orders the strides of transposed outputs).

    Raises:
        UserError: there is no compiler for `device`.
    """
    require_compiler(device)
    # Beyond this number of sizes and modes (with and without gradients), blocks would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks_of(module):
        block.compile(mode=None if mode == "default" else mode, dynamic=False)


def require_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile has no compiler for `device`."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError):
            raise UserError(
                "run.compile needs a C++ compiler on CPUs, and none was found: install g++ (or set CXX), or set "
                "run.compile=none"
            ) from None
    elif torch.utils._triton.has_triton() is False:
        raise UserError("run.compile needs Triton on GPUs: pip install triton, or set run.compile=none")
