"""Shards in Google Cloud Storage: read through gcsfs from a server that emulates its JSON API."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
import torch

from http_store import QuietHandler, serve_requests
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.data.remote import store
from selfvil.data.remote.access import Changed, Denied, Version
from selfvil.data.remote.urls import Url
from selfvil.data.views import RandomCropFlip
from selfvil.errors import UserError
from tars import labelled, write_tar

emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="the emulator is not installed: pip install gcp-storage-emulator"
)
pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install gcsfs")

COUNTS = [13, 7, 11]
VIEWS = [RandomCropFlip(8, (0.2, 1), (0.5,) * 3, (0.25,) * 3)]
SHARD = Url("gs://images/train/s-0.tar")


class Bucket:
    """The bucket `images` of the emulator. url: of the emulator. folder: the shards that are in the bucket, too."""

    def __init__(self, folder, server):
        host, port = server._api._httpd.server_address
        self.folder, self.url = folder, f"http://{host}:{port}"

    def put(self, name, data):
        import requests

        answer = requests.post(
            f"{self.url}/upload/storage/v1/b/images/o",
            params={"uploadType": "media", "name": name},
            data=data,
            headers={"Content-Type": "application/x-tar"},
            timeout=10,
        )
        answer.raise_for_status()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    folder, first = tmp_path_factory.mktemp("gs"), 0
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="images")
    server.start()
    while server._api._httpd is None:  # it reports that it runs a moment before
        pass
    server._api._httpd.handle_error = lambda *_: None  # a client that closes its connection is no error
    bucket = Bucket(folder, server)
    for number, count in enumerate(COUNTS):
        path = write_tar(folder / f"s-{number}.tar", labelled(count, first))
        bucket.put(f"train/{path.name}", path.read_bytes())
        first += count
    yield bucket
    server.stop()


@pytest.fixture(autouse=True)
def _environment(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
    credentials(monkeypatch, "anon")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "PATIENCE_AT_START", 1.0)
    store.store_of.cache_clear()
    yield
    store.store_of.cache_clear()


def credentials(monkeypatch, token):
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": token})  # FSSPEC_GS_TOKEN is read at the import


def views(shards, workers=0):
    batches = train_batches(shards, VIEWS, seed=1, batch_size=6, stop_step=8, workers=workers, window=2)
    return torch.cat([batch.views[0] for batch in batches])


@pytest.mark.parametrize("pattern", ["gs://images/train/s-{0..2}.tar", "gs://images/train/*.tar"])
def test_batches_equal_those_of_local_files(bucket, pattern, capfd):
    local, shards = open_shards(bucket.folder), open_shards(pattern)
    assert shards.fingerprint == local.fingerprint
    np.testing.assert_array_equal(shards.labels, local.labels)
    assert torch.equal(views(shards), views(local))
    assert torch.equal(views(shards, workers=2), views(local))  # forked after the connections were made
    assert "bucket type" not in capfd.readouterr().err  # gcsfs warns at each request if it asks for it in vain


def test_ranges_and_versions(bucket):
    version = store.stat(SHARD)
    data = (bucket.folder / "s-0.tar").read_bytes()
    assert version.size == len(data)
    assert store.read(SHARD, version, 512, 1000) == data[512:1000]
    url = Url("gs://images/other/changed.tar")
    bucket.put("other/changed.tar", data)
    version = store.stat(url)
    bucket.put("other/changed.tar", data[::-1])
    with pytest.raises(Changed, match="changed while it was used"):
        store.read(url, version, 0, len(data))
    with pytest.raises(Changed):
        store.download(url, version, io.BytesIO(data[:600]))  # it continues a download of the version before
    bucket.put("other/changed.tar", data[:600])
    with pytest.raises(Changed):
        store.read(url, version, 512, 1000)


def test_a_file_that_is_added_is_found(bucket):
    bucket.put("more/a.tar", b"1")
    assert len(store.glob(Url("gs://images/more/*.tar"))) == 1
    bucket.put("more/b.tar", b"2")
    assert len(store.glob(Url("gs://images/more/*.tar"))) == 2


def test_what_is_missing():
    with pytest.raises(UserError, match=r"s-9\.tar does not exist"):
        open_shards("gs://images/train/s-9.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_shards("gs://images/nothing/*.tar")
    with pytest.raises(UserError, match="is a folder"):
        open_shards("gs://images/train")
    with pytest.raises(UserError, match="does not exist"):
        open_shards("gs://none/train/s-0.tar")


# --- a store that refuses or fails ----------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answers):
    """A server that gives these (status, message) to its requests, the last one again and again, and counts them."""
    given = []

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.0"  # a connection ends after each answer: what a POST sends is not read

        def do_GET(self):
            status, message = answers[min(len(given), len(answers) - 1)]
            given.append(self.path)
            body = message if status == 200 else json.dumps({"error": {"code": status, "message": message}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with serve_requests(Handler) as url:
        yield url, given


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."),
        (403, "me@host does not have storage.objects.get access to the Google Cloud Storage object."),
    ],
)
def test_a_refusal_is_final_and_one_sentence(status, message, monkeypatch, capfd):
    with answering([(status, message)]) as (url, given):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(Denied, match="credentials in the environment do not allow it") as error:
            store.stat(SHARD)
        with pytest.raises(Denied):
            store.read(SHARD, Version(10, "1"), 0, 10)
    assert "\n" not in str(error.value)
    assert len(given) <= 5, "each is asked once; gcsfs also looks for a folder"
    assert "Traceback" not in capfd.readouterr().err


def test_a_failing_answer_is_repeated(monkeypatch):
    with answering([(503, "try later"), (200, b"0123456789")]) as (url, given):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        assert store.read(SHARD, Version(100, "1"), 0, 10) == b"0123456789"
    assert len(given) == 2


@pytest.mark.slow  # gcsfs itself tries again for half a minute
def test_credentials_that_are_no_longer_valid(tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "me@host", "private_key": key.decode(), "project_id": "p"}
    with answering([(400, "invalid_grant")]) as (url, given):
        path = tmp_path / "account.json"
        path.write_text(json.dumps({**account, "token_uri": f"{url}/token"}))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        credentials(monkeypatch, str(path))
        with pytest.raises(Denied, match="credentials in the environment do not allow it") as error:
            store.read(SHARD, Version(10, "1"), 0, 10)
    assert "PRIVATE KEY" not in str(error.value)
    assert given
