"""What a run will do, step by step: how many steps, of how many images, and the rates of each.

The loop follows a `Plan`, and `selfvil plan` prints one. It is a recipe together with the number of images and of
processes, and the recipe's shares of the budget as numbers of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ValidationError

from selfvil import optim
from selfvil.errors import UserError
from selfvil.optim import Progress
from selfvil.recipe import OptimSection, Recipe


class Rates(NamedTuple):
    """Rates of one optimizer step, in the order of the arguments of `optim.set_rates`."""

    lr: float
    """Learning rate before the factors of layers and tags."""
    weight_decay: float
    """Weight decay of the parameters that are decayed."""
    lr_scales: dict[str, float]
    """Factor on the learning rate of each tag; 0 freezes its parameters in this step."""


class HasRates(Protocol):
    """What a plan asks of an objective: factors on the learning rate, by tag."""

    def lr_scales(self, progress: Progress) -> Mapping[str, float]: ...


class _Stored(BaseModel, strict=True):
    """A plan in the meta of a checkpoint. The rest follows from the recipe and the data set."""

    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    heads_first_steps: int


@dataclass(frozen=True)
class Plan:
    """The steps of a run. A prolonged run keeps the warm-up and the frozen start of its first launch, in steps."""

    recipe: Recipe = field(repr=False)
    num_samples: int
    """Images of the data set."""
    processes: int
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    heads_first_steps: int
    """Steps at the start during which the backbone is frozen."""

    @classmethod
    def of(cls, recipe: Recipe, num_samples: int, processes: int = 1) -> "Plan":
        """The plan of a new run on `num_samples` images in `processes` processes.

        Raises:
            UserError: a step does not divide into equal micro-batches, or would contain an image more than once.
        """
        settings, total = recipe.optim, recipe.budget.total_steps(num_samples, recipe.optim.batch_size)
        check_division(settings, processes)
        check_batch(settings.batch_size, num_samples)
        cooldown = {"cosine": total, "wsd": round(settings.cooldown * total), "constant": 0}[settings.schedule]
        frozen = ceil(round(settings.heads_first * total, 6))
        return cls(recipe, num_samples, processes, total, round(settings.warmup * total), cooldown, frozen)

    # Images.

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass of one process."""
        return self.recipe.optim.batch_size // (self.processes * self.recipe.optim.accumulate)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over the images; may be fractional."""
        return self.num_samples / self.recipe.optim.batch_size

    def samples(self, step: int) -> int:
        """Images, repetitions included, of the first `step` steps."""
        return step * self.recipe.optim.batch_size

    def epochs(self, step: int) -> float:
        """Passes over the images in the first `step` steps."""
        return step / self.steps_per_epoch

    # Steps and their rates. `step` counts the steps taken before, from 0.

    def progress(self, step: int) -> Progress:
        """What an objective is told about its place in the run."""
        return Progress(step, self.total_steps, self.steps_per_epoch, self.recipe.run.seed)

    def rates(self, step: int, objective: HasRates | None = None) -> Rates:
        """Rates of the optimizer step after `step` finished ones; `optim.set_rates(optimizer, *rates)` sets them.

        objective: adds the factors of its own tags to that of the backbone.
        """
        scales = {optim.BACKBONE: 0.0 if step < self.heads_first_steps else 1.0}
        own = objective.lr_scales(self.progress(step)) if objective is not None else {}
        return Rates(self.learning_rate(step), self.weight_decay(step), scales | dict(own))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, before the factors of layers and tags."""
        settings = self.recipe.optim
        if settings.schedule == "cosine":
            return optim.cosine(step, self.total_steps, settings.peak_lr, settings.min_lr, self.warmup_steps)
        return optim.warmup_stable_decay(
            step, self.total_steps, settings.peak_lr, settings.min_lr, self.warmup_steps, self.cooldown_steps
        )

    def weight_decay(self, step: int) -> float:
        """The weight decay of a step: a half cosine from optim.weight_decay to weight_decay_end, where that is set."""
        settings = self.recipe.optim
        end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
        return optim.cosine(step, self.total_steps, settings.weight_decay, end)

    def key_steps(self) -> dict[str, int]:
        """Steps at which schedules change their course, in their order, by name."""
        total, last = self.total_steps, self.total_steps - 1
        steps = {"start": 0}
        if self.heads_first_steps:
            steps["backbone is trained"] = min(self.heads_first_steps, last)
        if self.warmup_steps:
            steps["end of warm-up"] = min(self.warmup_steps, last)
        steps["middle"] = total // 2
        if 0 < self.cooldown_steps < total:
            steps["start of cool-down"] = total - self.cooldown_steps
        steps["end"] = last
        return dict(sorted(steps.items(), key=lambda item: item[1]))

    # Continuing a run.

    def prolonged(self, new: "Plan", step: int, name: str) -> "Plan":
        """This plan with the length and recipe of `new`, for a run that has taken `step` steps; `name` is for messages.

        A run may become longer while its learning rate does not depend on its length: with optim.schedule wsd before
        the cool-down begins, with constant at any time. It then computes what a run of the new length computes whose
        warm-up (and heads_first) has the same number of steps.

        Raises:
            UserError: the run would become shorter, or its rates up to `step` would have been others.
        """
        settings = new.recipe.optim
        longer = replace(new, warmup_steps=self.warmup_steps, heads_first_steps=self.heads_first_steps)
        if new.total_steps == self.total_steps:
            return replace(longer, cooldown_steps=self.cooldown_steps)
        before = f"{name} was launched for {self.total_steps:,} steps, and the budget now makes {new.total_steps:,}"
        if new.total_steps < self.total_steps:
            raise UserError(f"{before}: a run cannot be shortened; take at least the old budget, or a new run.out")
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
        return longer

    def as_json(self) -> dict[str, int]:
        """What a checkpoint stores of it: the numbers of steps."""
        return {name: getattr(self, name) for name in _Stored.model_fields}

    @classmethod
    def read(cls, value: Any, recipe: Recipe, num_samples: int, processes: int = 1) -> "Plan":
        """The plan stored in a checkpoint of a run of `recipe`; that of the recipe where it stores none."""
        plan = cls.of(recipe, num_samples, processes)
        try:
            stored: dict[str, Any] = _Stored.model_validate(value).model_dump()
        except ValidationError:  # checkpoints of before 2026-11-27
            return plan
        return replace(plan, **stored)


def check_division(settings: OptimSection, processes: int) -> None:
    """Raises UserError if a step does not divide into equal micro-batches of all processes."""
    per_step = processes * settings.accumulate
    if settings.batch_size % per_step:
        raise UserError(
            f"optim.batch_size = {settings.batch_size} is not divisible by {processes} processes x "
            f"{settings.accumulate} micro-batches: take a multiple of {per_step}"
        )


def check_batch(batch_size: int, num_images: int) -> None:
    """Raises UserError if a step would contain images more than once."""
    if batch_size > num_images:
        raise UserError(
            f"optim.batch_size = {batch_size:,} is more than the {num_images:,} images of data.train, so that a step "
            f"would hold images more than once: lower it to at most {num_images:,}, or give more images"
        )
