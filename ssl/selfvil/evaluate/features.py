"""Features of frozen backbones: one row for each labelled image.

A readout (`selfvil.models.adapter`) turns the tokens of an image into its row. Shapes: B images, N images of a data
set, D features.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from rich.progress import track
from torch import Tensor, nn

from selfvil import terminal
from selfvil.data.index import Shards
from selfvil.data.ledger import BadSample
from selfvil.data.loader import ordered_batches
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate.processes import Processes
from selfvil.models.adapter import READOUTS, adapt
from selfvil.settings import Section

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
ALONE = Processes()


@dataclass(frozen=True)
class Features:
    """x: float32 (N, D), one row for each image; y: int64 (N,), its label."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> "Features":
        return Features(self.x.to(device), self.y.to(device))


def _known(readout: str) -> str:
    if readout not in READOUTS:
        raise ValueError(f"there is no readout {readout!r}; choose one of: {', '.join(READOUTS)}")
    return readout


class FeatureSettings(Section):
    """Settings of an evaluation that fits on frozen features."""

    readout: Annotated[str, AfterValidator(_known)] | None = None
    """How tokens become features: mean, cls, first_last_mean ...; null takes the architecture's usual readout."""


def choose_readout(backbone: nn.Module, readout: str | None = None) -> str:
    """`readout` if `backbone` has the tokens for it; for None, the architecture's usual one for frozen features.

    A Vision-LSTM: its first and last token, each of which ends a scan over the whole image, and the mean. With a class
    token or, in a Vision-LSTM, registers: these and the mean. Any other network: the mean.

    Raises UserError for an unknown readout, or one without its tokens.
    """
    if readout is None:
        return adapt(backbone).frozen_readout
    if readout not in READOUTS:
        raise UserError(f"There is no readout {readout!r}; choose one of: {', '.join(READOUTS)}.")
    if readout not in adapt(backbone).usable_readouts():
        needed = "a class token" if readout.startswith("cls") else "registers as its output"
        raise UserError(f"The readout {readout!r} needs {needed}, which {type(backbone).__name__} does not have.")
    return readout


# --- from shards to rows ---------------------------------------------------------------------------------------------


def extract(
    backbone: nn.Module,
    shards: Shards,
    *,
    img_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    readout: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    title: str | None = None,
    processes: Processes = ALONE,
) -> Features | None:
    """Features of every readable image in `shards`, in their order, on the CPU of the main process; None on others.

    Each image is resized and cropped at its centre to `img_size` (H, W), and normalised with mean and std per channel.
    The backbone moves to `device` (None: a GPU if there is one) and runs in evaluation mode, without gradients, in
    float32 or bf16 autocast; its mode is restored afterwards. batch_size: images in a pass (None: 64 on a CPU, 256
    elsewhere). title: shown with a progress bar on a terminal. Several processes share the batches; each batch is the
    same as with one process, so features are the same too. A collective where there are several.

    Raises UserError if images have no labels, or for a readout the backbone does not have.
    """
    readout = choose_readout(backbone, readout)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if batch_size is None:
        batch_size = 64 if device.type == "cpu" else 256  # batches that fit into a CPU's caches are a third faster
    was_training = backbone.training
    backbone.to(device).eval()
    autocast: Any = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def row(images: Tensor) -> Tensor:
        with autocast:
            return adapt(backbone).read_out(images.to(device), readout)

    view = CenterCrop(img_size, mean, std)
    try:
        with processes.same_buffers(backbone):
            return labelled_rows(row, shards, view, len(mean), batch_size, workers, title, processes)
    finally:
        backbone.train(was_training)


def raw_pixels(
    shards: Shards,
    img_size: int | Sequence[int],
    *,
    channels: int = 3,
    batch_size: int = 256,
    workers: int = 2,
    title: str | None = None,
    processes: Processes = ALONE,
) -> Features | None:
    """The pixels themselves, 0 to 1, of images resized and cropped to `img_size`: the features of no network.

    x is (N, channels · H · W); None but on the main process. Raises UserError if images have no labels.
    """
    view = CenterCrop(img_size, [0.0] * channels, [1.0] * channels)
    return labelled_rows(
        lambda images: images.flatten(1), shards, view, channels, batch_size, workers, title, processes
    )


def labelled_rows(
    row: Callable[[Tensor], Tensor],
    shards: Shards,
    view: CenterCrop,
    channels: int,
    batch_size: int,
    workers: int,
    title: str | None,
    processes: Processes = ALONE,
) -> Features | None:
    """`row` of every readable image in `shards`, in their order, on the CPU: images (B, channels, H, W) to rows (B, D).

    Each process computes the rows of its part of the batches; the main process gathers them, the others return None.
    Raises UserError if images have no labels.
    """

    @torch.no_grad()
    def own_part() -> tuple[Tensor, Tensor, list[BadSample]]:
        require_labels(shards)
        batches = ordered_batches(
            shards, view, batch_size=batch_size, workers=workers, channels=channels, rank=processes.rank,
            world_size=processes.world_size,
        )  # fmt: skip
        xs, ys, bad = [], [], []
        for batch in track(
            batches,
            description=title or "",
            total=-(-len(shards) // batch_size // processes.world_size),
            console=terminal.console(stderr=True),
            transient=True,
            disable=title is None or not sys.stderr.isatty() or not processes.is_main,
        ):
            bad += batch.bad
            replaced = {sample.position for sample in batch.bad}
            kept = torch.tensor([position not in replaced for position in batch.positions.tolist()])
            xs.append(row(batch.views[0][kept]).float().cpu())
            ys.append(batch.labels[kept].cpu())
        if not xs:  # more processes than batches
            return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), bad
        return torch.cat(xs), torch.cat(ys), bad

    x, y, bad = processes.together(own_part)
    bad = [sample for part in processes.exchange(bad) for sample in part]
    everyones_x, everyones_y = processes.gather_rows(x), processes.gather_rows(y)
    if everyones_x is None or everyones_y is None:
        return None
    if bad:
        first = bad[0]
        log.warning("%d of %d images cannot be read and are left out (first: %s in %s: %s)",
                    len(bad), len(shards), first.key, first.shard, first.reason)  # fmt: skip
    return Features(everyones_x, everyones_y)


def require_labels(shards: Shards) -> None:
    """Raises UserError if any image has no label."""
    unlabelled = len(shards) if shards.labels is None else int((shards.labels < 0).sum())
    if unlabelled:
        raise UserError(
            f"{unlabelled} of the {len(shards)} images in {names(shards)} have no label, and an evaluation needs one "
            f"(.cls) for each: pack a folder with one subfolder for each class, `selfvil pack SOURCE OUT`."
        )


def names(shards: Shards) -> str:
    """The first shard, and how many more there are, for messages."""
    more = len(shards.paths) - 1
    return f"{shards.paths[0]}{f' and {more} more shard' if more else ''}{'s' if more > 1 else ''}"


# --- what an evaluation needs ----------------------------------------------------------------------------------------


def shared_classes(train: Features, test: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (K,) among the labels of `train`, ascending, and the labels of both as positions in it.

    Raises UserError if either is empty or holds NaN, their widths differ, or `test` has a class that `train` lacks.
    """
    for name, features in (("training", train), ("test", test)):
        if len(features) == 0:
            raise UserError(f"There are no {name} images.")
        if not torch.isfinite(features.x).all():
            raise UserError(f"The features of the {name} images hold NaN or infinity: the backbone is broken.")
        if int(features.y.min()) < 0:
            raise UserError(f"Some {name} images have no label.")
    if train.x.shape[1] != test.x.shape[1]:
        raise UserError(f"Training features have {train.x.shape[1]} columns, test features {test.x.shape[1]}.")
    classes, train_ids = train.y.unique(return_inverse=True)
    unknown = sorted(set(test.y.tolist()) - set(classes.tolist()))
    if unknown:
        raise UserError(
            f"The test images have labels that no training image has: {unknown[:10]}"
            f"{' ...' if len(unknown) > 10 else ''}; training has {len(classes)} classes, {int(classes[0])} to "
            f"{int(classes[-1])}. Give both parts of the same data set."
        )
    return classes, train_ids, torch.searchsorted(classes, test.y.to(classes.device))
