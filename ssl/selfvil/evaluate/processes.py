"""The processes that take part in an evaluation.

Each extracts the features of its part of the images; the main process gathers them and fits. If one process fails, the
others must not wait for it in a collective. Local work therefore runs in `together`, which raises on all processes if
it failed on one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from selfvil.errors import UserError
from selfvil.stop import Interrupted

T = TypeVar("T")

_CHUNK_ELEMENTS = 2**26  # values of a tensor that one collective moves: 256 MiB in float32
_TIMEOUT = timedelta(days=1)  # limit for the others while the main process fits or fine-tunes


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of all; the default is one process.

    interrupts: makes a context in which a signal raises `stop.Interrupted`; local work runs inside one.
    """

    rank: int = 0
    world_size: int = 1
    interrupts: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def current(cls, interrupts: Callable[[], AbstractContextManager[Any]] = nullcontext) -> "Processes":
        """The processes of torch's process group, or one process if there is no group."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), interrupts)
        return cls(interrupts=interrupts)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Call `work` on every process; return this process's result when all are done. Collective.

        Raises the exception of `work` on this process, or UserError if it failed only on another one.
        """
        if self.world_size == 1:
            with self.interrupts():
                return work()
        error: BaseException | None = None
        try:
            with self.interrupts():
                result = work()
        except (Exception, Interrupted) as raised:
            error = raised
        failures = self.exchange(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise UserError(f"process {rank}: {failure}")
        return result

    def exchange(self, value: T) -> list[T]:
        """The small picklable values of all processes, in the order of their ranks; a collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, x: Tensor, allocate: Callable[..., Tensor] = torch.empty) -> Tensor | None:
        """The rows of all processes, in the order of their ranks, on the CPU of the main process; None on the others.

        x: (N, ...) on the CPU; N may differ and may be 0, the other dimensions are ignored where N is 0. allocate:
        makes the tensor of all rows from its shape and dtype, in memory or on disk. A collective, chunk by chunk.
        """
        if self.world_size == 1:
            return x
        shapes = self.exchange(tuple(x.shape))
        row = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
        lengths, device = [shape[0] for shape in shapes], collective_device()
        starts = [sum(lengths[:rank]) for rank in range(self.world_size)]
        make = partial(allocate, (sum(lengths), *row), dtype=x.dtype)
        everyones = self.together(make if self.is_main else lambda: None)
        rows = max(1, _CHUNK_ELEMENTS // max(1, torch.Size(row).numel()))
        for first in range(0, max(lengths), rows):
            count = min(rows, max(lengths) - first)
            sent = torch.zeros(count, *row, dtype=x.dtype, device=device)
            mine = x[first : first + count]
            if len(mine):
                sent[: len(mine)] = mine.to(device)
            received = [torch.empty_like(sent) for _ in lengths] if self.is_main else None
            distributed.gather(sent, received, dst=0)
            for start, length, chunk in zip(starts, lengths, received or ()):
                part = chunk[: max(0, length - first)]
                if everyones is not None and len(part):
                    everyones[start + first : start + first + len(part)] = part.cpu()
        return everyones

    @contextmanager
    def same_buffers(self, backbone: nn.Module) -> Iterator[None]:
        """In this context, `backbone` has the buffers of the main process, on every process. Collective.

        Statistics of batch normalisation, for instance, differ between the processes of a run.
        """
        before = [(buffer, buffer.clone()) for buffer in backbone.buffers()] if self.world_size > 1 else []
        for buffer, _ in before:
            shared = buffer.detach().to(collective_device())
            distributed.broadcast(shared, src=0)
            buffer.data.copy_(shared)
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.data.copy_(value)


def collective_device() -> torch.device:
    """Device for the tensors of collectives: the GPU of this process under NCCL, otherwise the CPU."""
    if "nccl" in distributed.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def launched() -> Iterator[Processes]:
    """Connect the processes that torchrun started; without torchrun, one process. An existing group is used."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield Processes.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes.current()
    finally:
        distributed.destroy_process_group()
