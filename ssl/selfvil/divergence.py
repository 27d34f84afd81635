"""Losses, gradients and weights that become NaN or infinite, and losses that jump.

A step with a non-finite loss or gradient on any process is skipped on all processes: weights, optimizer state, teacher
and running statistics do not change. Tensors are also checked before they are saved, since a step with a finite
gradient can make weights infinite.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.records import CHECKPOINTS, SKIPPED

MOST_SKIPPED = 10
"""Steps that may be skipped in a row; with more, the run stops."""

WINDOW, FEWEST, BOUND = 32, 8, 8.0
"""Logged losses that a new one is compared with, at most and at least, and deviations above them that are a spike."""


class BuffersBefore:
    """Copies of the buffers of a module after its last complete step, such as the running statistics of batch norm.

    values: by the buffers' names.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = dict(module.named_buffers())
        self.values = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers: a step is complete."""
        if self._buffers:
            torch._foreach_copy_(list(self.values.values()), list(self._buffers.values()))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers back to the last complete step."""
        if self._buffers:
            torch._foreach_copy_(list(self._buffers.values()), list(self.values.values()))


class Broken(NamedTuple):
    """Non-finite values in one process's part of a step: their `names`, and the `ids` of the samples of micro-batches
    with a non-finite loss."""

    names: list[str]
    ids: list[int]


class NonFinite:
    """Applies `optim.on_nonfinite`, records skipped steps in `skipped.jsonl`, and counts those in a row."""

    def __init__(self, policy: Literal["skip", "stop"], run: Path) -> None:
        self.policy, self.run = policy, run
        self.in_a_row = 0

    def find(self, outputs: Sequence[Mapping[str, Tensor]], grad_norm: Tensor, ids: Sequence[Tensor]) -> Broken | None:
        """Find non-finite values in a step; None where all are finite. Synchronises with the device.

        outputs: of each micro-batch, with its "loss". grad_norm: norm of all gradients together. ids: sample ids of
        each micro-batch.
        """
        losses = torch.stack([*(output["loss"].float() for output in outputs), grad_norm.float()])
        *losses_finite, norm_finite = losses.isfinite().tolist()
        if norm_finite and all(losses_finite):
            return None
        names = [] if all(losses_finite) else ["loss"]
        broken = [id for finite, part in zip(losses_finite, ids) if not finite for id in part.tolist()]
        return Broken(names + ([] if norm_finite else ["grad_norm"]), broken)

    def skip(self, step: int, found: Sequence[Broken], record: bool) -> str:
        """A message about step number `step`, counted from 1, which is skipped.

        found: of all processes. record: append a line to skipped.jsonl.

        Raises:
            UserError: the policy is to stop, or too many steps in a row were skipped.
        """
        self.in_a_row += 1
        names = " and ".join(dict.fromkeys(name for each in found for name in each.names))
        ids = [id for each in found for id in each.ids]
        if record:
            with open(self.run / SKIPPED, "a") as file:
                file.write(json.dumps({"step": step, "not_finite": names, "ids": ids}) + "\n")
        if self.policy == "stop":
            raise UserError(
                f"{names} became NaN or infinite by step {step:,} (optim.on_nonfinite = stop). {self._advice()}"
            )
        if self.in_a_row > MOST_SKIPPED:
            raise UserError(
                f"{names} became NaN or infinite by step {step - self.in_a_row + 1:,} and stayed so for "
                f"{self.in_a_row} steps, which were all skipped: the run has diverged. It stops without saving, and "
                f"its last checkpoint is the newest. {self._advice()}"
            )
        return f"step {step:,} was skipped: {names} NaN or infinite (its samples are in {self.run / SKIPPED})"

    def refuse(self, step: int, names: Sequence[str]) -> None:
        """Raise UserError if there are `names`: of values or tensors that are not finite after `step` steps."""
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(
                f"{names[0]}{more} became NaN or infinite by step {step:,}: the run has diverged. {self._advice()}"
            )

    def _advice(self) -> str:
        return (
            f"No non-finite value was saved; the checkpoints in {self.run / CHECKPOINTS} are valid. Lower "
            f"optim.base_lr, raise optim.warmup or lower optim.clip_norm, with a new run.out"
        )


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that contain NaN or infinite values. Synchronises with the device."""
    floats = {name: x.detach() for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not floats:
        return []
    largest = torch._foreach_norm(list(floats.values()), ord=torch.inf)  # does not overflow; NaN if any value is NaN
    all_finite = torch.stack([x.float().cpu() for x in largest]).isfinite().tolist()
    return [name for name, finite in zip(floats, all_finite) if not finite]


class LossSpikes:
    """Finds logged losses far above the recent ones, measured by robust statistics: median and MAD.

    The median absolute deviation (MAD) times 1.4826 estimates the standard deviation of a normal distribution; a few
    outliers do not change it. A loss is a spike if it is more than `BOUND` such deviations above the median.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """By how many deviations a spike is above the median of the losses before it; None if `loss` is no spike."""
        recent = list(self._recent)
        self._recent.append(loss)
        if len(recent) < FEWEST:
            return None
        middle = median(recent)
        deviation = 1.4826 * median(abs(value - middle) for value in recent)
        height = (loss - middle) / max(deviation, 1e-3 * abs(middle), 1e-12)
        return height if height > BOUND else None
