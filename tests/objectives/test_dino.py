"""DINO equals the published code; teacher and centre do not depend on how a batch is split."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import runs
from selfvil import checkpoint, optim
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.dino import DINO, DINOSettings, cross_entropy_of_pairs
from selfvil.objectives.heads import ProjectionHead
from selfvil.objectives.teacher import Center, FrozenNetwork, Teacher
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe
from selfvil.records import read_metrics
from small import MODELS, Views, network, random_views

VALUES = Path(__file__).with_name("published_dino.safetensors")
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)


def dino(name: str = "vil_nano_patch4_32", backbone: nn.Module | None = None, **settings) -> DINO:
    torch.manual_seed(0)
    settings = {"out_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 3, "local_crop_size": 8} | settings
    spec = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return DINO(network(name) if backbone is None else backbone, DINOSettings(**settings), spec)


def batch(count: int = 4, seed: int = 1) -> Views:
    return random_views([(16, 24)] * 2 + [(8, 8)] * 3, count, seed=seed)


def train(objective: DINO, batches: list[Views], accumulate: int = 1, lr: float = 0.1) -> list[Tensor]:
    """Plain SGD; the losses of all micro-batches."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=lr), []
    for step in range(len(batches) // accumulate):
        progress = Progress(step, len(batches) // accumulate, 2, seed=3)
        for micro in batches[step * accumulate : (step + 1) * accumulate]:
            output = objective(micro, progress)
            (output.loss / accumulate).backward()
            losses.append(output.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress)
    return losses


# --- the published code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(VALUES)


def part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = {"last_layer.weight_v": "last_layer", "last_layer.weight_g": "last_layer_length"}
    found = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {name.replace(old, new): found[name] for name in found for old, new in names.items() if old in name} | {
        name: value for name, value in found.items() if "last_layer" not in name
    }


def test_stored_values_equal_those_of_the_published_code(values, tmp_path):
    folder = os.environ.get("SELFVIL_PUBLISHED_DINO")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_DINO does not name a checkout of facebookresearch/dino")
    script = Path(__file__).with_name("make_published_dino.py")
    subprocess.run([sys.executable, str(script), folder, str(tmp_path / "values")], check=True, timeout=120)
    again = load_file(tmp_path / "values")
    assert again.keys() == values.keys()
    for name, value in again.items():
        torch.testing.assert_close(value, values[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_four_steps_equal_the_published_code(values):
    """Losses, gradients, centre, and student and teacher after four steps in which every schedule moves."""
    backbone = network("vit_tiny_patch16_224", img_size=(8, 8), embed_dim=8, depth=1)
    settings = DINOSettings(
        out_dim=12, hidden_dim=16, bottleneck_dim=4, local_crops=2, local_crop_size=(8, 8), teacher_momentum=0.9,
        warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_temp_epochs=2, freeze_last_layer_epochs=0,
    )  # fmt: skip
    objective = DINO(backbone, settings, ImageSpec((8, 8), 4, 3, (0.5,) * 3, (0.2,) * 3))
    start = part(values, "start/")
    objective.load_state_dict(
        start | {f"teacher.{name}": value for name, value in start.items()} | {"center.value": torch.zeros(12)}
    )
    optimizer = torch.optim.SGD(optim.parameter_groups(objective, (), objective.tags()), lr=0.0, momentum=0.9)
    for step, images in enumerate(values["images"]):
        progress = Progress(step, total_steps=4, steps_per_epoch=2, seed=0)
        optim.set_rates(optimizer, optim.cosine(step, 4, 0.1, 0.01), 0.0, objective.lr_scales(progress))
        loss = objective(Views(list(images), torch.arange(3)), progress).loss
        torch.testing.assert_close(loss, values["losses"][step], rtol=1e-5, atol=0)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
            torch.testing.assert_close(found, part(values, "gradient/"), rtol=1e-4, atol=1e-6)
        optim.clip_gradients(objective.parameters(), 0.3, per_tensor=True)
        optimizer.step()
        objective.after_step(progress)
        torch.testing.assert_close(objective.center.value, values["centers"][step], rtol=1e-5, atol=1e-6)
    state = objective.state_dict()
    for network_, prefix in (("student/", ""), ("teacher/", "teacher.")):
        for name, expected in part(values, network_).items():
            torch.testing.assert_close(state[prefix + name], expected, rtol=1e-4, atol=1e-6)


def test_a_head_with_learned_lengths_equals_the_published_one(values):
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, norm_last_layer=False)
    head.load_state_dict(part(values, "head/"))
    torch.testing.assert_close(head(values["head_in"]), values["head_out"], rtol=1e-5, atol=1e-6)
    assert head.last_layer_length.requires_grad


def test_schedules_equal_the_published_ones(values):
    objective = dino(
        warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, freeze_last_layer_epochs=2
    )
    run = [Progress(step, total_steps=7 * 13, steps_per_epoch=13, seed=0) for step in range(7 * 13)]

    def same(name: str, found: list[float]) -> None:
        np.testing.assert_allclose(found, values[name].numpy(), rtol=1e-12)

    same("momentum 0.996 to 1, 7 epochs of 13", [objective.settings.momentum_at(p) for p in run])
    same("weight decay 0.04 to 0.4, 7 epochs of 13", [optim.cosine(p.step, 91, 0.04, 0.4) for p in run])
    same("rate 1 to 0.1, 7 epochs of 13, 2 of warm-up", [optim.cosine(p.step, 91, 1, 0.1, 26) for p in run])
    temperatures = [objective.teacher_temp(p) for p in run]
    same("temperature 0.04 to 0.07 over 3 of 7 epochs", temperatures[::13])
    assert temperatures == [value for value in temperatures[::13] for _ in range(13)]
    assert [objective.lr_scales(p)["last_layer"] for p in run] == [0.0] * 26 + [1.0] * 65


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [2, 3, 10])
def test_loss_equals_equation_3_of_the_paper(crops):
    """Equation 3 written out for every pair of crops and every image, in float64."""
    student, teacher = torch.randn(crops, 3, 7).double().requires_grad_(), torch.randn(2, 3, 7).double()
    targets = (teacher / 0.04).softmax(dim=-1)
    found = cross_entropy_of_pairs((student / 0.1).log_softmax(dim=-1), targets)
    terms = [
        -(targets[t, b] * (student[s, b] / 0.1).softmax(dim=-1).log()).sum()
        for t in range(2) for s in range(crops) for b in range(3) if s != t
    ]  # fmt: skip
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(found, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_collapse_metrics_of_known_distributions():
    """Uniform targets, the same sharp target for all images, and a different sharp target for each."""
    objective = dino(out_dim=4)
    logits = torch.zeros(2, 2, 4)
    logs_of = {}
    for name, rows in {"none": None, "one": [0, 0], "own": [0, 3]}.items():
        logits.zero_()
        for image, row in enumerate(rows or []):
            logits[:, image, row] = 100.0
        objective.logits = lambda backbone, head, crops, logits=logits: logits[: len(crops)].clone()
        logs_of[name] = objective(Views([torch.zeros(2)] * 2, torch.arange(2)), PROGRESS).logs
    assert logs_of["none"]["teacher_entropy"] == pytest.approx(1)
    assert logs_of["none"]["teacher_spread"] == pytest.approx(1)
    assert logs_of["one"]["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert logs_of["one"]["teacher_spread"] == pytest.approx(0, abs=1e-6)
    assert logs_of["own"]["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert logs_of["own"]["teacher_spread"] == pytest.approx(0.5)
    assert all(logs["kl"] == pytest.approx(0, abs=1e-6) for logs in logs_of.values())


# --- student and teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("readout", [None, "mean"])
def test_every_parameter_of_the_student_learns_and_none_of_the_teacher(name, readout):
    objective = dino(name, readout=readout)
    objective(batch(), PROGRESS).loss.backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {name for name, _ in objective.named_parameters() if not name.startswith("teacher.")}
    unused = {"backbone.cls_token"} if readout == "mean" and name.startswith("vit") else set()
    assert expected - trained <= {"head.last_layer_length"} | unused
    assert trained <= expected
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_the_teacher_starts_as_a_copy_and_is_a_running_mean():
    objective = dino()
    before = copy.deepcopy(objective.teacher)
    progress = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=3)
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    objective.after_step(progress)
    momentum = 1 - (1 - 0.996) * (1 + np.cos(0.3 * np.pi)) / 2
    for name, parameter in objective.teacher.named_parameters():
        student, old = objective.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(parameter, momentum * old + (1 - momentum) * student, rtol=1e-5, atol=1e-7)


def test_the_teacher_copies_buffers():
    backbone, head = nn.BatchNorm1d(3), nn.Linear(3, 2)
    teacher = Teacher(backbone=backbone, head=head)
    backbone(torch.randn(8, 3))
    teacher.follow(nn.ModuleDict({"backbone": backbone, "head": head}), 0.9)
    assert torch.equal(teacher.backbone.running_mean, backbone.running_mean)
    assert teacher.backbone.num_batches_tracked == 1


def test_a_frozen_network_copies_another_exactly_and_stays_in_evaluation_mode():
    source = nn.ModuleDict({"backbone": nn.BatchNorm1d(3)})
    nn.init.normal_(source["backbone"].weight)
    source["backbone"](torch.randn(8, 3))
    frozen = FrozenNetwork(backbone=nn.BatchNorm1d(3)).train()
    frozen.copy_from(source)
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in frozen.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_teacher_and_centre_stay_float32_where_the_student_is_bf16(name):
    """As under DeepSpeed: everything is cast to bf16, images too, without autocast."""
    expected = dino(name)(batch(), PROGRESS).loss
    objective, views = dino(name).bfloat16(), batch()
    views.views = [view.bfloat16() for view in views.views]
    expected_teacher = dino(name).teacher.state_dict()
    assert all(torch.equal(value, expected_teacher[key]) for key, value in objective.teacher.state_dict().items())
    assert all(parameter.dtype == torch.bfloat16 for parameter in objective.backbone.parameters())
    output = objective(views, PROGRESS)
    output.loss.backward()
    objective.after_step(PROGRESS)
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)
    kept = objective.teacher.state_dict() | objective.center.state_dict()
    assert all(value.dtype == torch.float32 for value in kept.values())


def test_the_teacher_has_no_stochastic_depth():
    objective = dino(backbone=network(drop_path_rate=0.9)).train()
    assert not any(module.training for module in objective.teacher.modules())
    images = batch().views[:2]
    one, two = (objective.logits(objective.teacher.backbone, objective.teacher.head, images) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_is_close_to_fp32_and_keeps_state_float32(name):
    objective = dino(name)
    expected = objective(batch(), PROGRESS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch(), PROGRESS)
    output.loss.backward()
    objective.after_step(PROGRESS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)
    state = objective.state_dict()
    assert all(value.dtype == torch.float32 for name, value in state.items() if value.is_floating_point())


def test_crops_of_one_size_share_a_forward_pass():
    """The result equals that of a forward pass for each crop."""
    objective, views = dino(), batch().views
    passes = []
    objective.backbone.patch_embed.register_forward_hook(lambda module, inputs, out: passes.append(inputs[0].shape))
    together = objective.logits(objective.backbone, objective.head, views)
    assert passes == [(8, 3, 16, 24), (12, 3, 8, 8)]
    adapter = adapt(objective.backbone)
    alone = torch.stack([objective.head(adapter.read_out(view, objective.readout)) for view in views])
    torch.testing.assert_close(together, alone)


def test_state_dict_has_no_duplicates_and_restores_training():
    objective = dino()
    train(objective, [batch(seed=seed) for seed in range(3)])
    state = copy.deepcopy(objective.state_dict())
    assert len({value.data_ptr() for value in objective.state_dict().values()}) == len(state)
    for prefix in objective.networks.values():
        ours = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        assert ours == set(objective.backbone.state_dict())
    other = dino()
    other.load_state_dict(state)
    ours, theirs = (train(each, [batch(seed=seed) for seed in (7, 8)]) for each in (objective, other))
    assert ours == theirs
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in objective.state_dict().items())


# --- centre ----------------------------------------------------------------------------------------------------------


def test_micro_batches_equal_the_whole_batch():
    whole, split = dino(), dino()
    micro = [batch(2, seed) for seed in range(6)]
    joined = [
        Views([torch.cat(pair) for pair in zip(micro[i].views, micro[i + 1].views)], torch.arange(4)) for i in (0, 2, 4)
    ]
    losses = torch.stack(train(split, micro, accumulate=2)).view(3, 2).mean(dim=1)
    torch.testing.assert_close(torch.stack(train(whole, joined)), losses, rtol=1e-5, atol=1e-6)
    assert whole.center.value.any()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_centre_is_updated_once_a_step_and_by_training_only():
    objective = dino()
    views = batch()
    with torch.no_grad():
        mean = objective.logits(objective.teacher.backbone, objective.teacher.head, views.views[:2]).mean(dim=(0, 1))
    objective(views, PROGRESS)
    assert not objective.center.value.any()
    objective.eval()
    objective(batch(seed=9), PROGRESS)
    objective.after_step(PROGRESS)
    torch.testing.assert_close(objective.center.value, 0.1 * mean)
    objective.after_step(PROGRESS)
    torch.testing.assert_close(objective.center.value, 0.1 * mean)


def test_all_processes_share_one_centre(monkeypatch):
    """The other process, with more rows, is simulated by an all_reduce that adds its sum and count."""
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    other = torch.cat([theirs.sum(dim=(0, 1)), torch.tensor([8.0])])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(other))
    center = Center(5, momentum=0.9)
    center.add(ours)
    center.update()
    torch.testing.assert_close(center.value, 0.1 * torch.cat([ours, theirs], dim=1).mean(dim=(0, 1)))


def test_a_step_without_logits_does_not_move_the_centre():
    center = Center(5, momentum=0.9)
    center.add(torch.randn(3, 5))
    center.update()
    before = center.value.clone()
    center.add(torch.zeros(0, 5))
    center.update()
    assert torch.equal(center.value, before)


# --- views and pictures ----------------------------------------------------------------------------------------------


def test_views_are_two_large_and_some_small_crops():
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    views = dino(local_crops=3, local_crop_size=(8, 12)).views()
    assert [tuple(view(image).shape) for view in views] == [(3, 16, 24)] * 2 + [(3, 8, 12)] * 3
    assert [(view.blur, view.solarise, view.scale) for view in views] == [
        (1.0, 0.0, (0.4, 1.0)), (0.1, 0.2, (0.4, 1.0)), *[(0.5, 0.0, (0.05, 0.4))] * 3,
    ]  # fmt: skip
    assert [view.blur for view in dino(blur=False).views()] == [0.0] * 5


def test_the_picture_contains_every_crop():
    objective, views = dino(), batch(3)
    picture = objective.picture(views, PROGRESS)
    assert picture.shape == (3, 3 * 18, 5 * 26)
    assert 0 <= picture.min() <= picture.max() <= 1
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    for column, view in enumerate(views.views):
        height, width = view.shape[-2:]
        found = picture[:, 18 : 18 + height, column * 26 : column * 26 + width]
        torch.testing.assert_close(found, (view[1] * 0.2 + mean).clamp(0, 1))


# --- a real run ------------------------------------------------------------------------------------------------------


def small(shards: Path, out: Path, *more: str) -> Recipe:
    return runs.small("dino", shards, out, *more)


def test_a_run_learns_without_collapse(digit_shards, tmp_path):
    """The KL divergence from the teacher falls, and targets differ between images."""
    recipe = small(
        digit_shards, tmp_path / "run", "budget.steps=40", "optim.base_lr=0.005", "monitor.log_every=5",
        "objective.hidden_dim=256", "objective.bottleneck_dim=64", "objective.teacher_momentum=0.996",
        "monitor.pictures_every=40",
    )  # fmt: skip
    assert pretrain(recipe).finished
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 8
    assert records[-1]["kl"] < 0.6 * records[0]["kl"]
    for record in records:
        assert 0.05 < record["teacher_entropy"] < 0.95
        assert 0.05 < record["student_entropy"] < 0.95
        assert record["teacher_spread"] > record["teacher_entropy"] + 0.15
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


def test_two_processes_train_like_one(digit_shards, tmp_path):
    """Two gloo processes with two micro-batches each: losses, teacher and centre of one with the whole batch."""
    pretrain(small(digit_shards, tmp_path / "alone", "monitor.log_every=1", "budget.steps=4"))
    more = ("monitor.log_every=1", "budget.steps=4", "optim.accumulate=2")
    launched = runs.launch("dino", *runs.overrides("dino", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    assert [record["loss"] for record in both] == pytest.approx([record["loss"] for record in alone], rel=1e-5)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    assert ours["center.value"].any()
    # AdamW's first steps depend on the gradient's sign only, so gradients near 0 give steps that differ.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.teacher_temp=0.1", "teacher_temp = 0.1 is not below student_temp = 0.1"),
        ("objective.warmup_teacher_temp=0.2", "warmup_teacher_temp = 0.2 is not below student_temp"),
        ("objective.local_crop_size=10", r"local_crop_size = [10, 10] is not divisible by model.patch_size = 4"),
        ("objective.local_crop_size=0", r"local_crop_size = [0, 0]"),
        ("objective.local_crop_size=[8, -4]", "local_crop_size = [8, -4] is not divisible"),
        ("objective.readout=registers", "'registers' is not possible with VisionLSTM; choose one of: bilateral_concat"),
        ("objective.readout=middle", "objective.readout = 'middle': input should be 'bilateral_concat', 'mean'"),
        ("objective.readout=cls", "'cls' is not possible with VisionLSTM; choose one of: bilateral_concat, mean"),
        ("objective.local_crop_scale=[0.4, 0.1]", "[0.4, 0.1] is not a range of shares"),
        ("objective.temperature=0.1", "unknown key objective.temperature"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, override, expected):
    with pytest.raises(UserError) as caught:
        pretrain(small(digit_shards, tmp_path / "run", override))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_cannot_take_crops_is_refused():
    with pytest.raises(UserError, match="SwinTransformer cannot take crops of several sizes"):
        dino(backbone=timm.create_model("swin_tiny_patch4_window7_224", num_classes=0))


@pytest.mark.parametrize("readout", [None, "registers"])
def test_registers_are_concatenated_by_the_readout(readout):
    objective = dino(backbone=network(global_pool="registers", num_registers=3), readout=readout)
    assert objective.readout == "registers"
    assert objective.head.mlp[0].in_features == 3 * 32
    objective(batch(), PROGRESS).loss.backward()
    assert objective.backbone.reg_token.grad.abs().sum() > 0
