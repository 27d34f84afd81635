"""One process, or several processes with a complete copy each (distributed data parallel), through Accelerate."""

from typing import Any

from torch import Tensor

from selfvil import optim
from selfvil.engine.base import Engine, GradientNorms
from selfvil.objectives.base import Batch, Progress, StepOutput


class DDP(Engine):
    """Every process holds all weights and the whole optimizer state; gradients are averaged after each step."""

    model: Any

    @property
    def strategy(self) -> str:  # type: ignore[override]
        return "one process" if self.world_size == 1 else "ddp"

    def wrap(self, groups: list[dict]) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.objective, optim.adamw(groups, self.betas))

    def forward(self, batch: Batch, progress: Progress, last: bool) -> StepOutput:
        if self.world_size > 1:  # DDP.no_sync() sets it; DDP reads it at the beginning of forward
            self.model.require_backward_grad_sync = last
        return self.model(batch, progress)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self, max_norm: float | None, per_tensor: bool = False) -> GradientNorms:
        trained = {name: p for name, p in self.objective.named_parameters() if p.grad is not None}
        total, norms = optim.clip_gradients(trained.values(), max_norm, per_tensor)
        return GradientNorms(total, dict(zip(trained, norms)))

    def update(self, apply: bool = True) -> None:
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optim.optimizer_tensors(self.optimizer)

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        optim.load_optimizer_tensors(self.optimizer, tensors)
