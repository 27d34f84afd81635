"""Runs with damaged images or failing workers: they save their state, and stop with one message."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from runs import assert_same_state, launch, overrides, small
from selfvil import checkpoint
from selfvil.data.index import open_shards
from selfvil.data.ledger import Ledger
from selfvil.errors import UserError
from selfvil.objectives.mae import MAE
from selfvil.pretrain import pretrain


def kill_a_worker() -> None:
    multiprocessing.active_children()[0].kill()


# --- killed workers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(digit_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain(small("mae", digit_shards, out))
    return out


@pytest.mark.parametrize("moment", ["forward", "after_step", "picture"])
def test_a_run_whose_worker_died_saves_and_resumes_bit_for_bit(
    digit_shards, uninterrupted, tmp_path, monkeypatch, moment
):
    out = tmp_path / "run"
    original, calls = getattr(MAE, moment), []

    def killing(self, *args, **kwargs):
        calls.extend([moment] if multiprocessing.active_children() else [])  # not the passes before the first step
        if len(calls) == 3:
            kill_a_worker()
            calls.append("killed")
            until = time.monotonic() + 0.3
            while time.monotonic() < until:  # the signal arrives while the main thread is in the model
                sum(range(1000))
        return original(self, *args, **kwargs)

    run = ["data.workers=2", "run.checkpoint_every=100", "monitor.pictures_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(MAE, moment, killing)
        with pytest.raises(UserError, match=r"^stopped after step \d+, whose state is saved: a data worker died"):
            pretrain(small("mae", digit_shards, out, *run))
    saved = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert saved.step in (2, 3, 4)
    assert multiprocessing.active_children() == []
    pretrain(small("mae", digit_shards, out, *run))
    assert_same_state(out, uninterrupted)


# --- images that changed ------------------------------------------------------------------------------------------


def test_changed_shards_are_refused_and_newer_dates_are_not(digit_shards, tmp_path):
    folder, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(digit_shards, folder)
    run = small("mae", folder, out, "budget.pause_minutes=1e-6")
    assert pretrain(run).step == 1
    second = folder / "digits-000001.tar"
    second.touch()
    assert pretrain(run).step == 2
    content = bytearray(second.read_bytes())
    content[content.index(b"\x89PNG") + 50] ^= 1
    second.write_bytes(content)
    with pytest.raises(UserError) as error:
        pretrain(run)
    message = str(error.value)
    assert f"(1 of 2 shards hold other images or labels, the first is {second}; " in message
    assert "1 of 80 samples have other bytes" in message
    assert "names and dates do not matter" in message
    with pytest.raises(UserError, match="1 of 2 shards hold other images or labels"):
        pretrain(run)


# --- damaged images -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(digit_shards, tmp_path_factory) -> Path:
    """The digits with 11 images that cannot be decoded, one more than the smallest limit."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in digit_shards.glob("*.tar"):
        shutil.copy(path, folder)
    content = bytearray((folder / "digits-000000.tar").read_bytes())
    place = 0
    for _ in range(11):
        place = content.index(b"\x89PNG", place + 1)
        content[place : place + 4] = b"none"
    (folder / "digits-000000.tar").write_bytes(content)
    return folder


def test_a_run_with_too_many_damaged_images_saves_and_stops(damaged, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"whose state is saved: 11 of 200 samples are damaged, more than the 10"):
        pretrain(small("mae", damaged, out, "run.checkpoint_every=100"))
    saved = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert 1 <= saved.step <= 5
    with pytest.raises(UserError, match=r"^11 of 200 samples are damaged"):
        pretrain(small("mae", damaged, out, "run.checkpoint_every=100"))
    assert pretrain(small("mae", damaged, out, "data.max_bad=0.1")).finished


@pytest.mark.slow
def test_the_limit_of_damaged_images_holds_across_processes_and_launches(damaged, tmp_path):
    """Each of the two processes reads about half of the 11."""
    out = tmp_path / "run"
    arguments = overrides("mae", damaged, out, "run.checkpoint_every=100", "monitor.log_every=5")
    run = launch("mae", *arguments, processes=2)
    assert run.returncode != 0
    assert "11 of 200 samples are damaged, more than the 10" in run.stderr
    assert "selfvil/pretrain.py" not in run.stderr, "a traceback of ours; torchrun adds one of its own"
    saved = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert saved.step == 5
    met = [
        {json.loads(line)["id"] for line in (out / name).read_text().splitlines()}
        for name in ("ledger.jsonl", "ledger-1.jsonl")
    ]
    assert all(0 < len(ids) < 11 for ids in met)
    assert len(Ledger(out, len(open_shards(damaged)))) == 11
    with pytest.raises(UserError, match=r"^11 of 200 samples are damaged"):
        pretrain(small("mae", damaged, out))
