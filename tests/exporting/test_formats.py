"""`selfvil export` with every format: files, card, config, and code of the card that runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import selfvil
from selfvil.cli import main
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.exporting import onnx, published, quantise
from selfvil.exporting.formats import FORMATS
from selfvil.verification import verify
from small_exports import make_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory, digit_shards):
    """A run, its export in every format, and its network."""
    pytest.importorskip("onnxscript")
    root = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    train, test = (str(digit_shards / f"digits-00000{number}.tar") for number in range(2))
    backbone = make_run(root / "run", train)
    rows = [
        {"network": "pretrained", "protocol": "k-NN", "measure": "top-1 accuracy", "value": 41.5, "deviation": None,
         "interval": [38.25, 44.0], "readout": "mean", "train_images": 160, "test_images": 40},
        {"network": "untrained", "protocol": "a|b", "value": 7.123456789, "train_images": 160, "test_images": 40},
    ]  # fmt: skip
    (root / "run" / "scores.json").write_text(json.dumps(rows))
    out = export(
        root / "run", root / "out", formats=FORMATS, train=train, test=test, workers=0, licence="cc-by-4.0"
    )  # fmt: skip
    return root / "run", out, backbone


def facts(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["selfvil"]["formats"]


def test_all_files_are_there_listed_and_verified(exported):
    _, out, _ = exported
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "recipe.yaml", "model.onnx",
        "model.int8.onnx", "model.pt2", "published/vision_lstm.safetensors",
    }  # fmt: skip
    assert "model.int8.onnx" in verify(out)[0]
    assert set(facts(out)) == {"model.onnx", "model.int8.onnx", "model.pt2", published.FILE}
    assert all(0 <= facts(out)[name]["largest_difference"] < 1e-4 for name in ("model.onnx", "model.pt2"))


def test_onnx_equals_the_loaded_network_and_describes_itself(exported):
    _, out, backbone = exported
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", ["batch", 1, "height", "width"])]
    assert [x.name for x in session.get_outputs()] == ["pooled", "patches"]
    assert session.get_outputs()[1].shape[1:] == [32, "rows", "columns"]
    described = json.loads(session.get_modelmeta().custom_metadata_map["selfvil"])
    assert described["mean"] == [0.3]
    assert described["img_size"] == [8, 8]
    assert described["img_size_multiple"] == [2, 2]
    images = torch.randn(2, 1, 12, 4)
    pooled, patches = session.run(["pooled", "patches"], {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(pooled, backbone(images), atol=1e-4)
        np.testing.assert_allclose(patches, backbone.forward_features(images).permute(0, 3, 1, 2), atol=1e-4)


def test_int8_holds_integers_and_its_cost_is_that_of_a_slow_loop(exported, digit_shards):
    import onnx as package
    from sklearn.neighbors import KNeighborsClassifier

    from selfvil.data.index import open_shards
    from selfvil.data.views import CenterCrop

    _, out, _ = exported
    found = facts(out)[quantise.FILE]
    weights = package.load(out / quantise.FILE).graph.initializer
    assert sum(weight.data_type == package.TensorProto.INT8 and len(weight.dims) == 2 for weight in weights) >= 4
    assert found["bytes"] == (out / quantise.FILE).stat().st_size
    view, sessions = CenterCrop((8, 8), [0.3], [0.4]), {"float32": onnx.FILE, "int8": quantise.FILE}
    rows, labels = {name: [] for name in sessions}, []
    for part in range(2):
        shards = open_shards(digit_shards / f"digits-00000{part}.tar")
        pictures = [Image.open(__import__("io").BytesIO(shards.read(i))).convert("L") for i in range(len(shards))]
        labels.append(np.asarray(shards.labels))
        for name, file in sessions.items():
            session = onnxruntime.InferenceSession(out / file)
            batches = torch.stack([view(picture) for picture in pictures]).split(quantise.BATCH)
            rows[name].append(np.concatenate([session.run(["pooled"], {"images": b.numpy()})[0] for b in batches]))
    float32, int8 = rows["float32"][1], rows["int8"][1]
    cosines = (float32 * int8).sum(1) / np.linalg.norm(float32, axis=1) / np.linalg.norm(int8, axis=1)
    assert found["images"] == len(cosines)
    assert found["cosine_mean"] == pytest.approx(cosines.mean(), abs=2e-5)
    assert found["cosine_lowest"] == pytest.approx(cosines.min(), abs=2e-5)
    assert 0.9 < found["cosine_mean"] < 1
    for name in sessions:
        classifier = KNeighborsClassifier(
            quantise.K, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        accuracy = 100 * classifier.fit(rows[name][0], labels[0]).score(rows[name][1], labels[1])
        assert found["knn"][name] == pytest.approx(accuracy, abs=0.01)


def test_every_code_block_of_the_card_runs_in_a_fresh_process(exported, tmp_path):
    _, out, _ = exported
    card = (out / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 5
    Image.new("L", (40, 50)).save(tmp_path / "photo.jpg")
    results = {"features": "(1, 4, 4, 32)", "network(images)": "(1, 64)", "session.run": "(1, 64)"}
    checked = []
    for block in blocks:
        if "vision_lstm import" in block:  # tests/exporting/test_published_names.py runs it with the published code
            continue
        for part, shape in results.items():
            if part in block:
                block += f"assert {'features' if part == 'features' else 'pooled'}.shape == {shape}\n"
        checked.append(block.replace("PATH_OF_THIS_FOLDER", str(out)))
    code = f"for block in {checked!r}:\n    exec(block, {{}})\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_card_has_the_facts(exported):
    _, out, _ = exported
    card = (out / "README.md").read_text()
    neighbours = f"k-NN accuracy (k = 20, {facts(out)[quantise.FILE]['knn']['train_images']} train"
    for fact in (
        "license: cc-by-4.0", "vil_nano_patch4_32", "640 images seen (4 epochs)", "0.03 hours", "2 x a CPU",
        "160 without labels", "mean [0.3]", "mae, mask_ratio 0.75", "loss: 0.123",
        "| pretrained | k-NN | top-1 accuracy | 41.5 |  | 38.25 to 44 | mean | 160 | 40 |", r"a\|b", "7.12346",
        "Evaluated by a|b, k-NN only.", "Pretrained at 8 x 8 pixels", "`model.pt2`: torch.export", "recipe.yaml",
        "any height that is a multiple of 2", "can run code", "Cosine similarity", neighbours,
        "domain this card does not know",
    ):  # fmt: skip
        assert fact in card, fact
    assert card.startswith("---\nlibrary_name: timm\nlicense: cc-by-4.0\n")
    assert "Left to whoever" not in card


def test_an_export_gets_further_formats_in_a_new_folder(exported, tmp_path):
    _, out, _ = exported
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    more = export(out, tmp_path / "more", formats=["published"])
    assert {path.name for path in more.iterdir()} == {"README.md", "config.json", "manifest.json", "published"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "published/vision_lstm.safetensors are undamaged" in verify(more)[0]
    card = (more / "README.md").read_text()
    assert "further formats" in card
    assert json.loads((out / "config.json").read_text())["selfvil"]["sha256"] in card
    with pytest.raises(UserError, match="holds further formats of an export, without"):
        selfvil.load_backbone(more)
    for arguments, message in (
        ({}, "is an export already: choose formats, such as --onnx"),
        ({"formats": ["onnx"], "heads": True}, "--network and --heads need the folder of its run"),
        ({"formats": ["onnx"], "network": "teacher"}, "--network and --heads need"),
        ({"formats": ["int8"]}, "--int8 measures its cost in accuracy on real images: give --images SHARDS"),
    ):
        with pytest.raises(UserError, match=message):
            export(out, tmp_path / "no", **arguments)
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(out), str(damaged)], check=True)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        export(damaged, tmp_path / "no", formats=["onnx"])
    assert not (tmp_path / "no").exists()


def test_a_failed_comparison_leaves_nothing(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    real = published.published_weights
    monkeypatch.setattr(published, "published_weights", lambda b: {n: t + 1 for n, t in real(b).items()})
    with pytest.raises(UserError, match="would load other weights than were written"):
        export(tmp_path / "run", tmp_path / "out", formats=["published"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8"], "those of pretraining cannot be opened: give --images SHARDS"),
        (["--int8", "--train", "x.tar"], "needs both --train and --test"),
        (["--int8", "--images", "nowhere.tar"], "nowhere.tar"),
        (["--images", "x.tar"], "measure the cost of --int8: add --int8"),
        (["--licence", "My Licence!"], "is no identifier of the Hugging Face hub"),
        (["--onnx", "--network", "ema"], "no network 'ema'"),
    ],
)
def test_wrong_options_are_answered_before_anything_is_written(tmp_path, capsys, monkeypatch, words, message):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["export", "run", "out", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, package):
    make_run(tmp_path / "run")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == package else object())
    for format in ("onnx", "int8"):
        with pytest.raises(UserError, match=rf"ONNX files need {package}, .*pip install 'selfvil\[onnx\]'"):
            export(tmp_path / "run", tmp_path / "out", formats=[format])
    with pytest.raises(UserError, match="There is no format 'tflite'; choose one of: onnx, torch-export"):
        export(tmp_path / "run", tmp_path / "out", formats=["tflite"])


def test_the_command_writes_formats_and_names_the_files(tmp_path, capsys):
    make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--published"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "selfvil.load_backbone" in printed
    assert "files: README.md, config.json, manifest.json, model.safetensors, published, recipe.yaml" in printed
