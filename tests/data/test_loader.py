"""Batches: the same bytes for any number of ranks, micro-batches and workers; exact resume; damage is replaced."""

import io
import multiprocessing
import os
import random
import re
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfvil.data.index import open_shards
from selfvil.data.ledger import BadSample
from selfvil.data.loader import Batch, WorkerDied, ordered_batches, train_batches
from selfvil.data.order import Order
from selfvil.data.views import CenterCrop, DINOCrop, RandomCropFlip
from selfvil.errors import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEWS = [RandomCropFlip(16, (0.2, 1), MEAN, STD), RandomCropFlip((8, 12), (0.05, 0.4), MEAN, STD)]


def png(value: int) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_shards(folder: Path, counts: list[int], bad: dict[int, bytes] | None = None):
    """Shards with samples 0, 1, ...; those in `bad` have other bytes."""
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for _ in range(count):
                for name, data in (
                    (f"{number:03d}.png", (bad or {}).get(number, png(number))),
                    (f"{number:03d}.cls", b"%d" % number),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [13, 7, 17])


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    """Views, positions, ids, labels of all samples in the order of their positions."""
    columns = [torch.cat([batch.views[i] for batch in batches]) for i in range(len(batches[0].views))]
    columns += [torch.cat([getattr(batch, name) for batch in batches]) for name in ("positions", "ids", "labels")]
    order = columns[-3].argsort()
    return [column[order] for column in columns]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def alone(shards):
    """The batches of one process without workers, 10 steps of 8: two epochs of 37 and a part of the third."""
    return joined(list(train_batches(shards, VIEWS, seed=5, batch_size=8, stop_step=10)))


def test_shapes_and_meaning(shards, alone):
    first, second, positions, ids, labels = alone
    assert (first.shape, second.shape) == ((80, 3, 16, 16), (80, 3, 8, 12))
    assert first.dtype == second.dtype == torch.float32
    assert positions.tolist() == list(range(80))
    assert ids.tolist() == Order(37, 5).ids(np.arange(80)).tolist()
    assert torch.equal(labels, ids), "sample i has the label i here"


def test_every_epoch_has_every_sample_once(alone):
    ids = alone[3]
    for epoch in range(2):
        assert sorted(ids[epoch * 37 : (epoch + 1) * 37].tolist()) == list(range(37))


@pytest.mark.parametrize(
    ("world_size", "accumulate", "workers"),
    [(2, 1, 0), (4, 1, 0), (1, 4, 0), (2, 2, 0), (8, 1, 0), (1, 1, 2), (2, 2, 2)],
)
def test_batches_do_not_depend_on_topology(shards, alone, world_size, accumulate, workers):
    parts = [
        list(train_batches(
            shards, VIEWS, seed=5, batch_size=8, stop_step=10, rank=rank, world_size=world_size, accumulate=accumulate,
            workers=workers,
        ))
        for rank in range(world_size)
    ]  # fmt: skip
    micro = 8 // world_size // accumulate
    for rank, batches in enumerate(parts):
        assert len(batches) == 10 * accumulate
        for number, batch in enumerate(batches):
            step, part = divmod(number, accumulate)
            first = step * 8 + rank * 8 // world_size + part * micro
            assert batch.positions.tolist() == list(range(first, first + micro))
    assert_same(joined([batch for batches in parts for batch in batches]), alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [3, 5, 9])
def test_resume_equals_an_uninterrupted_run(shards, alone, start, workers):
    later = train_batches(shards, VIEWS, seed=5, batch_size=8, start_step=start, stop_step=10, workers=workers)
    assert_same(joined(list(later)), [column[start * 8 :] for column in alone])


def test_resume_at_a_late_step_is_immediate(shards):
    far = 10**12
    batch = next(train_batches(shards, VIEWS, seed=5, batch_size=8, start_step=far, stop_step=far + 10**12))
    assert batch.positions.tolist() == list(range(far * 8, far * 8 + 8))


def test_views_depend_on_seed_epoch_and_view(shards, alone):
    other = joined(list(train_batches(shards, VIEWS, seed=6, batch_size=8, stop_step=10)))
    assert not torch.equal(other[3], alone[3])
    twice = [RandomCropFlip(16, (0.2, 1), MEAN, STD)] * 2
    first, second, _, ids, _ = joined(list(train_batches(shards, twice, seed=5, batch_size=8, stop_step=10)))
    assert not torch.equal(first, second)
    again = {}
    for row, id in enumerate(ids.tolist()):
        if id in again:
            assert not torch.equal(first[row], first[again[id]]), "an epoch later the same image is cropped otherwise"
        again[id] = row


def test_the_generators_of_the_run_are_unchanged(shards):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    for workers in (0, 1):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
        list(train_batches(shards, VIEWS, seed=0, batch_size=8, stop_step=2, workers=workers))
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(8, 3, 1), (8, 2, 3), (7, 2, 1), (0, 1, 1)])
def test_batches_that_cannot_be_divided_are_refused(shards, batch_size, world_size, accumulate):
    with pytest.raises(UserError, match=f"batch size of {batch_size} is not divisible by {world_size * accumulate}"):
        train_batches(
            shards, VIEWS, seed=0, batch_size=batch_size, world_size=world_size, accumulate=accumulate, stop_step=1
        )


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (4, 0), (40, 0)])
def test_ordered_batches_are_all_samples_once(shards, world_size, workers):
    view = CenterCrop((10, 12), MEAN, STD)
    batches = [
        batch
        for rank in range(world_size)
        for batch in ordered_batches(shards, view, batch_size=8, workers=workers, rank=rank, world_size=world_size)
    ]
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.tolist() == list(range(37))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), ids)
    pixels = torch.cat([batch.views[0] for batch in batches])
    for i in (0, 12, 13, 36):
        image = Image.open(io.BytesIO(png(i)))
        assert torch.equal(pixels[i], view(image))
    if world_size == 1:
        assert [len(batch.ids) for batch in batches] == [8, 8, 8, 8, 5]


def test_grey_and_alpha_channels(shards):
    for channels in (1, 4):
        view = CenterCrop(8, [0.5] * channels, [0.5] * channels)
        assert next(ordered_batches(shards, view, batch_size=2, channels=channels)).views[0].shape == (
            2,
            channels,
            8,
            8,
        )


def test_real_images_through_workers(shared_data):
    shards = open_shards(f"{shared_data}/cifar10/cifar10-train-{{000000..000001}}.tar")
    views = [RandomCropFlip(32, (0.2, 1), MEAN, STD)]
    one = joined(list(train_batches(shards, views, seed=0, batch_size=64, start_step=154, stop_step=159)))
    parts = [
        batch
        for rank in range(2)
        for batch in train_batches(
            shards, views, seed=0, batch_size=64, start_step=154, stop_step=159, rank=rank, world_size=2, workers=2
        )
    ]
    assert_same(joined(parts), one)
    photos = open_shards(f"{shared_data}/photos")
    batch = next(train_batches(photos, [RandomCropFlip(96, (0.2, 1), MEAN, STD)], seed=0, batch_size=8, stop_step=1))
    assert batch.labels.tolist() == [-1] * 8
    assert 0.5 < batch.views[0].std() < 2


# --- views made on the device -------------------------------------------------------------------------------------

COLOURS = [
    DINOCrop(16, (0.4, 1), MEAN, STD, blur=1.0),
    DINOCrop((8, 12), (0.1, 0.4), MEAN, STD, blur=0.5, solarise=0.2),
    RandomCropFlip(16, (0.2, 1), MEAN, STD),
]


def on_device(shards, **settings) -> list[Batch]:
    return [b.to("cpu") for b in train_batches(shards, COLOURS, seed=5, batch_size=8, augment="device", **settings)]


@pytest.fixture(scope="module")
def rendered(shards):
    return joined(on_device(shards, stop_step=10))


def test_the_device_makes_the_views_of_the_workers(shards, rendered):
    """The same draws for the same images; only rounding differs, see test_render.py."""
    expected = joined(list(train_batches(shards, COLOURS, seed=5, batch_size=8, stop_step=10)))
    assert_same(rendered[3:], expected[3:])
    for ours, theirs in zip(rendered[:3], expected[:3]):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().mean() * 255 * STD[0] < 0.3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "accumulate", "start"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (8, 1, 0), (1, 1, 7)])
def test_rendered_batches_do_not_depend_on_topology(shards, rendered, world_size, accumulate, start, workers):
    parts = [
        on_device(
            shards, stop_step=10, start_step=start, rank=rank, world_size=world_size, accumulate=accumulate,
            workers=workers,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert_same(joined([batch for part in parts for batch in part]), [column[start * 8 :] for column in rendered])


def test_a_batch_has_views_once_it_is_on_the_device(shards):
    (batch,) = train_batches(shards, COLOURS, seed=5, batch_size=8, stop_step=1, augment="device")
    assert batch.views == []
    assert batch.drawn is not None
    assert batch.drawn.images.dtype == torch.uint8
    assert batch.drawn.images.shape == (8, 3, 10, 12)
    there = batch.to("cpu")
    assert there.drawn is None
    assert len(there.views) == 3
    assert all(torch.equal(ours, again) for ours, again in zip(there.views, there.to("cpu").views))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_are_rendered_too(shards, channels):
    view = DINOCrop(16, (0.4, 1), [0.5] * channels, [0.25] * channels, blur=0.5)
    settings = {"seed": 0, "batch_size": 8, "stop_step": 1, "channels": channels}
    (found,) = train_batches(shards, [view], **settings, augment="device")
    (expected,) = train_batches(shards, [view], **settings)
    assert (found.to("cpu").views[0] - expected.views[0]).abs().mean() * 255 / 4 < 0.3


def test_a_view_that_cannot_be_rendered_is_refused(shards):
    with pytest.raises(UserError, match=r"data\.augment = device: CenterCrop .* set data\.augment to workers"):
        train_batches(shards, [CenterCrop(8, MEAN, STD)], seed=0, batch_size=8, stop_step=1, augment="device")


# --- damage -------------------------------------------------------------------------------------------------------

DAMAGE = {3: b"", 20: b"this is no image", 36: png(36)[:150]}


@pytest.fixture
def damaged(tmp_path):
    return make_shards(tmp_path, [13, 7, 17], DAMAGE)


def test_damaged_samples_are_replaced_and_reported(damaged, alone):
    batches = list(train_batches(damaged, VIEWS, seed=5, batch_size=8, stop_step=10))
    bad = [sample for batch in batches for sample in batch.bad]
    columns = joined(batches)
    met = {sample.position: sample for sample in bad}
    for position in range(80):
        id = int(columns[3][position])
        assert id not in DAMAGE
        assert columns[4][position] == id, "the label is that of the image shown"
        expected = int(alone[3][position])
        if expected in DAMAGE:
            sample = met.pop(position)
            assert (sample.id, sample.replaced_by, sample.key) == (expected, id, f"{expected:03d}")
            assert sample.shard == str(damaged.shard_of(expected))
        else:
            assert id == expected
            assert torch.equal(columns[0][position], alone[0][position])
    assert not met
    assert {sample.id for sample in bad} == set(DAMAGE)
    assert {sample.reason for sample in bad if sample.id == 20} == {"not an image file of a known format"}


def test_replacements_do_not_depend_on_topology(damaged):
    one = list(train_batches(damaged, VIEWS, seed=5, batch_size=8, stop_step=5))
    parts = [
        batch
        for rank in range(2)
        for batch in train_batches(
            damaged, VIEWS, seed=5, batch_size=8, stop_step=5, rank=rank, world_size=2, accumulate=2, workers=2
        )
    ]
    assert_same(joined(parts), joined(one))

    def key(sample: BadSample) -> tuple[int, int]:
        return sample.position, sample.id

    reports = [sorted([bad for batch in each for bad in batch.bad], key=key) for each in (one, parts)]
    assert reports[0] == reports[1]


def test_replacements_are_rendered_on_the_device(damaged):
    settings = {"seed": 5, "batch_size": 8, "stop_step": 10}
    by_workers = list(train_batches(damaged, COLOURS, **settings))
    for workers in (0, 2):
        by_device = on_device(damaged, stop_step=10, workers=workers)
        assert [batch.bad for batch in by_device] == [batch.bad for batch in by_workers]
        assert_same(joined(by_device)[3:], joined(by_workers)[3:])


def test_bytes_that_changed_after_indexing_are_replaced(damaged):
    path = damaged.shard_of(0)
    content = bytearray(path.read_bytes())
    content[content.index(png(7)) + 60] ^= 1
    path.write_bytes(content)
    bad = [bad for batch in ordered_batches(damaged, VIEWS[0], batch_size=8) for bad in batch.bad]
    reasons = {sample.id: sample.reason for sample in bad}
    assert sorted(reasons) == [3, 7, 20, 36]
    assert "CRC" in reasons[7]


@pytest.mark.parametrize("workers", [0, 2])
def test_only_damaged_samples_are_an_error(tmp_path, workers):
    shards = make_shards(tmp_path, [5], dict.fromkeys(range(5), b"no image"))
    with pytest.raises(UserError, match="in a row could not be read") as error:
        list(train_batches(shards, VIEWS, seed=0, batch_size=8, stop_step=10, workers=workers))
    assert "s-0.tar" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert multiprocessing.active_children() == []


# --- processes ----------------------------------------------------------------------------------------------------


def worker_processes() -> list:
    return multiprocessing.active_children()


def test_closing_early_ends_the_workers(shards):
    batches = train_batches(shards, VIEWS, seed=0, batch_size=8, stop_step=1000, workers=2)
    assert worker_processes() == []
    next(batches)
    assert len(worker_processes()) == 2
    batches.close()
    assert worker_processes() == []


def test_workers_ignore_ctrl_c(shards):
    batches = train_batches(shards, VIEWS, seed=0, batch_size=8, stop_step=50, workers=2)
    next(batches)
    for worker in worker_processes():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 49


class _Slow:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        time.sleep(0.1)
        return torch.tensor([image.getpixel((0, 0))[0]])


def kill_a_worker() -> None:
    worker_processes()[0].kill()


@pytest.mark.parametrize("moment", ["idle", "awaited", "both workers"])
def test_after_the_death_of_a_worker_the_main_process_makes_the_batches(shards, moment):
    """The same batches, with the reason in `problem`, so that every process can finish its step."""
    settings = {"seed": 5, "batch_size": 2, "stop_step": 9}
    expected = joined(list(train_batches(shards, [_Slow()], **settings)))
    batches = train_batches(shards, [_Slow()], **settings, workers=2)
    found = [next(batches)]
    for worker in worker_processes()[: 2 if moment == "both workers" else 1]:
        if moment == "awaited":
            threading.Timer(0.15, worker.kill).start()
        else:
            worker.kill()
            time.sleep(0.2)  # the signal arrives in this time, and must not raise here
    found += batches
    assert_same(joined(found), expected)
    problems = [batch.problem for batch in found]
    assert problems[0] is None
    assert re.match(r"a data worker died \(.+\); .*data\.workers", problems[-1])
    assert worker_processes() == []


def test_the_death_of_a_worker_never_raises_outside_the_loader(shards):
    """PyTorch's handler of SIGCHLD raises anywhere in the main thread, for example in the model's forward pass."""
    batches = train_batches(shards, [_Slow()], seed=0, batch_size=8, stop_step=50, workers=1)
    next(batches)
    kill_a_worker()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert next(batches).problem
    batches.close()


def test_a_killed_worker_ends_an_evaluation_with_a_clear_error(shards):
    batches = ordered_batches(shards, _Slow(), batch_size=8, workers=1)
    next(batches)
    kill_a_worker()
    with pytest.raises(WorkerDied, match=r"data worker died.*data\.workers"):
        list(batches)
    assert worker_processes() == []


def test_moving_a_batch(shards):
    batch = next(train_batches(shards, VIEWS, seed=0, batch_size=4, stop_step=1))
    moved = batch.to("meta")
    assert [view.device.type for view in moved.views] == ["meta", "meta"]
    assert moved.labels.device.type == "meta"
    assert moved.positions.device.type == moved.ids.device.type == "cpu"
    assert batch.views[0].device.type == "cpu"
