"""A new run that begins with the weights of an old one: all of them, or the backbone alone; never a mixture."""

import shutil

import pytest
import torch

import runs
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.export import export, load_export
from selfvil.pretrain import build_objective, pretrain


@pytest.fixture(scope="module", params=["mae", "dino"])
def old(request, digit_shards, tmp_path_factory):
    """An objective's name, a run of it, an export of it with heads, and one without."""
    folder = tmp_path_factory.mktemp("old")
    pretrain(runs.small(request.param, digit_shards, folder / "run", "budget.steps=3"))
    export(folder / "run", folder / "whole", heads=True)
    export(folder / "run", folder / "bare")
    return request.param, folder


def started(old, digit_shards, tmp_path, source: str, *more: str):
    name, folder = old
    return build_objective(
        runs.small(name, digit_shards, tmp_path / "new", f"model.start_from={folder / source}", "run.seed=7", *more)
    )


@pytest.mark.parametrize("source", ["run", "whole"])
def test_all_weights_are_taken(old, digit_shards, tmp_path, source):
    ours = started(old, digit_shards, tmp_path, source).state_dict()
    theirs = checkpoint.newest(old[1] / "run" / "checkpoints").tensors("objective")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("source", ["run", "whole", "bare"])
def test_new_heads_take_the_exported_backbone_alone(old, digit_shards, tmp_path, source):
    objective = started(old, digit_shards, tmp_path, source, "model.start_heads=new")
    theirs = load_export(old[1] / "bare").backbone.state_dict()
    fresh = build_objective(runs.small(old[0], digit_shards, tmp_path / "new", "run.seed=7")).state_dict()
    backbones = [prefix for prefix in objective.networks.values()]
    for key, value in objective.state_dict().items():
        prefix = next((prefix for prefix in backbones if key.startswith(prefix)), None)
        expected = fresh[key] if prefix is None else theirs[key.removeprefix(prefix)]
        assert torch.equal(value, expected), key


def test_missing_heads_are_told_before_training(old, digit_shards, tmp_path):
    name, folder = old
    with pytest.raises(UserError, match=r"without the heads .* --heads, or set model\.start_heads=new"):
        pretrain(runs.small(name, digit_shards, tmp_path / "new", f"model.start_from={folder / 'bare'}"))
    assert not (tmp_path / "new").exists()


def test_another_architecture_or_objective_is_refused(old, digit_shards, tmp_path):
    with pytest.raises(UserError, match=r"another objective or architecture .* the first is .*start_heads=new"):
        started(old, digit_shards, tmp_path, "run", "model.depth=2")
    with pytest.raises(UserError, match=r"another architecture than the recipe's: .* the first is blocks\.1\."):
        started(old, digit_shards, tmp_path, "bare", "model.depth=2", "model.start_heads=new")
    with pytest.raises(UserError, match=r"nowhere"):
        started(old, digit_shards, tmp_path, "nowhere")
    other = {"mae": "dino", "dino": "mae"}[old[0]]
    with pytest.raises(UserError, match="another objective"):
        build_objective(runs.small(other, digit_shards, tmp_path / "new", f"model.start_from={old[1] / 'whole'}"))


def test_damaged_heads_are_refused(old, digit_shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(old[1] / "whole", copy)
    heads = copy / "heads" / "heads.safetensors"
    data = bytearray(heads.read_bytes())
    data[-3] ^= 1
    heads.write_bytes(data)
    with pytest.raises(UserError, match=r"heads\.safetensors is damaged: its SHA-256"):
        started(old, digit_shards, tmp_path, copy)


def test_a_run_goes_on_though_its_start_is_gone(old, digit_shards, tmp_path):
    """The start is read once; afterwards the run's own checkpoints hold all there is to know."""
    name, folder = old
    shutil.copytree(folder / "whole", tmp_path / "start")
    more = [f"model.start_from={tmp_path / 'start'}", "budget.steps=4"]
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    pretrain(runs.small(name, digit_shards, straight, *more))
    pretrain(runs.small(name, digit_shards, paused, *more, "budget.pause_minutes=1e-6"))
    shutil.rmtree(tmp_path / "start")
    pretrain(runs.small(name, digit_shards, paused, *more))
    runs.assert_same_state(straight, paused)
