"""Accuracy on changed images: unchanged ones score as always, and changes that matter lower it."""

from functools import partial

import timm
import torch

from selfvil.data.index import open_shards
from selfvil.evaluate import evaluation, settings
from selfvil.evaluate.knn import knn
from selfvil.evaluate.linear import linear_probe
from selfvil.evaluate.speed import measure
from selfvil.evaluate.task import Task
from selfvil.weights import Network, Normalisation

SHOWN = Normalisation((0.3,), (0.4,), (8, 8))


def make_task(digit_shards, network: bool = True) -> Task:
    torch.manual_seed(123)
    arguments = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 1}
    backbone = timm.create_model("vil_nano_patch4_32", **arguments)
    loaded = Network(backbone, SHOWN, 0)
    train, test = (open_shards(str(digit_shards / f"digits-00000{number}.tar")) for number in (0, 1))
    return Task("pretrained", loaded if network else None, SHOWN, train, test, lambda **_: loaded, workers=0)


def scores(task: Task, **values) -> dict:
    chosen = settings("robustness", values)
    module = evaluation("robustness")
    module.check(task, chosen)
    return {score.metric.removeprefix("robustness_"): score for score in module.evaluate(task, chosen)}


def test_unchanged_images_score_as_the_evaluations_do(digit_shards, tmp_path):
    task = make_task(digit_shards)
    parts = task.features()
    found = scores(task, scales=[2.0], speed=False, out=str(tmp_path / "chart.svg"))
    assert (tmp_path / "chart.svg").read_text().count("<path") > 50
    assert list(found) == [
        "clean", "occlusion_25", "occlusion_50", "occlusion_75", "shuffle_2", "shuffle_4", "shuffle_8", "16x16",
    ]  # fmt: skip
    assert abs(found["clean"].value - linear_probe(parts.train, parts.test).accuracy) < 0.6  # batches differ in size
    nearest = scores(task, classifier="knn", scales=[], speed=False)
    assert abs(nearest["clean"].value - knn(parts.train, parts.test, [20])[20]) < 0.6
    for of_one in (found, nearest):
        assert of_one["clean"].value > of_one["occlusion_75"].value + 10  # digits cannot be read any more
        assert of_one["clean"].value > of_one["shuffle_8"].value + 10
        low, high = of_one["clean"].interval
        assert low < of_one["clean"].value < high
    assert (
        scores(task, scales=[], speed=False)["shuffle_4"].value
        == scores(task, scales=[], speed=False)["shuffle_4"].value
    )


def test_raw_pixels_have_no_other_sizes(digit_shards):
    found = scores(make_task(digit_shards, network=False), occlusions=[0.5], shuffles=[2])
    assert list(found) == ["clean", "occlusion_50", "shuffle_2"]
    assert found["clean"].value > 85


def test_costs_at_each_size_beside_another_network(digit_shards, monkeypatch):
    quick = partial(measure, rounds=2, seconds=0.0)
    monkeypatch.setattr("selfvil.evaluate.robustness.measure", quick)
    task = make_task(digit_shards)
    before = {name: tensor.clone() for name, tensor in task.network.backbone.state_dict().items()}
    found = scores(task, occlusions=[], shuffles=[], scales=[4.0], beside=["vil_nano_patch4_32"])
    assert list(found) == ["clean", "32x32"]
    for name, size in (("clean", [8, 8]), ("32x32", [32, 32])):
        details = found[name].details
        assert details["cost"]["img_size"] == size
        assert details["beside"]["vil_nano_patch4_32"]["img_size"] == size
        assert details["beside"]["vil_nano_patch4_32"]["speed_over_it"] > 0
    assert found["32x32"].details["cost"]["multiply_adds"] > 10 * found["clean"].details["cost"]["multiply_adds"]
    after = task.network.backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
