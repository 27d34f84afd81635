"""Scores during a run: what cannot be scored is refused before the first step, what fails later does not end it."""

import pytest

import runs
from selfvil.errors import UserError
from selfvil.monitor import probes
from selfvil.monitor.metrics import read_metrics
from selfvil.pretrain import pretrain
from tars import labelled, write_tar


@pytest.fixture
def parts(digit_shards):
    return digit_shards / "digits-000000.tar", digit_shards / "digits-000001.tar"


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
    settings = [f"eval.{part}={path}" for part, path in given.items()]
    with pytest.raises(UserError, match=rf"^eval\.train and eval\.test: .*{message}"):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


def test_enough_for_neighbours_may_be_too_few_for_a_probe(digit_shards, tmp_path):
    files = [(name, b"0" if name.endswith(".cls") else data) for name, data in labelled(24)]
    train, test = write_tar(tmp_path / "train.tar", files[:24]), write_tar(tmp_path / "test.tar", files[24:])
    settings = [f"eval.train={train}", f"eval.test={test}"]
    with pytest.raises(UserError, match="at least two classes"):
        probes.check_probes(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert probes.check_probes(runs.small("mae", digit_shards, tmp_path / "run", *settings, "eval.linear=false")) == []


def test_some_test_images_among_the_training_images_are_a_warning(digit_shards, tmp_path, caplog):
    mixed = write_tar(tmp_path / "mixed.tar", labelled(20))
    more = write_tar(tmp_path / "more.tar", labelled(20, first=15))
    settings = [f"eval.train={mixed}", f"eval.test={more}", "budget.steps=1"]
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert "5 of the 20 test images" in caplog.text
    assert [record["kind"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == ["train", "eval"]


def test_a_score_that_fails_is_a_warning_and_the_run_goes_on(digit_shards, parts, tmp_path, monkeypatch):
    """Its shards vanish after the check, and come back later."""
    settings = [f"eval.train={parts[0]}", f"eval.test={parts[1]}", "eval.every=4"]
    calls, extract = [], probes.extract

    def sometimes(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no room")
        if len(calls) == 2:
            raise UserError("missing shard: eval.tar")
        return extract(*arguments, **options)

    monkeypatch.setattr(probes, "extract", sometimes)
    whole = pretrain(runs.small("mae", digit_shards, tmp_path / "whole"))
    summary = pretrain(runs.small("mae", digit_shards, tmp_path / "run", *settings))
    assert summary.finished
    assert summary.loss == whole.loss
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "eval"] == [12]
    first, second = (record["message"] for record in records if record["kind"] == "warning")
    assert "training continues (MemoryError: no room)" in first
    assert "training continues (missing shard: eval.tar)" in second
    runs.assert_same_state(tmp_path / "whole", tmp_path / "run")
