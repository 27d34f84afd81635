"""Runs on a folder, a table and a mixture: resumed, evaluated, and refused after a change."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from runs import assert_same_state, overrides
from selfvil.cli import app
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.plan_report import report
from selfvil.pretrain import check_same_images, pretrain
from selfvil.recipe import load


@pytest.fixture(scope="module")
def digits(digit_shards, tmp_path_factory):
    """A folder `files` with the digits as image files in class subfolders."""
    folder, shards = tmp_path_factory.mktemp("sources") / "files", open_shards(digit_shards)
    for i in range(len(shards)):
        path = folder / f"class {shards.labels[i]}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.read(i))
    return folder


def recipe(train, digit_shards, out, *more):
    whole = [each for each in overrides("mae", digit_shards, out, *more) if not each.startswith("data.train=")]
    changed = load("demo", whole)
    data = type(changed.data).model_validate(changed.data.model_dump() | {"train": train})
    return changed.model_copy(update={"data": data})


def test_a_mixture_is_paused_continued_and_refused_after_a_change(digit_shards, digits, tmp_path):
    mixture = [{"source": str(digits), "weight": 3}, {"source": str(digit_shards), "weight": 1}]
    lengths = "budget.steps=6", "monitor.log_every=6"
    pretrain(recipe(mixture, digit_shards, tmp_path / "straight", *lengths))
    for _ in range(2):
        pretrain(recipe(mixture, digit_shards, tmp_path / "paused", *lengths, "budget.pause_minutes=1e-6"))
    other = [mixture[0] | {"weight": 2}, mixture[1]]
    with pytest.raises(UserError, match="the weights are 2 : 1, 3 : 1 before"):
        pretrain(recipe(other, digit_shards, tmp_path / "paused", *lengths))
    pretrain(recipe(mixture, digit_shards, tmp_path / "paused", *lengths))
    assert_same_state(tmp_path / "straight", tmp_path / "paused")
    lines = (tmp_path / "paused" / "metrics.jsonl").read_text().splitlines()
    last = [each for each in map(json.loads, lines) if "epoch" in each][-1]
    assert last["epoch/files"] == 180 / 200
    assert last[f"epoch/{digit_shards.name}"] == 60 / 200


def test_plan_shows_the_sources(digit_shards, digits, tmp_path):
    mixture = [{"source": str(digits), "weight": 3}, {"source": f"{digit_shards}/digits-000000.tar", "weight": 1}]
    planned = report(recipe(mixture, digit_shards, tmp_path / "run"), "own", trial=False)
    (folder, shards) = planned.sources
    assert (folder.name, folder.images, folder.share, folder.epochs) == ("files", 200, 0.75, 360 / 200)
    assert shards.name == "digits-000000.tar"
    assert json.loads(json.dumps(planned.as_json()))["sources"][0]["epochs"] == 1.8


def test_damage_in_a_mixture_is_replaced_from_its_source_and_named(digit_shards, digits, tmp_path):
    files = tmp_path / "files"
    for name in sorted(path.name for path in next(digits.iterdir()).iterdir()):
        (files / "a").mkdir(parents=True, exist_ok=True)
        (files / "a" / name).write_bytes((next(digits.iterdir()) / name).read_bytes())
    (files / "a" / "broken.png").write_bytes(b"no image")
    mixture = [{"source": str(files)}, {"source": str(digit_shards)}]
    out = tmp_path / "run"
    pretrain(recipe(mixture, digit_shards, out, "optim.batch_size=8", "budget.steps=12"))
    (entry,) = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert (entry["source"], entry["key"], entry["shard"]) == ("files", "a/broken.png", str(files))
    assert entry["replaced_by"] < len(list((files / "a").iterdir()))


def test_few_images_of_a_source_are_refused(digit_shards, digits, tmp_path):
    small = tmp_path / "few"
    small.mkdir()
    for number, path in enumerate(sorted(digits.rglob("*.png"))[:3]):
        (small / f"{number}.png").write_bytes(path.read_bytes())
    mixture = [{"source": str(small)}, {"source": str(digit_shards)}]
    with pytest.raises(UserError, match="a step of 40 images takes 20 of few, which has 3 images"):
        pretrain(recipe(mixture, digit_shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_balanced_classes_need_labels(digit_shards, digits, tmp_path):
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    for path in digits.rglob("*.png"):
        (unlabelled / path.name).write_bytes(path.read_bytes())
    balanced = "data.order=class_balanced", "budget.steps=2"
    pretrain(recipe(str(digits), digit_shards, tmp_path / "run", *balanced))
    with pytest.raises(UserError, match="class_balanced needs a label for each image, and 200 of the 200 images"):
        pretrain(recipe(str(unlabelled), digit_shards, tmp_path / "other", *balanced))
    with pytest.raises(UserError, match=r"data\.order: class_balanced -> shuffled"):
        pretrain(recipe(str(digits), digit_shards, tmp_path / "run", "data.order=shuffled", "budget.steps=2"))


def test_commands_take_a_folder(digit_shards, digits, tmp_path):
    runner = CliRunner()
    indexed = runner.invoke(app, ["index", str(digits)])
    assert indexed.exit_code == 0, indexed.output
    assert "200 images in 1 folder (" in indexed.output
    assert "labels 0 to 9: 10 classes" in indexed.output


def test_processes_with_other_images_are_refused(digit_shards):
    shards = open_shards(digit_shards)

    class Engine:
        def gather(self, values):
            return [*values, ("0" * 16, 199)]

    with pytest.raises(UserError, match=r"process 1 has other images or labels than process 0 \(199 and 200 images\)"):
        check_same_images(Engine(), shards)


def test_labels_of_a_folder_are_those_of_its_shards(digit_shards, digits):
    from selfvil.data.images import open_images

    folder, shards = open_images(digits), open_shards(digit_shards)
    by_bytes = dict(zip(shards.contents.tolist(), shards.labels.tolist()))
    assert np.array_equal([by_bytes[each] for each in folder.contents.tolist()], folder.labels)
