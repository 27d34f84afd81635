"""Convolutional networks for comparison: objectives of whole crops take them, masked ones refuse them."""

import pytest
import timm
import torch

import runs
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.pretrain import pretrain
from selfvil.recipe import load
from selfvil.weights import load_export

CONVOLUTIONAL = ["model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.img_size=40"]
CROPS = {"dino": ["objective.local_crop_size=32"], "lejepa": ["objective.local_crop_size=32"], "distill": []}


def recipe(objective: str, shards, out, *more: str, name: str = "test_convnext"):
    vil = ["model.traversal=null", "model.conv=null", "model.drop_path_uniform=null", "model.init_values=null"]
    return runs.small(objective, shards, out, f"model.name={name}", *CONVOLUTIONAL, *vil, *more)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
@pytest.mark.parametrize("objective", CROPS)
def test_it_trains_resumes_and_is_exported(digit_shards, tmp_path, objective, name):
    more = [*CROPS[objective], "budget.steps=4", "monitor.doctor_every=2"]
    assert pretrain(recipe(objective, digit_shards, tmp_path / "straight", *more, name=name)).finished
    for pause in (["budget.pause_minutes=1e-6"], []):
        pretrain(recipe(objective, digit_shards, tmp_path / "paused", *more, *pause, name=name))
    runs.assert_same_state(tmp_path / "straight", tmp_path / "paused")

    export(tmp_path / "straight", tmp_path / "exported")
    exported = load_export(tmp_path / "exported")
    assert exported.normalisation.img_size == (40, 40)
    saved = checkpoint.newest(tmp_path / "straight" / "checkpoints")
    prefix = saved.meta["networks"][saved.meta["export"]]
    for key, value in exported.backbone.state_dict().items():
        assert torch.equal(value, saved.tensors("objective")[prefix + key]), key
    backbone = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    assert backbone.forward_features(torch.randn(1, 1, 64, 64)).shape[2:] == (2, 2)


@pytest.mark.parametrize("objective", ["mae", "simmim", "autoregressive", "ibot", "dinov2"])
def test_masked_objectives_need_patches(digit_shards, tmp_path, objective):
    with pytest.raises(UserError, match=r"ConvNeXt (cannot leave tokens out|does not read patches in order)"):
        pretrain(recipe(objective, digit_shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_crop_size_that_is_too_small_is_named(digit_shards, tmp_path):
    with pytest.raises(UserError, match=r"ConvNeXt cannot take images of 8x8 pixels .*: raise objective\.local_crop"):
        build_objective(recipe("dino", digit_shards, tmp_path / "run"))
    with pytest.raises(UserError, match=r"ConvNeXt cannot take images of 12x12 pixels .*: raise model\.img_size"):
        build_objective(recipe("dino", digit_shards, tmp_path / "run", "objective.local_crops=0", "model.img_size=12"))


@pytest.mark.parametrize("objective", ["dino", "lejepa", "visreg", "distill", "supervised"])
def test_images_that_are_too_small_are_refused_by_every_objective(digit_shards, tmp_path, objective):
    crops = ["objective.local_crops=0"] if objective == "dino" else []
    with pytest.raises(UserError, match=r"ConvNeXt cannot take images of 12x12 pixels .*: raise model\.img_size"):
        pretrain(recipe(objective, digit_shards, tmp_path / "run", "model.img_size=12", *crops))
    assert not (tmp_path / "run").exists()


def test_patch_size_must_be_null_without_patches_only(digit_shards, tmp_path):
    vil = runs.overrides("mae", digit_shards, tmp_path / "run", "model.patch_size=null")
    with pytest.raises(UserError, match=r"patch_size = null is for networks without patches, and vil_nano_patch4_32"):
        build_objective(load("cifar10_mae", [*vil, "model.img_size=224"]))
    with pytest.raises(UserError, match=r"'img_size'; a masked objective needs .* model\.patch_size must be null"):
        build_objective(recipe("mae", digit_shards, tmp_path / "run", "model.patch_size=4"))
