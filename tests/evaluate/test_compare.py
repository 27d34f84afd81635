"""Several networks in one table: the same scores as alone, beside what each costs."""

import json

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from selfvil import checkpoint, cli
from selfvil.errors import UserError
from selfvil.evaluate import settings
from selfvil.evaluate.compare import as_table, compare, distinct_names, draw
from selfvil.evaluate.score import score

KWARGS = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 1}
FAST = {"workers": 0, "device": "cpu"}
KNN = {"knn": settings("knn", {"k": [5, 20]})}


@pytest.fixture
def runs(tmp_path):
    """Two run folders of the same name, with different random networks."""
    found = []
    for seed, depth in ((1, 1), (2, 2)):
        torch.manual_seed(seed)
        arguments = KWARGS | {"depth": depth}
        backbone = timm.create_model("vil_nano_patch4_32", **arguments)
        meta = {
            "format": 1, "step": 5, "samples": 640, "seconds": 1.0, "seed": 0, "export": "student",
            "networks": {"student": "backbone."}, "objective": {"name": "mae"},
            "model": {"name": "vil_nano_patch4_32", "kwargs": arguments},
            "data": {"pattern": "x.tar", "mean": [0.3], "std": [0.4], "fingerprint": "f", "num_samples": 9},
        }  # fmt: skip
        tensors = {"objective": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}
        checkpoint.save(tmp_path / str(seed) / "run" / "checkpoints", 5, tensors, meta)
        found.append(str(tmp_path / str(seed) / "run"))
    return found


@pytest.fixture
def parts(digit_shards):
    return str(digit_shards / "digits-000000.tar"), str(digit_shards / "digits-000001.tar")


def command(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code


def test_a_comparison_has_the_scores_of_each_alone_and_the_costs(runs, parts, tmp_path):
    kept = []
    found = compare(runs, *parts, KNN, keep=lambda rows: kept.append(len(rows)), **FAST)
    assert kept == [1, 2, 3, 4]
    for source in runs:
        alone = {row.protocol: row.value for row in score(source, *parts, KNN, **FAST)}
        assert {row.protocol: row.value for row in found.rows if row.source == source} == alone
    assert list(found.costs) == ["1/run", "2/run"]
    assert found.costs["2/run"].parameters > found.costs["1/run"].parameters
    plain = json.loads(json.dumps(found.as_json()))
    assert plain["networks"]["1/run"]["speed_over_first"] == 1
    assert plain["networks"]["2/run"]["source"] == runs[1]
    assert len(plain["scores"]) == 4

    console = Console(width=200, record=True)
    console.print(as_table(found))
    text = console.export_text()
    assert all(word in text for word in ("1/run", "2/run", "k-NN, k = 5", "k-NN, k = 20", "images/s", "8 x 8"))
    with Image.open(draw(found, tmp_path / "chart.png")) as chart:
        assert len(chart.convert("RGB").resize((300, 200)).getcolors(60_000)) > 20  # something is drawn


def test_names_are_as_short_as_they_can_be():
    assert distinct_names(["a/mae", "b/dino"]) == {"a/mae": "mae", "b/dino": "dino"}
    assert distinct_names(["x/a/mae", "x/b/mae", "resnet18"]) == {
        "x/a/mae": "a/mae", "x/b/mae": "b/mae", "resnet18": "resnet18",
    }  # fmt: skip
    with pytest.raises(UserError, match="mae is given twice"):
        distinct_names(["mae", "mae"])


def test_the_command_writes_table_chart_and_json(runs, parts, tmp_path, capsys):
    train, test = parts
    words = ["--train", train, "--test", test, "--workers", "0"]
    code = command(
        "eval", "compare", "knn", *runs, "k=5", *words, "--json", tmp_path / "c.json", "--chart", tmp_path / "c.svg"
    )
    assert code == 0
    assert "k-NN, k = 5" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "c.json").read_text())["networks"]) == ["1/run", "2/run"]
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_mistakes_are_one_sentence(runs, parts, tmp_path, capsys):
    train, test = parts
    both = ["--train", train, "--test", test]
    for words, message in [
        (["compare", "knn", runs[0], *both], "at least two networks, got 1"),
        (["compare", *runs], "--train and --test missing"),
        (["compare", "knn", *runs, "kk=3", *both], "kk"),
        (["compare", "knn", runs[0], str(tmp_path / "none"), *both], "There is no folder"),
        (["compare", "knn", *runs, runs[0], *both], "given twice"),
        (["compare", "knn", *runs, *both, *both], "one pair of --train and --test"),
        (["compare", "knn", *runs, *both, "--baselines"], "no --baselines"),
        (["compare", "knn", *runs, *both, "--chart", str(tmp_path / "c.txt")], "ends in .png, .svg or .pdf"),
        (["knn", runs[0], *both, "--chart", "c.png"], "--chart belongs to a comparison"),
    ]:
        assert command("eval", *words) == 2, words
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
