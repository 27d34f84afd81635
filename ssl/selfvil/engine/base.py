"""The contract between a strategy (DDP, ZeRO, FSDP2) and the loop.

The loop calls, in this order: `setup` once; then for each step `forward` and `backward` for each micro-batch,
`clip_gradients`, and `update`. `state` collects what a checkpoint holds. Methods marked "collective" must be called by
all processes.

A strategy computes what DDP computes, to rounding: the same loss, gradient norm and weights. Weights stay float32 and
bf16 is autocast, under every strategy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from selfvil import runtime
from selfvil.engine.blocks import compile_blocks
from selfvil.errors import UserError

if TYPE_CHECKING:
    from selfvil.checkpoint import Checkpoint
    from selfvil.objectives.base import Batch, Objective, Progress, StepOutput
    from selfvil.recipe import Recipe

T = TypeVar("T")


class GradientNorms(NamedTuple):
    """L2 norms before clipping, 0-dim float32: of the whole gradient, and of each parameter's by its name."""

    total: Tensor
    of: dict[str, Tensor]


class Engine(ABC):
    """One process of a launch, and how it trains an objective together with the other processes.

    Attributes:
        rank, world_size: of this process, and the number of processes.
        is_main: whether this is process 0, which writes files and prints.
        device: where this process computes.
        strategy: its name, for the run's record.
        divides_optimizer: each process holds a part of the gradients and the optimizer's state.
        divides_weights: each process holds a part of the weights; `gathered` collects them.
    """

    strategy: str
    divides_optimizer = False
    divides_weights = False
    connected_before = False
    """Whether the process group is that of the program that started this run, which leaves it."""

    def __init__(self, accelerator: Accelerator, recipe: "Recipe") -> None:
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.precision, self.compile_mode = recipe.run.precision, recipe.run.compile
        self.betas = recipe.optim.betas
        self.objective: Objective
        self.optimizer: torch.optim.Optimizer

    # --- training ----------------------------------------------------------------------------------------------------

    def setup(self, objective: "Objective", groups: list[dict], saved: "Checkpoint | None") -> None:
        """Prepare an objective on `device` for training, from a checkpoint if there is one. Collective.

        groups: from `optim.parameter_groups`.
        """
        if saved is not None:  # before `wrap`, in which ZeRO copies and FSDP2 divides the weights
            objective.load_state_dict(saved.tensors("objective"))
        self.objective = objective
        if self.compile_mode != "none":
            compile_blocks(objective, self.compile_mode, self.device)
        self.wrap(groups)
        if saved is not None:
            self.load_optimizer_tensors(saved.tensors("optimizer"))

    @abstractmethod
    def wrap(self, groups: list[dict]) -> None:
        """Create the optimizer, and prepare `objective` for training under this strategy."""

    @abstractmethod
    def forward(self, batch: "Batch", progress: "Progress", last: bool) -> "StepOutput":
        """The objective's output for one micro-batch. last: it is the last one of its step."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch. After the last one they are the mean over all processes."""

    @abstractmethod
    def clip_gradients(self, max_norm: float | None, per_tensor: bool = False) -> GradientNorms:
        """Clip the gradients as `optim.clip_gradients` does; return their norms before clipping. Collective."""

    @abstractmethod
    def update(self, apply: bool = True) -> None:
        """Take one optimizer step and clear the gradients; without `apply`, only clear them. Collective."""

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Group ("objective", "optimizer") -> name -> whole tensor, complete on process 0. Collective."""
        return {"objective": self.weights(), "optimizer": self.optimizer_tensors()}

    def weights(self) -> dict[str, Tensor]:
        """The objective's state dict with whole tensors. Collective where `divides_weights`."""
        return self.objective.state_dict()

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by `parameter|key`, whole tensors, complete on process 0. Collective."""

    @abstractmethod
    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`. Raises UserError if the tensors belong to other parameters."""

    def gathered(self) -> AbstractContextManager[None]:
        """In this context, every process has the complete weights, for reading and forward passes. Collective."""
        return nullcontext()

    def numel(self, parameter: Tensor) -> int:
        """Number of values of a whole parameter."""
        return parameter.numel()

    def describe(self) -> dict[str, Any]:
        """Facts about this launch for the run's record: device, strategy, processes, versions."""
        return runtime.describe(self.accelerator, self.strategy)

    # --- processes ---------------------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """A new autocast context of the run's precision, for forward passes outside `forward`."""
        return runtime.autocast(self.device, self.precision)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one process. Collective."""
        if self.world_size == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), reduction="sum")
        return bool(total.item())

    def agree(self, value: T) -> T:
        """The main process's `value`, on every process. Collective."""
        return value if self.world_size == 1 else broadcast_object_list([value], from_process=0)[0]

    def reduce(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes. Collective."""
        return self.accelerator.reduce(dict(values), reduction="mean")

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, in the order of their ranks. Collective."""
        return values if self.world_size == 1 else gather_object(values)

    def first_reason(self, reason: str | None) -> str | None:
        """The reason of the lowest rank that has one, on every process; None if no process has one. Collective."""
        if not self.any(reason is not None) or self.world_size == 1:
            return reason
        rank, first = next((rank, found) for rank, found in enumerate(gather_object([reason])) if found is not None)
        return first if rank == 0 else f"{first} at process {rank}"

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` on the main process only, and return its result on every process. Collective.

        Raises:
            UserError: `work` raised it. Every process raises it, so that none waits in a later collective.
        """
        result: tuple[T | None, str | None] = (None, None)
        if self.is_main:
            try:
                result = (work(), None)
            except UserError as error:
                if self.world_size == 1:
                    raise
                result = (None, str(error))
        value, message = self.agree(result)
        if message is not None:
            raise UserError(message)
        return cast(T, value)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process executes this context first, and the others after it. Collective."""
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        """Return once all processes have called this. Collective."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, unless it was there before this engine. Collective."""
        if self.connected_before:
            self.wait()
        else:
            self.accelerator.end_training()


def clip_parts(
    names: Sequence[str], parts: Sequence[Tensor | None], max_norm: float | None, per_tensor: bool, device: torch.device
) -> GradientNorms:
    """Clip gradients of which each process holds only parts, in place; collective.

    The squared norms of the parts are added up over the processes, so that every process has the norm of each whole
    gradient.

    Args:
        names: of the parameters, in the same order on every process.
        parts: this process's part of each gradient; None if it has none.
        max_norm, per_tensor: as for `optim.clip_gradients`.
        device: of the parts.
    """
    ours = [part for part in parts if part is not None]
    norms = iter(torch._foreach_norm(ours) if ours else [])
    nothing = torch.zeros((), device=device)
    squares = torch.stack([nothing if part is None else next(norms).square() for part in parts])
    distributed.all_reduce(squares)
    total = squares.sum().sqrt()
    if max_norm is not None and ours:
        scales = (max_norm / ((squares.sqrt() if per_tensor else total) + 1e-6)).clamp(max=1.0).expand(len(parts))
        torch._foreach_mul_(ours, [scale for scale, part in zip(scales, parts) if part is not None])
    return GradientNorms(total, dict(zip(names, squares.sqrt())))
