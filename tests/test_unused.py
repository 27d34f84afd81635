"""Every network that an objective accepts trains on several processes, with any unused layers in its classifier.

DDP ends with an error when a trained parameter gets no gradient.
"""

import pytest
import timm
import torch

import run_many
import runs
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.pretrain import pretrain
from selfvil.recipe import load
from selfvil.records import read_metrics
from selfvil.runtime import autocast
from selfvil.unused import freeze_unused

_OF_VIL = ["embed_dim", "depth", "traversal", "conv", "drop_path_uniform", "init_values"]
CROPS = ["dino", "ibot", "dinov2", "lejepa", "visreg"]
ON_TWO = [
    ("dino", "test_convnext"), ("lejepa", "test_convnext"), ("distill", "test_convnext"), ("dino", "test_mambaout"),
    ("mae", "test_vit3"), ("lejepa", "test_vit2"), ("distill", "test_vit_relpos"), ("dino", "test_resnet"),
]  # fmt: skip
"""Objective and network: a norm, two layers, attention pooling or nothing after what the objective uses."""


def overrides(objective, name, shards, out, *more):
    sizes = ["model.img_size=64", f"model.patch_size={16 if name.startswith(('vil', 'test_vit')) else 'null'}"]
    own = [f"model.{key}=null" for key in _OF_VIL] if not name.startswith("vil") else []
    crops = ["objective.local_crop_size=32"] if objective in CROPS else []
    few = ["budget.steps=2", "optim.batch_size=8", "optim.accumulate=1", "monitor.log_every=1", *more]
    return runs.overrides(objective, shards, out, f"model.name={name}", *own, *sizes, *crops, *few)


def test_networks_with_layers_after_the_features_train_on_two_processes(digit_shards, tmp_path):
    cases = []
    for objective, name in ON_TWO:
        arguments = overrides(objective, name, digit_shards, tmp_path / f"{objective}-{name}")
        cases.append({"recipe": runs.PACKAGED[objective], "arguments": arguments})
    run_many.torchrun(cases, 2, tmp_path)
    for objective, name in ON_TWO:
        losses = [record["loss"] for record in read_metrics(tmp_path / f"{objective}-{name}" / "metrics.jsonl")]
        assert len(losses) == 2, (objective, name)


def test_parameters_that_the_loss_does_not_depend_on_do_not_change(digit_shards, tmp_path):
    more = ["optim.weight_decay=0.5", "optim.warmup=0", "optim.base_lr=0.1"]
    recipe = load("cifar10_dino", overrides("dino", "test_mambaout", digit_shards, tmp_path / "run", *more))
    start = build_objective(recipe)
    unused = {name for name, _ in start.backbone.named_parameters() if name.startswith("head.")}
    assert unused == {"head.norm.weight", "head.norm.bias", "head.pre_logits.fc.weight", "head.pre_logits.fc.bias"}
    pretrain(recipe)
    end = runs.state(tmp_path / "run")
    for name, value in start.backbone.state_dict().items():
        same = torch.equal(value, end[f"objective/backbone.{name}"])
        assert same == (name in unused), name
    assert not any(name.startswith("optimizer/backbone.head.") for name in end)


def gradients_are_complete(objective, name, digit_shards, tmp_path) -> bool:
    """Whether the objective accepts the network; asserts that each trained parameter then gets a gradient."""
    recipe = load(runs.PACKAGED[objective], overrides(objective, name, digit_shards, tmp_path / "run"))
    try:
        built = build_objective(recipe)
    except UserError:
        return False
    before = {key: value.clone() for key, value in built.state_dict().items()}
    freeze_unused(built, recipe.model.in_chans, torch.device("cpu"), autocast(torch.device("cpu"), "fp32"))
    assert all(torch.equal(value, before[key]) for key, value in built.state_dict().items())
    assert built.training
    from selfvil.memory import blank_batch
    from selfvil.objectives.base import Progress

    batch = blank_batch(built.views(), 4, recipe.model.in_chans)
    batch.views = [view + torch.randn_like(view) for view in batch.views]
    batch.positions += 1000
    built(batch, Progress(90, 100, 5.0, seed=3)).loss.backward()
    missing = [key for key, x in built.named_parameters() if x.requires_grad and x.grad is None]
    assert not missing, (objective, name)
    return True


@pytest.mark.parametrize("name", ["test_convnext", "test_vit2", "vil_nano_patch4_32"])
@pytest.mark.parametrize("objective", ["dino", "distill"])
def test_each_trained_parameter_gets_a_gradient(digit_shards, tmp_path, objective, name):
    assert gradients_are_complete(objective, name, digit_shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(runs.PACKAGED))
def test_each_trained_parameter_of_every_accepted_network_gets_a_gradient(digit_shards, tmp_path, objective):
    names = [*timm.list_models("test_*"), "vil_nano_patch4_32"]
    accepted = [name for name in names if gradients_are_complete(objective, name, digit_shards, tmp_path)]
    assert {"vil_nano_patch4_32", "test_vit", "test_vit2", "test_vit3"} <= set(accepted)
    any_network = objective in ("dino", "lejepa", "visreg", "distill", "supervised")
    assert ("test_convnext" in accepted) == any_network
    assert len(accepted) >= (14 if any_network else 5)
