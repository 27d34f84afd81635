"""The contract between an objective and the loop.

An objective owns its networks and computes the loss of a batch. The loop owns everything else: backward, clipping,
accumulation, the optimizer, saving and logging. A new objective is one file with a settings model and a subclass of
`Objective`, and one line in the table of `selfvil.objectives`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from selfvil.optim import Progress as Progress

if TYPE_CHECKING:
    from selfvil.data.arrays import Pixels

View = Callable[["Pixels"], Tensor]
"""One augmented view of a decoded image: float32 (C, H, W), normalised."""


class Batch(Protocol):
    """A batch of the loader: `views[i]` is (B, C, H_i, W_i); `positions` (B,) int64 are global sample positions, and
    `labels` (B,) int64 are -1 for images without one."""

    views: list[Tensor]
    positions: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSpec:
    """The images of an objective: height and width in pixels, side of a patch in pixels, statistics for each channel.

    `patch_size` is 1 for a backbone without patches; objectives that need patches refuse such a backbone.
    channel_drop: probability that a channel of a view is set to its mean. shown: the channels of pictures, as red,
    green and blue.
    """

    size: tuple[int, int]
    patch_size: int
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    channel_drop: float = 0.0
    shown: tuple[int, int, int] = (0, 1, 2)

    def rgb(self, images: Tensor) -> Tensor:
        """Normalised images (..., C, H, W) as pictures (..., 3, H, W) in [0, 1].

        Channels in physical units, and those that use a small part of their range, are shown from 2.5 standard
        deviations below their mean to 2.5 above it.
        """
        mean, std = (torch.tensor(each, device=images.device).view(-1, 1, 1) for each in (self.mean, self.std))
        brightest = [centre + 2 * spread for centre, spread in zip(self.mean, self.std)]
        if self.in_chans in (1, 3, 4) and min(self.mean) >= 0 and min(brightest) >= 0.4 and max(self.mean) <= 1:
            pictures = (images.float() * std + mean).clamp(0, 1)
        else:
            pictures = (images.float() / 5 + 0.5).clamp(0, 1)
        if self.in_chans < 3:
            return pictures[..., :1, :, :].expand(*pictures.shape[:-3], 3, -1, -1)
        return pictures[..., self.shown, :, :]


class StepOutput(NamedTuple):
    """`loss` is a float32 scalar to minimise; `logs` are detached float scalars, averaged and written by the loop.

    A tuple, because DeepSpeed finds the tensors of an output in tuples, lists and mappings only.
    """

    loss: Tensor
    logs: dict[str, Tensor] = {}  # noqa: RUF012 - never modified


class Objective(nn.Module):
    """Base of all objectives. Subclasses are built as `Subclass(backbone, settings, image)`.

    `backbone` is the network that is trained. `networks` maps the name of each exportable backbone to its prefix in
    `state_dict()`; `export` is the name of the one that is exported by default. A network called "teacher" is a running
    mean of `backbone`, and the doctor checks that it follows. `not_restored` are prefixes in `state_dict()` that keep
    their values when a new run starts from another one's weights (`model.start_from`). `reads_weights`: the constructor
    reads another network from files; any other one is also built on torch's meta device, to count its weights.
    """

    backbone: nn.Module
    networks: Mapping[str, str] = {"student": "backbone."}
    export: str = "student"
    not_restored: tuple[str, ...] = ()
    reads_weights: bool = False

    def views(self) -> list[View]:
        """One transform for each view of a sample, in the order of `batch.views`."""
        raise NotImplementedError

    def check_batch(self, images: int) -> None:
        """Raise UserError if a micro-batch of `images`, summed over all processes, is too small for this objective."""

    def check_micro_batch(self, images: int) -> None:
        """Raise UserError if a micro-batch of one process cannot have this number of images."""

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of one micro-batch. Random numbers must come from `keyed_noise` or torch's global generator, which the
        loop seeds at every step."""
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Called after each optimizer step; an objective with a teacher updates it here."""

    def discard_step(self) -> None:
        """Called instead of `after_step` when a step is skipped: drop what its forward passes have accumulated."""

    def trivial_loss(self, batch: Batch) -> Tensor | None:
        """The loss of the best prediction that is the same for every image of `batch`, a scalar; None if undefined.

        If the training loss is close to it, the predictions do not depend on the input.
        """
        return None

    def exported(self) -> nn.Module:
        """The backbone that is exported by default and evaluated during a run."""
        return self.get_submodule(self.networks[self.export].removesuffix("."))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in addition to all one-dimensional ones."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            if module is not self and hasattr(module, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def tags(self) -> dict[str, str]:
        """Tags of parameters, by name, for `lr_scales`."""
        return {}

    def lr_scales(self, progress: Progress) -> dict[str, float]:
        """For each tag, the factor on the learning rate at this step; 0 freezes the parameters."""
        return {}

    def schedules(self, progress: Progress) -> dict[str, float]:
        """The objective's own scheduled values at this step, by name, such as the momentum of a teacher."""
        return {}

    @torch.no_grad()
    def picture(self, batch: Batch, progress: Progress) -> Tensor | None:
        """An RGB picture (3, H, W) in [0, 1] that shows the objective's inputs and predictions for `batch`, or None."""
        return None


def keyed_noise(seed: int, positions: Tensor, length: int, device: Any = None) -> Tensor:
    """Uniform noise (B, length), float32 in [0, 1), that depends only on the seed and each sample's position.

    The same sample gets the same mask whatever the number of processes, workers or micro-batches. Philox is counter
    based (Salmon et al., 2011), so a generator for each key is cheap.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, position], dtype=np.uint64))).random(
            length, dtype=np.float32
        )
        for position in positions.tolist()
    ]
    return torch.from_numpy(np.stack(rows)).to(device)
