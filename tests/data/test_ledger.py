"""The ledger of damaged samples: one limit for a run with any number of processes."""

import json
from pathlib import Path

import pytest

from selfvil.data.ledger import BadSample, Ledger


def bad_sample(id: int) -> BadSample:
    return BadSample(position=100 + id, id=id, shard="s.tar", key=f"k{id}", reason="cut", replaced_by=1)


def exchange(ledgers: list[Ledger]) -> None:
    """The exchange of the loop at each log interval."""
    ids = [id for ledger in ledgers for id in ledger.unshared()]
    for ledger in ledgers:
        ledger.merge(ids)


def test_each_sample_is_listed_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(tmp_path, num_samples=1000, max_bad=0.02)
    assert not path.exists()
    ledger.record([])
    assert not path.exists(), "an undamaged run has no ledger"
    ledger.record([bad_sample(4), bad_sample(5), bad_sample(4)])
    ledger.record([bad_sample(5), bad_sample(6)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [4, 5, 6]
    assert lines[0] == {
        "position": 104,
        "id": 4,
        "shard": "s.tar",
        "key": "k4",
        "reason": "cut",
        "replaced_by": 1,
        "source": "",
    }
    resumed = Ledger(tmp_path, num_samples=1000, max_bad=0.02)
    resumed.record([bad_sample(6), bad_sample(7)])
    assert len(resumed) == len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(("max_bad", "limit"), [(0.004, 20), (0.0001, 10), (0, 0), (0.5, 2500)])
def test_it_limits_the_damage(tmp_path, max_bad, limit):
    ledger = Ledger(tmp_path, num_samples=5000, max_bad=max_bad)
    ledger.record(map(bad_sample, range(limit)))
    assert ledger.excess() is None
    ledger.record([bad_sample(4999)])
    assert f"{limit + 1:,} of 5,000 samples are damaged" in ledger.excess()
    assert "data.max_bad" in ledger.excess()
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == limit + 1, "the last one is entered too"


def test_the_limit_is_for_all_processes_together(tmp_path):
    ledgers = [Ledger(tmp_path, num_samples=1000, rank=rank) for rank in range(4)]
    for rank, ledger in enumerate(ledgers):
        ledger.record(map(bad_sample, [rank, 10 + rank, 500]))  # sample 500 is met by all
    exchange(ledgers)
    assert [len(ledger) for ledger in ledgers] == [9] * 4
    assert [ledger.excess() for ledger in ledgers] == [None] * 4
    ledgers[1].record([bad_sample(20)])
    ledgers[3].record([bad_sample(21)])
    exchange(ledgers)
    assert all("11 of 1,000 samples are damaged" in ledger.excess() for ledger in ledgers)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_resume_with_another_number_of_processes_keeps_all(tmp_path, processes):
    for rank, ids in enumerate([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10, 11]]):
        Ledger(tmp_path, num_samples=1000, rank=rank).record(map(bad_sample, ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger-1.jsonl", "ledger.jsonl"]
    ledgers = [Ledger(tmp_path, num_samples=1000, rank=rank) for rank in range(processes)]
    assert all(len(ledger) == 11 and ledger.excess() for ledger in ledgers)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    for ledger in ledgers:
        ledger.record(map(bad_sample, range(1, 12)))
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before, "what is known is not entered again"


def test_files_of_other_machines_are_exchanged_too(tmp_path):
    """Without shared storage, each machine reads only its own files."""
    Ledger(tmp_path / "a", 1000).path.parent.mkdir()
    Ledger(tmp_path / "b", 1000, rank=1).path.parent.mkdir()
    Ledger(tmp_path / "a", 1000).record(map(bad_sample, range(6)))
    Ledger(tmp_path / "b", 1000, rank=1).record(map(bad_sample, range(6, 12)))
    ledgers = [Ledger(tmp_path / "a", 1000), Ledger(tmp_path / "b", 1000, rank=1)]
    exchange(ledgers)
    assert all("12 of" in ledger.excess() for ledger in ledgers)


def test_a_ledger_truncated_by_a_crash_is_continued(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(tmp_path, 1000).record([bad_sample(1), bad_sample(2)])
    path.write_text(path.read_text()[:-10])
    ledger = Ledger(tmp_path, 1000)
    assert len(ledger) == 1
    ledger.record([bad_sample(3)])
    assert len(Ledger(tmp_path, 1000)) == 2


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"null", b"[]", b"7", b"{}", b'{"id": "4"}', b'{"id": 1e999}', b'{"id": -1}', b'{"id": 1000}',
        b"[" * 100_000, b"\0" * 4096, b'{"id": NaN}',
    ],
)  # fmt: skip
def test_damaged_lines_are_skipped(tmp_path, line):
    path = tmp_path / "ledger-1.jsonl"
    Ledger(tmp_path, 1000, rank=1).record([bad_sample(1)])
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert len(Ledger(tmp_path, 1000)) == 1


def test_on_a_full_disk_samples_are_counted_and_written_later(tmp_path, caplog):
    ledger = Ledger(tmp_path, num_samples=1000)
    ledger.record([bad_sample(1)])
    ledger.path, there = Path("/dev/full"), ledger.path
    ledger.record([bad_sample(2)])
    assert "No space left" in caplog.text
    assert len(ledger) == 2
    ledger.path = there
    ledger.record([bad_sample(3)])
    assert [json.loads(line)["id"] for line in there.read_text().splitlines()] == [1, 2, 3]
