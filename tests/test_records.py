"""Reading the files of a run's folder, complete, damaged or missing."""

import json

import pytest

from selfvil.records import (
    RunRecord,
    ends_incomplete,
    is_unstarted,
    ledger_file,
    ledger_files,
    newest_picture,
    picture_file,
    read_metrics,
    read_record,
    read_scores,
)


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "doctor"}\n{"step": 2, "ki\x00\x00\n{"step": 3, "kind": "doctor"}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    assert ends_incomplete(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("text", ["", "{", "{}", '"x"', "[" * 100_000, '{"value": 1}'])
def test_damaged_scores_are_no_rows(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    assert read_scores(tmp_path) == []


def test_only_rows_of_scores_are_read(tmp_path):
    assert read_scores(tmp_path) == []
    (tmp_path / "scores.json").write_text(json.dumps([{"value": 1.5}, 3, None, {}]))
    assert read_scores(tmp_path) == [{"value": 1.5}, {}]


@pytest.mark.parametrize("text", ["", "[]", '{"launches": 3}', '{"summary": {"step": 1}}'])
def test_a_damaged_run_record_is_empty(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert read_record(tmp_path) == RunRecord() == read_record(tmp_path / "absent")


def test_the_newest_picture_is_of_the_highest_step(tmp_path):
    assert newest_picture(tmp_path) is None
    for step in (100_000_000, 20, 5):
        picture_file(tmp_path, step).parent.mkdir(exist_ok=True)
        picture_file(tmp_path, step).touch()
    assert newest_picture(tmp_path) == picture_file(tmp_path, 100_000_000)


def test_each_process_has_a_ledger(tmp_path):
    names = [ledger_file(tmp_path, rank).name for rank in (0, 1, 12)]
    assert names == ["ledger.jsonl", "ledger-1.jsonl", "ledger-12.jsonl"]
    for name in [*names, "ledger.txt"]:
        (tmp_path / name).touch()
    assert {path.name for path in ledger_files(tmp_path)} == set(names)


def test_only_files_that_an_early_end_leaves_count_as_unstarted():
    assert is_unstarted({"lease.json", "metrics.jsonl", "metrics.jsonl.aside", "ledger-3.jsonl", "tensorboard"})
    assert is_unstarted(set())
    assert not is_unstarted({"lease.json", "ledger.xlsx"})
