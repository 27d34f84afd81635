"""What a training step keeps in memory, measured on a few samples, and how much memory is free."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

_GRADIENT_AND_MOMENTS = 3  # tensors that AdamW's first step adds for each trained one


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
        return tensor

    training = module.training
    module.eval()
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward()
    finally:
        module.train(training)
    del output
    return sum(kept.values())


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def update_bytes(module: nn.Module, parts: int = 1) -> int:
    """Bytes of the gradients and of AdamW's moments, divided among `parts` processes."""
    return _GRADIENT_AND_MOMENTS * trained_bytes(module) // parts


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its share of the machine's or container's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:  # a container's limit does not show in the machine's figures
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
