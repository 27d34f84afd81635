"""The sections of a recipe on how a run trains, and for how long: `optim` and `budget`."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfvil.settings import Section


class OptimSection(Section):
    """AdamW, its schedules, and the size of a step."""

    batch_size: int = Field(ge=1)
    """Images in one optimizer step, over all processes and accumulated micro-batches together."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches a step is split into, to save memory."""
    base_lr: float = Field(gt=0)
    """Learning rate for 256 images per step; lr_scaling determines it for other batch sizes."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """Peak learning rate for a batch: base_lr * batch_size / 256, base_lr * sqrt(batch_size / 256), or base_lr."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: a half cosine; wsd, stable until the last cooldown; or constant."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule, unless it is constant (not scaled by the batch size)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the budget over which the learning rate rises linearly from 0."""
    cooldown: float = Field(0.2, gt=0, le=1)
    """With schedule wsd: share of the budget, its last, over which the learning rate falls to min_lr."""
    heads_first: float = Field(0.0, ge=0, lt=1)
    """The backbone is frozen for this first fraction of the run: for new heads on a trained backbone."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Ratio of the learning rate of a backbone's layer to that of the next layer (for ViL, of pairs of blocks)."""
    patch_embed_lr: float = Field(1.0, ge=0)
    """Factor on the learning rate of the patch embedding; 0 freezes it."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; norms, LayerScale, positions, skips and biases are never decayed."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of a cosine schedule; null keeps it constant."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of the gradient; null does not clip."""
    clip_per_tensor: bool = False
    """Clip the gradient of each parameter tensor separately (as DINO does) instead of the whole gradient."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A step whose loss or gradient is NaN or infinite on any process: skip leaves weights, optimizer and teacher as
    they were, records the step in skipped.jsonl, and stops after more than 10 in a row; stop ends the run at once."""

    @model_validator(mode="after")
    def _batch_splits(self) -> "OptimSection":
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        return self

    @property
    def peak_lr(self) -> float:
        """Peak learning rate at this batch size: base_lr is the one for 256 images a step.

        "linear": Goyal et al. (2017); "sqrt", the rule for Adam: Malladi et al. (2022), and DINOv2's; "none": base_lr.
        """
        ratio = self.batch_size / 256
        return self.base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.lr_scaling]

    @model_validator(mode="after")
    def _rate_falls(self) -> "OptimSection":
        if self.schedule != "constant" and self.min_lr > self.peak_lr:
            raise ValueError(
                f"min_lr {self.min_lr:g}, the rate at the end, is above the peak rate {self.peak_lr:g} that base_lr "
                f"{self.base_lr:g} gives at batch_size {self.batch_size}: lower min_lr, or raise base_lr"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> "OptimSection":
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} together are more than the whole run")
        return self


class BudgetSection(Section):
    """How long a run lasts: exactly one of epochs, samples and steps."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training images."""
    samples: int | None = Field(None, gt=0)
    """Images seen, with repetition."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps."""
    pause_minutes: float | None = Field(None, gt=0)
    """Save and stop after this many minutes of this launch; the next launch continues. Schedules do not change."""

    @model_validator(mode="after")
    def _one_length(self) -> "BudgetSection":
        given = [key for key in ("epochs", "samples", "steps") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, samples and steps (given: {', '.join(given) or 'none'})")
        return self

    def total_steps(self, num_samples: int, batch_size: int) -> int:
        """Optimizer steps of the whole run; at least one."""
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else (self.epochs or 0) * num_samples
        return max(1, round(samples / batch_size))
