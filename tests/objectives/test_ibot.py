"""iBOT: losses equal DINOv2's, masks depend on samples only, and masked pixels do not reach the student."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import runs
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.models.adapter import READOUTS, adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.dino import cross_entropy_of_pairs
from selfvil.objectives.ibot import IBOT, IBOTSettings, cross_entropy_of_patches
from selfvil.objectives.mae import patchify
from selfvil.objectives.sinkhorn import sinkhorn_knopp
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics
from small import MODELS, Views, network, random_views

VALUES = Path(__file__).with_name("published_dinov2.safetensors")
TEMPERATURE = 0.05  # of the stored values
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)


def ibot(name: str = MODELS[0], **settings) -> IBOT:
    torch.manual_seed(0)
    settings = {"out_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 3, "local_crop_size": 8} | settings
    spec = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return IBOT(network(name), IBOTSettings(**settings), spec)


def batch(count: int = 4, first: int = 0) -> Views:
    return random_views([(16, 24)] * 2 + [(8, 8)] * 3, count, first=first)


# --- the published code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(VALUES)


def test_stored_values_equal_those_of_the_published_code(values, tmp_path):
    folders = [os.environ.get("SELFVIL_PUBLISHED_DINOV2"), os.environ.get("SELFVIL_PUBLISHED_DINOV3")]
    if not all(folders):
        pytest.skip("SELFVIL_PUBLISHED_DINOV2 and ..._DINOV3 do not name checkouts of facebookresearch/dinov2, dinov3")
    script = Path(__file__).with_name("make_published_dinov2.py")
    subprocess.run([sys.executable, str(script), *folders, str(tmp_path / "values")], check=True, timeout=120)
    again = load_file(tmp_path / "values")
    assert again.keys() == values.keys()
    for name, value in again.items():
        torch.testing.assert_close(value, values[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_losses_of_images_equal_the_published_ones(values, centring):
    objective = ibot(out_dim=10, centring=centring)
    objective.center.value.copy_(values["images/center"].flatten())
    student = values["images/student"].clone().requires_grad_()
    targets = objective.targets(values["images/teacher"], objective.center, TEMPERATURE)
    loss = cross_entropy_of_pairs(objective.log_probs(student), targets)
    torch.testing.assert_close(targets, values[f"images/targets/{centring}"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, values[f"images/loss/{centring}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(loss, student), values[f"images/gradient/{centring}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_losses_of_patches_equal_the_published_ones(values, centring):
    """The published centre is updated before the stored targets, ours after a step."""
    objective = ibot(out_dim=10, centring=centring)
    student, teacher = values["patches/student"].clone().requires_grad_(), values["patches/teacher"]
    objective.targets(teacher, objective.patch_center, TEMPERATURE)
    objective.patch_center.update()
    center = objective.patch_center.value
    torch.testing.assert_close(center, values["patches/center"] * (centring == "softmax"), rtol=1e-5, atol=1e-7)
    targets = objective.targets(teacher, objective.patch_center, TEMPERATURE)
    loss = cross_entropy_of_patches(objective.log_probs(student), targets, values["patches/masked"])
    torch.testing.assert_close(targets, values[f"patches/targets/{centring}"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, values[f"patches/loss/{centring}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(loss, student), values[f"patches/gradient/{centring}"], rtol=1e-4, atol=1e-6)


# --- Sinkhorn-Knopp --------------------------------------------------------------------------------------------------


def test_sinkhorn_balances_prototypes_and_targets_sum_to_one():
    logits = (
        torch.randn(40, 8) + torch.arange(8) / 4
    )  # without balancing, some prototypes would have most of the weight
    targets = sinkhorn_knopp(logits, 0.3, iterations=50)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((8,), 5.0), rtol=1e-3, atol=0)
    assert (logits / 0.3).softmax(dim=1).sum(dim=0).std() > 3


def test_sinkhorn_is_finite_for_any_logits():
    """A constant that overflows the published exponentials has no effect on ours."""
    logits = torch.randn(6, 5)
    torch.testing.assert_close(sinkhorn_knopp(logits + 1000, 0.04), sinkhorn_knopp(logits, 0.04), rtol=1e-2, atol=1e-3)
    assert sinkhorn_knopp(logits * 1e4, 0.04).isfinite().all()
    assert sinkhorn_knopp(logits.bfloat16(), 0.04).dtype == torch.float32
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.04).shape == (0, 5)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block", "random", "row"])
def test_half_of_the_crops_are_masked_with_ratios_in_the_range(kind):
    objective = ibot(mask=kind, mask_ratios=(0.2, 0.5))
    masked = objective.mask(torch.arange(500), PROGRESS)
    hidden = masked.sum(dim=1)
    assert masked.shape == (1000, 24)
    assert 430 < (hidden > 0).sum() < 570
    assert set(hidden[hidden > 0].tolist()) == set(range(4, 12))  # 24 · .2 to 24 · .5, rounded down
    assert not torch.equal(masked[:500], masked[500:])
    assert ibot(mask_share=1.0).mask(torch.arange(50), PROGRESS).any(dim=1).all()


def test_masks_depend_on_samples_and_not_on_batches():
    objective, positions = ibot(), torch.tensor([7, 3, 9])
    some = objective.mask(positions, PROGRESS).view(2, 3, 24)
    alone = objective.mask(positions[1:2], PROGRESS).view(2, 1, 24)
    assert torch.equal(some[:, 1:2], alone)
    other = objective.mask(torch.arange(50), Progress(step=0, total_steps=10, steps_per_epoch=5, seed=4))
    assert not torch.equal(other, objective.mask(torch.arange(50), PROGRESS))


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_the_paper_crop_by_crop(name):
    """Computed separately for each crop, pair and masked patch."""
    objective, views = ibot(name, mask_share=0.8), batch()
    masked = objective.mask(views.positions, PROGRESS).view(2, 4, 24)
    assert not masked.any(dim=2).all()
    teacher, patch_head = objective.teacher, objective.get_submodule(objective.patch_head_name)
    teacher_patch_head = teacher.get_submodule(objective.patch_head_name)

    def read(backbone: nn.Module, features: Tensor) -> Tensor:
        return READOUTS[objective.readout](*adapt(backbone).split_tokens(features))

    of_patches, logits, targets = [], [], []
    for crop, images in enumerate(views.views):
        for image in range(4):
            one = images[image : image + 1]
            if crop > 1:
                logits.append(objective.head(read(objective.backbone, objective.backbone.forward_features(one))))
                continue
            hidden = masked[crop, image : image + 1]
            features = teacher.backbone.forward_features(one)
            targets.append((teacher.head(read(teacher.backbone, features)) / 0.04).softmax(dim=-1))
            tokens = adapt(teacher.backbone).split_tokens(features)[1][hidden]
            patch_targets = (teacher_patch_head(tokens) / 0.04).softmax(dim=-1)
            tokens = adapt(objective.backbone).encode_masked(one, hidden, objective.mask_token)[hidden]
            terms = -(patch_targets * (patch_head(tokens) / 0.1).log_softmax(dim=-1)).sum(dim=-1)
            of_patches.append(terms.mean() if hidden.any() else torch.tensor(0.0))
            masked_one = adapt(objective.backbone).masked_features(one, hidden, objective.mask_token)
            logits.append(objective.head(read(objective.backbone, masked_one)))
    pairs = cross_entropy_of_pairs(
        (torch.cat(logits).view(5, 4, -1) / 0.1).log_softmax(dim=-1), torch.cat(targets).view(2, 4, -1)
    )
    output = objective(views, PROGRESS)
    torch.testing.assert_close(output.logs["image_loss"], pairs, rtol=1e-4, atol=0)
    torch.testing.assert_close(output.logs["patch_loss"], torch.stack(of_patches).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(output.loss, pairs + torch.stack(of_patches).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_masked_pixels_have_no_gradient(name):
    objective, views = ibot(name, mask_share=1.0), batch()
    for view in views.views:
        view.requires_grad_()
    masked = objective.mask(views.positions, PROGRESS).view(2, 4, 24)
    objective(views, PROGRESS).loss.backward()
    for view, hidden in zip(views.views, masked):
        found = patchify(view.grad, 4)
        assert not found[hidden].any()
        assert found[~hidden].any(dim=-1).all()


@pytest.mark.parametrize(("name", "shared"), [(MODELS[0], False), (MODELS[1], False), (MODELS[1], True)])
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_every_parameter_of_the_student_learns_and_none_of_the_teacher(name, shared, centring):
    objective = ibot(name, shared_head=shared, centring=centring)
    objective(batch(), PROGRESS).loss.backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {name for name, _ in objective.named_parameters() if not name.startswith("teacher.")}
    assert {"mask_token", "head.last_layer"} <= trained
    assert {name for name in expected - trained if "last_layer_length" not in name} == set()
    assert trained <= expected
    assert ("patch_head.last_layer" in trained) == (not shared)


def test_heads_are_shared_if_the_readout_is_as_wide_as_a_patch():
    assert ibot().patch_head_name == "patch_head"
    assert ibot(readout="mean").patch_head_name == "head"
    assert ibot(MODELS[1]).patch_head_name == "head"
    assert set(ibot().tags()) == {
        f"{head}.{name}" for head in ("head", "patch_head") for name in ("last_layer", "last_layer_length")
    }


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_a_batch_without_masks_equals_dino(centring):
    """Every parameter still has a gradient, as DDP requires."""
    objective = ibot(mask_share=1e-12, centring=centring)
    output = objective(batch(), PROGRESS)
    assert output.logs["patch_loss"] == 0
    assert output.loss == output.logs["image_loss"]
    output.loss.backward()
    objective.after_step(PROGRESS)
    assert not [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert all(value.isfinite().all() for value in objective.state_dict().values())


def test_all_networks_follow_and_evaluation_changes_nothing():
    objective = ibot()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()(batch(), PROGRESS)
    objective.after_step(PROGRESS)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert len({value.data_ptr() for value in objective.state_dict().values()}) == len(before)
    with torch.no_grad():
        objective.patch_head.last_layer.add_(1)
    objective.train()(batch(), PROGRESS)
    objective.after_step(PROGRESS)
    moved = objective.teacher.patch_head.last_layer - before["teacher.patch_head.last_layer"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.004), rtol=1e-3, atol=1e-6)
    assert objective.center.value.any()
    assert objective.patch_center.value.any()


def test_micro_batches_equal_the_whole_batch():
    whole, split = ibot(), ibot()
    whole(batch(8), PROGRESS).loss.backward()
    for first in (0, 4):
        (split(batch(4, first), PROGRESS).loss / 2).backward()
    for objective in (whole, split):
        objective.after_step(PROGRESS)
    ours, theirs = ({name: p.grad for name, p in o.named_parameters() if p.requires_grad} for o in (whole, split))
    lengths = {name for name in ours if "last_layer_length" in name}
    for name in ours.keys() - lengths:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)
    for name in ("center.value", "patch_center.value"):
        torch.testing.assert_close(split.state_dict()[name], whole.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_bf16_is_close_to_fp32_and_keeps_the_teacher_float32(name, centring):
    """With autocast, and as under DeepSpeed: everything is cast, without autocast."""
    expected = ibot(name, centring=centring)(batch(), PROGRESS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ibot(name, centring=centring)(batch(), PROGRESS)
    cast, views = ibot(name, centring=centring).bfloat16(), batch()
    views.views = [view.bfloat16() for view in views.views]
    for found in (output.loss, cast(views, PROGRESS).loss):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
        found.backward()
    cast.after_step(PROGRESS)
    kept = cast.teacher.state_dict() | cast.patch_center.state_dict()
    assert all(value.dtype == torch.float32 for value in kept.values())


def test_the_picture_hides_masked_patches():
    objective, views = ibot(mask_share=1.0), batch(3)
    picture = objective.picture(views, PROGRESS)
    hidden = objective.mask(views.positions, PROGRESS)[0].view(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1)
    crop = picture[:, :16, :24]
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(crop, (views.views[0][0] * ~hidden * 0.2 + mean).clamp(0, 1))
    assert picture.shape == (3, 3 * 18, 5 * 26)


# --- a real run ------------------------------------------------------------------------------------------------------


def test_a_run_learns_without_collapse(digit_shards, tmp_path):
    """The losses of images and of masked patches fall, and targets differ between images."""
    more = ["budget.steps=40", "optim.base_lr=0.005", "monitor.log_every=5", "objective.hidden_dim=256",
            "objective.bottleneck_dim=64", "objective.teacher_momentum=0.996", "monitor.pictures_every=40"]  # fmt: skip
    assert pretrain(runs.small("ibot", digit_shards, tmp_path / "run", *more)).finished
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["kl"] < 0.6 * records[0]["kl"]
    assert records[-1]["patch_loss"] < records[0]["patch_loss"]
    assert all(record["teacher_spread"] > record["teacher_entropy"] + 0.1 for record in records)
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


@pytest.mark.slow  # test_dino.py and test_dinov2.py compare two processes of the same centre and Sinkhorn-Knopp
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_two_processes_train_like_one(digit_shards, tmp_path, centring):
    more = ("monitor.log_every=1", "budget.steps=4", f"objective.centring={centring}")
    pretrain(runs.small("ibot", digit_shards, tmp_path / "alone", *more))
    launched = runs.launch("ibot", *runs.overrides("ibot", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    for key in ("loss", "patch_loss"):
        assert [record[key] for record in both] == pytest.approx([record[key] for record in alone], rel=1e-4)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    assert ours["patch_center.value"].any() == (centring == "softmax")
    # AdamW's first steps depend on the gradient's sign only, so gradients near 0 give steps that differ.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.mask_ratios=[0.5, 0.1]"], "objective.mask_ratios: [0.5, 0.1] is not a range of shares"),
        (["objective.mask_ratios=[0.01, 0.05]"], "hides at most 0 of the 16 patches of a 16x16 crop"),
        (["objective.mask_ratios=[0.1, 1.0]"], "hides at most 16 of the 16 patches"),
        (["objective.mask_share=0"], "objective.mask_share = 0"),
        (["objective.shared_head=true"], "the readout bilateral_concat is 64 wide and a patch 32"),
        (["objective.centring=sinkhorn", "optim.batch_size=15"], "one of 15 images on all processes is too small"),
        (["objective.teacher_temp=0.1"], "teacher_temp = 0.1 is not below student_temp"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        pretrain(runs.small("ibot", digit_shards, tmp_path / "run", *overrides))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10t", "swin_tiny_patch4_window7_224"])
def test_a_backbone_without_a_grid_of_patches_is_refused(name):
    spec = ImageSpec((32, 32), 4, 3, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(UserError, match=r"cannot leave tokens out: a masked objective needs a vil_\* model"):
        IBOT(timm.create_model(name, num_classes=0), IBOTSettings(out_dim=8), spec)
