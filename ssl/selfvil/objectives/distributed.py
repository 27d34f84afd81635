"""Collectives over the processes of a run, for losses and statistics of the batches of all processes together.

Each works without a process group too, as for a run of one process. All processes must call them equally often.

Shapes: P processes, B rows of each.
"""

import torch
from torch import Tensor, distributed
from torch.distributed import nn as distributed_nn


def is_distributed() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    return distributed.get_world_size() if is_distributed() else 1


def gather(x: Tensor) -> list[Tensor]:
    """`x` of every process, in the order of ranks, without gradients; x has the same shape on all processes."""
    if not is_distributed():
        return [x.detach()]
    gathered = [torch.empty_like(x) for _ in range(process_count())]
    distributed.all_gather(gathered, x.detach().contiguous())
    return gathered


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes, (P·B, ...) of x (B, ...), for a loss that every process computes on all of them.

    Each process's own rows receive P times their gradient and the others' rows none, so that the mean over processes,
    which DDP and DeepSpeed take of the parameters' gradients, is the gradient of the loss of the whole batch.
    """
    gathered = gather(x)
    if len(gathered) == 1:
        return x
    gathered[distributed.get_rank()] = x.detach() + len(gathered) * (x - x.detach())
    return torch.cat(gathered)


def sum_(x: Tensor) -> Tensor:
    """Replace x, in place and without gradients, by its sum over all processes."""
    if is_distributed():
        distributed.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean of x over all processes; gradients flow back to each of them."""
    if process_count() == 1:
        return x
    return distributed_nn.all_reduce(x) / process_count()
