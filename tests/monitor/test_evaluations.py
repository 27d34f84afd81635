"""Evaluations during a run: wrong shards are refused before the first step, and a later failure does not end it."""

import pytest
import yaml

import runs
from selfvil.errors import UserError
from selfvil.evaluate import task
from selfvil.evaluate.score import score
from selfvil.monitor.evaluations import check_evaluations, due_evaluations
from selfvil.pretrain import pretrain
from selfvil.recipe import parse
from selfvil.records import read_metrics
from tars import labelled, write_tar


@pytest.fixture
def parts(digit_shards):
    return digit_shards / "digits-000000.tar", digit_shards / "digits-000001.tar"


def entries(train, test, *names: str) -> list[str]:
    """Overrides for one entry of each name; k-NN and a linear probe by default."""
    return [
        f"eval.{name}.{key}={path}"
        for name in names or ("knn", "linear")
        for key, path in (("train", train), ("test", test))
    ]


def missing(part, folder):
    return folder / "none.tar"


def cut(part, folder):
    (folder / "cut.tar").write_bytes(part.read_bytes()[:-20000])
    return folder / "cut.tar"


def unlabelled(part, folder):
    return write_tar(folder / "bare.tar", [file for file in labelled(20) if file[0].endswith(".png")])


def few(part, folder):
    return write_tar(folder / "few.tar", labelled(6))


def renamed(part, folder):
    (folder / "renamed.tar").write_bytes(part.read_bytes())
    (folder / "classes.txt").write_text("0\n2\n1\n")
    return folder / "renamed.tar"


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("train", missing, "missing shard: .*none.tar"),
        ("test", missing, "missing shard: .*none.tar"),
        ("train", cut, "cut.tar was cut at byte"),
        ("test", cut, "cut.tar was cut at byte"),
        ("train", unlabelled, "20 of the 20 images in .*bare.tar have no label"),
        ("test", unlabelled, "20 of the 20 images in .*bare.tar have no label"),
        ("train", few, "labels that no training image has|needs at least 10 training images"),
        ("test", renamed, "label 1 is '1' by .* and '2' by .*classes.txt"),
        ("train", lambda part, folder: part.with_name("digits-000001.tar"), "all 80 test images .* are also training"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_scored_are_refused_before_the_first_step(
    digit_shards, parts, tmp_path, key, wrong, message
):
    given = {"train": parts[0], "test": parts[1]}
    given[key] = wrong(given[key], tmp_path)
    settings = entries(given["train"], given["test"])
    with pytest.raises(UserError, match=rf"^eval\.knn: .*{message}"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


def test_enough_for_neighbours_may_be_too_few_for_a_probe(digit_shards, tmp_path):
    files = [(name, b"0" if name.endswith(".cls") else data) for name, data in labelled(24)]
    train, test = write_tar(tmp_path / "train.tar", files[:24]), write_tar(tmp_path / "test.tar", files[24:])
    with pytest.raises(UserError, match=r"eval\.linear: .*at least two classes"):
        check_evaluations(runs.small("mae", digit_shards, tmp_path / "run", *entries(train, test)))
    recipe = runs.small("mae", digit_shards, tmp_path / "run", *entries(train, test, "knn"))
    assert check_evaluations(recipe) == []


def test_test_images_among_the_training_images_are_refused_or_a_warning(digit_shards, tmp_path, caplog):
    mixed = write_tar(tmp_path / "mixed.tar", labelled(20))
    more = write_tar(tmp_path / "more.tar", labelled(20, first=15))
    settings = [*entries(mixed, more), "budget.steps=1"]
    with pytest.raises(UserError, match="5 of the 20 test images"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    settings += ["eval.allow_shared=true"]
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert "5 of the 20 test images" in caplog.text
    assert [record["kind"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == ["train", "eval"]


def test_an_evaluation_that_fails_is_a_warning_and_the_run_continues(digit_shards, parts, tmp_path, monkeypatch):
    """k-NN and the linear probe fail once each; later ones succeed, and the weights are those of a run without them."""
    settings = [*entries(*parts), "eval.every=4"]
    calls, extract = [], task.extract_all

    def sometimes(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no room")
        if len(calls) == 2:
            raise UserError("missing shard: eval.tar")
        return extract(*arguments, **options)

    monkeypatch.setattr(task, "extract_all", sometimes)
    whole = pretrain(runs.small("mae", digit_shards, tmp_path / "whole"))
    summary = pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert summary.finished
    assert summary.loss == whole.loss
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scores = {record["step"]: record for record in records if record["kind"] == "eval"}
    assert sorted(scores) == [8, 12]
    assert "knn_10" in scores[8]
    first, second = (record["message"] for record in records if record["kind"] == "warning")
    assert "the evaluation knn failed, training continues (MemoryError: no room)" in first
    assert "the evaluation linear failed, training continues (missing shard: eval.tar)" in second
    runs.assert_same_state(tmp_path / "whole", tmp_path / "run")


def test_each_entry_has_its_interval_settings_and_metrics(digit_shards, parts, tmp_path):
    """Two entries of one kind have their number in their metrics; a readout of its own."""
    part = f"train: {parts[0]}, test: {parts[1]}"
    recipe = runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=2")
    tree = yaml.safe_load(recipe.to_yaml()) | {
        "eval": yaml.safe_load(f"""
            - {{name: knn, {part}, every: 1, k: [5, 10]}}
            - {{name: knn, {part}, k: 5, readout: mean, at_start: true}}
            - {{name: few_label, {part}, labels_per_class: 2, draws: 2}}
        """)
    }
    recipe = parse(tree, "recipe")
    assert [due_evaluations(recipe, step, ended) for step, ended in ((0, False), (3, False), (2, True))] == [
        [1], [0], [0, 1, 2]
    ]  # fmt: skip
    pretrain(recipe)
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "eval"]
    start, first, last = records
    assert [record["step"] for record in records] == [0, 1, 2]
    assert start.keys() - {"step", "kind"} == {"1/knn_5"}
    assert first.keys() - {"step", "kind"} == {"0/knn_5", "0/knn_10"}
    expected = {"0/knn_5", "0/knn_10", "1/knn_5", "few_label_2"}
    assert last.keys() - {"step", "kind"} == expected
    assert all(0 <= last[name] <= 100 for name in expected)


def test_scores_during_a_run_are_those_of_the_command(digit_shards, parts, tmp_path):
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", *entries(*parts), "budget.steps=2"))
    (logged,) = (record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "eval")
    values = {row.protocol: row.value for row in score(tmp_path / "run", *map(str, parts), workers=0, device="cpu")}
    assert logged["knn_10"] == pytest.approx(values["k-NN, k = 10"])
    assert logged["linear"] == pytest.approx(values["linear probe"])
