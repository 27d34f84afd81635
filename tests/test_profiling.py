"""run.profile: a trace file and a table of the ten most expensive operations."""

import gzip
import json

from runs import small
from selfvil.pretrain import pretrain


def test_some_steps_are_traced(digit_shards, tmp_path, capsys):
    pretrain(small("mae", digit_shards, tmp_path / "run", "run.profile=2", "budget.steps=8"))
    output = capsys.readouterr().out
    assert "Self CPU" in output
    assert "ui.perfetto.dev" in output
    (path,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")} == {
        "ProfilerStep#3", "ProfilerStep#4"
    }  # fmt: skip
