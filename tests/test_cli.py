"""The command line from end to end; for a wrong input it prints one message, with status 2 and no traceback."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from selfvil.cli import main
from selfvil.evaluate import EVALUATIONS, arguments


@pytest.fixture(scope="module")
def run(digit_shards, tmp_path_factory) -> Path:
    """A short run on the digits."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = [
        f"data.train={digit_shards}", f"run.out={out}", "data.workers=0", "run.precision=fp32", "run.threads=1",
        "model.embed_dim=32", "model.depth=1", "objective.decoder_dim=32", "optim.batch_size=40",
        "budget.epochs=null", "budget.steps=3", "monitor.tensorboard=false",
    ]  # fmt: skip
    command("pretrain", "demo", *settings)
    return out


def command(*words: object) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code, f"{words} ended with {ended.value.code}"


def refusal(capsys, *words: object) -> str:
    """Run a command that must be refused, and return its message."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error
    assert "Traceback" not in error
    return " ".join(error.split())


def test_pack_index_pretrain_export_eval_report(digit_shards, run, tmp_path, capsys):
    command("index", f"{digit_shards}/digits-{{000000..000001}}.tar")
    assert "200 images in 2 shards" in capsys.readouterr().out
    command("export", run, tmp_path / "export", "--heads")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    with torch.no_grad():
        assert backbone(torch.rand(1, 1, 16, 16)).shape == (1, 64)
    train, test = f"{digit_shards}/digits-000000.tar", f"{digit_shards}/digits-000001.tar"
    command("eval", "few_label", tmp_path / "export", "--train", train, "--test", test, "--workers", 0,
            "labels_per_class=2", "draws=3", "--baselines", "--json", tmp_path / "rows.json")  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["network"] for row in rows} == {"pretrained", "untrained", "raw pixels"}
    assert all(0 <= row["value"] <= 100 for row in rows)
    command("eval", "all", run, "--train", train, "--test", test, "--workers", 0)
    assert "k-NN, k = 10" in capsys.readouterr().out
    command("report", run, "--curve", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.width > 300
    assert "finished" in capsys.readouterr().out


def test_labels_of_two_folders_agree_through_classes(tmp_path, capsys):
    """A test set that lacks a class keeps the training set's labels."""
    for split, labels in {"train": "abc", "test": "ac"}.items():
        for label in labels:
            for index in range(2):
                path = tmp_path / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (index, ord(label), 0)).save(path)
    command("pack", tmp_path / "train", tmp_path / "packed")
    command("pack", tmp_path / "test", tmp_path / "packed-test", "--classes", tmp_path / "packed" / "classes.txt")
    capsys.readouterr()
    command("index", tmp_path / "packed-test")
    assert "4 labelled, labels 0 to 2: 2 classes" in capsys.readouterr().out
    error = refusal(capsys, "pack", tmp_path / "test", tmp_path / "x", "--classes", tmp_path / "nothing.txt")
    assert "nothing.txt cannot be read" in error


def test_recipes_and_schema(capsys):
    command("recipes")
    assert "cifar10_mae" in capsys.readouterr().out
    command("schema")
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_wrong_shards_are_refused(digit_shards, tmp_path, capsys):
    assert "missing shard" in refusal(capsys, "index", tmp_path / "none.tar")
    assert "no file matches" in refusal(capsys, "index", f"{tmp_path}/none-*.tar")
    (tmp_path / "text.tar").write_text("no tar at all " * 100)
    assert "text.tar is not a tar file" in refusal(capsys, "index", tmp_path / "text.tar")
    whole = (digit_shards / "digits-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    assert "cut.tar was cut at byte" in refusal(capsys, "index", tmp_path / "cut.tar")


def test_an_unlabelled_shard_cannot_be_probed(digit_shards, run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 80 * index).save(tmp_path / "images" / f"{index}.png")
    command("pack", tmp_path / "images", tmp_path / "bare")
    error = refusal(capsys, "eval", "knn", run, "--train", tmp_path / "bare", "--test", digit_shards)
    assert "have no label" in error


def test_a_checkpoint_of_another_architecture_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("embed_dim: 32", "embed_dim: 64"))
    arguments = [f"run.out={tmp_path / 'run'}", "run.threads=1", "budget.steps=3", "budget.epochs=null"]
    error = refusal(capsys, "pretrain", recipe, *arguments)
    assert "model.embed_dim: 32 -> 64" in error  # by the recipe that the checkpoint holds


def test_an_export_overwrites_nothing(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert str(tmp_path / "mine") in refusal(capsys, "export", run, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    refusal(capsys, "export", tmp_path / "nowhere", tmp_path / "out")
    refusal(capsys, "report", tmp_path)


def test_a_file_that_cannot_be_written_is_refused_before_computing(digit_shards, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.score.load_pretrained", None)  # calling it would be a TypeError
    (tmp_path / "text").write_text("mine")
    parts = ["--train", digit_shards / "digits-000000.tar", "--test", digit_shards / "digits-000001.tar"]
    for kind in ("knn", "linear", "finetune", "all"):
        for file, reason in ((tmp_path, "Is a directory"), (tmp_path / "text" / "rows.json", "Not a directory")):
            error = refusal(capsys, "eval", kind, run, *parts, "--json", file)
            assert f"{file} cannot be written: {reason}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_rows_before_a_failure_are_kept(digit_shards, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.linear.linear_probe", lambda *_, **__: 1 / 0)
    parts = ["--train", digit_shards / "digits-000000.tar", "--test", digit_shards / "digits-000001.tar"]
    with pytest.raises(ZeroDivisionError):
        main(
            [str(word) for word in ("eval", "all", run, *parts, "--workers", 0, "--json", tmp_path / "new" / "a.json")]
        )
    rows = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [row["protocol"] for row in rows] == ["k-NN, k = 10", "k-NN, k = 20", "k-NN, k = 100"]
    assert "k-NN, k = 10" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_rows_can_be_written_to_a_device(digit_shards, run):
    """/dev/null is not replaced by a file."""
    parts = ["--train", digit_shards / "digits-000000.tar", "--test", digit_shards / "digits-000001.tar"]
    command("eval", "knn", run, *parts, "--workers", 0, "--json", "/dev/null")
    assert Path("/dev/null").is_char_device()


EVAL = {
    "knn RUN --labels-per-class 5": "--labels-per-class is a setting of few_label and finetune now: write "
    "labels_per_class=VALUE after the source",
    "linear RUN --probe-seeds=3": "--probe-seeds is a setting of linear and mae_probe now: write probe_seeds=3",
    "finetune RUN --img-size 12": "--img-size is a setting of finetune now: write img_size=VALUE",
    "knn RUN --temprature 1": "there is no option --temprature (did you mean the setting temperature=VALUE?)",
    "knnn RUN": "there is no evaluation 'knnn' (did you mean knn? choose one of: knn, linear",
    "knn liner RUN": "after the source 'liner' is not of the form key=value",
    "knn": "SOURCE is missing",
    "knn k=20": "SOURCE is missing",
    "knn RUN kk=20": "unknown key knn.kk = 20 (did you mean knn.k?)",
    "knn RUN k=many": "knn.k = 'many': input should be a valid list",
    "knn RUN linear.probe_seeds=3": "'linear' is not among the evaluations of this command: knn",
    "linear RUN holdout=2": "linear.holdout = 2: input should be less than 1",
    "finetune RUN img_size=x": "finetune.img_size = 'x'",
    "knn RUN": "--train and --test missing",
}


@pytest.mark.parametrize(("words", "expected"), EVAL.items())
def test_wrong_arguments_of_eval_are_refused(capsys, words, expected):
    assert expected in refusal(capsys, "eval", *words.split())


def test_settings_of_several_evaluations():
    chosen, source = arguments.parse(["knn", "linear", "runs/lr=0.1", "readout=mean", "knn.k=[3,5]", "probe_seeds=2"])
    assert source == "runs/lr=0.1"
    assert list(chosen) == ["knn", "linear"]
    assert (chosen["knn"].readout, chosen["linear"].readout) == ("mean", "mean")
    assert (chosen["knn"].k, chosen["linear"].probe_seeds) == ([3, 5], 2)
    assert list(arguments.parse(["all", "knn", "x"])[0]) == ["knn", "linear"]
    assert arguments.parse(["finetune", "x", "out=2026"])[0]["finetune"].out == "2026"


def test_help_lists_settings(capsys):
    command("eval", "knn", "--help")
    text = capsys.readouterr().out
    assert "--baselines" in text
    assert "k=[10, 20, 100, 200]" in text
    assert "epochs=100" not in text
    command("eval", "--help")
    text = capsys.readouterr().out
    assert all(re.search(rf"\n  {name:12} (Accuracy|Mean IoU)", text) for name in EVALUATIONS)
    assert "k=[10, 20, 100, 200]" not in text
    command("eval", "linear", "linear_grid", "--help")
    text = capsys.readouterr().out
    assert "probe_seeds=1" in text
    assert "batch_size=128" in text
