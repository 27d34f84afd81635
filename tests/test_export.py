"""An export equals the network, is loaded by timm without selfvil's reader, and overwrites nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.recipe import load
from selfvil.weights import Normalisation, create_backbone, load_export, load_network, open_checkpoint

MODELS = {
    "vil": ("vil_nano_patch4_32", {"img_size": [32, 32], "patch_size": 4, "in_chans": 3, "num_classes": 0, "depth": 2}),
    "vil-published": (
        "vil_tiny_patch16_224",
        {"img_size": [32, 48], "patch_size": 16, "in_chans": 1, "num_classes": 0, "depth": 1, "init_values": 0.1},
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": [32, 32], "patch_size": 8, "in_chans": 3, "num_classes": 0, "depth": 2, "drop_path_rate": 0.1},
    ),
}


def meta_of(name: str, kwargs: dict, step: int = 20) -> dict:
    channels = kwargs["in_chans"]
    return {
        "format": 1,
        "step": step,
        "samples": 64 * step,
        "seconds": 90.0,
        "seed": 3,
        "model": {"name": name, "kwargs": kwargs},
        "networks": {"student": "backbone.", "teacher": "teacher.backbone."},
        "export": "teacher",
        "objective": {"name": "mae", "mask_ratio": 0.75},
        "data": {"pattern": "images-{000..003}.tar", "mean": [0.5] * channels, "std": [0.2] * channels,
                 "fingerprint": "abc", "num_samples": 4000},
    }  # fmt: skip


def make_run(root: Path, kind: str = "vil", step: int = 20) -> tuple[Path, nn.Module, nn.Module]:
    """The folder of a run as the loop writes it, and its student and teacher, with random parameters."""
    name, kwargs = MODELS[kind]
    student, teacher = timm.create_model(name, **kwargs), timm.create_model(name, **kwargs)
    for parameter in [*student.parameters(), *teacher.parameters()]:
        nn.init.normal_(parameter)
    objective = {"decoder.weight": torch.randn(3, 4), "mask_token": torch.randn(5)}
    objective |= {f"backbone.{key}": value for key, value in student.state_dict().items()}
    objective |= {f"teacher.backbone.{key}": value for key, value in teacher.state_dict().items()}
    tensors = {"objective": objective, "optimizer": {"exp_avg": torch.zeros(2)}}
    checkpoint.save(root / "checkpoints", step, tensors, meta_of(name, kwargs, step))
    (root / "recipe.yaml").write_text(load("cifar10_mae").to_yaml())
    launch = {"device": "a CPU", "processes": 2, "commit": "0123abc", "versions": {"selfvil": "0.1", "torch": "2.x"}}
    (root / "run.json").write_text(json.dumps({"launches": [launch]}))
    return root, student, teacher


@pytest.mark.parametrize("kind", MODELS)
def test_timm_loads_the_same_network(tmp_path, kind):
    run, student, teacher = make_run(tmp_path / "run", kind)
    kwargs = MODELS[kind][1]
    for network, original in ((None, teacher), ("teacher", teacher), ("student", student)):
        out = export(run, tmp_path / "deep" / f"out-{network}", network=network)
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
        expected = original.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
        images = torch.randn(2, kwargs["in_chans"], *kwargs["img_size"])
        assert torch.equal(loaded.eval().forward_features(images), original.eval().forward_features(images))
        untrained = timm.create_model(f"local-dir:{out}")
        assert untrained.state_dict().keys() == expected.keys()
        config = timm.data.resolve_model_data_config(loaded)
        assert list(config["mean"]) == [0.5] * kwargs["in_chans"]
        assert tuple(config["input_size"]) == (kwargs["in_chans"], *kwargs["img_size"])
        again, normalisation, samples_seen = load_export(out)
        assert samples_seen == 1280
        assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
        channels = kwargs["in_chans"]
        assert normalisation == Normalisation((0.5,) * channels, (0.2,) * channels, tuple(kwargs["img_size"]))
        assert normalisation.channels == channels


def test_a_new_classifier_a_new_size_and_no_weights(tmp_path):
    run, _, teacher = make_run(tmp_path / "run")
    out = export(run, tmp_path / "out")
    model = load_export(out, num_classes=7, drop_path_rate=0.2).backbone
    assert model.num_classes == 7
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert torch.equal(model.blocks[0].first.state_dict()["norm.weight"], teacher.blocks[0].first.norm.weight)
    larger = load_export(out, img_size=48).backbone
    assert larger.forward_features(torch.randn(1, 3, 48, 48)).shape == (1, 12, 12, 96)
    untrained, _, samples_seen = load_export(out, pretrained=False)
    assert samples_seen == 0
    assert not torch.equal(untrained.pos_embed, teacher.pos_embed)
    with pytest.raises(UserError, match=r'embed_dim=96, depth=2, block="gated", conv="2d": build the network'):
        load_export(out, depth=5)


def test_a_damaged_recipe_is_left_out_with_a_warning(tmp_path, caplog):
    run, *_ = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("objective: [")
    out = export(run, tmp_path / "out")
    assert "the export has no recipe.yaml" in caplog.text
    assert not (out / "recipe.yaml").exists()
    assert "holds the whole recipe" not in (out / "README.md").read_text()


def test_loads_in_a_fresh_process_with_the_lines_of_the_model_card(tmp_path):
    out = export(make_run(tmp_path / "run")[0], tmp_path / "out")
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(out))
    code += "assert features.shape == (1, 8, 8, 96)"
    Image.new("RGB", (40, 50)).save(tmp_path / "photo.jpg")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)


def test_the_model_card_describes_the_training(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    (run / "scores.json").write_text(json.dumps([{"protocol": "k-NN", "value": 41.5, "commit": "x"}, {}]))
    out = export(run, tmp_path / "out")
    card = (out / "README.md").read_text()
    for fact in ("vil_nano_patch4_32", "teacher, one of student, teacher", "mae, mask_ratio 0.75", "20 steps",
                 "1,280 images seen", "0.03 hours", "2 x a CPU", "Seed: 3", "0123abc", "torch 2.x",
                 "4,000 without labels", "images-{000..003}.tar",
                 "mean [0.5, 0.5, 0.5]", "|  | k-NN | 41.5 |"):  # fmt: skip
        assert fact in card
    assert (out / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "manifest.json", "README.md", "recipe.yaml",
    }  # fmt: skip
    (run / "run.json").write_text("not json")
    (run / "scores.json").write_text("{}")
    assert "## Scores" not in (export(run, tmp_path / "again") / "README.md").read_text()


def test_a_single_checkpoint_and_the_heads(tmp_path):
    run, student, _ = make_run(tmp_path / "run", step=20)
    make_run(tmp_path / "run", step=30)
    assert open_checkpoint(run).step == 30
    moved = (run / "checkpoints" / "step-00000020").rename(tmp_path / "best")
    out = export(moved, tmp_path / "out", network="student", heads=True)
    assert not (out / "recipe.yaml").exists()
    assert torch.equal(timm.create_model(f"local-dir:{out}", pretrained=True).pos_embed, student.pos_embed)
    heads = load_file(out / "heads" / "heads.safetensors")
    assert {"decoder.weight", "mask_token", "teacher.backbone.pos_embed"} <= heads.keys()
    assert not any(key.startswith("backbone.") for key in heads)
    assert torch.equal(load_file(out / "model.safetensors")["pos_embed"], student.pos_embed)
    joined = heads | {f"backbone.{key}": value for key, value in load_file(out / "model.safetensors").items()}
    original = open_checkpoint(moved).tensors("objective")
    assert joined.keys() == original.keys()
    assert all(torch.equal(joined[key], original[key]) for key in original)


def test_nothing_is_overwritten(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    out = export(run, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "file").write_text("mine")
    for taken in (out, tmp_path / "file", run):
        with pytest.raises(UserError, match="nothing was overwritten"):
            export(run, taken)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["empty", "file", "out", "run"]  # and no temporary folder is left


def test_folders_without_a_run_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    for folder, message in (("nowhere", "no folder"), ("empty", "neither the folder of a run"), ("bare", "no usable")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / folder, tmp_path / "out")
    checkpoint.save(tmp_path / "other" / "checkpoints", 1, {}, {"format": 1})
    with pytest.raises(UserError, match="does not describe a run"):
        export(tmp_path / "other", tmp_path / "out")
    with pytest.raises(UserError, match="no network 'ema'; choose one of: student, teacher"):
        export(make_run(tmp_path / "run")[0], tmp_path / "out", network="ema")
    assert not (tmp_path / "out").exists()


def resave(run: Path, change) -> None:
    """Save the run's checkpoint again as the next step, with `change(objective tensors, meta)` applied."""
    saved = open_checkpoint(run)
    objective, meta = dict(saved.tensors("objective")), json.loads(json.dumps(saved.meta))
    change(objective, meta)
    checkpoint.save(run / "checkpoints", saved.step + 1, {"objective": objective}, meta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m["model"]["kwargs"].update(depth=3), r"missing, the first is blocks\.2"),
        (lambda t, m: m["model"]["kwargs"].update(depth=1), r"unknown to it, the first is blocks\.1"),
        (lambda t, m: m["model"]["kwargs"].update(embed_dim=48), r"has shape \[.*\], expected"),
        (lambda t, m: m["model"].update(name="vit_tiny_patch16_224"), "do not fit vit_tiny_patch16_224"),
        (lambda t, m: m["model"].update(name="hf-hub:someone/model"), "does not know"),
        (lambda t, m: m["model"]["kwargs"].update(checkpoint_path="evil.pth"), "checkpoint_path.*not trusted"),
        (lambda t, m: m["model"]["kwargs"].update(depht=3), "cannot build vil_nano_patch4_32"),
        (lambda t, m: t["teacher.backbone.pos_embed"].view(-1)[3:4].fill_(float("nan")), "pos_embed.* NaN or infinity"),
        (lambda t, m: t["teacher.backbone.norm.weight"].fill_(float("inf")), r"norm\.weight.* NaN or infinity"),
        (lambda t, m: t.clear(), "are missing"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path, change, message):
    run, *_ = make_run(tmp_path / "run")
    resave(run, change)
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damaged_exports_are_refused(tmp_path):
    out = export(make_run(tmp_path / "run")[0], tmp_path / "out")
    weights, config = out / "model.safetensors", out / "config.json"
    (out / "pytorch_model.bin").write_bytes(b"a pickle")
    load_export(out)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its SHA-256 is .*, expected"):
        load_export(out)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_export(out)
    for text in ("{", "[]", "{}", '{"pretrained_cfg": 3}'):
        config.write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            load_export(out)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_export(out)


def test_untrained_weights_depend_on_the_seed_and_trained_ones_do_not(tmp_path):
    run, student, _ = make_run(tmp_path / "run")
    saved = open_checkpoint(run)
    torch.manual_seed(5)
    first = create_backbone(saved.meta).backbone
    torch.manual_seed(5)
    second = create_backbone(saved.meta).backbone
    assert torch.equal(first.pos_embed, second.pos_embed)
    assert torch.equal(load_network(saved, "student").backbone.pos_embed, student.pos_embed)
