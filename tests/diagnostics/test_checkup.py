"""Examining a run from its folder: the table, the report, and folders of killed runs or of no run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import runs
from selfvil.cli import main
from selfvil.diagnostics.checkup import examine, measure, open_run, rows
from selfvil.monitor.saliency import pca_colours, readout_saliency
from selfvil.pretrain import pretrain


@pytest.fixture(scope="module")
def run(digit_shards, tmp_path_factory) -> Path:
    """A finished DINO run without an EMA, scored once."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = ["objective.teacher_momentum=0", "monitor.doctor_every=2"]
    settings += [
        f"eval.{name}.{part}={digit_shards}/digits-00000{number}.tar"
        for name in ("knn", "linear")
        for number, part in enumerate(("train", "test"))
    ]
    pretrain(runs.small("dino", digit_shards, out, *settings))
    return out


@pytest.fixture
def copied(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copied")
    return tmp_path / "copied"


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def test_the_doctor_finds_the_alarm_again_from_the_folder(run, capsys):
    assert command("doctor", run) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no ema: the teacher is only" in said
    assert "ALARM" in said
    table = {symptom: (value, verdict, advice) for symptom, value, _, verdict, advice in rows(examine(open_run(run)))}
    _, verdict, advice = table["steps by which the teacher lags"]
    assert verdict == "ALARM at step 2"
    assert advice.startswith("raise objective.teacher_momentum")
    assert table["learning rate over typical weight"][1:] == ("healthy", "")


def test_the_newest_checkpoint_can_be_measured(run, capsys):
    signs = measure(open_run(run), num_images=150)
    assert {"feature_std", "rankme", "lidar", "saturated", "horizon/00_forward", "horizon/01_backward"} <= signs.keys()
    assert 1 < signs["rankme"] <= 96
    assert 1 < signs["lidar"] <= 96
    assert command("doctor", run, "--measure") == 0
    assert "newest checkpoint" in capsys.readouterr().out


def test_a_run_scores_k_nn_and_a_linear_probe(run):
    (scores,) = (record for record in open_run(run).metrics if record["kind"] == "eval")
    assert {"knn_10", "knn_20", "linear"} <= scores.keys()
    assert 10 < scores["linear"] <= 100


def test_the_report_is_one_self_contained_page(run, tmp_path):
    assert command("report", run, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    pictures = re.findall(r'src="([^"]{20})', page)
    assert len(pictures) == 4  # crops, and rows of images, features and saliency
    assert all(source.startswith("data:image/png") for source in pictures)
    assert "Not shown" not in page
    assert "no ema: the teacher is only" in page
    for fact in ("teacher_momentum: 0.0", torch.__version__, "12 of 12", "linear"):
        assert fact in page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "<td></td>" not in page
    assert "None" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert "<dt>RankMe</dt>" in page


def test_a_report_without_images_or_checkpoint_names_what_is_absent(copied, tmp_path):
    recipe = copied / "recipe.yaml"
    recipe.write_text(re.sub(r"train: .*digits-\*\.tar", "train: gone/digits-*.tar", recipe.read_text()))
    assert command("report", copied) == 0
    page = (copied / "report.html").read_text()
    assert page.count("Not shown: ") == 3
    assert "gone/digits-*.tar" in page
    shutil.rmtree(copied / "checkpoints")
    (copied / "run.json").unlink()
    assert command("report", copied) == 0
    assert "no checkpoint" in (copied / "report.html").read_text()


def test_folders_without_a_run_or_metrics_are_refused(copied, tmp_path, capsys):
    """A report has what there is; the doctor needs metrics."""
    (copied / "metrics.jsonl").unlink()
    missing = "holds no training metrics: a run writes the first ones after monitor.log_every steps"
    for name, folder, expected in (
        ("doctor", tmp_path, "is not the folder of a run: it holds no recipe.yaml"),
        ("report", tmp_path, "is not the folder of a run: it holds no recipe.yaml"),
        ("doctor", copied, missing),
    ):
        assert command(name, folder) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error
    assert command("report", copied) == 0
    assert "There is no metrics.jsonl" in (copied / "report.html").read_text()
    (copied / "recipe.yaml").write_text("model: [")
    shutil.rmtree(copied / "checkpoints")  # which hold the recipe too
    assert command("doctor", copied) == 2
    assert "recipe.yaml is damaged" in capsys.readouterr().err


def test_a_truncated_line_of_metrics_loses_only_itself(copied, capsys):
    """After a kill, which may truncate run.json too."""
    path = copied / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines()
    path.write_text(whole[: -len(lines[-1]) // 2])
    (copied / "run.json").write_text('{"launches": [')
    before = path.read_bytes()
    record = open_run(copied)
    assert record.cut
    assert record.metrics == [json.loads(line) for line in lines[:-1]]
    assert record.total_steps == 12
    assert command("doctor", copied) == 0
    assert "ends with an incomplete line" in capsys.readouterr().out
    assert command("report", copied) == 0
    assert "The last line of metrics.jsonl is incomplete" in (copied / "report.html").read_text()
    assert path.read_bytes() == before


def test_metrics_of_a_run_without_vital_signs_are_examined_too(copied):
    path = copied / "metrics.jsonl"
    kept = [record | {"teacher_spread": 0.0} for record in open_run(copied).metrics if record["kind"] == "train"]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert "constant_teacher" in examine(open_run(copied)).alarms


def test_a_run_with_nothing_to_judge_is_reported(digit_shards, tmp_path, capsys):
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=2", "monitor.log_every=1"))
    assert command("doctor", tmp_path / "run") == 0
    assert "nothing to judge: the run took no vital signs" in capsys.readouterr().out
    assert command("report", tmp_path / "run") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Not shown: nothing to judge" in page
    assert "No alarm" not in page


@pytest.mark.parametrize("model", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
def test_features_become_colours_and_the_readout_has_a_map(model):
    import timm

    size = {"img_size": 32, "patch_size": 4, "num_classes": 0, "embed_dim": 48}
    backbone = timm.create_model(model, **size, **({"num_heads": 3, "depth": 2} if "vit" in model else {"depth": 1}))
    images = torch.rand(3, 3, 32, 32)
    colours, saliency = pca_colours(backbone.eval(), images), readout_saliency(backbone, images)
    assert colours.shape == (3, 3, 8, 8)
    assert saliency.shape == (3, 8, 8)
    for maps in (colours, saliency):
        assert float(maps.min()) >= 0
        assert float(maps.max()) == 1
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_saliency_is_the_size_of_the_derivative():
    """It is known for a readout that is linear in two patches and independent of the others."""
    import timm

    backbone = timm.create_model("vil_nano_patch4_32", embed_dim=32, depth=1, num_classes=0).eval()
    backbone.blocks = torch.nn.ModuleList()
    backbone.norm = torch.nn.Identity()
    saliency = readout_saliency(backbone, torch.rand(2, 3, 32, 32)).flatten(1)
    expected = torch.zeros(64)
    expected[[0, -1]] = 1  # Bilateral Concat of the embeddings themselves: the first and the last patch
    torch.testing.assert_close(saliency, expected.expand(2, -1), atol=0.2, rtol=0)
    assert int((saliency > 0).sum()) == 4
