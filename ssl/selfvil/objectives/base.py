"""The contract between an objective and the loop.

An objective owns its networks and says how a batch becomes a loss. The loop owns everything else: backward,
clipping, accumulation, the optimizer, saving and logging. A new objective is one file with a settings model and a
subclass of `Objective`, and one line in the table of `selfvil.objectives`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

View = Callable[["Image"], Tensor]
"""One augmented view of a decoded image: float32 (C, H, W), normalised."""


class Batch(Protocol):
    """What the loader delivers: `views[i]` is (B, C, H_i, W_i); `positions` (B,) int64 are global sample positions."""

    views: list[Tensor]
    positions: Tensor


@dataclass(frozen=True)
class ImageSpec:
    """The images an objective works on: sides in pixels, patch side in pixels, statistics for each channel.

    `patch_size` is 1 for a backbone without patches, which every objective that needs them refuses.
    """

    size: tuple[int, int]
    patch_size: int
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` counts optimizer steps from 0; `steps_per_epoch` may be fractional."""

    step: int
    total_steps: int
    steps_per_epoch: float
    seed: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step / self.steps_per_epoch


class StepOutput(NamedTuple):
    """`loss` is a float32 scalar to minimise; `logs` are detached float scalars, averaged and written by the loop.

    A tuple, because DeepSpeed looks for the tensors of an output in tuples, lists and mappings only.
    """

    loss: Tensor
    logs: dict[str, Tensor] = {}  # noqa: RUF012 - only ever read


class Objective(nn.Module):
    """Base of all objectives. Subclasses are built as `Subclass(backbone, settings, image)`.

    `backbone` is the network that is trained. `networks` names each exportable backbone with its prefix in
    `state_dict()`; `export` is the one exported unless another is asked for. One that is called "teacher" is a running
    mean of `backbone`: the doctor expects it to follow. `brings` are prefixes in `state_dict()` of what an objective
    brings itself, and does not take from the run that it starts from.
    """

    backbone: nn.Module
    networks: Mapping[str, str] = {"student": "backbone."}
    export: str = "student"
    brings: tuple[str, ...] = ()

    def views(self) -> list[View]:
        """The views of one sample, in the order in which `forward` finds them in `batch.views`."""
        raise NotImplementedError

    def check_batch(self, images: int) -> None:
        """Raise UserError if a micro-batch of `images`, all processes counted, is too small for this objective."""

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of one micro-batch. Randomness must come from `keyed_noise` or torch's global generator, which the
        loop seeds anew for every step."""
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Called after each optimizer step; an objective with a teacher moves it here."""

    def discard_step(self) -> None:
        """Called in place of `after_step` when a step is skipped: drop what its forward passes have collected."""

    def trivial_loss(self, batch: Batch) -> Tensor | None:
        """The loss of the best answer that is the same for every image of `batch`, a scalar; None if it has none.

        A loss near it says that what is predicted does not depend on what is seen.
        """
        return None

    def exported(self) -> nn.Module:
        """The backbone that is exported unless another is asked for, and scored during a run."""
        return self.get_submodule(self.networks[self.export].removesuffix("."))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beside all one-dimensional ones, that weight decay must leave alone."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def tags(self) -> dict[str, str]:
        """Parameters, by name, whose learning rate is scaled by `lr_scales`, with their tags."""
        return {}

    def lr_scales(self, progress: Progress) -> dict[str, float]:
        """For each tag, the factor on the learning rate at this step; 0 freezes."""
        return {}

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor | None:
        """An RGB picture (3, H, W) in [0, 1] of what the objective sees in `batch`, or None."""
        return None


def keyed_noise(seed: int, positions: Tensor, length: int, device: Any = None) -> Tensor:
    """Uniform noise (B, length), float32 in [0, 1), that depends only on the seed and each sample's position.

    The same sample gets the same mask whatever the number of processes, workers or micro-batches. Philox is counter
    based (Salmon et al., 2011), so a generator for each key costs next to nothing.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, position], dtype=np.uint64))).random(
            length, dtype=np.float32
        )
        for position in positions.tolist()
    ]
    return torch.from_numpy(np.stack(rows)).to(device)
