"""Shards in S3: read through s3fs from a real S3-compatible server (moto)."""

import io
import logging

import numpy as np
import pytest
import torch

from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.data.remote import store
from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from tars import labelled, write_tar

moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3,server]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 's3fs'")

COUNTS = [13, 7, 11]
VIEWS = [RandomCropFlip(8, (0.2, 1), (0.5,) * 3, (0.25,) * 3)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The folder of shards, and a boto3 client of the bucket `images` that holds them."""
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    folder, first = tmp_path_factory.mktemp("s3"), 0
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"s-{number}.tar", labelled(count, first))
        first += count
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    patch = pytest.MonkeyPatch()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in folder.glob("*.tar"):
        client.upload_file(str(path), "images", f"train/{path.name}")
    store.store_of.cache_clear()
    yield folder, client
    patch.undo()
    server.stop()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "PATIENCE_AT_START", 1.0)


def views(shards, workers=0):
    batches = train_batches(shards, VIEWS, seed=1, batch_size=6, stop_step=8, workers=workers, window=2)
    return torch.cat([batch.views[0] for batch in batches])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["s3://images/train/s-{0..2}.tar", "s3://images/train/*.tar"])
def test_batches_equal_those_of_local_files(bucket, pattern):
    local, shards = open_shards(bucket[0]), open_shards(pattern)
    assert shards.fingerprint == local.fingerprint
    np.testing.assert_array_equal(shards.labels, local.labels)
    assert torch.equal(views(shards), views(local))
    assert torch.equal(views(shards, workers=2), views(local))  # forked after the connections were made


def test_ranges_and_versions(bucket):
    from selfvil.data.remote.access import Changed
    from selfvil.data.remote.urls import Url

    url = Url("s3://images/train/s-0.tar")
    version = store.stat(url)
    data = (bucket[0] / "s-0.tar").read_bytes()
    assert version.size == len(data)
    assert store.read(url, version, 512, 1000) == data[512:1000]
    bucket[1].put_object(Bucket="images", Key="train/changed.tar", Body=data)
    url = Url("s3://images/train/changed.tar")
    version = store.stat(url)
    bucket[1].put_object(Bucket="images", Key="train/changed.tar", Body=data[::-1])
    with pytest.raises(Changed, match="changed while it was used"):
        store.read(url, version, 0, len(data))
    with pytest.raises(Changed):
        store.download(url, version, io.BytesIO(data[:600]))  # it continues a download of the version before
    bucket[1].put_object(Bucket="images", Key="train/changed.tar", Body=data[:600])
    with pytest.raises(Changed):
        store.read(url, version, 512, 1000)
    bucket[1].delete_object(Bucket="images", Key="train/changed.tar")


def test_what_is_missing(bucket):
    with pytest.raises(UserError, match=r"s-9\.tar does not exist"):
        open_shards("s3://images/train/s-9.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_shards("s3://images/nothing/*.tar")
    with pytest.raises(UserError, match="is a folder"):
        open_shards("s3://images/train")


def test_without_credentials_there_is_one_sentence(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store.store_of.cache_clear()
    with pytest.raises(UserError, match=r"credentials") as error:
        open_shards("s3://images/train/s-0.tar")
    store.store_of.cache_clear()
    assert "SECRET" not in str(error.value)
