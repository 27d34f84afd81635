"""How many steps a run has, what happens during which of them, and the learning rate at each."""

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from pydantic import TypeAdapter, ValidationError

from selfvil import optim
from selfvil.errors import UserError
from selfvil.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The recipe's shares of the budget as numbers of optimizer steps.

    A prolonged run keeps the warm-up and the frozen start of its first launch, in steps.
    """

    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    heads_first_steps: int

    @classmethod
    def of(cls, recipe: Recipe, num_samples: int) -> "Plan":
        """The plan of a new run on `num_samples` images."""
        settings, total = recipe.optim, recipe.budget.total_steps(num_samples, recipe.optim.batch_size)
        cooldown = {"cosine": total, "wsd": round(settings.cooldown * total), "constant": 0}[settings.schedule]
        frozen = ceil(round(settings.heads_first * total, 6))
        return cls(total, round(settings.warmup * total), cooldown, frozen)

    def learning_rate(self, recipe: Recipe, step: int) -> float:
        """The rate of the optimizer step that follows `step` finished ones, before the factors of layers and tags."""
        settings = recipe.optim
        if settings.schedule == "cosine":
            return optim.cosine(step, self.total_steps, settings.peak_lr, settings.min_lr, self.warmup_steps)
        return optim.warmup_stable_decay(
            step, self.total_steps, settings.peak_lr, settings.min_lr, self.warmup_steps, self.cooldown_steps
        )

    def prolonged(self, new: "Plan", recipe: Recipe, step: int, name: str) -> "Plan":
        """This plan with the length of `new`, for a run that has taken `step` steps by it; `name` is for messages.

        A run may become longer while its learning rate does not depend on its length: with optim.schedule wsd before
        the cooldown begins, with constant at any time. It then computes what a run of the new length computes whose
        warm-up (and heads_first) has the same number of steps.

        Raises:
            UserError: the run would become shorter, or its rates up to `step` would have been others.
        """
        if new.total_steps == self.total_steps:
            return self
        before = f"{name} was launched for {self.total_steps:,} steps, and the budget now makes {new.total_steps:,}"
        if new.total_steps < self.total_steps:
            raise UserError(f"{before}: a run cannot be shortened; take at least the old budget, or a new run.out")
        settings = recipe.optim
        if settings.schedule == "cosine":
            raise UserError(
                f"{before}: a cosine schedule cannot be prolonged (optim.schedule wsd and constant can); keep the old "
                f"budget, or begin a new run with model.start_from"
            )
        if settings.weight_decay_end not in (None, settings.weight_decay):
            raise UserError(
                f"{before}: with optim.weight_decay_end the weight decay depends on the length of the run; keep the "
                f"old budget, or begin a new run with model.start_from"
            )
        if step > (stable := self.total_steps - self.cooldown_steps):
            raise UserError(
                f"{before}: its newest checkpoint is of step {step:,}, and its learning rate has been falling since "
                f"step {stable:,}; keep the old budget, or begin a new run with model.start_from"
            )
        return replace(new, warmup_steps=self.warmup_steps, heads_first_steps=self.heads_first_steps)

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def read_plan(value: Any) -> Plan | None:
    """The plan in a checkpoint's meta; None where there is none, as in those of before 2026-11-27."""
    try:
        return _plan.validate_python(value)
    except ValidationError:
        return None


_plan = TypeAdapter(Plan)
