"""Whole runs on shards behind a URL: the weights of a run on local files, resumed anywhere, and a store that fails."""

import json

import pytest
import torch

from http_store import serve
from runs import launch, overrides, small
from selfvil import checkpoint
from selfvil.data.remote import store
from selfvil.errors import UserError
from selfvil.pretrain import pretrain


@pytest.fixture
def served(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in digit_shards.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    with serve(mine) as server:
        yield server


def urls(server):
    return f"data.train={server.url}/digits-{{000000..000001}}.tar?token=SECRET"


def weights(out):
    saved = checkpoint.newest(out / "checkpoints")
    return checkpoint.load(saved.folder).tensors("objective")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_equals_one_from_the_disk_and_records_no_secret(served, digit_shards, tmp_path):
    pretrain(small("mae", digit_shards, tmp_path / "local", "data.window=1"))
    pretrain(small("mae", digit_shards, tmp_path / "remote", urls(served), "data.window=1"))
    assert equal(weights(tmp_path / "local"), weights(tmp_path / "remote"))
    texts = [path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert any(b"digits-{000000..000001}.tar" in text for text in texts)
    assert not any(b"SECRET" in text for text in texts)


def test_a_failing_store_stops_the_run_and_the_same_command_continues(served, digit_shards, tmp_path):
    pretrain(small("mae", digit_shards, tmp_path / "local", "data.window=1"))
    recipe = small(
        "mae", digit_shards, tmp_path / "remote", urls(served), "data.window=1", f"data.cache={tmp_path / 'cache'}",
        "data.cache_gb=0.000001",
    )  # fmt: skip
    read, calls = store.read, []

    def failing(url, *arguments):
        calls.append(url)
        if len(calls) == 230 and url.name.endswith(".tar"):
            served.faults |= {f"digits-{number:06d}.tar": ["503*"] for number in range(2)}
        return read(url, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read", failing)
        with pytest.raises(UserError, match=r"whose state is saved: .*503"):
            pretrain(recipe)
    saved = checkpoint.newest(tmp_path / "remote" / "checkpoints")
    assert 0 < saved.step < 12
    served.faults.clear()
    pretrain(recipe)
    assert equal(weights(tmp_path / "local"), weights(tmp_path / "remote"))


def test_the_window_of_a_url_is_recorded(served, digit_shards, tmp_path):
    pretrain(small("mae", digit_shards, tmp_path / "run", urls(served), "budget.steps=2"))
    with pytest.raises(UserError, match=r"data\.window: 16 -> None"):
        pretrain(small("mae", digit_shards, tmp_path / "run", "budget.steps=2"))
    pretrain(small("mae", digit_shards, tmp_path / "run", "budget.steps=2", "data.window=16"))


def test_a_changed_shard_is_refused_on_resume(served, digit_shards, tmp_path):
    pretrain(small("mae", digit_shards, tmp_path / "run", urls(served), "budget.steps=2"))
    one, two = (served.folder / f"digits-{number:06d}.tar" for number in range(2))
    one.write_bytes(two.read_bytes())
    one.with_name(one.name + ".index.npz").write_bytes(two.with_name(two.name + ".index.npz").read_bytes())
    with pytest.raises(
        UserError, match=r"1 of 2 shards hold other images or labels, the first is http:.*digits-000000\.tar"
    ):
        pretrain(small("mae", digit_shards, tmp_path / "run", urls(served), "budget.steps=2"))


@pytest.mark.slow
def test_two_processes_with_workers(served, digit_shards, tmp_path):
    more = ("data.window=1", "data.workers=2", "optim.accumulate=1")
    for out, train in (("local", ()), ("remote", (urls(served),))):
        done = launch("mae", *overrides("mae", digit_shards, tmp_path / out, *more, *train), processes=2)
        assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / "local"), weights(tmp_path / "remote"))
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["id"]
