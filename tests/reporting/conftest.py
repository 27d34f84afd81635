"""Three small finished runs: two of MAE that differ in one setting, and one of DINO; with vital signs and scores."""

import json
from pathlib import Path

import pytest

import runs
from selfvil.pretrain import pretrain


@pytest.fixture(scope="session")
def three(digit_shards, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    shared = ["monitor.doctor_every=3", "monitor.pictures_every=3", "monitor.log_every=1"]
    parts = zip(("train", "test"), ("000000", "000001"))
    scored = [f"eval.knn.{part}={digit_shards}/digits-{number}.tar" for part, number in parts] + ["eval.knn.every=3"]
    for name, lr in (("mae", "0.004"), ("mae_fast", "0.02")):
        changed = ["budget.steps=6", f"optim.base_lr={lr}"]
        pretrain(runs.small("mae", digit_shards, folder / name, *shared, *scored, *changed))
    pretrain(runs.small("dino", digit_shards, folder / "dino", *shared, "budget.steps=3", "optim.batch_size=20"))
    for name, value in (("mae", 60.0), ("mae_fast", 41.0)):
        row = {
            "network": "pretrained", "protocol": "linear probe", "value": value, "deviation": None, "train_images": 120,
            "test_images": 80, "samples_seen": 240,
        }  # fmt: skip
        baseline = row | {"network": "untrained", "value": 31.0}
        dense = {
            "protocol": "linear head", "measure": "mIoU", "value": 20.0, "interval": [18.5, 21.0],
            "details": {"per class": {"road": 80.5, "sky": None}},
        }  # fmt: skip
        (folder / name / "scores.json").write_text(json.dumps([row, baseline, dense]))
    return [folder / name for name in ("mae", "mae_fast", "dino")]
