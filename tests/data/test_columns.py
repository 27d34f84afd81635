"""The joined index of many shards, which is memory-mapped."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from http_store import serve
from selfvil.data import index
from selfvil.data.index import open_shards
from selfvil.data.remote import indexes
from tars import labelled, png, write_tar


def test_a_large_index_is_joined_mapped_and_compared(tmp_path, monkeypatch):
    """The joined index gives the same samples; it is left out as soon as a shard changes."""
    monkeypatch.setattr(index, "_MAPPED", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", labelled(5, first=5 * i))
    built = open_shards(tmp_path)
    monkeypatch.setattr(index, "load_index", lambda *_: pytest.fail("a shard's own index was read"))
    mapped = open_shards(tmp_path)
    for name in ("ends", "several", "ignored", "num_classes", "fingerprint", "digests"):
        assert getattr(mapped, name) == getattr(built, name), name
    assert (mapped.labels == built.labels).all()
    assert isinstance(mapped.sizes.base, np.memmap)
    assert [mapped.read(i) for i in range(15)] == [png(i) for i in range(15)]
    monkeypatch.undo()
    monkeypatch.setattr(index, "_MAPPED", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "1.tar", labelled(4))
    assert len(open_shards(tmp_path)) == 14
    assert len(open_shards(tmp_path)) == 14


def test_a_large_index_of_a_store_is_mapped_too(tmp_path, monkeypatch):
    """Only the versions of the shards are asked for; another version of one makes a new index."""
    monkeypatch.setattr(index, "_MAPPED", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        write_tar(folder / f"{i}.tar", labelled(5, first=5 * i))
    with serve(folder) as server:
        url = f"{server.url}/{{0..2}}.tar"
        built = open_shards(url)
        server.requests.clear()
        with monkeypatch.context() as patch:
            patch.setattr(indexes, "load", lambda *_: pytest.fail("a shard's own index was read"))
            mapped = open_shards(url)
        assert server.requests == {f"{i}.tar": 1 for i in range(3)}
        for name in ("ends", "several", "ignored", "num_classes", "fingerprint", "digests", "paths", "remote"):
            assert getattr(mapped, name) == getattr(built, name), name
        assert (mapped.labels == built.labels).all()
        assert isinstance(mapped.sizes.base, np.memmap)
        assert not isinstance(built.sizes.base, np.memmap)
        assert [mapped.read(i) for i in range(15)] == [png(i) for i in range(15)]
        assert mapped.key(7) == built.key(7)
        write_tar(folder / "1.tar", labelled(4, first=50))
        changed = open_shards(url)
        assert len(changed) == 14
        assert "1.tar changed since it was last indexed" in changed.changed
        assert changed.read(5) == png(50)
        assert isinstance(open_shards(url).sizes.base, np.memmap)


def test_a_hundred_million_samples_need_twenty_bytes_each_and_no_time(monkeypatch):
    """Mapped, so that only the samples that are used need memory; a position in the middle is found at once."""
    count, shards = 100_000_000, 1_000
    joined = {name: np.broadcast_to(np.zeros(1, dtype), count) for name, dtype in index._COLUMNS.items()}
    facts = {
        "ends": [count // shards * (i + 1) for i in range(shards)], "several": [], "ignored": 0, "highest": 3,
        "fingerprint": "0" * 16, "digests": [],
    }  # fmt: skip
    paths = [Path(f"{i}.tar") for i in range(shards)]
    opened = index.Shards.mapped(paths, facts, joined, index.local_files(paths), None)
    assert sum(dtype.itemsize for dtype in (column.dtype for column in joined.values())) <= 20
    tracemalloc.start()
    ids = opened.order(seed=1).ids(np.arange(50_000_000, 50_004_096))
    assert opened.shard_of(int(ids[0])) == Path(f"{int(ids[0]) // (count // shards)}.tar")
    assert opened.labels[ids].shape == opened.sizes[ids].shape
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
