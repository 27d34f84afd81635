"""Shards behind a URL: the same samples as from local files, whatever the store, the cache and the processes do."""

import io
import logging
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import selfvil.data.remote.fetch as fetch
from http_store import serve
from selfvil.data.index import index_shards, open_shards
from selfvil.data.loader import ordered_batches, train_batches
from selfvil.data.remote import indexes, store
from selfvil.data.remote.cache import Cache
from selfvil.data.subset import FewLabels
from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from tars import labelled, open_files, png, write_tar

COUNTS = [13, 7, 17, 1, 9, 11, 4]
TOTAL = sum(COUNTS)
VIEWS = [RandomCropFlip(8, (0.2, 1), (0.5,) * 3, (0.25,) * 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven shards of 62 images together, without indexes beside them."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"s-{number}.tar", labelled(count, first))
        first += count
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(100)))
    return folder


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "PATIENCE", 3.0)
    monkeypatch.setattr(store, "PATIENCE_AT_START", 1.0)
    monkeypatch.setattr(fetch, "_reported", set())
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".tar", ".txt"):
            (mine / path.name).write_bytes(path.read_bytes())
    with serve(mine) as server:
        yield server


@pytest.fixture
def local(folder):
    return open_shards(folder)


def remote(server, **how):
    return open_shards(f"{server.url}/s-{{0..6}}.tar", **how)


def trained(shards, workers=0, ranks=1, first=0, last=11, window=3):
    """positions, ids and views of all ranks, in the order of the positions."""
    rows = {}
    for rank in range(ranks):
        batches = train_batches(
            shards, VIEWS, seed=5, batch_size=12, rank=rank, world_size=ranks, start_step=first, stop_step=last,
            workers=workers, window=window,
        )  # fmt: skip
        for batch in batches:
            assert not batch.bad
            for position, id, view in zip(batch.positions.tolist(), batch.ids.tolist(), batch.views[0]):
                rows[position] = id, view
    positions = sorted(rows)
    return positions, [rows[p][0] for p in positions], torch.stack([rows[p][1] for p in positions])


def same(one, other):
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


# --- the same as local files --------------------------------------------------------------------------------------


def test_content_equals_local_files(served, local):
    shards = remote(served)
    assert len(shards) == TOTAL
    assert shards.remote
    assert not local.remote
    assert shards.fingerprint == local.fingerprint
    assert shards.digests == local.digests
    np.testing.assert_array_equal(shards.labels, local.labels)
    for i in (0, 12, 13, 61):
        assert shards.read(i) == local.read(i)
        assert shards.key(i) == local.key(i)
    assert str(shards.shard_of(13)) == f"{served.url}/s-1.tar"


_SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in [(2, 2), (4, 1), (4, 0), (2, 3), (1, 3)]]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (2, 0), *_SLOW])
def test_batches_equal_those_of_local_files(served, local, ranks, workers):
    """Two epochs and a part, for several numbers of processes and workers, with a cache of less than a window."""
    expected = trained(local)
    ids = np.array(expected[1])
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(ids[epoch * TOTAL : (epoch + 1) * TOTAL]), np.arange(TOTAL))
    size = served.folder.joinpath("s-2.tar").stat().st_size
    shards = remote(served, cache=Cache(limit=2 * size))
    assert same(trained(shards, workers, ranks), expected)
    assert same(trained(shards, workers, ranks, first=4), trained(local, first=4))  # resumed in an epoch


def test_evaluation_reads_all_in_order(served, local):
    shards = remote(served)
    for workers in (0, 2):
        ids = [batch.ids for batch in ordered_batches(shards, VIEWS[0], batch_size=10, workers=workers)]
        assert torch.cat(ids).tolist() == list(range(TOTAL))


def test_a_subset_of_labels(served, folder):
    shards = FewLabels(remote(served), 1, seed=0)
    assert same(trained(shards, workers=1), trained(FewLabels(open_shards(folder), 1, seed=0)))


@pytest.mark.slow
def test_each_shard_is_downloaded_once_by_all_workers_in_all_epochs(served):
    shards = remote(served)
    trained(shards, workers=3)
    trained(remote(served), workers=2, ranks=2)
    assert all(served.sent[f"s-{number}.tar"] < 1.2 * size(served, number) for number in range(7))


def size(server, number):
    return (server.folder / f"s-{number}.tar").stat().st_size


def test_the_next_window_is_downloaded_ahead(served):
    shards = remote(served)
    order = shards.order(5, window=2)
    for path in Cache().folder.glob("*.tar"):
        path.unlink()
    served.requests.clear()
    now, following = order.shards(0)
    batches = train_batches(shards, VIEWS, seed=5, batch_size=2, stop_step=1, window=2)
    next(batches)
    for thread in threading.enumerate():
        if thread.name == "selfvil-download":
            thread.join(10)
    assert {name for name in served.requests if name.endswith(".tar")} == {f"s-{i}.tar" for i in now + following}
    assert not any(thread.name == "selfvil-download" for thread in threading.enumerate())


def test_classes_and_report(served):
    from selfvil.data.classes import class_names

    found = class_names(remote(served))
    assert found.names[3] == "class 3"
    assert str(found.file) == f"{served.url}/classes.txt"
    report = index_shards(f"{served.url}/s-{{0..6}}.tar")
    assert report.samples == TOTAL
    assert report.bytes == sum(size(served, number) for number in range(7))


# --- the index ----------------------------------------------------------------------------------------------------


def add_sidecars(server):
    open_shards(server.folder)  # writes them


def test_with_a_sidecar_no_shard_is_downloaded_to_open_it(served, local):
    add_sidecars(served)
    shards = remote(served)
    assert shards.fingerprint == local.fingerprint
    assert sum(served.sent[f"s-{number}.tar"] for number in range(7)) <= 7
    served.requests.clear()
    assert shards.key(20) == local.key(20)
    assert remote(served).fingerprint == local.fingerprint
    assert not any(name.endswith(".npz") for name in served.requests), "the index is in the user's cache"


@pytest.mark.parametrize("kind", ["truncated", "random", "of another shard", "huge", "pickle", "empty"])
def test_a_hostile_sidecar_is_not_used(served, local, kind):
    add_sidecars(served)
    path = served.folder / "s-2.tar.index.npz"
    data = path.read_bytes()
    if kind == "huge":
        with open(path, "wb") as file:
            file.truncate(100 << 20)
    elif kind == "pickle":
        np.savez(path, stamp=np.array([{"a": 1}], dtype=object))
    else:
        path.write_bytes(
            {
                "truncated": data[: len(data) // 2],
                "random": np.random.default_rng(0).bytes(2000),
                "of another shard": (served.folder / "s-0.tar.index.npz").read_bytes(),
                "empty": b"",
            }[kind]
        )
    shards = remote(served)
    assert shards.fingerprint == local.fingerprint
    assert served.sent["s-2.tar.index.npz"] < 2 << 20


def test_an_index_with_wrong_checksums_is_noticed(served, caplog):
    """A sidecar of another shard of the same size: its images count as damaged, as for local files."""
    other = write_tar(served.folder / "other.tar", labelled(17, 500))
    open_shards(other)
    assert other.stat().st_size == size(served, 2)
    (served.folder / "s-2.tar.index.npz").write_bytes((served.folder / "other.tar.index.npz").read_bytes())
    shards = remote(served)
    with pytest.raises(Exception, match="CRC-32 differs"):
        shards.read(25)
    assert "17 images differ from the index" in caplog.text


def test_a_damaged_shard_is_refused(served):
    path = served.folder / "s-4.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"s-4\.tar was cut at byte"):
        remote(served)


def test_missing_shards_are_all_named(served):
    with pytest.raises(UserError, match=r"s-7\.tar does not exist.*s-8\.tar does not exist"):
        open_shards(f"{served.url}/s-{{5..8}}.tar")


def test_a_shard_given_twice(served):
    with pytest.raises(UserError, match="given twice"):
        open_shards([f"{served.url}/s-0.tar", f"{served.url}/s-{{0..1}}.tar"])


# --- a store that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_failures_during_training_change_nothing(served, local, workers):
    add_sidecars(served)
    shards = remote(served)
    for number in range(7):
        served.faults[f"s-{number}.tar"] = ["503", "short", "500", "long"]
    assert same(trained(shards, workers), trained(local))


def test_without_ranges_training_is_the_same(served, local):
    served.ranges = False
    assert same(trained(remote(served), workers=1), trained(local))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_that_keeps_failing_ends_the_run_with_one_sentence(served, workers):
    add_sidecars(served)
    shards = remote(served)
    for number in range(7):
        served.faults[f"s-{number}.tar"] = ["503*"]
    with pytest.raises(UserError, match=r"could not be read: \d+ tries in \d s, the last one: 503"):
        trained(shards, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_during_a_run_is_refused(served, workers):
    add_sidecars(served)
    shards = remote(served)
    write_tar(served.folder / "s-2.tar", labelled(17, 900))
    with pytest.raises(UserError, match=r"s-2\.tar changed while it was used: .* bytes, .* before, .* bytes, .* now"):
        trained(shards, workers)


def test_a_new_version_is_indexed_again_and_reported(served):
    before = remote(served)
    write_tar(served.folder / "s-2.tar", [(f"{i:06d}.png", png(900 + i)) for i in range(3)])
    now = remote(served)
    assert len(now) == TOTAL - 14
    assert now.fingerprint != before.fingerprint
    assert "s-2.tar changed since it was last indexed" in now.changed
    assert "1 of 7 shards hold other images" in now.describe_change(len(before), before.digests)


def test_damage_on_the_way_is_downloaded_again(served, local, monkeypatch):
    """A response with the right length and other bytes: the CRC-32 of the images shows it."""
    add_sidecars(served)
    shards = remote(served)
    flipped = []
    download = store.download

    def damaging(url, version, file, patience=None):
        download(url, version, file, patience)
        if url.name not in flipped:
            flipped.append(url.name)
            file.seek(600)
            file.write(b"\xff" * 50)

    monkeypatch.setattr(store, "download", damaging)
    assert same(trained(shards), trained(local))
    assert len(flipped) == 7


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_cache_without_space_is_not_needed(served, local, caplog):
    add_sidecars(served)
    expected = trained(local, last=3)
    assert same(trained(remote(served, cache=Cache(limit=1000)), workers=0, last=3), expected)
    assert caplog.text.count("images are read one by one") == 1
    assert not [path for path in Cache().folder.glob("*") if not path.name.startswith(".")]


def test_a_shard_larger_than_the_cache_is_indexed_in_one_pass(served, local):
    shards = remote(served, cache=Cache(limit=1000))
    assert shards.fingerprint == local.fingerprint
    assert all(served.sent[f"s-{number}.tar"] < 1.3 * size(served, number) + 20_000 for number in range(7))


def test_a_read_only_cache(served, local, tmp_path, caplog):
    add_sidecars(served)
    (tmp_path / "cache").mkdir(mode=0o555)
    shards = remote(served, cache=Cache(tmp_path / "cache"))
    assert same(trained(shards, workers=0, last=2), trained(local, last=2))
    assert "Permission denied" in caplog.text


def test_a_full_disk(served, local, monkeypatch, caplog):
    add_sidecars(served)
    shards = remote(served)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "download", full)
    assert same(trained(shards, last=2), trained(local, last=2))
    assert "No space left on device" in caplog.text


def test_without_space_and_without_ranges_there_is_one_sentence(served):
    add_sidecars(served)
    served.ranges = False
    shards = remote(served, cache=Cache(limit=1000))
    with pytest.raises(UserError, match="does not send parts of a file"):
        trained(shards)


def test_the_limit_holds_during_training(served):
    """Seven shards through a cache of about four."""
    limit = 2 * size(served, 2) + size(served, 0)
    shards = remote(served, cache=Cache(limit=limit))
    trained(shards, workers=2, window=2)
    used = sum(path.stat().st_size for path in Cache().folder.glob("*-*"))
    assert 0 < used <= limit


def test_files_that_were_removed_from_the_cache_are_downloaded_again(served, local):
    shards = remote(served)
    trained(shards)
    for path in Cache().folder.glob("*.tar"):
        path.unlink()
    again = remote(served)
    assert same(trained(again), trained(local))


def test_descriptors_are_closed(served):
    shards = remote(served)
    trained(shards, window=2)
    assert any(path.suffix == ".tar" for path in open_files(Cache().folder))
    del shards
    assert open_files(Cache().folder) == []


# --- the rest -----------------------------------------------------------------------------------------------------


def test_signatures_are_not_shown(served, caplog):
    caplog.set_level(logging.DEBUG, logger="selfvil")
    shards = open_shards(f"{served.url}/s-{{0..6}}.tar?signature=SECRET")
    assert len(shards) == TOTAL
    served.faults["s-0.tar"] = ["403*"]
    with pytest.raises(UserError) as error:
        open_shards(f"{served.url}/s-{{0..1}}.tar?signature=SECRET")
    for text in (str(error.value), str(shards.paths), str(shards.shard_of(3)), caplog.text):
        assert "SECRET" not in text


def test_masks_are_read_from_a_store(tmp_path, served):
    from selfvil.data.pack import pack
    from selfvil.data.pack_sources import open_source

    source = open_source(f"{served.url}/s-{{0..6}}.tar", None, True, None, None)
    assert source.size == TOTAL
    pack(f"{served.url}/s-{{0..1}}.tar", tmp_path / "out", workers=1)
    assert len(open_shards(tmp_path / "out")) == 20


def test_a_missing_package_is_one_sentence(monkeypatch):
    import importlib
    import sys

    from selfvil.data.remote.buckets import BucketStore
    from selfvil.data.remote.urls import Url

    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry  # an earlier test of this process may have used s3fs
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3:// needs the package s3fs: pip install 'selfvil\[remote\]'"):
        BucketStore("s3").stat(Url("s3://bucket/a.tar"))


def test_an_index_removed_from_the_cache_costs_only_names(served):
    shards = remote(served)
    for path in Path(os.environ["XDG_CACHE_HOME"], "selfvil", "index").glob("*"):
        path.unlink()
    assert shards.key(13) == "sample 0"
    assert indexes.load(shards.files.files[0], None) is None


def test_a_tar_of_gzip_members(tmp_path, served):
    import gzip

    with tarfile.open(served.folder / "z.tar", "w") as tar:
        data = gzip.compress(png(3))
        info = tarfile.TarInfo("a.png.gz")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert open_shards(f"{served.url}/z.tar").read(0) == png(3)
