"""The Python API: several calls with different settings in one process, which leave the process as it was."""

import inspect
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import selfvil
from selfvil import UserError, api
from selfvil.evaluate import compare as comparison
from selfvil.evaluate.speed import measure
from selfvil.recipe import load


def tiny(shards: Path, out: Path, objective: str = "mae") -> dict[str, object]:
    """Overrides by value: 2 steps of 40 digits."""
    loaded = load(runs.PACKAGED[objective], runs.overrides(objective, shards, out, "budget.steps=2"))
    tree = loaded.model_dump(mode="json")
    return {name: section for name, section in tree.items() if name != "eval"}


@pytest.fixture(scope="module")
def run(digit_shards, tmp_path_factory) -> api.Run:
    return selfvil.pretrain("demo", **tiny(digit_shards, tmp_path_factory.mktemp("api") / "run"))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Check that a call changes nothing that belongs to a notebook, and leaves no thread."""
    before, threads = state(), threading.enumerate()
    yield
    assert state() == before
    assert set(threading.enumerate()) <= set(threads), "those of other tests may end meanwhile"


def state() -> list[object]:
    root, own = logging.getLogger(), logging.getLogger("selfvil")
    return [
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        list(root.handlers), root.level, list(own.handlers), own.level, logging.root.manager.disable,
        sys.stdout, sys.stderr, sys.excepthook,
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state().tolist(),
        random.getstate(), torch.are_deterministic_algorithms_enabled(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    ]  # fmt: skip


def test_several_runs_in_one_process_with_different_settings(digit_shards, run, tmp_path):
    torch.manual_seed(3)
    with undisturbed():
        other = selfvil.pretrain("cifar10_dino", **tiny(digit_shards, tmp_path / "dino", "dino"))
        again = selfvil.pretrain("demo", **tiny(digit_shards, tmp_path / "again"))
        rows = {each.folder: selfvil.evaluate(each, "knn", train=digit_shards / "digits-000000.tar",
                                              test=digit_shards / "digits-000001.tar", workers=0, k=k)
                for each, k in ((other, 3), (again, 5))}  # fmt: skip
        assert [row.metric for found in rows.values() for row in found] == ["knn_3", "knn_5"]
    runs.assert_same_state(run.folder, again.folder)
    assert other.summary.finished
    assert other.folder == tmp_path / "dino"


def test_a_run_is_what_the_command_line_makes(digit_shards, run, tmp_path):
    from selfvil.pretrain import pretrain

    changed = runs.overrides("mae", digit_shards, tmp_path / "run", "budget.steps=2")
    pretrain(load("demo", changed))
    runs.assert_same_state(run.folder, tmp_path / "run")
    metrics = run.metrics()
    assert metrics[-1]["step"] == 2
    assert metrics[-1]["loss"] == pytest.approx(run.summary.loss)


def test_a_recipe_of_load_and_single_keys(digit_shards, run, tmp_path):
    recipe = runs.small("mae", digit_shards, tmp_path / "one", "budget.steps=2")
    one = selfvil.pretrain(recipe)
    two = selfvil.pretrain(recipe, **{"run.out": tmp_path / "two", "optim.base_lr": 1e-3}, budget={"samples": 120})
    runs.assert_same_state(run.folder, one.folder)
    assert (two.summary.samples, two.folder) == (120, tmp_path / "two")
    assert load(two.folder / "recipe.yaml").optim.base_lr == 1e-3
    assert load(one.folder / "recipe.yaml").run.stall_minutes is None, "the watchdog would end the process"
    entry = {
        "name": "knn",
        "train": digit_shards / "digits-000000.tar",
        "test": digit_shards / "digits-000001.tar",
        "k": 3,
    }
    three = selfvil.pretrain(one.folder / "recipe.yaml", run={"out": tmp_path / "three"}, eval=[entry])
    four = selfvil.pretrain(three.folder / "recipe.yaml", run={"out": tmp_path / "four"}, eval={"knn": {"k": 5}})
    assert "knn_5" in four.metrics("eval")[-1]
    assert 0 < three.metrics("eval")[-1]["knn_3"] <= 100


def test_a_run_continues(digit_shards, tmp_path):
    settings = tiny(digit_shards, tmp_path / "run")
    first = selfvil.pretrain("demo", **settings | {"budget": {"steps": 4, "pause_minutes": 1e-9}})
    assert not first.summary.finished
    assert first.summary.step < 4
    second = selfvil.pretrain("demo", **settings | {"budget": {"steps": 4}})
    assert (second.summary.finished, second.summary.step) == (True, 4)


def test_evaluations_and_their_settings(digit_shards, run, tmp_path):
    shards = {"train": digit_shards / "digits-000000.tar", "test": [str(digit_shards / "digits-000001.tar")]}
    rows = selfvil.evaluate(
        run, "knn", "few_label", **shards, workers=0, readout="mean", few_label={"labels_per_class": 2, "draws": 2},
        knn={"k": 7}, baselines=True,
    )  # fmt: skip
    assert {row.metric for row in rows} == {"knn_7", "few_label_2"}, rows
    assert {row.network for row in rows} == {"pretrained", "untrained", "raw pixels"}
    assert all(row.settings["readout"] == "mean" for row in rows)
    exported = selfvil.export(run, tmp_path / "export")
    (direct,) = selfvil.evaluate(run, "knn", **shards, workers=0, k=5)
    (again,) = selfvil.evaluate(exported, "knn", **shards, workers=0, k=5)
    assert direct.value == again.value


def test_fine_tuning_is_an_evaluation_of_the_api(digit_shards, run, tmp_path):
    with undisturbed():
        rows = selfvil.evaluate(
            run, "finetune", train=digit_shards / "digits-000000.tar", test=digit_shards / "digits-000001.tar",
            workers=0, readout="mean", epochs=1, batch_size=64, out=tmp_path / "tuned",
        )  # fmt: skip
    assert [row.metric for row in rows] == ["frozen_mean", "finetune_mean"]
    assert selfvil.load_backbone(tmp_path / "tuned").num_classes == 10


def test_comparison(digit_shards, run, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "measure", partial(measure, rounds=2, seconds=0.01))
    shards = {"train": digit_shards / "digits-000000.tar", "test": digit_shards / "digits-000001.tar"}
    exported = selfvil.export(run, tmp_path / "export")
    with undisturbed():
        found = selfvil.compare(
            [run, exported], "knn", **shards, workers=0, k=3, chart=tmp_path / "chart.png", allow_shared=True
        )
    (alone,) = selfvil.evaluate(run, "knn", **shards, workers=0, k=3)
    assert [(row.protocol, row.value) for row in found.rows] == 2 * [(alone.protocol, alone.value)]
    assert list(found.costs) == [run.folder.name, "export"]
    assert found.costs["export"].parameters == found.costs[run.folder.name].parameters > 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_export_in_further_formats(run, tmp_path):
    with undisturbed():
        out = selfvil.export(run, tmp_path / "export", formats=["published"], licence="mit", heads=True)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"published/vision_lstm.safetensors", "heads/heads.safetensors", "model.safetensors"} <= names
    assert "license: mit" in (out / "README.md").read_text()
    only = selfvil.export(out, tmp_path / "only", formats="published")
    assert not (only / "model.safetensors").exists()
    file = Path("published") / "vision_lstm.safetensors"
    assert (only / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.slow
def test_export_measures_int8(digit_shards, run, tmp_path):
    pytest.importorskip("onnxruntime")
    out = selfvil.export(
        run, tmp_path / "export", formats=["int8"], workers=0, images=digit_shards / "digits-000001.tar",
        train=digit_shards / "digits-000000.tar", test=digit_shards / "digits-000001.tar",
    )  # fmt: skip
    assert (out / "model.int8.onnx").stat().st_size < (out / "model.onnx").stat().st_size
    assert "k-NN" in (out / "README.md").read_text()


def test_a_run_is_a_path_for_every_function(digit_shards, run, tmp_path):
    assert selfvil.verify(run)
    found = selfvil.embed(digit_shards / "digits-000001.tar", run, workers=0)
    direct = selfvil.Embedder(run, workers=0).transform(digit_shards / "digits-000001.tar")
    np.testing.assert_array_equal(found.features, direct)
    page = selfvil.report(run, tmp_path / "one.html")
    both = selfvil.report([run], tmp_path / "list.html")
    assert page.read_text().count("<svg") == both.read_text().count("<svg") > 0
    assert set(selfvil.load_backbone(run).state_dict()) == set(
        selfvil.load_backbone(selfvil.export(run, tmp_path / "export")).state_dict()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, r, t: selfvil.pretrain("demoo"), "did you mean demo"),
        (lambda d, r, t: selfvil.pretrain(7), "is a int"),
        (lambda d, r, t: selfvil.evaluate(None, "knn", train=d, test=d), "source = 'None' is a NoneType"),
        (lambda d, r, t: selfvil.evaluate(r, "knn", train=None, test=d), "train = 'None'"),
        (lambda d, r, t: selfvil.evaluate(r, "knn", train=d, test=[3]), "test = '3'"),
        (lambda d, r, t: selfvil.evaluate(r, "knn", train=d, test=d, workers=-1), "workers = '-1'"),
        (lambda d, r, t: selfvil.export(None, t / "out"), "run = 'None'"),
        (lambda d, r, t: selfvil.export(r, 3), "out = '3'"),
        (lambda d, r, t: selfvil.pretrain("demo", optim={"bach_size": 3}), "optim.batch_size"),
        (lambda d, r, t: selfvil.pretrain("demo", optim=3), "not a section with its keys"),
        (lambda d, r, t: selfvil.pretrain("demo", optin={"batch_size": 3}), "there is no section optin"),
        (lambda d, r, t: selfvil.pretrain("demo", eval=[3]), "eval, entry 0"),
        (lambda d, r, t: selfvil.pretrain("demo", **{"a.b.c": 3}), "not of the form"),
        (lambda d, r, t: selfvil.pretrain("demo", data={"train": t / "none"}, run={"out": t / "run"}), "none"),
        (lambda d, r, t: selfvil.pretrain("demo", data={"train": 5}), "data.train"),
        (lambda d, r, t: selfvil.evaluate(r, "knnn", train=d, test=d), "did you mean knn"),
        (lambda d, r, t: selfvil.evaluate(r, "knn", train=d, test=d, kk=3), "kk"),
        (lambda d, r, t: selfvil.evaluate(r, "knn", train=d, test=d, knn=3), "must be a mapping"),
        (lambda d, r, t: selfvil.evaluate(r, train=d, test=d, k=-1), "knn.k"),
        (lambda d, r, t: selfvil.evaluate(t, train=d, test=d), "neither the folder of a run"),
        (lambda d, r, t: selfvil.evaluate(r, train=d, test=t / "none"), "none"),
        (lambda d, r, t: selfvil.evaluate(r, train=d, test=d, device="gpuu"), "gpuu"),
        (lambda d, r, t: selfvil.compare(r, "knn", train=d, test=d), "is no list"),
        (lambda d, r, t: selfvil.compare([r], "knn", train=d, test=d), "at least two networks"),
        (lambda d, r, t: selfvil.compare([r, r], "knn", train=d, test=d), "given twice"),
        (lambda d, r, t: selfvil.compare([r, 3], "knn", train=d, test=d), r"sources\[1\] = '3'"),
        (lambda d, r, t: selfvil.compare([r, t], "knn", train=d, test=d), "neither the folder of a run"),
        (lambda d, r, t: selfvil.compare([r, t], "knnn", train=d, test=d), "did you mean knn"),
        (lambda d, r, t: selfvil.compare([r, t], "knn", train=d, test=d, chart="a.gif"), "ends in .png"),
        (lambda d, r, t: selfvil.compare([r, t], train=d, test=d, chart=r.folder), "ends in .png"),
        (lambda d, r, t: selfvil.compare([r, t], "finetune", train=d, test=d, out=t / "o"), "finetune.out = .*every"),
        (lambda d, r, t: selfvil.compare([r, t], train=d, test=d, chart=r.folder / "run.json" / "b.png"), "b.png"),
        (lambda d, r, t: selfvil.compare([r, t], "knn", train=[3], test=d), "compare: train = '3'"),
        (lambda d, r, t: selfvil.compare([r, t], "knn", train=d, test=d, device="gpuu"), "compare: device"),
        (lambda d, r, t: selfvil.export(r, t / "out", formats=["onyx"]), "no format 'onyx'"),
        (lambda d, r, t: selfvil.export(r, t / "out", formats=3), "no list of formats"),
        (lambda d, r, t: selfvil.export(r, t / "out", formats=["int8"], images=t / "none"), "none"),
        (lambda d, r, t: selfvil.export(r, t / "out", images=d), "int8"),
        (lambda d, r, t: selfvil.export(r, t / "out", formats=["int8"], train=3), "train = '3'"),
        (lambda d, r, t: selfvil.export(r, t / "out", licence="My Licence"), "My Licence"),
        (lambda d, r, t: selfvil.export(t / "none", t / "out"), "There is no folder"),
        (lambda d, r, t: selfvil.export(r, d), "not an empty folder"),
        (lambda d, r, t: selfvil.export(r, t / "out", network="taecher"), "taecher"),
    ],
)
def test_a_mistake_raises_a_user_error_and_leaves_no_files(digit_shards, run, tmp_path, call, message):
    with undisturbed(), pytest.raises(UserError, match=message):
        call(digit_shards, run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_the_run_and_the_call_returns(digit_shards, tmp_path, monkeypatch):
    """As a notebook's stop button, which sends SIGINT."""
    from selfvil.monitor import journal

    monkeypatch.setattr(journal.Journal, "step", lambda *_: signal.raise_signal(signal.SIGINT))
    run = selfvil.pretrain("demo", **tiny(digit_shards, tmp_path / "run") | {"budget": {"steps": 50}})
    assert (run.summary.finished, run.summary.step) == (False, 1)
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):  # the notebook's own handler is back
        signal.raise_signal(signal.SIGINT)


def test_modules_with_the_name_of_a_function_stay_modules():
    code = """
import selfvil.pretrain
import inspect, selfvil, selfvil.evaluate.knn
from selfvil import export, pretrain
import selfvil.pretrain as loop
assert callable(selfvil.pretrain) and callable(selfvil.evaluate) and callable(export)
assert pretrain is loop is selfvil.pretrain and inspect.ismodule(loop) and callable(loop.train)
assert selfvil.evaluate.knn.Settings
assert list(inspect.signature(selfvil.evaluate).parameters)[:2] == ["source", "names"]
try:
    selfvil.pretrain("no_such_recipe")
except selfvil.UserError as error:
    assert "no recipe no_such_recipe" in str(error)
try:
    selfvil.no_such_name
except AttributeError:
    print("all right")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("all right"), done.stderr


def test_every_function_is_documented():
    for function in (api.pretrain, api.evaluate, api.compare, api.export):
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            assert name in text, f"{function.__name__}: {name} is not documented"
