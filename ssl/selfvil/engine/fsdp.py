"""FSDP2: weights, gradients and optimizer state divided among the processes, a teacher's weights too.

Each parameter is a DTensor, divided along its first dimension (`torch.distributed.fsdp.fully_shard`; Zhao et al.,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023). A pair of blocks is gathered while it
computes; parameters outside of the blocks are gathered for the whole step. A teacher is divided like its student, so
that the exponential moving average is elementwise on each process's part, and equals DDP's.

On CPUs, Accelerate would silently run DDP instead. Therefore `fully_shard` is called here, on CPUs (gloo) and GPUs
(NCCL), and Accelerate only connects the processes. Settings of Accelerate's FSDP that could change the result are
refused; weights stay float32 and bf16 is autocast, as under every strategy.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from selfvil import optim
from selfvil.engine.base import Engine, GradientNorms, clip_parts
from selfvil.engine.blocks import blocks_of
from selfvil.errors import UserError
from selfvil.objectives.base import Batch, Progress, StepOutput

if TYPE_CHECKING:
    from selfvil.recipe import Recipe

_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "offloading to the CPU is not tested",
    "FSDP_ACTIVATION_CHECKPOINTING": "it is not tested; lower optim.batch_size or raise optim.accumulate instead",
}


class FSDP(Engine):
    """An objective whose parameters are divided among the processes."""

    strategy = "fsdp"
    divides_optimizer = divides_weights = True

    def __init__(self, accelerator: Accelerator, recipe: "Recipe") -> None:
        super().__init__(accelerator, recipe)
        check_settings(os.environ, self.world_size)

    def wrap(self, groups: list[dict]) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for module in blocks_of(self.objective):
            fully_shard(module, mesh=mesh)
        fully_shard(self.objective, mesh=mesh)
        for group in groups:  # every parameter has been replaced by its DTensor
            group["params"] = [self.objective.get_parameter(name) for name in group["names"]]
        self.optimizer = optim.adamw(groups, self.betas)

    def forward(self, batch: Batch, progress: Progress, last: bool) -> StepOutput:
        self._root.set_requires_gradient_sync(last)
        with self.autocast():
            return self.objective(batch, progress)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def clip_gradients(self, max_norm: float | None, per_tensor: bool = False) -> GradientNorms:
        named = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        parts = [None if p.grad is None else _local(p.grad) for _, p in named]
        return clip_parts([name for name, _ in named], parts, max_norm, per_tensor, self.device)

    def update(self, apply: bool = True) -> None:
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        modules = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not self.objective, recurse=False)
                module.reshard()

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in self.objective.state_dict().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in optim.optimizer_tensors(self.optimizer).items()}

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        parameters = {
            name: parameter
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
        }
        for name, state in optim.by_parameter(tensors, parameters).items():
            parameter = parameters[name]
            self.optimizer.state[parameter] = {
                key: distribute_tensor(value.to(self.device), parameter.device_mesh, parameter.placements)
                if value.ndim
                else value.to(self.device, copy=True)
                for key, value in state.items()
            }

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.objective, FSDPModule)
        return self.objective


def check_settings(environ: Mapping[str, str], world_size: int) -> None:
    """Refuse settings of Accelerate's FSDP that are not tested. Raises UserError."""
    if environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(f"FSDP_VERSION = {environ['FSDP_VERSION']}: only version 2 is supported; set fsdp_version: 2")
    for key, why in _REFUSED.items():
        if environ.get(key, "").lower() == "true":
            raise UserError(f"{key} = {environ[key]}: {why}; leave it out")
    if world_size == 1:
        raise UserError("FSDP2 divides weights among processes, and this launch has one: start two or more, or use DDP")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    """The complete tensor, on every process. Collective."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor
