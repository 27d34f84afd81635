"""Features of frozen backbones: one row for each labelled image.

A readout (`selfvil.models.adapter`) turns the tokens of an image into its row. All readouts that the evaluations need
are computed in one pass over the images. Shapes: B images, N images of a data set, D features, T patches, C channels.
"""

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from rich.progress import track
from torch import Tensor, nn

from selfvil import runtime, terminal
from selfvil.data.base import Images
from selfvil.data.ledger import BadSample
from selfvil.data.loader import ordered_batches
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate.processes import Processes
from selfvil.models.adapter import READOUTS, BackboneAdapter, adapt
from selfvil.models.pooling import avg
from selfvil.settings import Section

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
ALONE = Processes()

LAST_BLOCKS = "last blocks"
"""The designed readout of each of the last `NUM_BLOCKS` blocks, first to last, and the mean of the last block's
patches: what DINOv2's linear evaluation chooses from. For evaluations; a user's setting cannot name it."""
TOKENS = "patch tokens"
"""The tokens of all patches after the final norm, without prefix tokens. For evaluations, as `LAST_BLOCKS`."""
NUM_BLOCKS = 4


@dataclass(frozen=True)
class Features:
    """x: float32 (N, D), one row for each image, or for `TOKENS` float16 (N, T, C); y: int64 (N,), its label."""

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
    if readout in (LAST_BLOCKS, TOKENS):
        return readout
    if readout not in READOUTS:
        raise UserError(f"There is no readout {readout!r}; choose one of: {', '.join(READOUTS)}.")
    if readout not in adapt(backbone).usable_readouts():
        needed = "a class token" if readout.startswith("cls") else "registers as its output"
        raise UserError(f"The readout {readout!r} needs {needed}, which {type(backbone).__name__} does not have.")
    return readout


# --- from shards to rows ---------------------------------------------------------------------------------------------


def extract(
    backbone: nn.Module,
    shards: Images,
    *,
    readout: str | None = None,
    **options: Any,
) -> Features | None:
    """Features of every readable image in `shards` under one readout; arguments and errors as `extract_all`."""
    readout = choose_readout(backbone, readout)
    found = extract_all(backbone, shards, [readout], **options)
    return None if found is None else found[readout]


def extract_all(
    backbone: nn.Module,
    shards: Images,
    readouts: Sequence[str],
    *,
    img_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    title: str | None = None,
    processes: Processes = ALONE,
) -> dict[str, Features] | None:
    """Features of every readable image in `shards` under each of several readouts, in one pass over the images.

    Features are in the order of the images, on the CPU of the main process; None on others. `TOKENS` are in a temporary
    file (`on_disk`), all else is in memory.

    Each image is resized and cropped at its centre to `img_size` (H, W), and normalised with mean and std per channel.
    The backbone moves to `device` (None: a GPU if there is one) and runs in evaluation mode, without gradients, in
    float32 or bf16 autocast; its mode is restored afterwards. batch_size: images in a pass (None: 64 on a CPU, 256
    elsewhere). title: shown with a progress bar on a terminal. Several processes share the batches; each batch is the
    same as with one process, so features are the same too. A collective where there are several.

    Raises UserError if images have no labels, for a readout the backbone does not have, or too little disk space.
    """
    for readout in readouts:
        choose_readout(backbone, readout)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if batch_size is None:
        batch_size = 64 if device.type == "cpu" else 256  # batches that fit into a CPU's caches are a third faster
    was_training = backbone.training
    backbone.to(device).eval()

    def rows(images: Tensor) -> dict[str, Tensor]:
        with runtime.autocast(device, precision):
            return _read_out(adapt(backbone), images.to(device), readouts)

    view = CenterCrop(img_size, mean, std)
    try:
        with processes.same_buffers(backbone):
            return named_rows(rows, shards, view, len(mean), batch_size, workers, title, processes)
    finally:
        backbone.train(was_training)


def _read_out(adapter: BackboneAdapter, images: Tensor, readouts: Sequence[str]) -> dict[str, Tensor]:
    """The features of images (B, channels, H, W) under each readout, from one forward pass."""
    blocks = adapter.last_blocks(images, NUM_BLOCKS) if LAST_BLOCKS in readouts else None
    prefix, patches = adapter.split_tokens(adapter.forward_features(images)) if blocks is None else blocks[-1]
    found = {}
    for readout in readouts:
        if readout == LAST_BLOCKS:
            own = READOUTS[adapter.default_readout]
            found[readout] = torch.cat([*(own(*block) for block in blocks or ()), avg(patches)], dim=1)
        elif readout == TOKENS:
            found[readout] = patches.half()
        else:
            found[readout] = READOUTS[readout](prefix, patches)
    return found


def raw_pixels(
    shards: Images,
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


def labelled_rows(row: Callable[[Tensor], Tensor], shards: Images, *options: Any) -> Features | None:
    """`row` of every readable image in `shards`: images (B, channels, H, W) to rows (B, D); else as `named_rows`."""
    found = named_rows(lambda images: {"rows": row(images)}, shards, *options)
    return None if found is None else found["rows"]


def named_rows(
    rows: Callable[[Tensor], Mapping[str, Tensor]],
    shards: Images,
    view: CenterCrop,
    channels: int,
    batch_size: int,
    workers: int,
    title: str | None,
    processes: Processes = ALONE,
) -> dict[str, Features] | None:
    """`rows` of every readable image in `shards`, in their order: images (B, channels, H, W) to named rows (B, ...).

    Float16 rows are stored on disk, all others as float32 in memory. Each process computes the rows of its part of the
    batches; the main process gathers them, the others return None. Raises UserError if images have no labels.
    """

    @torch.no_grad()
    def own_part() -> tuple[dict[str, Tensor], Tensor, list[BadSample]]:
        require_labels(shards)
        batches = ordered_batches(
            shards, view, batch_size=batch_size, workers=workers, channels=channels, rank=processes.rank,
            world_size=processes.world_size,
        )  # fmt: skip
        count = -(-len(shards) // batch_size)
        first, last = (
            count * processes.rank // processes.world_size,
            count * (processes.rank + 1) // processes.world_size,
        )
        most, used = min(len(shards), last * batch_size) - first * batch_size, 0
        xs, ys, bad = dict[str, Tensor](), [torch.zeros(0, dtype=torch.int64)], []
        for batch in track(
            batches,
            description=title or "",
            total=last - first,
            console=terminal.console(stderr=True),
            transient=True,
            disable=title is None or not sys.stderr.isatty() or not processes.is_main,
        ):
            bad += batch.bad
            replaced = {sample.position for sample in batch.bad}
            kept = torch.tensor([position not in replaced for position in batch.positions.tolist()])
            ys.append(batch.labels[kept].cpu())
            for name, made in rows(batch.views[0][kept]).items():
                if name not in xs:
                    xs[name] = _allocate((most, *made.shape[1:]), made.dtype)
                xs[name][used : used + len(made)] = made.cpu()
            used += len(ys[-1])
        return {name: x[:used] for name, x in xs.items()}, torch.cat(ys), bad

    xs, y, bad = processes.together(own_part)
    bad = [sample for part in processes.exchange(bad) for sample in part]
    kinds = {
        name: kind for part in processes.exchange({n: x.dtype for n, x in xs.items()}) for name, kind in part.items()
    }
    everyones_y = processes.gather_rows(y)
    everyones = {
        name: processes.gather_rows(
            xs.get(name, torch.zeros(0, 0, dtype=kind)), _allocate
        )  # a process may have no batch
        for name, kind in kinds.items()
    }
    if everyones_y is None:
        return None
    if bad:
        first = bad[0]
        log.warning("%d of %d images cannot be read and are left out (first: %s in %s: %s)",
                    len(bad), len(shards), first.key, first.shard, first.reason)  # fmt: skip
    return {name: Features(x, everyones_y) for name, x in everyones.items() if x is not None}


def _allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return on_disk(shape) if dtype == torch.float16 else torch.empty(*shape, dtype=torch.float32)


def on_disk(shape: Sequence[int]) -> Tensor:
    """A float16 tensor in a temporary file, which is deleted with it: memory holds what is in use.

    The file is in the folder for temporary files, which the environment variable TMPDIR sets. Raises UserError if there
    is too little space.
    """
    require_disk(shape)
    if math.prod(shape) == 0:
        return torch.zeros(*shape, dtype=torch.float16)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(
            file.fileno(), 0, 2 * math.prod(shape)
        )  # a file with holes would end in SIGBUS on a full disk
        return torch.from_numpy(np.memmap(file, np.float16, mode="w+", shape=tuple(shape)))


def require_disk(shape: Sequence[int]) -> None:
    """Raises UserError if the folder for temporary files has too little space for a float16 tensor."""
    size, folder = 2 * math.prod(shape), tempfile.gettempdir()
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the tokens of {shape[0]:,} images take {size / 2**30:,.1f} GiB on disk, and {folder} has "
            f"{free / 2**30:,.1f} GiB free: set TMPDIR to a folder with more space, or use fewer images"
        )


def require_labels(shards: Images) -> None:
    """Raises UserError if any image has no label."""
    unlabelled = len(shards) if shards.labels is None else int((shards.labels < 0).sum())
    if unlabelled:
        raise UserError(
            f"{unlabelled} of the {len(shards)} images in {names(shards)} have no label, and an evaluation needs one "
            f"(.cls) for each: pack a folder with one subfolder for each class, `selfvil pack SOURCE OUT`."
        )


def names(shards: Images) -> str:
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
        if not all(torch.isfinite(part).all() for part in features.x.split(4096)):
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
