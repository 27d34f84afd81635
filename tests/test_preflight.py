"""Checks before a run begins: batch and data set, workers and machine, Weights & Biases."""

import sys
from types import SimpleNamespace

import pytest

import runs
from selfvil.errors import UserError
from selfvil.monitor.metrics import MetricsWriter
from selfvil.plan import check_batch
from selfvil.preflight import check_wandb, workers_warning
from selfvil.pretrain import pretrain
from selfvil.recipe import load


def test_a_batch_larger_than_the_data_set_is_refused(digit_shards, tmp_path):
    check_batch(200, 200)
    with pytest.raises(UserError, match=r"optim\.batch_size = 201 is more than the 200 images of data\.train"):
        check_batch(201, 200)
    with pytest.raises(UserError, match="lower it to at most 200"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", "optim.batch_size=400"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("workers", "processes", "cores", "gigabytes", "expected"),
    [
        (2, 1, 2, 16, None),
        (0, 8, 2, 1, None),
        (12, 1, 2, 16, "are 12 workers on 2 cores, with about 8.4 GB of memory (free: 16.0 GB): set data.workers=2"),
        (8, 2, 16, 4, "set data.workers=2"),
        (4, 1, 8, 1, "(free: 1.0 GB): set data.workers=1"),
        (8, 8, 16, 99, "set data.workers=2"),
    ],
)
def test_workers_are_compared_with_the_machine(workers, processes, cores, gigabytes, expected):
    warning = workers_warning(workers, processes, cores, int(gigabytes * 1e9))
    if expected is None:
        assert warning is None
    else:
        assert expected in warning


def wandb_with(key):
    return SimpleNamespace(api=SimpleNamespace(api_key=key))


def test_wandb_is_checked_at_the_start(monkeypatch):
    recipe = load("demo", ["monitor.wandb=vil"])
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    check_wandb(load("demo"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed: pip install"):
        check_wandb(recipe)
    monkeypatch.setitem(sys.modules, "wandb", wandb_with(None))
    with pytest.raises(UserError, match=r"no account is logged in .* `wandb login`, or set WANDB_MODE=offline"):
        check_wandb(recipe)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(recipe)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", wandb_with("key"))
    check_wandb(recipe)
    for project in ("a/b", "what?", "x" * 129, "''"):
        with pytest.raises(UserError, match="cannot be the name of a Weights & Biases project"):
            check_wandb(load("demo", [f"monitor.wandb={project}"]))


def test_wandb_gets_the_recipe_and_its_errors_are_one_message(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: given.update(how)))
    config = load("demo").model_dump(mode="json")
    MetricsWriter(tmp_path, 0, False, "vil", "mine", "id", config=config).close()
    assert given["config"]["optim"]["batch_size"] == 128

    def fail(**how):
        raise RuntimeError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    with pytest.raises(UserError, match=r"cannot be started: no route to host; set WANDB_MODE=offline"):
        MetricsWriter(tmp_path, 0, False, "vil", "mine", "id")
