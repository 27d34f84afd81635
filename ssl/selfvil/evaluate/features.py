"""Features of frozen backbones: one row for each labelled image.

A readout (`selfvil.models.heads`) turns the tokens of an image into its row. Shapes: B images, N images of a data set,
D features.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from selfvil import terminal
from selfvil.data.index import Shards
from selfvil.data.loader import ordered_batches
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.heads import READOUTS, has_class_token, read_out, usable_readouts
from selfvil.weights import Network, create_backbone, load_export, load_network, open_checkpoint

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Features:
    """x: float32 (N, D), one row for each image; y: int64 (N,), its label."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> "Features":
        return Features(self.x.to(device), self.y.to(device))


def choose_readout(backbone: nn.Module, readout: str | None = None) -> str:
    """`readout` if `backbone` has the tokens for it; for None, the architecture's usual one for frozen features.

    A Vision-LSTM reads from both ends, so its first and last token have seen the whole image; a ViT, and a Vision-LSTM
    built so, has a class token or registers for that; for anything else the mean is left.

    Raises UserError for an unknown readout, or one without its tokens.
    """
    if readout is None:
        if has_class_token(backbone):
            return "cls_mean"
        if isinstance(backbone, VisionLSTM):
            return "registers_mean" if backbone.global_pool == "registers" else "first_last_mean"
        return "mean"
    if readout not in READOUTS:
        raise UserError(f"There is no readout {readout!r}; choose one of: {', '.join(READOUTS)}.")
    if readout not in usable_readouts(backbone):
        needed = "a class token" if readout.startswith("cls") else "registers to be read from"
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
) -> Features:
    """Features of every readable image in `shards`, in their order, on the CPU.

    Each image is resized and cropped at its centre to `img_size` (H, W), and normalised with mean and std per channel.
    The backbone moves to `device` (None: a GPU if there is one) and runs in evaluation mode, without gradients, in
    float32 or bf16 autocast; afterwards its mode is as before. batch_size: images in a pass (None: 64 on a CPU, 256
    elsewhere). title: shown with a progress bar on a terminal.

    Raises UserError if images have no labels, or for a readout the backbone cannot give.
    """
    readout = choose_readout(backbone, readout)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if batch_size is None:
        batch_size = 64 if device.type == "cpu" else 256  # what a CPU's caches hold is a third faster
    was_training = backbone.training
    backbone.to(device).eval()
    autocast: Any = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def row(images: Tensor) -> Tensor:
        with autocast:
            return read_out(backbone, images.to(device), readout)

    try:
        return labelled_rows(row, shards, CenterCrop(img_size, mean, std), len(mean), batch_size, workers, title)
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
) -> Features:
    """The pixels themselves, 0 to 1, of images resized and cropped to `img_size`: what a probe gets without a network.

    x is (N, channels · H · W). Raises UserError if images have no labels.
    """
    view = CenterCrop(img_size, [0.0] * channels, [1.0] * channels)
    return labelled_rows(lambda images: images.flatten(1), shards, view, channels, batch_size, workers, title)


@torch.no_grad()
def labelled_rows(
    row: Callable[[Tensor], Tensor],
    shards: Shards,
    view: CenterCrop,
    channels: int,
    batch_size: int,
    workers: int,
    title: str | None,
) -> Features:
    """`row` of every readable image in `shards`, in their order, on the CPU: images (B, channels, H, W) to rows (B, D).

    Raises UserError if images have no labels.
    """
    need_labels(shards)
    batches = ordered_batches(shards, view, batch_size=batch_size, workers=workers, channels=channels)
    xs, ys, bad = [], [], []
    for batch in track(
        batches,
        description=title or "",
        total=-(-len(shards) // batch_size),
        console=terminal.console(stderr=True),
        transient=True,
        disable=title is None or not sys.stderr.isatty(),
    ):
        bad += batch.bad
        replaced = {sample.position for sample in batch.bad}
        kept = torch.tensor([position not in replaced for position in batch.positions.tolist()])
        xs.append(row(batch.views[0][kept]).float().cpu())
        ys.append(batch.labels[kept].cpu())
    if bad:
        first = bad[0]
        log.warning("%d of %d images cannot be read and are left out (first: %s in %s: %s)",
                    len(bad), len(shards), first.key, first.shard, first.reason)  # fmt: skip
    return Features(torch.cat(xs), torch.cat(ys))


def need_labels(shards: Shards) -> None:
    """Raises UserError if any image has no label."""
    unlabelled = len(shards) if shards.labels is None else int((shards.labels < 0).sum())
    if unlabelled:
        raise UserError(
            f"{unlabelled} of the {len(shards)} images in {names(shards)} have no label, and a probe needs one (.cls) "
            f"for each: pack a folder with one subfolder for each class, `selfvil pack SOURCE OUT`."
        )


def names(shards: Shards) -> str:
    """The first shard, and how many more there are, for messages."""
    more = len(shards.paths) - 1
    return f"{shards.paths[0]}{f' and {more} more shard' if more else ''}{'s' if more > 1 else ''}"


# --- what a protocol needs -------------------------------------------------------------------------------------------


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


def load_backbone(
    source: str | Path, *, network: str | None = None, untrained: bool = False, seed: int = 0, **overrides: Any
) -> Network:
    """The backbone that `source` holds, how its images were presented, and how many it saw.

    source: an export folder, a run folder (its newest valid checkpoint) or a checkpoint folder. network: which one of
    a run; None takes its choice. untrained=True gives the same architecture, freshly initialised from `seed`.
    overrides: arguments of `timm.create_model` that change no weight's shape, such as drop_path_rate.
    Raises UserError as `selfvil.export` does.
    """
    source = Path(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if (source / "config.json").is_file():
            if network is not None:
                raise UserError(f"{source} is an export and holds one network: leave out the choice of {network!r}.")
            return load_export(source, pretrained=not untrained, **overrides)
        saved = open_checkpoint(source)
        saved.meta["model"]["kwargs"].update(overrides)
        return create_backbone(saved.meta) if untrained else load_network(saved, network)
