"""Shards on the Hugging Face hub: read through huggingface_hub from a server that speaks its calls."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hub_store import serve_hub
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.data.remote import store
from selfvil.data.remote.access import Changed, Denied
from selfvil.data.remote.urls import Url
from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from tars import labelled, write_tar

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install huggingface_hub")

COUNTS = [13, 7, 11]
VIEWS = [RandomCropFlip(8, (0.2, 1), (0.5,) * 3, (0.25,) * 3)]
SHARD = Url("hf://datasets/me/photos/train/s-0.tar")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import fsspec

    folder, first = tmp_path / "photos", 0
    (folder / "train").mkdir(parents=True)
    for number, count in enumerate(COUNTS):
        write_tar(folder / "train" / f"s-{number}.tar", labelled(count, first))
        first += count
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "PATIENCE_AT_START", 1.0)
    monkeypatch.setattr(store, "PATIENCE", 3.0)
    with serve_hub(folder) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})  # HF_ENDPOINT is read at the import
        store.store_of.cache_clear()
        yield server
    store.store_of.cache_clear()


@pytest.fixture
def local(hub, tmp_path):
    """The same shards in another folder: an index beside the shards of the hub would be used."""
    (tmp_path / "local").mkdir()
    for path in hub.folder.glob("train/*.tar"):
        (tmp_path / "local" / path.name).write_bytes(path.read_bytes())
    return open_shards(tmp_path / "local")


def views(shards, workers=0):
    batches = train_batches(shards, VIEWS, seed=1, batch_size=6, stop_step=8, workers=workers, window=2)
    return torch.cat([batch.views[0] for batch in batches])


@pytest.mark.parametrize("pattern", ["photos/train/s-{0..2}.tar", "photos@v1/train/*.tar"])
def test_batches_equal_those_of_local_files(hub, local, pattern):
    shards = open_shards(f"hf://datasets/me/{pattern}")
    assert shards.fingerprint == local.fingerprint
    np.testing.assert_array_equal(shards.labels, local.labels)
    assert torch.equal(views(shards), views(local))
    assert torch.equal(views(shards, workers=2), views(local))  # forked after the connections were made


def test_the_command_line_reads_the_hub_of_the_environment(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "selfvil.cli", "index", "hf://datasets/me/photos/train/*.tar"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "31" in done.stdout


def test_only_the_bytes_that_are_needed_are_sent(hub):
    """The library's file system lists the folder, and reads megabytes more than it is asked for."""
    data = (hub.folder / "train" / "s-0.tar").read_bytes()
    version = store.stat(SHARD)
    assert version.size == len(data)
    assert len(version.tag) == 64
    assert store.read(SHARD, version, 512, 1000) == data[512:1000]
    assert hub.sent["s-0.tar"] == 488
    assert store.stat(SHARD) == version
    assert hub.requests == {"GET info": 1, "HEAD resolve": 2, "GET resolve": 1, "GET storage": 1}


def test_a_bucket_of_the_hub(hub):
    url = Url("hf://buckets/me/photos/train/s-0.tar")
    version = store.stat(url)
    assert version == store.stat(SHARD)
    assert len(store.read(url, version, 0, version.size)) == version.size


def test_many_threads_find_the_same_version(hub):
    from selfvil.data.remote.shards import in_threads

    assert len(set(in_threads(store.stat, [SHARD] * 64, 16))) == 1


def test_a_changed_file_is_refused(hub):
    path = hub.folder / "train" / "s-0.tar"
    data, version = path.read_bytes(), store.stat(SHARD)
    path.write_bytes(data[::-1])
    with pytest.raises(Changed, match="changed while it was used"):
        store.read(SHARD, version, 0, len(data))
    begun = io.BytesIO(data[:600])
    with pytest.raises(Changed):
        store.download(SHARD, version, begun)
    path.write_bytes(data[:600])
    with pytest.raises(Changed):
        store.read(SHARD, version, 512, 1000)


@pytest.mark.parametrize("fault", ["503", "429", "short", "whole"])
def test_a_failing_download_is_tried_again(hub, fault):
    data = (hub.folder / "train" / "s-0.tar").read_bytes()
    version = store.stat(SHARD)
    hub.faults["s-0.tar"] = [fault]
    assert store.read(SHARD, version, 512, 5000) == data[512:5000]
    assert hub.faults["s-0.tar"] == []


def test_a_hub_that_keeps_failing(hub):
    version = store.stat(SHARD)
    hub.faults["s-0.tar"] = ["503"] * 1000
    with pytest.raises(store.StoreFailed, match=r"\d+ tries in \d s, the last one: .*503"):
        store.read(SHARD, version, 0, 100, patience=0.5)


def test_what_is_missing(hub):
    with pytest.raises(UserError, match=r"s-9\.tar does not exist"):
        open_shards("hf://datasets/me/photos/train/s-9.tar")
    with pytest.raises(UserError, match="does not exist"):
        open_shards("hf://datasets/me/photos@v9/train/s-0.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_shards("hf://datasets/me/photos/nothing/*.tar")
    with pytest.raises(UserError, match="is a folder"):
        open_shards("hf://datasets/me/photos/train")
    with pytest.raises(UserError, match=r"the file does not exist, or the credentials"):
        open_shards("hf://datasets/me/other/train/s-0.tar")


def test_the_token_is_needed_and_does_not_reach_the_storage(hub, monkeypatch):
    hub.token = "SECRET"
    with pytest.raises(Denied, match="credentials") as error:
        store.stat(SHARD)
    assert "SECRET" not in str(error.value)
    assert sum(hub.requests.values()) == 1, "a refusal is final"
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    store.store_of.cache_clear()
    version = store.stat(SHARD)
    assert len(store.read(SHARD, version, 0, version.size)) == version.size
    assert not hub.leaked
