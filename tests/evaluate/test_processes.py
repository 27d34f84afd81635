"""Evaluations on several processes: the same features and scores as on one, and no process left in a collective."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runs import REPOSITORY, environment, small
from selfvil.evaluate import settings
from selfvil.evaluate.processes import Processes
from selfvil.evaluate.score import score
from selfvil.pretrain import pretrain


def test_two_processes_give_the_scores_of_one(digit_shards, tmp_path):
    """By torchrun and gloo; `two_processes.py` has the checks within them."""
    run = tmp_path / "run"
    pretrain(small("mae", digit_shards, run, "budget.steps=1"))
    parts = [str(digit_shards / f"digits-00000{number}.tar") for number in range(2)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("two_processes.py")), str(run), *parts, str(tmp_path)],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("k-NN, k = 10 ") == 3  # one table, of three networks

    two = {name: settings(name, {"epochs": 2}) for name in ("linear_grid", "mae_probe", "attentive")}
    chosen = {"knn": settings("knn"), "few_label": settings("few_label", {"draws": 2})} | two
    rows = score(run, *parts, chosen, baselines=True, workers=0, device="cpu")
    found = json.loads((tmp_path / "command.json").read_text())
    assert [(row["network"], row["protocol"], row["value"], tuple(row["interval"])) for row in found] == [
        (row.network, row.protocol, row.value, row.interval) for row in rows
    ]
    logged = json.loads((tmp_path / "loop.json").read_text())
    assert logged["1/knn_10"] == rows[0].value
    assert logged.keys() == {"1/knn_10", "1/knn_20", "1/knn_100", "linear", "few_label_5"}


def test_one_process_has_no_collectives():
    """No process group is needed, and an error or interrupt is raised as it is."""
    alone = Processes.current()
    x = torch.rand(3, 2)
    assert alone.is_main
    assert alone.gather_rows(x) is x
    assert alone.exchange("value") == ["value"]
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 / 0)
