"""Distillation: the loss written out, and a teacher that is never changed, saved or exported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import runs
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.distill import Distill, DistillSettings, feature_loss, resample_to_grid
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe
from selfvil.records import read_metrics
from selfvil.weights import load_export
from small import MODELS, Views, network, random_views

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)
TEACHERS = ["test_vit", "test_convnext"]
SPEC = ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with the weights of random teachers."""
    folder = tmp_path_factory.mktemp("weights")
    for name in TEACHERS:
        runs.random_teacher(folder, name)
    return folder


def distill(weights: Path, name: str = MODELS[0], teacher: str = "test_vit", spec: ImageSpec = SPEC, **settings):
    torch.manual_seed(0)
    file = str(weights / f"{teacher}.safetensors")
    settings = {"teacher": teacher, "teacher_weights": file, "teacher_img_size": (32, 48)} | settings
    return Distill(network(name), DistillSettings(**settings), spec)


def batch(count: int = 3) -> Views:
    return random_views([(16, 24)], count)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_loss_is_the_sum_of_image_and_patch_losses(weights, name, teacher, kind):
    """Written out with the features of timm's own network for images in its normalisation and size."""
    objective, images = distill(weights, name, teacher, loss=kind, patch_weight=0.5), batch().views[0]
    kwargs = {"dynamic_img_size": True} if teacher == "test_vit" else {}
    reference = timm.create_model(teacher, **kwargs).eval()
    reference.load_state_dict(load_file(weights / f"{teacher}.safetensors"))
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    large = F.interpolate(images, (32, 48), mode="bicubic", antialias=True)
    pixels = large * torch.tensor(SPEC.std).view(3, 1, 1) + torch.tensor(SPEC.mean).view(3, 1, 1)
    with torch.no_grad():
        target = reference.forward_features((pixels - mean) / std)
    if teacher == "test_vit":  # 2 x 3 patches of 16 pixels after a class token
        image, patches = target[:, 0], target[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    else:
        image, patches = target.mean(dim=(2, 3)), target
    patches = F.interpolate(patches, (4, 6), mode="bilinear").flatten(2).mT
    predicted = objective.backbone.forward_features(images)
    tokens = predicted.flatten(1, 2) if name.startswith("vil") else predicted[:, 1:]
    pooled = torch.cat([tokens[:, 0], tokens[:, -1]], dim=1) if name.startswith("vil") else predicted[:, 0]
    pairs = [(objective.readout_head(pooled), image), (objective.patch_head(tokens), patches)]
    if kind == "cosine":
        losses = [1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1) for a, b in pairs]
    else:
        variances = [target.var(-1, correction=0, keepdim=True) for _, target in pairs]
        errors = [(a - (b - b.mean(-1, True)) / (v + 1e-5).sqrt()).abs() for (a, b), v in zip(pairs, variances)]
        losses = [torch.where(e < 2, e.square() / 4, e - 1) for e in errors]
    output = objective(batch(), PROGRESS)
    torch.testing.assert_close(output.logs["readout_loss"], losses[0].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logs["patch_loss"], 0.5 * losses[1].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, losses[0].mean() + 0.5 * losses[1].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_masked_prediction_is_of_the_masked_patches_only(weights, name):
    """The student has mask tokens there, the teacher the whole image; the number of masked patches is exact."""
    objective, views = distill(weights, name, mask_ratio=0.4, mask="random", readout_weight=0.0), batch()
    images = views.views[0]
    masked = objective.mask(views.positions, PROGRESS, images.device)
    assert masked.sum(dim=1).tolist() == [10] * 3  # 0.4 of 24
    target = resample_to_grid(objective.teacher(images)[1], (4, 6))
    tokens = adapt(objective.backbone).encode_masked(images, masked, objective.mask_token)
    errors = [
        1 - F.cosine_similarity(objective.patch_head(tokens[image, patch]), target[image, patch], dim=0)
        for image, patch in masked.nonzero().tolist()
    ]
    output = objective(views, PROGRESS)
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())
    output.loss.backward()
    assert objective.mask_token.grad.any()
    hidden = masked.unflatten(1, (4, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    changed = torch.where(hidden, images + 1, images)
    torch.testing.assert_close(adapt(objective.backbone).encode_masked(changed, masked, objective.mask_token), tokens)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"mask_ratio": 0.4, "patch_weight": 0.0}, "patch_weight = 0 does not predict them"),
    ({"mask_ratio": 0.01}, "masks 0 of the 24 patches of the student"),
])  # fmt: skip
def test_masks_without_patches_to_predict_are_refused(weights, settings, expected):
    with pytest.raises((UserError, ValueError), match=expected):
        distill(weights, **settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_the_picture_shows_the_teachers_features_and_their_predictions(weights, name, mask_ratio):
    """A prediction of the right direction has the colours of the target."""
    objective, views = distill(weights, name, mask_ratio=mask_ratio), batch()
    targets = resample_to_grid(objective.teacher(views.views[0])[1], (4, 6))
    objective.patch_head.forward = lambda tokens: 3 * targets
    picture = objective.picture(views, PROGRESS)
    image, seen, wanted, predicted = picture.unflatten(1, (3, 16)).split(24, dim=-1)
    torch.testing.assert_close(image, SPEC.rgb(views.views[0]).movedim(1, 0))
    torch.testing.assert_close(predicted, wanted)
    assert wanted.any()
    if mask_ratio:
        masked = objective.mask(views.positions, PROGRESS, torch.device("cpu")).view(3, 4, 6)
        masked = masked.repeat_interleave(4, 1).repeat_interleave(4, 2)
        torch.testing.assert_close(seen, image * ~masked)
        assert not wanted[:, ~masked].any()
    else:
        torch.testing.assert_close(seen, image)
    assert distill(weights, name, patch_weight=0).picture(views, PROGRESS) is None


def test_features_are_resampled_between_grids():
    patches = torch.randn(2, 3, 4, 6)
    assert torch.equal(resample_to_grid(patches, (4, 6)), patches.flatten(2).mT)
    torch.testing.assert_close(resample_to_grid(torch.full((1, 3, 5, 7), 2.0), (4, 6)), torch.full((1, 24, 3), 2.0))
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    coarse = resample_to_grid(rows, (4, 4)).view(4, 4)
    assert torch.equal(coarse, coarse[:, :1].expand(4, 4))
    assert (coarse[1:, 0] - coarse[:-1, 0]).tolist() == pytest.approx([2, 2, 2], abs=0.3)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_the_scale_of_the_teacher_has_no_effect(kind):
    predicted, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(feature_loss(predicted, 9 * target, kind), feature_loss(predicted, target, kind))
    assert feature_loss(predicted.bfloat16(), target.bfloat16(), kind).dtype == torch.float32


def test_a_grey_image_is_broadcast_to_all_channels(weights):
    objective = distill_grey(weights)
    grey = torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1, 1).expand(3, 1, 32, 48) / 255
    converted = objective.teacher.convert((grey - 0.3) / 0.37)
    mean, std = (
        torch.tensor(objective.teacher.backbone.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    torch.testing.assert_close(converted, ((grey - mean) / std).expand(3, 3, 32, 48))


def distill_grey(weights: Path) -> Distill:
    backbone = timm.create_model(MODELS[0], embed_dim=32, depth=1, img_size=(16, 24), num_classes=0, in_chans=1)
    file = str(weights / "test_convnext.safetensors")
    settings = DistillSettings(teacher="test_convnext", teacher_weights=file, teacher_img_size=(32, 48))
    return Distill(backbone, settings, ImageSpec((16, 24), 4, 1, (0.3,), (0.37,)))


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns_and_the_teacher_is_not_a_part(weights, name):
    objective = distill(weights, name).train()
    before = {key: value.clone() for key, value in objective.teacher.state_dict().items()}
    torch.optim.SGD(objective.parameters(), 0.1).zero_grad()
    objective(batch(), PROGRESS).loss.backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert {n.split(".")[0] for n in objective.state_dict()} == {"backbone", "readout_head", "patch_head"}
    assert not any(p.requires_grad or p.grad is not None for p in objective.teacher.parameters())
    assert not any(module.training for module in objective.teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in objective.teacher.state_dict().items())
    assert objective.networks == {"student": "backbone."}


def test_the_teacher_moves_with_the_student_and_stays_float32(weights):
    objective = distill(weights).bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in objective.parameters())
    assert all(p.dtype == torch.float32 for p in objective.teacher.parameters())
    objective.to("meta")
    assert all(tensor.is_meta for tensor in objective.teacher.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_either_loss_can_be_used_alone(weights, name):
    images = distill(weights, name, patch_weight=0)
    patches = distill(weights, name, readout_weight=0)
    assert images(batch(), PROGRESS).logs.keys() == {"readout_loss"}
    assert patches(batch(), PROGRESS).logs.keys() == {"patch_loss"}
    assert not hasattr(images, "patch_head")
    assert not hasattr(patches, "readout_head")


def test_a_copy_of_the_teacher_has_no_loss(digit_shards, tmp_path):
    """The student is the exported network and its heads are identities."""
    pretrain(runs.small("mae", digit_shards, tmp_path / "old", "budget.steps=2"))
    folder = export(tmp_path / "old", tmp_path / "export")
    network = load_export(folder)
    spec = ImageSpec((16, 16), 4, 1, network.normalisation.mean, network.normalisation.std)
    objective = Distill(network.backbone, DistillSettings(teacher=str(folder)), spec)
    for head in (objective.readout_head, objective.patch_head):
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
    images = torch.stack(
        [
            objective.views()[0](Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)))
            for i in range(4)
        ]
    )
    assert objective(Views([images], torch.arange(4)), PROGRESS).loss < 1e-5
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert objective(Views([images], torch.arange(4)), PROGRESS).loss > 0.01


# --- real runs -------------------------------------------------------------------------------------------------------


def small(shards: Path, out: Path, *more: str) -> Recipe:
    return runs.small("distill", shards, out, *more)


def test_the_losses_of_a_run_fall(digit_shards, tmp_path):
    recipe = small(digit_shards, tmp_path / "run", "budget.steps=40", "monitor.log_every=5", "optim.base_lr=0.01")
    assert pretrain(recipe).finished
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    for term in ("readout_loss", "patch_loss"):
        assert records[-1][term] < 0.5 * records[0][term]
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    names = saved.tensors("objective").keys() | saved.tensors("optimizer").keys()
    assert not [name for name in names if "teacher" in name]
    exported = load_export(export(tmp_path / "run", tmp_path / "export")).backbone
    assert exported.state_dict().keys() == build_objective(recipe).backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("vil_nano_patch4_32", "vil_mlp_nano_patch4_32"), ("vil_mlp_nano_patch4_32", "vil_nano_patch4_32")],
)
def test_each_kind_of_block_learns_from_the_other(teacher, student, digit_shards, tmp_path):
    pretrain(runs.small("mae", digit_shards, tmp_path / "old", f"model.name={teacher}", "budget.steps=2"))
    folder = export(tmp_path / "old", tmp_path / "export")
    learning = ["budget.steps=40", "monitor.log_every=5", "optim.base_lr=0.01", "objective.teacher_img_size=16"]
    names = [f"objective.teacher={folder}", "objective.teacher_weights=null", f"model.name={student}"]
    assert pretrain(small(digit_shards, tmp_path / "run", *learning, *names)).finished
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.teacher=nowhere", r"objective\.teacher = nowhere is neither the folder of an export .* nor a"),
        ("objective.teacher=hf-hub:timm/test_vit", r"objective\.teacher = hf-hub:timm/test_vit is neither"),
        ("objective.teacher_weights=null", r"objective\.teacher_weights = None is no safetensors file on this machine"),
        ("objective.teacher_weights=a.pth", r"objective\.teacher_weights = a\.pth is no safetensors file"),
        ("objective.teacher=test_vit2", r"does not hold the weights of test_vit2: "),
        ("objective.teacher=vit_tiny_patch16_224", r"does not hold the weights of vit_tiny_patch16_224: .*Missing key"),
        ("objective.teacher_img_size=50", r"test_vit cannot take images of 50x50 pixels .* set objective\.teacher_img"),
        ("objective.teacher_readout=bilateral", r"objective\.teacher_readout = 'bilateral': input should be"),
        ("objective.readout=cls", r"objective\.readout = 'cls' is not possible with VisionLSTM"),
        ("objective.patch_weight=0", "readout_weight and patch_weight are both 0"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, override, expected):
    more = ["objective.readout_weight=0"] if override == "objective.patch_weight=0" else []
    with pytest.raises(UserError, match=expected):
        pretrain(small(digit_shards, tmp_path / "run", override, *more))
    assert not (tmp_path / "run").exists()


def test_incomplete_weights_are_refused(weights, tmp_path):
    """timm alone would ignore the missing weights."""
    part = {k: v for k, v in load_file(weights / "test_vit.safetensors").items() if not k.startswith("blocks.3.")}
    save_file(part, tmp_path / "test_vit.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights of test_vit: .*Missing key\(s\) .*blocks\.3\."):
        distill(tmp_path)


def test_a_damaged_export_or_two_sources_are_refused(digit_shards, tmp_path):
    pretrain(runs.small("mae", digit_shards, tmp_path / "old", "budget.steps=1"))
    folder = export(tmp_path / "old", tmp_path / "export")
    with pytest.raises(UserError, match="is an export with weights: leave teacher_weights out"):
        pretrain(small(digit_shards, tmp_path / "run", f"objective.teacher={folder}"))
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        pretrain(
            small(digit_shards, tmp_path / "run", f"objective.teacher={damaged}", "objective.teacher_weights=null")
        )
    with pytest.raises(UserError, match=r"takes images of 1 channels, and model\.in_chans is 4"):
        Distill(
            timm.create_model(MODELS[0], img_size=16, in_chans=4, num_classes=0),
            DistillSettings(teacher=str(folder)), ImageSpec((16, 16), 4, 4, (0.5,) * 4, (0.5,) * 4),
        )  # fmt: skip


def test_a_teacher_without_a_grid_is_refused_for_patches(tmp_path):
    runs.random_teacher(tmp_path, "levit_128s")
    size = {"teacher_img_size": (224, 224)}
    with pytest.raises(UserError, match=r"objective\.patch_weight = 1\.0 needs a teacher with a grid of patches"):
        distill(tmp_path, teacher="levit_128s", **size)
    with pytest.raises(UserError, match=r"objective\.teacher_readout = 'cls' is not possible with Levit"):
        distill(tmp_path, teacher="levit_128s", teacher_readout="cls", **size)
    assert distill(tmp_path, teacher="levit_128s", patch_weight=0, **size)(batch(), PROGRESS).loss > 0
