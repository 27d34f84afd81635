"""From images to batches.

Sample positions are counted through all epochs: step s of a run covers positions [s·B, (s+1)·B) of the order, for any
number of processes. Rank r takes the r-th contiguous part of them, and its micro-batches are contiguous parts of that.
The position determines which image is read and, with the seed, how it is augmented. A run therefore resumes at any step
immediately, and a step has the same tensors with one process or many, with workers or without.
"""

import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfvil.data.arrays import Pixels, decode_pixels, size_of
from selfvil.data.base import Images
from selfvil.data.jpeg import allowed_reduction
from selfvil.data.ledger import BadSample
from selfvil.data.order import AnyOrder, Order
from selfvil.data.read import DamagedImage
from selfvil.data.render import Drawn, drawn_on, require_renderable
from selfvil.data.views import RandomCropFlip, preserved_randomness, seed_randomness
from selfvil.errors import UserError
from selfvil.stop import SIGNALS

View = Callable[[Pixels], Tensor]
"""A decoded image to a float32 tensor (C, H, W)."""

Span = tuple[int, int]
"""First and last position of a batch, the last one excluded."""


_TRIES = 16  # replacements that are tried for one damaged sample


class WorkerDied(UserError):
    """A data worker was killed, for example by the system because memory ran out."""


@dataclass
class Batch:
    """B samples. `views[i]` float32 (B, C, H_i, W_i); `positions`, `ids`, `labels` int64 (B,), labels -1 for none.

    ids: the samples that were read, replacements included. bad: the samples that were replaced. drawn: for a batch that
    is augmented on the device, images and random numbers from which `to` makes the views; `views` is empty before.
    problem: a sentence for the user if a worker died; training should stop after this optimizer step.
    """

    views: list[Tensor]
    positions: Tensor
    ids: Tensor
    labels: Tensor
    bad: list[BadSample] = field(default_factory=list)
    drawn: Drawn | None = None
    problem: str | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with views and labels on `device`; positions and ids stay on the CPU."""
        if self.drawn is not None:
            views = self.drawn.render(device)
        else:
            views = [view.to(device, non_blocking=True) for view in self.views]
        return replace(self, views=views, labels=self.labels.to(device, non_blocking=True), drawn=None)

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: views and labels in pinned memory, for asynchronous copies to a GPU."""
        return replace(
            self,
            views=[view.pin_memory() for view in self.views],
            labels=self.labels.pin_memory(),
            drawn=self.drawn and self.drawn.pin_memory(),
        )


def train_batches(
    shards: Images,
    views: Sequence[View],
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    micro_batch: int | None = None,
    start_step: int = 0,
    stop_step: int,
    workers: int = 0,
    channels: int = 3,
    augment: Literal["workers", "device"] = "workers",
    balanced: bool = False,
    decode: Literal["scaled", "exact"] = "scaled",
    window: int | None = None,
) -> Generator[Batch, None, None]:
    """Micro-batches of steps [start_step, stop_step) for one rank, in order: `accumulate` of them for each step.

    Args:
        batch_size: samples in one optimizer step, over all ranks and micro-batches together.
        micro_batch: largest number of samples in a micro-batch of one rank; the last micro-batch of a step may be
            smaller. None: `accumulate` equal parts.
        workers: processes that decode and augment; 0 does it in this process. Results are the same.
        channels: of the decoded images, 1 to 32: 8 bits in 1 (grey), 3 (RGB) or 4 (RGBA), or arrays.
        augment: where augmentation runs: in the workers, or on the device in `Batch.to`, with the images and random
            numbers of the workers. Both give the same views to the rounding of 8 bits.
        balanced: visit all classes equally often.
        decode: "scaled" decodes a large JPEG to a half, a quarter or an eighth of its size if every crop stays twice as
            large as its view (`selfvil.data.jpeg`); only where augmentation runs in the workers.
        window: shuffle the images of this many shards at a time, for shards in a store; None: all images.

    If a worker dies, this process makes the next batches itself, more slowly, with the reason in `problem`. All
    processes of a run can then finish the step, save and stop together.

    Raises:
        UserError: batch_size is not divisible by world_size * accumulate, or a view cannot be made on the device; while
            iterating: so many images are damaged that no replacement is found.
    """
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"a batch size of {batch_size} is not divisible by {parts} ({world_size} processes × {accumulate} "
            "micro-batches); change optim.batch_size, optim.accumulate or the number of processes"
        )
    crops = require_renderable(views) if augment == "device" else None
    scaled = [] if crops or decode == "exact" else [view for view in views if isinstance(view, RandomCropFlip)]
    samples = _Samples(
        shards, views, channels, seed, shards.order(seed, balanced, window), crops,
        scaled if len(scaled) == len(views) else [],
    )  # fmt: skip
    share = batch_size // world_size
    micro = micro_batch or share // accumulate

    def spans() -> Iterator[Span]:
        for step in range(start_step, stop_step):
            begin = step * batch_size + rank * share
            for first in range(begin, begin + share, micro):
                yield first, min(first + micro, begin + share)

    return _batches_despite_worker_death(samples, spans, workers)


def ordered_batches(
    shards: Images,
    view: View,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    channels: int = 3,
    numbers: Sequence[int] | None = None,
    skip_damaged: bool = False,
) -> Generator[Batch, None, None]:
    """All samples once, in the order of the shards, for evaluation; the last batch may be short.

    Rank r takes the r-th contiguous part of the batches, so the parts in the order of the ranks are the whole, and each
    batch is the same for any number of ranks; a part is empty where there are more ranks than batches. Damaged samples
    are replaced, and listed, as in training.

    Args:
        numbers: of the batches to read, which the ranks share; None: all. Batch i has the samples from i · batch_size.
        skip_damaged: leave damaged samples out of their batch, which may become empty, and list them in `bad`.

    Raises:
        UserError: as `train_batches`.
        WorkerDied: a worker process died.
    """
    if batch_size < 1:
        raise UserError(f"a batch size of {batch_size} is not possible; it must be at least 1")
    numbers = range(-(-len(shards) // batch_size)) if numbers is None else numbers
    count = len(numbers)
    own = numbers[count * rank // world_size : count * (rank + 1) // world_size]
    ranges = ((i * batch_size, min((i + 1) * batch_size, len(shards))) for i in own)
    samples = _Samples(shards, [view], channels, seed=0, order=None, skip_damaged=skip_damaged)
    return _batches(samples, ranges, workers)


@dataclass
class _Samples(Dataset):
    """Map-style data set whose item is a whole batch: positions [first, last) of the order, or of the shards.

    crops: the same views, if the device makes them; then only their random numbers are drawn here.
    scaled: the same views, if a JPEG may be decoded to a smaller size.
    skip_damaged: leave damaged samples out instead of replacing them.
    """

    shards: Images
    views: Sequence[View]
    channels: int
    seed: int
    order: AnyOrder | None
    crops: Sequence[RandomCropFlip] | None = None
    scaled: Sequence[RandomCropFlip] = ()
    skip_damaged: bool = False

    def __getitem__(self, span: tuple[int, int]) -> Batch | UserError:
        positions = np.arange(*span)
        ids = positions.copy() if self.order is None else self.order.ids(positions)
        self.shards.ahead(self.order, int(positions[0]))
        made: list[list[Any]] = [[] for _ in self.views]
        images: list[Pixels] = []
        bad: list[BadSample] = []
        kept: list[int] = []
        with preserved_randomness():
            for row, position in enumerate(positions.tolist()):
                try:
                    image, size, ids[row] = self._image(position, int(ids[row]), bad)
                    self._make_views(image, size, position, made)
                except UserError as error:  # DataLoader would add the traceback of the worker to a raised error
                    return error
                except DamagedImage as damage:  # only with skip_damaged
                    bad.append(self._bad(position, int(ids[row]), str(damage), -1))
                    continue
                kept.append(row)
                if self.crops:
                    images.append(image)
        positions, ids = positions[kept], ids[kept]
        labels = np.full(len(ids), -1) if self.shards.labels is None else self.shards.labels[ids].astype(np.int64)
        drawn = Drawn.collate(images, made, self.crops) if self.crops else None
        stacked = [] if drawn else [torch.stack(rows) if rows else torch.zeros(0) for rows in made]
        return Batch(stacked, torch.from_numpy(positions), torch.from_numpy(ids), torch.from_numpy(labels), bad, drawn)

    def _make_views(self, image: Pixels, size: tuple[int, int], position: int, made: list[list[Any]]) -> None:
        """size: width and height of the image before it was reduced."""
        for number, view in enumerate(self.views):
            seed_randomness(self.seed, position, number)
            if self.crops:
                made[number].append(drawn_on(self.crops[number], image))
            elif size != size_of(image):
                made[number].append(self.scaled[number](image, size))
            else:
                made[number].append(view(image))

    def _image(self, position: int, first: int, bad: list[BadSample]) -> tuple[Pixels, tuple[int, int], int]:
        """The image for a position, its size before it was reduced, and its id.

        A damaged sample is replaced by the sample that the order with another seed has at this position, which is the
        same for any number of processes.
        """
        failed: list[tuple[int, str]] = []
        id = first
        for hop in range(_TRIES):
            try:
                image, size = self._decode(position, self.shards.read(id))
            except DamagedImage as damage:
                if self.skip_damaged:
                    raise
                failed.append((id, str(damage)))
                order = self.order or Order(len(self.shards), self.seed)
                id = int(order.seeded(self.seed + hop + 1).ids(np.array([position]))[0])
                continue
            for each, reason in failed:
                bad.append(self._bad(position, each, reason, id))
            return image, size, id
        raise UserError(
            f"{_TRIES} samples in a row could not be read, the first from {self.shards.shard_of(first)}: "
            f"{failed[0][1]}; repair the shards or leave out the damaged ones"
        )

    def _decode(self, position: int, data: bytes) -> tuple[Pixels, tuple[int, int]]:
        """The image, reduced if all its views allow that, and the size that it would have otherwise."""
        full: list[tuple[int, int]] = []

        def reduction(width: int, height: int) -> int:
            full.append((width, height))
            crops = []
            for number, view in enumerate(self.scaled):
                if allowed_reduction([(width, height, view.width, view.height)]) == 1:  # even for all of the image
                    return 1
                seed_randomness(self.seed, position, number)
                crops.append((*view.draw(width, height, "RGB").box[2:], view.width, view.height))
            return allowed_reduction(crops)

        image = decode_pixels(data, self.channels, reduction if self.scaled else None)
        return image, full[-1] if full else size_of(image)

    def _bad(self, position: int, id: int, reason: str, replaced_by: int) -> BadSample:
        shard, key, source = str(self.shards.shard_of(id)), self.shards.key(id), self.shards.source_of(id)
        return BadSample(position, id, shard, key, reason, replaced_by, source)


def _batches_despite_worker_death(
    samples: _Samples, spans: Callable[[], Iterator[Span]], workers: int
) -> Generator[Batch, None, None]:
    """A batch for each span. After the death of a worker, batches are made in this process, with `problem` set."""
    made = 0
    try:
        with closing(_batches(samples, spans(), workers)) as batches:
            for batch in batches:
                yield batch
                made += 1
        return
    except WorkerDied as death:
        problem = str(death)
    for batch in _batches(samples, itertools.islice(spans(), made, None), workers=0):
        yield replace(batch, problem=problem)


def _batches(samples: _Samples, spans: Iterator[Span], workers: int) -> Generator[Batch, None, None]:
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_size=None,  # an item is a batch
        sampler=spans,  # an iterable is enough; a sampler with a length would need memory
        num_workers=workers,
        # Forked workers share the index and start quickly; they use neither CUDA nor threads of the parent.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else DataLoader draws its workers' seeds from the run's generator
    )
    batches: Iterator[Batch | UserError] | None = None
    processes: set[Any] = set()
    try:
        while True:
            # Errors are raised outside of `except`: a traceback that refers to the iterator keeps its workers alive.
            batch, death = None, ""
            try:
                with _worker_deaths_raised():
                    if batches is None:
                        others = set(multiprocessing.active_children())
                        batches = iter(loader)
                        processes = set(multiprocessing.active_children()) - others
                    death = _death_among(processes)
                    batch = None if death else next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:  # a worker that is killed while sending breaks the pipe
                death = str(error) if str(error).startswith("DataLoader worker") else _death_among(processes, wait=1.0)
                if not death:
                    raise
            if death:
                raise WorkerDied(
                    f"a data worker died ({death.rstrip('. ')}); most often memory ran out: lower data.workers, or "
                    "give the container more shared memory (docker: --shm-size)"
                )
            if isinstance(batch, UserError):
                raise batch
            if batch is None:
                return
            yield batch
    finally:
        del batches  # ends the workers now, not at the next garbage collection


def _death_among(processes: Iterable[Any], wait: float = 0.0) -> str:
    """How the first dead worker ended; "" if none ends within `wait` seconds for each."""
    for process in processes:
        process.join(wait)
        if process.exitcode is not None:
            return f"process {process.pid}, exit code {process.exitcode}"
    return ""


_torch_handler: Callable[[int, FrameType | None], Any] | None = None
_fetching = False


@contextmanager
def _worker_deaths_raised() -> Iterator[None]:
    """In this context, and only here, the death of a worker raises RuntimeError in the main thread.

    DataLoader's own handler of SIGCHLD raises anywhere in the main thread, for example in the model's forward pass.
    """
    global _fetching, _torch_handler
    if threading.current_thread() is not threading.main_thread():  # signal handlers run in the main thread
        yield
        return
    _fetching = True
    try:
        yield
    finally:
        _fetching = False
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current is not _on_child_exit and "torch" in getattr(current, "__module__", ""):
            _torch_handler = current
            signal.signal(signal.SIGCHLD, _on_child_exit)


def _on_child_exit(number: int, frame: FrameType | None) -> None:
    try:
        if _torch_handler is not None:
            _torch_handler(number, frame)
    except RuntimeError:
        if _fetching:
            raise


def _ignore_signals(worker: int) -> None:
    """Make a worker ignore signals. Ctrl-C goes to all processes of a terminal, a scheduler's signals to all processes
    of a job; only the main process handles them, and it still needs batches. It ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
