"""A small part of the fault campaign in every test run, a larger one marked slow; `make faults` runs all of it."""

import pytest

from faults.campaign import kinds

# Trials of a kind cost from 20 ms to 4 s.
OFTEN = ["damaged-exports", "damaged-shards", "damaged-indexes"]
SELDOM = ["kills", "crash-points", "full-disk", "writers-crash", "damaged-runs", "signals", "two-launches",
          "killed-workers", "stopped-workers"]  # fmt: skip


@pytest.mark.parametrize(("kind", "scale"), [(kind, 0.1) for kind in OFTEN] + [(kind, 0.03) for kind in SELDOM])
def test_what_is_promised_holds(digit_shards, tmp_path, kind, scale):
    row = kinds(scale)[kind](digit_shards, tmp_path)
    assert row.tried
    assert not row.failures


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(kinds(1)))
def test_what_is_promised_holds_more_often(digit_shards, tmp_path, kind):
    row = kinds(0.3, seed=1)[kind](digit_shards, tmp_path)
    assert not row.failures
