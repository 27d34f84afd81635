"""A new run that starts from the weights of an old one: all of them, or only the backbone."""

import os
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import runs
from published_files import as_in_published_file
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.models.positions import resample_positions
from selfvil.pretrain import pretrain
from selfvil.recipe import load
from selfvil.records import read_metrics
from selfvil.weights import load_export


@pytest.fixture(scope="module", params=["mae", "dino", "ibot"])
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
def test_new_heads_take_only_the_exported_backbone(old, digit_shards, tmp_path, source):
    objective = started(old, digit_shards, tmp_path, source, "model.start_heads=new")
    theirs = load_export(old[1] / "bare").backbone.state_dict()
    fresh = build_objective(runs.small(old[0], digit_shards, tmp_path / "new", "run.seed=7")).state_dict()
    backbones = [prefix for prefix in objective.networks.values()]
    for key, value in objective.state_dict().items():
        prefix = next((prefix for prefix in backbones if key.startswith(prefix)), None)
        expected = fresh[key] if prefix is None else theirs[key.removeprefix(prefix)]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("heads", ["load", "new"])
def test_a_later_phase_may_have_larger_images(old, digit_shards, tmp_path, heads):
    name, folder = old
    before = load_export(folder / "bare").backbone.state_dict()
    more = ["model.img_size=24", f"model.start_heads={heads}", f"model.start_from={folder / 'run'}", "budget.steps=2"]
    recipe = runs.small(name, digit_shards, tmp_path / "larger", *more)
    objective = build_objective(recipe)
    expected = resample_positions(before["pos_embed"], (6, 6))
    assert torch.equal(objective.exported().pos_embed, expected)
    assert torch.equal(objective.exported().norm.weight, before["norm.weight"])
    assert pretrain(recipe).finished


def test_a_later_phase_of_a_vit_may_have_larger_images(digit_shards, tmp_path):
    more = ["model.name=vit_tiny_patch16_224", "model.num_heads=2"]
    pretrain(runs.small("dino", digit_shards, tmp_path / "old", "budget.steps=1", *more))
    recipe = runs.small("dino", digit_shards, tmp_path / "new", *more, "model.img_size=24",
                        f"model.start_from={tmp_path / 'old'}", "budget.steps=2")  # fmt: skip
    before = checkpoint.newest(tmp_path / "old" / "checkpoints").tensors("objective")["backbone.pos_embed"]
    assert torch.equal(
        build_objective(recipe).backbone.pos_embed, resample_abs_pos_embed(before, [6, 6], num_prefix_tokens=1)
    )
    assert pretrain(recipe).finished


def test_the_high_resolution_recipe_starts_from_the_first_phase(digit_shards, tmp_path):
    """Both packaged recipes at a small size, with Gram anchoring to the first phase as the recipe's header proposes."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert pretrain(load("dinov2_vil_b", runs.overrides("dinov2", digit_shards, first, "budget.steps=2"))).finished
    more = ["model.img_size=24", f"model.start_from={first}", "objective.gram_weight=1.5",
            f"objective.gram_from={first}", "budget.steps=2"]  # fmt: skip
    recipe = load("dinov2_vil_b_highres", runs.overrides("dinov2", digit_shards, second, *more))
    before = checkpoint.newest(first / "checkpoints").tensors("objective")
    started = build_objective(recipe).state_dict()
    for key in ("head.last_layer", "teacher.patch_head.last_layer", "patch_center.value", "backbone.norm.weight"):
        assert torch.equal(started[key], before[key])
    assert started["teacher.backbone.pos_embed"].shape[1:3] == (6, 6)
    assert torch.equal(started["gram.backbone.norm.weight"], before["teacher.backbone.norm.weight"])
    assert pretrain(recipe).finished
    assert read_metrics(second / "metrics.jsonl")[-1]["gram"] > 0
    third = runs.overrides("dinov2", digit_shards, tmp_path / "third", "model.img_size=24", "budget.steps=1")
    assert pretrain(load("dinov2_vil_b_highres", [*third, f"model.start_from={second}"])).finished  # without an anchor


def test_missing_heads_are_reported_before_training(old, digit_shards, tmp_path):
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
    other = {"mae": "dino", "dino": "mae", "ibot": "dino"}[old[0]]
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


def test_a_run_resumes_after_its_start_is_deleted(old, digit_shards, tmp_path):
    """The source is read once; afterwards the run's checkpoints hold all weights."""
    name, folder = old
    shutil.copytree(folder / "whole", tmp_path / "start")
    more = [f"model.start_from={tmp_path / 'start'}", "budget.steps=4"]
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    pretrain(runs.small(name, digit_shards, straight, *more))
    pretrain(runs.small(name, digit_shards, paused, *more, "budget.pause_minutes=1e-6"))
    shutil.rmtree(tmp_path / "start")
    pretrain(runs.small(name, digit_shards, paused, *more))
    runs.assert_same_state(straight, paused)


# --- files of weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def supervised(tmp_path):
    """A network with a classifier, and a published file of one like it: .th, other names, another grid."""
    network = timm.create_model(
        "vil_nano_patch4_32", embed_dim=32, depth=1, img_size=32, patch_size=4, in_chans=1, num_classes=7, fc_norm=True
    )
    in_file = as_in_published_file(network.state_dict())
    torch.save({"state_dict": in_file}, tmp_path / "vil.th")
    return in_file, tmp_path / "vil.th"


GREY = ["model.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]", "model.start_heads=new"]


@pytest.mark.parametrize("name", ["mae", "dino", "lejepa"])
def test_a_run_starts_from_published_supervised_weights(digit_shards, tmp_path, supervised, name):
    """Student and teacher get these weights, resampled to the images' grid, without the classifier and its norm."""
    in_file, file = supervised
    recipe = runs.small(name, digit_shards, tmp_path / "new", f"model.start_from={file}", *GREY)
    objective = build_objective(recipe)
    for prefix in objective.networks.values():
        backbone = objective.get_submodule(prefix.removesuffix("."))
        weights = backbone.state_dict()
        assert torch.equal(
            weights["blocks.0.second.layer.q_proj.weight"], in_file["xlstm.blocks.1.xlstm.q_proj.weight"]
        )
        assert torch.equal(weights["norm.bias"], in_file["xlstm.post_blocks_norm.bias"])
        assert torch.equal(weights["pos_embed"], resample_positions(in_file["pos_embed.embed"], (4, 4)))
        assert not [key for key in weights if key.startswith(("head.", "fc_norm."))]


def test_heads_first_freezes_the_backbone(digit_shards, tmp_path, supervised):
    """The backbone keeps its weights while the new heads are trained, and is trained afterwards."""
    _, file = supervised
    more = [f"model.start_from={file}", *GREY, "optim.heads_first=0.5", "optim.warmup=0", "budget.steps=4"]
    more += ["run.checkpoint_every=1", "run.keep_checkpoints=4"]
    recipe = runs.small("mae", digit_shards, tmp_path / "run", *more)
    start = build_objective(recipe).state_dict()
    pretrain(recipe)
    half, end = (
        checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").tensors("objective") for step in (2, 4)
    )
    backbone = {key for key in start if key.startswith("backbone.")}
    assert all(torch.equal(half[key], start[key]) for key in backbone)
    assert any(not torch.equal(half[key], start[key]) for key in start.keys() - backbone)
    assert any(not torch.equal(end[key], start[key]) for key in backbone)


def test_a_run_starts_from_the_safetensors_file_of_a_vit(digit_shards, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2, img_size=16, patch_size=4)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    more = ["model.name=vit_tiny_patch16_224", "model.num_heads=2", "model.start_heads=new"]
    more += ["model.in_chans=3", "data.mean=[0.3,0.3,0.3]", "data.std=[0.37,0.37,0.37]"]
    file = f"model.start_from={tmp_path / 'vit.safetensors'}"
    found = build_objective(runs.small("lejepa", digit_shards, tmp_path / "new", file, *more)).backbone.state_dict()
    assert found.keys() == {key for key in vit.state_dict() if not key.startswith("head.")}
    assert all(torch.equal(value, vit.state_dict()[key]) for key, value in found.items())


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_unsuitable_files_are_refused(digit_shards, tmp_path, supervised, monkeypatch):
    _, file = supervised

    def start(source, *more):
        build_objective(runs.small("mae", digit_shards, tmp_path / "new", f"model.start_from={source}", *GREY, *more))

    with pytest.raises(UserError, match=r"without the heads of an objective: set model\.start_heads=new"):
        start(file, "model.start_heads=load")
    with pytest.raises(UserError, match=r"another architecture than the recipe's: .* the first is blocks\.1\."):
        start(file, "model.depth=2")
    with pytest.raises(UserError, match=r"another architecture than the recipe's: .* has shape \[32, 1, 4, 4\], exp"):
        start(file, "model.patch_size=8")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.th")
    with pytest.raises(UserError, match=r"harmful\.th is no file of weights that can be read safely"):
        start(tmp_path / "harmful.th")
    assert not (tmp_path / "harm").exists()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"vil\.th is no file of weights that can be read safely"):
        start(file)
    torch.save([1, 2], tmp_path / "list.th")
    with pytest.raises(UserError, match=r"list\.th is no file of weights that can be read safely"):
        start(tmp_path / "list.th")
