"""Detects the export of a graph to programs that do not have the custom operators of this package."""

import torch


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace is running: operators then use plain torch only."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
