"""Damaged files are not loaded: every file of an export is compared with its digest first."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import timm
import torch

import selfvil
from selfvil import checkpoint, cli
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.recipe import load
from selfvil.start_from import start_backbone, start_objective
from selfvil.weights import load_export, load_pretrained
from test_export import make_run

FLIPS = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run and an export of it with heads."""
    folder = tmp_path_factory.mktemp("source")
    run, *_ = make_run(folder / "run")
    (run / "recipe.yaml").write_text(load("cifar10_mae").to_yaml())
    export(run, folder / "export", heads=True)
    return folder


@pytest.fixture
def exported(source, tmp_path) -> Path:
    return Path(shutil.copytree(source / "export", tmp_path / "export"))


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def run_command(*arguments) -> int | None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def verified(folder: Path) -> str:
    try:
        return " ".join(selfvil.verify(folder))
    except UserError as error:
        return str(error)


def make_older(folder: Path) -> None:
    """Change an export into one of the older format, without a manifest."""
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["selfvil"]["format"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def test_the_backbone_equals_the_one_that_timm_loads(source, exported):
    backbone = selfvil.load_backbone(exported)
    expected = timm.create_model(f"local-dir:{exported}", pretrained=True).state_dict()
    assert not backbone.training
    assert backbone.state_dict().keys() == expected.keys()
    for other in (backbone, selfvil.load_backbone(source / "run"), load_pretrained(exported).backbone):
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert selfvil.load_backbone(exported, num_classes=7)(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    student = selfvil.load_backbone(source / "run", network="student")
    assert not torch.equal(student.pos_embed, backbone.pos_embed)
    with pytest.raises(UserError, match="holds one network"):
        selfvil.load_backbone(exported, network="student")
    with pytest.raises(UserError, match="only an export can be loaded with num_classes"):
        selfvil.load_backbone(source / "run", num_classes=7)


FILES = ["config.json", "manifest.json", "model.safetensors", "heads/heads.safetensors", "recipe.yaml", "README.md"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected_or_harmless(exported, name):
    """Loading gives the written weights or an error; verification names the file."""
    assert {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()} == set(FILES)
    file, draw = exported / name, random.Random(name)
    expected = load_export(exported).backbone.state_dict()
    undamaged = verified(exported)
    loaded = name not in ("config.json", "model.safetensors")
    for _ in range(FLIPS):
        bit = draw.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        if not loaded:
            with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256 is .*, expected"):
                selfvil.load_backbone(exported)
        told = verified(exported)
        if name == "README.md":  # it may be edited: no error
            assert "README.md was edited, damaged or removed" in told
        elif name == "manifest.json":  # any file may be blamed
            assert told != undamaged
        else:
            assert f"{name} is damaged: its SHA-256" in told
        flip_bit(file, bit)
    if loaded:
        flip_bit(file, 8 * (file.stat().st_size // 2))  # of what is not loaded
        try:
            backbone = selfvil.load_backbone(exported)
        except UserError:
            assert name == "manifest.json"
        else:
            assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())
        flip_bit(file, 8 * (file.stat().st_size // 2))
    assert "README.md was edited" not in " ".join(selfvil.verify(exported))


def test_every_loading_function_refuses_damaged_files(exported):
    from selfvil.objectives.distill import DistillSettings, load_teacher

    backbone = load_export(exported).backbone
    objective = torch.nn.Module()
    config = (exported / "config.json").read_bytes()
    (exported / "config.json").write_bytes(config.replace(b'"mean": [\n      0.5', b'"mean": [\n      0.7'))
    assert (exported / "config.json").read_bytes() != config
    ways = [
        lambda: load_export(exported),
        lambda: load_pretrained(exported),
        lambda: load_pretrained(exported, untrained=True),
        lambda: start_backbone(backbone, exported),
        lambda: start_objective(objective, exported),
        lambda: load_teacher(DistillSettings(name="distill", teacher=str(exported))),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"config\.json is damaged: its SHA-256"):
            way()
    (exported / "config.json").write_bytes(config)
    flip_bit(exported / "model.safetensors", 100_003)
    file = str(exported / "model.safetensors")
    ways += [
        lambda: start_backbone(backbone, file),
        lambda: load_teacher(DistillSettings(name="distill", teacher="vil_nano_patch4_32", teacher_weights=file)),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"model\.safetensors is damaged: its SHA-256"):
            way()


def test_an_export_without_a_file_is_not_taken_for_an_older_one(exported):
    for name in ("manifest.json", "config.json", "model.safetensors"):
        content = (exported / name).read_bytes()
        (exported / name).unlink()
        for way in (selfvil.load_backbone, selfvil.verify):
            with pytest.raises(UserError, match=f"{name} is missing"):
                way(exported)
        (exported / name).write_bytes(content)


def test_an_older_export_loads_with_a_warning(exported, caplog):
    make_older(exported)
    with caplog.at_level(logging.WARNING):
        load_export(exported)
    assert [record.message for record in caplog.records if "could not be verified" in record.message]
    assert "No other file of it has a digest" in selfvil.verify(exported)[0]
    flip_bit(exported / "heads" / "heads.safetensors", 10_000)
    with pytest.raises(UserError, match=r"heads\.safetensors is damaged"):
        selfvil.verify(exported)
    flip_bit(exported / "model.safetensors", 10_000)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_export(exported)


def test_the_command_verifies_exports_runs_and_checkpoints(source, exported, tmp_path, capsys):
    run = Path(shutil.copytree(source / "run", tmp_path / "run"))
    saved = run / "checkpoints" / "step-00000020"
    (exported / "added.bin").write_bytes(b"x")
    for folder, *told in (
        (exported, "an export", "heads/heads.safetensors", "not verified: added.bin"),
        (run, "a checkpoint of step 20", "No digest protects the other files of the run: recipe.yaml, run.json"),
        (saved, "a checkpoint of step 20", "objective.safetensors"),
    ):
        assert run_command("verify", folder) in (0, None)
        out = capsys.readouterr().out
        assert all(part in out for part in told), out
    make_run(run, step=30)
    flip_bit(saved / "objective.safetensors", 80_000)
    for folder in (run, saved):
        assert run_command("verify", folder) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "objective.safetensors is damaged" in error
        if folder == run:
            assert "Undamaged checkpoints" in error
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        assert run_command("verify", folder) == 2
    assert "nothing was verified" in capsys.readouterr().err
    assert checkpoint.newest(run / "checkpoints").step == 30


def test_a_timm_model_is_a_source(monkeypatch):
    """By its name; its weights come from timm, and its normalisation from timm's table."""
    asked = []
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        asked.append(pretrained)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    network = load_pretrained("vit_tiny_patch16_224", img_size=64)
    assert asked == [True]
    assert network.backbone.num_classes == 0
    assert network.samples_seen == 0
    assert network.normalisation.mean == (0.5, 0.5, 0.5)
    assert network.normalisation.img_size == (64, 64)
    assert load_pretrained("resnet18", untrained=True).normalisation.img_size == (224, 224)
    assert asked == [True, False]
    with pytest.raises(UserError, match=r"vil_mlp_tiny_patch16_224 has no published weights"):
        load_pretrained("vil_mlp_tiny_patch16_224")
    with pytest.raises(UserError, match=r"holds one network"):
        load_pretrained("resnet18", network="teacher")
    with pytest.raises(UserError, match=r"no folder resnet81 \(did you mean the timm model resnet"):
        load_pretrained("resnet81")


def test_weights_that_cannot_be_downloaded_are_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"could not load resnet18 with its published weights: no route to host"):
        load_pretrained("resnet18")
