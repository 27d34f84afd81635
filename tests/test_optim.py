"""Groups, schedules, clipping and the optimizer's state."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from selfvil import optim
from selfvil.errors import UserError
from selfvil.recipe import OptimSection


def test_the_cosine_schedule_equals_the_published_one():
    """As in the code of the DINO paper: linspace(0, base, warmup), then a half cosine over the remaining steps."""
    base, final, total, warmup = 0.3, 0.01, 50, 10
    rise = torch.linspace(0, base, warmup, dtype=torch.float64)
    steps = torch.arange(total - warmup, dtype=torch.float64)
    fall = final + 0.5 * (base - final) * (1 + torch.cos(math.pi * steps / (total - warmup)))
    expected = torch.cat([rise, fall])
    found = torch.tensor([optim.cosine(step, total, base, final, warmup) for step in range(total)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
def test_only_matrices_are_decayed(name):
    model = timm.create_model(name, num_classes=0, init_values=1e-4)
    groups = optim.parameter_groups(model, model.no_weight_decay())
    decayed = {name for group in groups if group["decay"] for name in group["names"]}
    kept = {name for group in groups if not group["decay"] for name in group["names"]}
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    for name in decayed:
        assert not any(word in name for word in ("bias", "norm", "gamma", "skip", "pos_embed", "cls_token")), name
    assert any("pos_embed" in name for name in kept)
    assert any("gamma" in name for name in kept)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    assert [group["names"] for group in optim.parameter_groups(model)] == [["weight"]]


def test_a_tag_scales_its_learning_rate_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = optim.adamw(optim.parameter_groups(model, tags={"1.weight": "last"}), (0.9, 0.95))
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    optim.set_rates(optimizer, 0.1, 0.5, {"last": 0.0})
    optimizer.step()
    moved = [not torch.equal(now, was) for now, was in zip(model.parameters(), before)]
    assert dict(zip((name for name, _ in model.named_parameters()), moved)) == {
        "0.weight": True, "0.bias": True, "1.weight": False, "1.bias": True,
    }  # fmt: skip


def gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_global_clipping_keeps_the_direction(scale):
    parameters = gradients(scale)
    before = torch.cat([parameter.grad.flatten() for parameter in parameters])
    norm, norms = optim.clip_gradients(parameters, 1.0)
    assert torch.stack(norms).norm() == norm
    after = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before * min(1.0, 1.0 / before.norm().item()), rtol=1e-5, atol=1e-6)


def test_clipping_per_tensor_clips_each_tensor_separately():
    parameters = gradients(10.0)
    parameters[1].grad *= 1e-3
    small = parameters[1].grad.clone()
    optim.clip_gradients(parameters, 1.0, per_tensor=True)
    assert parameters[0].grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(parameters[1].grad, small)


def test_without_a_limit_nothing_is_clipped():
    parameters = gradients(10.0)
    before = [parameter.grad.clone() for parameter in parameters]
    optim.clip_gradients(parameters, None)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optim.set_rates(optimizer, 1e-2 / (step + 1), 0.1)
        model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_state_is_restored_bit_for_bit():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = optim.adamw(optim.parameter_groups(model), (0.9, 0.95))
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    twin_optimizer = optim.adamw(optim.parameter_groups(twin), (0.9, 0.95))
    optim.load_optimizer_tensors(twin_optimizer, optim.optimizer_tensors(optimizer))
    train(model, optimizer, 3)
    train(twin, twin_optimizer, 3)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_optimizer_state_of_another_model_is_refused():
    optimizer = optim.adamw(optim.parameter_groups(nn.Linear(3, 3)), (0.9, 0.95))
    with pytest.raises(UserError, match=r"another architecture"):
        optim.load_optimizer_tensors(optimizer, {"stranger|exp_avg": torch.zeros(1)})


def test_lower_layers_have_lower_learning_rates():
    model = timm.create_model("vil_nano_patch4_32", num_classes=0, depth=3)
    scales = optim.layer_lr_scales(model, layer_decay=0.5, patch_embed=0.2)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert scales["norm.weight"] == scales["blocks.2.second.norm.weight"] == 1.0
    assert scales["blocks.1.first.layer.proj_up.weight"] == 0.5
    assert scales["pos_embed"] == 0.125
    assert scales["patch_embed.proj.bias"] == pytest.approx(0.125 * 0.2)


def test_group_and_tag_scale_a_rate_together():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = optim.parameter_groups(model, tags={"1.weight": "last"}, lr_scales={"1.weight": 0.5, "0.bias": 0.1})
    optimizer = optim.adamw(groups, (0.9, 0.95))
    optim.set_rates(optimizer, 0.1, 0.5, {"last": 0.2})
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == pytest.approx({"0.weight": 0.1, "0.bias": 0.01, "1.weight": 0.01, "1.bias": 0.1})


def test_warmup_stable_decay_has_these_values():
    found = [optim.warmup_stable_decay(step, 12, 1.0, 0.2, warmup=3, decay=4) for step in range(12)]
    fall = [0.2 + 0.8 * (1 - math.sqrt(share)) for share in (0, 0.25, 0.5, 0.75)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, *fall])
    assert [optim.warmup_stable_decay(step, 4, 1.0, 0.0, warmup=0, decay=0) for step in range(4)] == [1.0] * 4


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 4e-3), ("sqrt", 2e-3), ("none", 1e-3)])
def test_the_peak_rate_depends_on_the_batch_size(scaling, expected):
    settings = OptimSection(batch_size=1024, base_lr=1e-3, lr_scaling=scaling)
    assert settings.peak_lr == pytest.approx(expected)
    assert settings.model_copy(update={"batch_size": 256}).peak_lr == pytest.approx(1e-3)
