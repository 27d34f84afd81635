"""Tensors of all processes of a run, for losses that compare the samples of a batch with one another."""

import torch
from torch import Tensor, distributed


def gather(x: Tensor) -> list[Tensor]:
    """`x` of every process, of one shape on all, in the order of their ranks and without gradients."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [x.detach()]
    everyones = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, x.detach().contiguous())
    return everyones


def join(x: Tensor) -> Tensor:
    """The rows of all processes, (P·B, ...) of x (B, ...), for a loss that every process computes of all of them.

    What reaches x is P times its gradient, and none reaches the others' rows, so that the mean over processes, which
    DDP and DeepSpeed take of the parameters' gradients, is the gradient of the loss of the joined batch.
    """
    everyones = gather(x)
    if len(everyones) > 1:
        everyones[distributed.get_rank()] = x.detach() + len(everyones) * (x - x.detach())
        return torch.cat(everyones)
    return x
