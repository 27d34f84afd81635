"""Requests to a store: retries, lengths, ranges, versions and redirects, against a real HTTP server that fails."""

import io
import time

import numpy as np
import pytest

from http_store import serve
from selfvil.data.remote import store, web
from selfvil.data.remote.access import Changed, Denied, Missing, Version
from selfvil.data.remote.store import StoreFailed
from selfvil.data.remote.urls import Url, expand_braces, is_remote
from selfvil.errors import UserError

DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    (tmp_path / "a.tar").write_bytes(DATA)
    with serve(tmp_path) as server:
        yield server


def url(server, name="a.tar"):
    return Url(f"{server.url}/{name}")


def downloaded(server, patience=5.0, begin=b""):
    file = io.BytesIO()
    file.write(begin)
    store.download(url(server), store.stat(url(server)), file, patience)
    return file.getvalue()


@pytest.mark.parametrize("faults", [[], ["503"], ["503", "short", "500", "short", "429"], ["long"]])
def test_a_download_is_whole_after_failures(served, faults):
    version = store.stat(url(served))
    served.faults["a.tar"] = list(faults)
    file = io.BytesIO()
    store.download(url(served), version, file, patience=5)
    assert file.getvalue() == DATA
    assert served.faults["a.tar"] == []


def test_a_download_continues_with_the_missing_bytes(served):
    version = store.stat(url(served))
    served.sent.clear()
    served.faults["a.tar"] = ["short", "short"]
    file = io.BytesIO()
    store.download(url(served), version, file, patience=5)
    assert file.getvalue() == DATA
    assert served.sent["a.tar"] < 1.1 * len(DATA)
    assert downloaded(served, begin=DATA[:1_000_000]) == DATA


def test_without_ranges_a_download_begins_again(served):
    served.ranges = False
    version = store.stat(url(served))
    assert not version.ranges
    served.faults["a.tar"] = ["short"]
    file = io.BytesIO()
    store.download(url(served), version, file, patience=5)
    assert file.getvalue() == DATA


def test_ranges(served):
    version = store.stat(url(served))
    assert version.size == len(DATA)
    assert version.ranges
    assert store.read(url(served), version, 1000, 1512) == DATA[1000:1512]
    assert store.read(url(served), version, len(DATA) - 1, len(DATA)) == DATA[-1:]
    assert store.read(url(served), version, 5, 5) == b""


def test_an_empty_file_has_a_size(served):
    (served.folder / "empty.tar").write_bytes(b"")
    assert store.stat(url(served, "empty.tar")).size == 0


@pytest.mark.parametrize("etags", [True, False])
def test_a_changed_file_is_refused(served, etags):
    served.etags = etags
    version = store.stat(url(served))
    (served.folder / "a.tar").write_bytes(DATA[1:])
    for action in (
        lambda: store.read(url(served), version, 0, 100),
        lambda: store.download(url(served), version, io.BytesIO()),
    ):
        with pytest.raises(Changed, match=r"changed while it was used: 3,000,000 bytes, .* before, 2,999,999 bytes"):
            action()


def test_a_change_in_the_middle_of_a_download_is_refused(served):
    version = store.stat(url(served))
    served.faults["a.tar"] = ["short"]
    file = io.BytesIO()
    write = file.write

    def change_and_write(chunk):
        (served.folder / "a.tar").write_bytes(DATA[::-1])
        return write(chunk)

    file.write = change_and_write
    with pytest.raises(Changed):
        store.download(url(served), version, file)


def test_final_answers_are_not_repeated(served):
    with pytest.raises(Missing, match=r"none\.tar does not exist"):
        store.stat(url(served, "none.tar"))
    served.faults["a.tar"] = ["403"]
    with pytest.raises(Denied, match="403"):
        store.stat(url(served))
    assert served.requests["a.tar"] == served.requests["none.tar"] == 1


def test_a_store_that_keeps_failing_is_an_error_after_the_patience(served, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE_AT_START", 0.3)
    served.faults["a.tar"] = ["503*"]
    began = time.monotonic()
    with pytest.raises(StoreFailed, match=r"could not be read: \d+ tries in \d s, the last one: 503"):
        store.stat(url(served))
    assert time.monotonic() - began < 2
    assert served.requests["a.tar"] > 2


def test_a_store_that_hangs_is_asked_again(served, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", (0.3, 0.3))
    served.faults["a.tar"] = ["hang", "hang"]
    assert store.stat(url(served)).size == len(DATA)
    assert served.requests["a.tar"] == 3


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(store, "PATIENCE_AT_START", 0.1)
    with pytest.raises(StoreFailed, match="refused"):
        store.stat(Url("http://127.0.0.1:9/a.tar"))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "gopher://127.0.0.1/"])
def test_redirects_to_other_protocols_are_refused(served, target):
    served.faults["a.tar"] = [f"redirect {target}"]
    with pytest.raises(UserError, match="cannot be read"):
        store.stat(url(served))


def test_redirects_within_http_are_followed(served):
    (served.folder / "b.tar").write_bytes(b"other")
    served.faults["a.tar"] = [f"redirect {served.url}/b.tar"]
    assert store.stat(url(served)).size == 5
    served.faults["a.tar"] = [f"redirect {served.url}/a.tar*"]
    with pytest.raises(UserError, match="redirects"):
        store.stat(url(served))


def test_the_random_numbers_of_the_run_are_not_used(served):
    import random

    served.faults["a.tar"] = ["503", "503"]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is meant
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    store.stat(url(served))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


# --- URLs ---------------------------------------------------------------------------------------------------------


def test_braces():
    found = expand_braces("s3://bucket/{train,extra}-{00..02}.tar")
    assert [each.text for each in found[:2]] == ["s3://bucket/train-00.tar", "s3://bucket/train-01.tar"]
    assert len(found) == 6


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:curl https://host/a.tar", "file:///etc/passwd", "simplecache::s3://b/a.tar", "s3://b/a.tar::file:///x",
        "github://a:b@/c.tar", "https://", "https://host", "HTTPS://host/a.tar", "s3://b/{0..9.tar",
        "https://host/{0..999999}{0..999999}.tar", "reference://a/b", "local://a/b", "ssh://host/a.tar",
    ],
)  # fmt: skip
def test_other_protocols_and_patterns_are_refused(pattern):
    assert is_remote(pattern)
    with pytest.raises(UserError):
        expand_braces(pattern)


@pytest.mark.parametrize("path", ["shards/a.tar", "~/a.tar", "a:b.tar", ["x.tar", "y.tar"], b"a", None])
def test_paths_are_not_remote(path):
    assert not is_remote(path)


def test_secrets_are_not_shown():
    signed = Url("https://host/folder/a.tar?X-Amz-Signature=SECRET&token=SECRET")
    assert str(signed) == repr(signed) == "https://host/folder/a.tar?…"
    assert signed.beside(".index.npz").text == "https://host/folder/a.tar.index.npz?X-Amz-Signature=SECRET&token=SECRET"
    assert (signed.parent / "classes.txt").text.startswith("https://host/folder/classes.txt?X-Amz")
    assert signed.name == "a.tar"
    error = UserError("cannot read 'https://me:SECRET@host/a.tar?sig=SECRET' and https://h/b.tar?sig=SECRET, twice")
    assert str(error) == "cannot read 'https://host/a.tar?…' and https://h/b.tar?… twice"
    with pytest.raises(UserError, match="holds a user name or password") as refused:
        expand_braces("https://me:SECRET@host/a.tar")
    assert "SECRET" not in str(refused.value)
    assert Url("hf://datasets/me/photos@v1/a.tar").name == "a.tar"
    assert str(Url("hf://datasets/me/photos@v1/a.tar")) == "hf://datasets/me/photos@v1/a.tar"


def test_a_version_describes_itself():
    assert str(Version(1234, '"abc"')) == '1,234 bytes, "abc"'
