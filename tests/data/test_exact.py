"""Every kind of source gives exactly its images, on any number of processes and workers, from any position."""

import contextlib
import itertools
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from selfvil.data.base import Images
from selfvil.data.classes import class_names
from selfvil.data.images import open_images, open_mixture
from selfvil.data.loader import ordered_batches, train_batches
from selfvil.data.read import DamagedImage
from selfvil.data.views import CenterCrop
from tars import png
from written_sources import CLASSES, KINDS, write_source

VIEW = CenterCrop(4, [0.0] * 3, [1.0] * 3)
COUNT = 13


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    return write_source(request.param, tmp_path / request.param, COUNT)


def values(batch) -> list[int]:
    """The red value of each image, which is its number."""
    return (batch.views[0][:, 0, 0, 0] * 255).round().int().tolist()


def visited(images: Images, steps: range, batch_size: int, processes: int, workers: int, **options) -> list[list[int]]:
    """The images of each step, over all processes."""
    parts = []
    for rank in range(processes):
        batches = train_batches(
            images, [VIEW], seed=3, batch_size=batch_size, rank=rank, world_size=processes, start_step=steps.start,
            stop_step=steps.stop, workers=workers, **options,
        )  # fmt: skip
        parts.append([values(batch) for batch in batches])
    return [list(itertools.chain.from_iterable(step)) for step in zip(*parts)]


def test_a_source_is_its_images(source):
    images = pickle.loads(pickle.dumps(open_images(source)))
    first = open_images(source)
    assert len(images) == COUNT
    found = [images.read(i) for i in range(COUNT)]
    assert sorted(found) == sorted(map(png, range(COUNT)))
    assert [png(i) for i in range(COUNT)].index(found[5]) % 3 == images.labels[5]
    assert images.labels.dtype == np.int32
    assert images.num_classes == 3
    assert source.suffix == ".parquet" or class_names(images).names == CLASSES
    assert len({(images.shard_of(i), images.key(i)) for i in range(COUNT)}) == COUNT
    assert first.fingerprint == images.fingerprint
    assert first.changed == ""
    with pytest.raises(IndexError):
        images.read(COUNT)
    batches = ordered_batches(images, VIEW, batch_size=4)
    assert sorted(itertools.chain.from_iterable(map(values, batches))) == list(range(COUNT))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1), (4, 0), (1, 3), (2, 0), (4, 2)])
def test_an_epoch_is_exactly_the_source(tmp_path, processes, workers):
    """`KINDS` share the loader, so the kind is varied with the grid."""
    for kind in KINDS if workers == 0 else KINDS[1:5:3]:
        images = open_images(write_source(kind, tmp_path / kind, COUNT))
        whole = visited(images, range(COUNT), 4, processes, workers)  # 4 epochs
        flat = list(itertools.chain.from_iterable(whole))
        for epoch in range(4):
            assert sorted(flat[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT)), kind
        if workers == 0:
            assert whole == visited(images, range(COUNT), 4, 1, 0)
            for stop in range(0, COUNT, 3):
                resumed = visited(images, range(stop, min(stop + 2, COUNT)), 4, processes, 0)
                assert resumed == whole[stop : stop + 2]


def mixed(tmp_path) -> Images:
    lengths = {"folder": (5, 0), "shards": (13, 20), "parquet": (7, 50)}
    sources = [write_source(kind, tmp_path / kind, count, first) for kind, (count, first) in lengths.items()]
    return open_mixture([(sources[0], 1), (sources[1], 2.5), (sources[2], 0.5)])


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1), (4, 0), (2, 3)])
def test_a_mixture_has_exact_shares_and_epochs(tmp_path, processes, workers):
    images = mixed(tmp_path)
    assert images.weights == (2, 5, 1)
    steps = 40
    whole = visited(images, range(steps), 4, processes, workers)
    flat = list(itertools.chain.from_iterable(whole))
    source = np.array([0 if value < 20 else 1 if value < 50 else 2 for value in flat])
    for number, share in enumerate((2 / 8, 5 / 8, 1 / 8)):
        counts = np.cumsum(source == number)
        assert np.abs(counts - share * np.arange(1, len(flat) + 1)).max() < 1
        mine = [value for value, own in zip(flat, source) if own == number]
        length = len(images.sources[number])
        assert len(mine) >= 2 * length
        for epoch in range(len(mine) // length):
            assert Counter(mine[epoch * length : (epoch + 1) * length]) == Counter(set(mine)), number
        assert images.shares(len(flat))[number].epochs == len(mine) / length
    for stop in (1, 7, 18):
        assert visited(images, range(stop, stop + 2), 4, 1, 0) == whole[stop : stop + 2]


@pytest.mark.parametrize("processes", [1, 4])
def test_classes_are_visited_equally(tmp_path, processes):
    images = open_images(write_source("csv", tmp_path, 10))  # 4, 3 and 3 images
    whole = visited(images, range(18), 4, processes, 0, balanced=True)
    flat = list(itertools.chain.from_iterable(whole))
    for round in range(24):
        assert sorted(value % 3 for value in flat[3 * round : 3 * round + 3]) == [0, 1, 2]
    for label, count in ((0, 4), (1, 3), (2, 3)):
        mine = [value for value in flat if value % 3 == label]
        for epoch in range(len(mine) // count):
            assert len(set(mine[epoch * count : (epoch + 1) * count])) == count
    assert visited(images, range(5, 7), 4, processes, 0, balanced=True) == whole[5:7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_source_is_named_and_its_images_are_not_used(kind, tmp_path):
    source = write_source(kind, tmp_path / "own", COUNT)
    before = open_images(source)
    known = len(before), before.digests
    shutil.rmtree(tmp_path / "own")
    write_source(kind, tmp_path / "own", COUNT, first=1)
    after = open_images(source)
    assert after.fingerprint != before.fingerprint
    assert str(tmp_path / "own") in after.describe_change(*known)
    old = set(map(png, range(COUNT)))
    for i in range(COUNT):  # the old index accepts none but the old bytes
        with contextlib.suppress(DamagedImage):
            assert before.read(i) in old


def test_a_changed_mixture_names_the_source(tmp_path):
    before = mixed(tmp_path)
    known = len(before), before.digests
    write_source("shards", tmp_path / "shards", 13, first=21)
    after = open_mixture([(tmp_path / "folder", 1), (tmp_path / "shards", 2), (tmp_path / "parquet", 0.5)])
    assert after.fingerprint != before.fingerprint
    found = after.describe_change(*known)
    assert "the weights are 2 : 4 : 1, 2 : 5 : 1 before; shards holds other images or labels" in found
    assert open_mixture([(tmp_path / "folder", 1), (tmp_path / "shards", 2)]).describe_change(*known).startswith(
        "there are 2 sources, 3 before"
    )  # fmt: skip
