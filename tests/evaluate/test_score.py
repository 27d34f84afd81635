"""From a run, a checkpoint or an export to a table of scores."""

import io
import json
import logging

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from selfvil import checkpoint
from selfvil.data.index import open_shards
from selfvil.data.pack import pack
from selfvil.errors import UserError
from selfvil.evaluate import EVALUATIONS, evaluation, settings
from selfvil.evaluate.features import extract
from selfvil.evaluate.knn import knn
from selfvil.evaluate.linear import linear_probe
from selfvil.evaluate.score import Pair, as_json, as_table, score, score_pairs
from selfvil.export import export
from selfvil.models.vision_lstm import VisionLSTM
from selfvil.weights import load_pretrained
from tars import labelled, write_tar

KWARGS = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 1}
FAST = {"workers": 0, "device": "cpu"}


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint of a random network."""
    torch.manual_seed(123)
    backbone = timm.create_model("vil_nano_patch4_32", **KWARGS)
    meta = {
        "format": 1, "step": 5, "samples": 640, "seconds": 1.0, "seed": 0, "export": "student",
        "networks": {"student": "backbone."}, "objective": {"name": "mae"},
        "model": {"name": "vil_nano_patch4_32", "kwargs": KWARGS},
        "data": {"pattern": "x.tar", "mean": [0.3], "std": [0.4], "fingerprint": "f", "num_samples": 9},
    }  # fmt: skip
    tensors = {"objective": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 5, tensors, meta)
    return tmp_path / "run"


@pytest.fixture
def parts(digit_shards):
    return str(digit_shards / "digits-000000.tar"), str(digit_shards / "digits-000001.tar")


def chosen(name: str, **values) -> dict:
    return {name: settings(name, values)}


def test_every_evaluation_has_the_three_names():
    for name in EVALUATIONS:
        module = evaluation(name)
        assert module.Settings().model_fields_set == set()  # every setting has a default
        assert callable(module.check)
        assert callable(module.evaluate)
        assert all(field.description for field in module.Settings.model_fields.values())


def test_all_protocols_and_baselines(run, parts):
    rows = score(run, *parts, chosen("knn") | chosen("linear"), baselines=True, seed=2, **FAST)
    protocols = ["k-NN, k = 10", "k-NN, k = 20", "k-NN, k = 100", "linear probe"]
    assert [(row.network, row.protocol) for row in rows] == [
        (network, protocol) for network in ("pretrained", "untrained", "raw pixels") for protocol in protocols
    ]
    assert all(row.train_images + row.test_images == 200 and row.seed == 2 for row in rows)
    assert {row.network: row.samples_seen for row in rows} == {"pretrained": 640, "untrained": 0, "raw pixels": 0}
    assert {row.network: row.readout for row in rows} == {
        "pretrained": "first_last_mean", "untrained": "first_last_mean", "raw pixels": "8 x 8 pixels",
    }  # fmt: skip
    values = {(row.network, row.protocol): row.value for row in rows}
    assert values["raw pixels", "linear probe"] > 60  # digits are easy: a scrambled label or row would show
    assert values["raw pixels", "k-NN, k = 10"] > 60

    # The same as by hand.
    backbone, normalisation, _ = load_pretrained(run)
    train, test = (
        extract(
            backbone,
            open_shards(part),
            img_size=normalisation.img_size,
            mean=normalisation.mean,
            std=normalisation.std,
            **FAST,
        )
        for part in parts
    )
    assert values["pretrained", "k-NN, k = 10"] == knn(train, test)[10]
    assert values["pretrained", "linear probe"] == linear_probe(train, test, seed=2).accuracy

    out = io.StringIO()
    Console(file=out, width=120).print(as_table(rows))
    assert all(text in out.getvalue() for text in ("linear probe", "untrained", "8 x 8 pixels", "120 train / 80 test"))
    plain = json.loads(json.dumps(as_json(rows)))
    assert plain[0]["value"] == rows[0].value
    assert {"device", "versions", "commit", "seconds", "source"} <= plain[0].keys()


def test_few_labels(run, parts):
    (row,) = score(run, *parts, chosen("few_label", labels_per_class=3, draws=4, readout="mean"), **FAST)
    assert row.protocol == "linear probe, 3 labels per class, 4 draws"
    assert row.deviation is not None
    assert row.deviation > 0
    assert row.readout == "mean"
    with pytest.raises(UserError, match="fewer than the 100 labels for each class"):
        score(run, *parts, chosen("few_label", labels_per_class=100), **FAST)


def test_run_checkpoint_and_export_score_the_same(run, parts, tmp_path):
    sources = [run, run / "checkpoints" / "step-00000005", export(run, tmp_path / "out")]
    values = [score(source, *parts, chosen("knn"), **FAST)[0].value for source in sources]
    assert values[0] == values[1] == values[2]


def test_untrained_is_a_function_of_its_seed_and_leaves_the_random_state(run, tmp_path):
    sources = run, export(run, tmp_path / "out")
    state = torch.get_rng_state()
    for source in sources:
        first, again, other = (load_pretrained(source, untrained=True, seed=seed).backbone for seed in (1, 1, 2))
        assert torch.equal(first.pos_embed, again.pos_embed)
        assert not torch.equal(first.pos_embed, other.pos_embed)
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes_are_refused_before_features_are_computed(run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
    train, test = parts
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "a.png")
    pack(str(tmp_path / "flat"), tmp_path / "unlabelled", workers=1)
    unlabelled = str(tmp_path / "unlabelled")
    exported = export(run, tmp_path / "out")
    for arguments, options, message in [
        ((run, train, test), {"evaluations": {"lineer": None}}, "no evaluation 'lineer' .did you mean linear"),
        ((tmp_path / "no", train, test), {}, "no folder"),
        ((run, train, str(tmp_path / "none-*.tar")), {}, "none-"),
        ((run, train, unlabelled), {}, "have no label"),
        ((run, unlabelled, test), {}, "have no label"),
        ((run, train, train), {}, "are also training images"),
        ((run, train, test), {"evaluations": chosen("knn", readout="cls")}, "needs a class token"),
        ((run, train, test), {"evaluations": chosen("knn", k=[500])}, "at least 500 training images, found 120"),
        ((run, train, test), {"network": "teacher"}, "no network 'teacher'; choose one of: student"),
        ((exported, train, test), {"network": "teacher"}, "holds one network"),
    ]:
        with pytest.raises(UserError, match=message):
            score(*arguments, **options, **FAST)


@pytest.mark.slow
def test_real_images(run, shared_data, caplog):
    """Colour photographs through a network for grey ones: decoded to its channels, and better than chance by pixels."""
    cifar = shared_data / "cifar10"
    with caplog.at_level(logging.WARNING):
        rows = score(
            run, str(cifar / "cifar10-test-000000.tar"), str(cifar / "cifar10-test-000001.tar"), chosen("knn"),
            baselines=True, **FAST,
        )  # fmt: skip
    assert (rows[0].train_images, rows[0].test_images) == (5000, 5000)
    assert {row.network: row.value > 12 for row in rows}["raw pixels"]


def test_several_probes_are_averaged(run, parts):
    one, other, both = (
        score(run, *parts, chosen("linear", probe_seeds=count), seed=seed, **FAST)[0]
        for seed, count in ((4, 1), (5, 1), (4, 2))
    )
    assert one.deviation is None
    assert one.value != other.value
    assert both.value == pytest.approx((one.value + other.value) / 2)
    assert both.deviation == pytest.approx(abs(one.value - other.value) / 2**0.5)
    with pytest.raises(UserError, match=r"linear\.probe_seeds = 0: input should be greater than or equal to 1"):
        settings("linear", {"probe_seeds": 0})


def test_all_features_are_computed_in_one_pass_over_the_images(run, parts, monkeypatch):
    """Each image is read and encoded once, and every score is that of the evaluation alone."""
    evaluations = chosen("knn") | chosen("linear", readout="mean") | chosen("few_label", labels_per_class=2, draws=2)
    alone = [row for name in evaluations for row in score(run, *parts, {name: evaluations[name]}, **FAST)]
    encoded, forward = [], VisionLSTM.forward_features
    monkeypatch.setattr(
        VisionLSTM, "forward_features", lambda self, x: encoded.append(len(x)) or forward(self, x)
    )  # fmt: skip
    rows = score(run, *parts, evaluations, **FAST)
    assert sum(encoded) == 200
    assert [(row.metric, row.value, row.interval) for row in rows] == [
        (row.metric, row.value, row.interval) for row in alone
    ]


def test_several_pairs_of_shards(run, parts, tmp_path):
    """Each row names its data, and is that of its pair alone; everything is checked before the first features."""
    pairs = [Pair(*parts), Pair(*reversed(parts))]
    rows = score_pairs(run, pairs, chosen("knn", k=5), **FAST)
    alone = [score(run, *pair, chosen("knn", k=5), **FAST)[0] for pair in pairs]
    assert [(row.train, row.test, row.value) for row in rows] == [(row.train, row.test, row.value) for row in alone]
    assert [row.train_images for row in rows] == [120, 80]
    out = io.StringIO()
    Console(file=out, width=400).print(as_table(rows))
    titles = " ".join(out.getvalue().split())
    assert f"train {parts[0]}, test {parts[1]}: top-1 in percent, 120 train / 80 test images" in titles
    assert f"train {parts[1]}, test {parts[0]}: top-1 in percent, 80 train / 120 test images" in titles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
        with pytest.raises(UserError, match="are also training images"):
            score_pairs(run, [Pair(*parts), Pair(parts[0], parts[0])], chosen("knn"), **FAST)
        with pytest.raises(UserError, match="a pair of training and test shards"):
            score_pairs(run, [], chosen("knn"), **FAST)


def test_rows_have_intervals_and_the_accuracy_of_each_class(run, parts):
    rows = score(run, *parts, chosen("knn", k=5) | chosen("few_label", labels_per_class=2, draws=3), **FAST)
    for row in rows:
        assert row.interval[0] < row.value < row.interval[1]
        assert list(row.details["classes"]) == [str(digit) for digit in range(10)]
        assert (row.deviation is None) == (row.metric == "knn_5")
    out = io.StringIO()
    Console(file=out, width=160).print(as_table(rows))
    assert f"{rows[0].interval[0]:.1f} … {rows[0].interval[1]:.1f}" in out.getvalue()


def test_shared_images_are_in_the_rows_if_they_are_allowed(run, tmp_path):
    train = write_tar(tmp_path / "train.tar", labelled(20))
    test = write_tar(tmp_path / "test.tar", labelled(20, first=15))
    with pytest.raises(UserError, match=r"5 of the 20 test images .* up to 25 points too high.*--allow-shared"):
        score(run, train, test, chosen("knn", k=5), **FAST)
    (row,) = score(run, train, test, chosen("knn", k=5), allow_shared=True, **FAST)
    assert row.shared_images == 5
    out = io.StringIO()
    Console(file=out, width=120).print(as_table([row]))
    assert "5 of them in both" in out.getvalue()


def test_wrong_settings_have_the_nearest_key():
    for name, values, message in [
        ("knn", {"temprature": 1}, r"unknown key knn\.temprature = 1 \(did you mean knn\.temperature\?\)"),
        ("knn", {"k": []}, r"knn\.k = \[\]"),
        ("knn", {"k": 0}, r"knn\.k"),
        ("linear", {"readout": "middle"}, "there is no readout 'middle'; choose one of: bilateral_concat"),
        ("svm", {}, r"there is no evaluation 'svm' \(choose one of: knn, linear"),
    ]:
        with pytest.raises(UserError, match=message):
            settings(name, values)
    assert settings("knn", {"k": 20}).k == [20]
