"""Metrics: means between two lines, one record per step after a resume, and optional writers."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from selfvil.errors import UserError
from selfvil.monitor.metrics import Means, MetricsWriter
from selfvil.monitor.pictures import curves_figure, loss_curve, save_picture
from selfvil.records import read_metrics


def write(folder, steps, resume_step=0, **options):
    writer = MetricsWriter(
        folder, resume_step, **({"tensorboard": False, "wandb": None, "name": "run", "run_id": "1"} | options)
    )
    for step in steps:
        writer.write(step, {"loss": 1 / step, "samples": 8 * step, "epoch": step / 4, "lr": 0.1})
    writer.close()


def test_means_are_over_what_was_added():
    means = Means()
    means.add({"loss": torch.tensor(1.0), "entropy": torch.tensor(5.0)})
    means.add({"loss": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert {name: value.item() for name, value in means.means().items()} == {"loss": 1.5, "entropy": 5.0}
    means.reset()
    assert means.means() == {}


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ki')  # cut off by a crash
    write(tmp_path, range(5, 9), resume_step=4)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 9)]


def test_wandb_gets_the_records_of_the_file(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    write(tmp_path, [2], wandb="project")
    assert logged == [(2, {"train/loss": 0.5, "train/samples": 16, "train/epoch": 0.5, "train/lr": 0.1}), "end"]


def test_a_missing_wandb_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'selfvil\[wandb\]'"):
        write(tmp_path, [1], wandb="project")


def test_the_loss_curve_is_drawn_and_an_empty_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no training metrics"):
        loss_curve(tmp_path, tmp_path / "loss.png")
    write(tmp_path, range(1, 8))
    assert loss_curve(tmp_path, tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_with_a_teacher_shows_its_entropy_too(tmp_path):
    with_teacher, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_teacher, without):
        folder.mkdir()
        write(folder, range(1, 8))
    path = with_teacher / "metrics.jsonl"
    records = [json.loads(line) | {"teacher_entropy": 0.5, "teacher_spread": 0.9} for line in path.open()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    heights = []
    for folder in (with_teacher, without):
        with Image.open(loss_curve(folder, folder / "loss.png")) as image:
            heights.append(image.height)
    assert heights[0] > heights[1]


def test_scores_during_a_run_are_drawn_over_the_images_seen(tmp_path):
    write(tmp_path, range(1, 8))
    scores = [
        {"step": step, "kind": "eval", "knn_10": 1.0, "knn_20": 30.0 + step, "linear": 40.0} for step in (0, 4, 7)
    ]
    records = [*(json.loads(line) for line in (tmp_path / "metrics.jsonl").open()), *scores]
    of_scores, loss, _ = curves_figure(records, "a run").axes
    images_of_step = next(record for record in records if record["kind"] == "train")["samples"]
    assert [line.get_label() for line in of_scores.lines] == ["k-NN, k = 20", "linear"]
    assert list(of_scores.lines[0].get_xdata()) == [0, 4 * images_of_step, 7 * images_of_step]
    assert list(of_scores.lines[0].get_ydata()) == [30, 34, 37]
    assert loss.get_ylabel() == "loss"


def test_a_small_picture_is_enlarged_by_an_integer_factor(tmp_path):
    picture = torch.rand(3, 5, 100)
    with Image.open(save_picture(picture, tmp_path / "deep" / "x.png")) as image:
        assert image.size == (400, 20)
        assert image.getpixel((4 * 7 + 1, 4 * 2 + 3)) == tuple((picture[:, 2, 7] * 255).round().int().tolist())


def test_records_are_json_lines(tmp_path):
    write(tmp_path, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["train", "train"]
