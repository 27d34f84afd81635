"""I-JEPA: the published loss and gradients, masks of equal length, targets of the teacher, and several processes."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import runs
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.models.layout import gather_tokens
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.colours import principal_colours
from selfvil.objectives.ijepa import IJEPA, IJEPASettings, block_ids, block_size
from selfvil.objectives.teacher import TeacherSettings
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics
from small import MODELS, SIZE, Views, network, random_views

PROGRESS = Progress(step=5, total_steps=10, steps_per_epoch=5, seed=3)
SCRIPT = Path(__file__).with_name("make_published_ijepa.py")
STORED = Path(__file__).with_name("published_ijepa.safetensors")
published_code = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def ijepa(name: str = MODELS[0], size: tuple[int, int] = SIZE, **settings) -> IJEPA:
    torch.manual_seed(0)
    settings = {"predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 2} | settings
    return IJEPA(network(name, img_size=size), IJEPASettings(**settings), ImageSpec(size, 4, 3, (0.5,) * 3, (0.2,) * 3))


def batch(count: int = 4) -> Views:
    return random_views([SIZE], count)


# --- the published code ----------------------------------------------------------------------------------------------


def ours(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the published networks under our names."""
    renamed = {}
    for name, value in published.items():
        name = re.sub(r"^predictor_blocks\.", "predictor.", name).replace("predictor_proj.", "predictor_head.")
        renamed[name] = value.flatten() if name == "mask_token" else value
    return renamed


def take_weights(objective: IJEPA, weights: dict[str, Tensor]) -> None:
    weights = ours(weights)
    positions = weights.pop("predictor_pos_embed")
    torch.testing.assert_close(objective.predictor_pos.double(), positions[0], rtol=0, atol=1e-6)
    objective.predictor_pos = positions[0]  # as rounded there
    objective.load_state_dict(weights)


def vit(size: int, patch: int, dim: int, depth: int, heads: int, width: int) -> IJEPA:
    backbone = timm.models.VisionTransformer(
        size, patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0, class_token=False, global_pool="avg",
        fc_norm=False,
    )  # fmt: skip
    settings = IJEPASettings(predictor="vit", predictor_dim=width, predictor_depth=depth, predictor_heads=heads)
    objective = IJEPA(backbone, settings, ImageSpec((size, size), patch, 3, (0.5,) * 3, (0.2,) * 3)).double()
    for parameter in objective.teacher.parameters():  # `double` leaves a teacher in float32
        parameter.data = parameter.data.double()
    return objective


def compare(objective: IJEPA, images: Tensor, keep: Tensor, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    objective.masks = lambda *arguments: (keep, blocks)
    loss = objective(Views([images], torch.arange(len(images))), PROGRESS).loss
    loss.backward()
    with_gradient = ((name, p.grad) for name, p in objective.named_parameters() if p.grad is not None)
    return loss.detach(), {name: grad for name, grad in with_gradient if name != "backbone.pos_embed"}


def test_loss_and_gradients_equal_the_stored_ones():
    values = load_file(STORED)
    objective = vit(32, 4, 8, 1, 2, 16)
    take_weights(objective, {k.removeprefix("weight/"): v for k, v in values.items() if k.startswith("weight/")})
    loss, gradients = compare(objective, values["images"], values["keep"], values["blocks"])
    torch.testing.assert_close(loss, values["loss"], rtol=1e-12, atol=0)
    expected = ours({k.removeprefix("gradient/"): v for k, v in values.items() if k.startswith("gradient/")})
    found = {name: published_code.summary(gradient) for name, gradient in gradients.items()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    settings = TeacherSettings(teacher_momentum=0.9, teacher_momentum_schedule="linear")
    momenta = [settings.momentum_at(Progress(step, 10, 5, 0)) for step in range(10)]
    assert momenta == pytest.approx(values["momenta"].tolist(), rel=1e-12)


def checkout() -> str:
    folder = os.environ.get("SELFVIL_PUBLISHED_IJEPA")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_IJEPA does not name a checkout of facebookresearch/ijepa")
    return folder


def test_stored_values_equal_those_of_the_published_code(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), checkout(), str(tmp_path / "values")], check=True, timeout=120)
    found, stored = load_file(tmp_path / "values"), load_file(STORED)
    assert found.keys() == stored.keys()
    # Block positions come from torch's generator, and are the same.
    torch.testing.assert_close(found, stored, rtol=1e-9, atol=1e-14)


def test_loss_and_gradients_equal_the_published_code_at_full_size():
    published = published_code.import_published(checkout())
    torch.manual_seed(0)
    encoder, predictor, target = published_code.build(published, 224, 16, 96, 4, 6, 48)
    objective = vit(224, 16, 96, 4, 6, 48)
    parts = (("backbone.", encoder), ("", predictor), ("teacher.backbone.", target))
    take_weights(objective, {f"{prefix}{k}": v for prefix, part in parts for k, v in part.state_dict().items()})
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    keep, blocks = objective.masks(torch.arange(2), PROGRESS, images.device)
    expected, gradients = published_code.loss_and_gradients(published, encoder, predictor, target, images, keep, blocks)
    loss, found = compare(objective, images, keep, blocks)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, ours(gradients), rtol=1e-8, atol=1e-12)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (56, 56), (32, 64)])
def test_masks_have_equal_lengths_whole_blocks_and_a_context_without_targets(size):
    objective = ijepa(size=size)
    rows, columns = objective.grid
    leaks, heights = 0, set()
    for step in range(20):
        progress = Progress(step, 20, 5, seed=1)
        keep, blocks = objective.masks(torch.arange(step * 64, (step + 1) * 64), progress, torch.device("cpu"))
        (height, width), _ = objective.block_sizes(progress)
        heights.add((height, width))
        assert keep.shape == (64, round(rows * columns / 4))
        assert blocks.shape == (64, 4, height * width)
        assert (keep.diff(dim=1) > 0).all()
        assert 0.1 < height * width / (rows * columns) < 0.27
        for ids in blocks[0]:
            found = torch.zeros(rows * columns).index_fill_(0, ids, 1).view(rows, columns)
            assert int(found.any(dim=1).sum()) == height
            assert int(found.any(dim=0).sum()) == width
        leaks += sum(len(set(k.tolist()) & set(b.flatten().tolist())) for k, b in zip(keep, blocks))
    assert len(heights) > 1
    assert leaks < 0.002 * 20 * keep.numel(), "targets in the context where they leave too few others"


def test_a_mask_depends_on_its_image_and_not_on_the_batch():
    objective = ijepa()
    keep, blocks = objective.masks(torch.arange(8), PROGRESS, torch.device("cpu"))
    later, others = objective.masks(torch.arange(4, 8), PROGRESS, torch.device("cpu"))
    assert torch.equal(keep[4:], later)
    assert torch.equal(blocks[4:], others)
    assert not torch.equal(keep[0], keep[1])


def test_blocks_reach_every_border():
    corner = torch.tensor([[[0.0, 0.0], [0.999, 0.999], [0.0, 0.999]]])
    ids = block_ids(corner, (2, 3), (4, 5))[0]
    assert ids.tolist() == [[0, 1, 2, 5, 6, 7], [12, 13, 14, 17, 18, 19], [2, 3, 4, 7, 8, 9]]
    assert block_size((8, 8), 0.2, 1.0) == (3, 3)
    assert block_size((8, 8), 1.0, 1.0) == (7, 7)
    assert block_size((1, 6), 0.2, 1.0) == (1, 1)


# --- targets and predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [1, 2])
def test_targets_are_the_normalised_features_of_the_whole_image(name, layers):
    objective, images = ijepa(name, target_layers=layers), batch().views[0]
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        outputs = adapt(objective.teacher.backbone).last_blocks(images, layers)
    centred = [patches - patches.mean(dim=-1, keepdim=True) for _, patches in outputs]
    expected = sum(x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() for x in centred) / layers
    torch.testing.assert_close(objective.targets(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
@pytest.mark.parametrize("predictor", ["vil", "vit"])
def test_loss_is_that_of_each_place_of_each_block(loss, predictor):
    objective, views = ijepa(loss=loss, predictor=predictor), batch()
    images = views.views[0]
    keep, blocks = objective.masks(views.positions, PROGRESS, images.device)
    with torch.no_grad():
        features = objective.targets(images)
        predicted = objective.predict(adapt(objective.backbone).encode_kept(images, keep), keep, blocks)
        predicted = predicted.unflatten(1, blocks.shape[1:])
        errors = []
        for image, of_blocks in enumerate(blocks.tolist()):
            for block, ids in enumerate(of_blocks):
                for place, patch in enumerate(ids):
                    errors.append(predicted[image, block, place] - features[image, patch])
        errors = torch.stack(errors).abs()
        each = errors.square() if loss == "l2" else torch.where(errors < 1, errors.square() / 2, errors - 0.5)
        output = objective(views, PROGRESS)
    torch.testing.assert_close(output.loss, each.mean())
    deviation = torch.stack([features[:, patch].std(dim=0).square() for patch in range(24)]).mean().sqrt()
    torch.testing.assert_close(output.logs["target_std"], deviation)


@pytest.mark.parametrize("predictor", ["vil", "vit"])
def test_predictions_depend_on_the_place_and_the_context_and_not_on_hidden_patches(predictor):
    objective, views = ijepa(predictor=predictor), batch(1)
    images = views.views[0]
    keep, blocks = torch.tensor([[0, 3, 5, 9, 14]]), torch.tensor([[[1, 2], [20, 21]]])

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            return objective.predict(adapt(objective.backbone).encode_kept(images, keep), keep, blocks)

    found, changed = predict(images), images.clone()
    changed[:, :, 4:8, 0:4] += 1  # patch 6 of 4 x 6
    torch.testing.assert_close(predict(changed), found)
    changed[:, :, 0:4, 0:4] += 1  # patch 0, in the context
    assert (predict(changed) - found).abs().amax(dim=-1).min() > 1e-6
    assert (found[:, 0] - found[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("predictor", ["vil", "vit"])
def test_every_parameter_learns_and_bf16_is_close(name, predictor):
    objective = ijepa(name, predictor=predictor)
    expected = objective(batch(), PROGRESS).loss
    expected.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch(), PROGRESS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0)
    assert objective.picture(batch(3), PROGRESS).shape == (3, 3 * SIZE[0], 4 * SIZE[1])


@pytest.mark.parametrize("predictor", ["vil", "vit"])
def test_the_picture_shows_context_targets_and_predictions_as_colours(predictor):
    """A perfect prediction has the colours of its target; outside the blocks both columns are black."""
    objective, views = ijepa(predictor=predictor), batch(3)
    features = objective.targets(views.views[0])
    objective.predict = lambda latent, keep, blocks: gather_tokens(features, blocks.flatten(1))
    picture = objective.picture(views, PROGRESS)
    image, context, targets, predicted = picture.unflatten(1, (3, SIZE[0])).split(SIZE[1], dim=-1)
    keep, blocks = objective.masks(views.positions, PROGRESS, torch.device("cpu"))
    on_pixels = [
        torch.zeros(3, 24).scatter(1, ids, 1).view(3, 4, 6).repeat_interleave(4, 1).repeat_interleave(4, 2)
        for ids in (keep, blocks.flatten(1))
    ]
    torch.testing.assert_close(image, objective.image.rgb(views.views[0]).movedim(1, 0))
    torch.testing.assert_close(context, image * on_pixels[0])
    torch.testing.assert_close(predicted, targets)
    assert not targets[:, on_pixels[1] == 0].any()
    colours = principal_colours(features)[0].movedim(-1, 0).unflatten(2, (4, 6))
    colours = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(targets, colours * on_pixels[1])


def test_the_trivial_loss_is_that_of_one_prediction_for_each_place():
    objective, features = ijepa(loss="l2"), torch.randn(40, 24, 8)
    objective.targets = lambda images: features
    expected = features.var(dim=0).mean()
    torch.testing.assert_close(objective.trivial_loss(Views([torch.zeros(40, 3, *SIZE)], torch.arange(40))), expected)
    assert objective.trivial_loss(batch(1)) is None


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.95, 1), ("linear", 0.95, 1), ("constant", 0.9, 0.9)]
)
def test_schedules_of_the_momentum(schedule, middle, last):
    settings = TeacherSettings(teacher_momentum=0.9, teacher_momentum_schedule=schedule)
    values = [settings.momentum_at(Progress(step, 8, 5, 0)) for step in (0, 4, 8)]
    assert values == pytest.approx([0.9, middle, last])
    quarter = settings.momentum_at(Progress(2, 8, 5, 0))
    assert quarter == pytest.approx({"cosine": 1 - 0.05 * (1 + 0.5**0.5), "linear": 0.925, "constant": 0.9}[schedule])


def test_the_teacher_follows_by_the_momentum_of_its_step():
    objective = ijepa(teacher_momentum=0.8)
    start = objective.teacher.backbone.get_parameter("norm.weight").clone()
    with torch.no_grad():
        objective.backbone.get_parameter("norm.weight").add_(1)
    objective.after_step(PROGRESS)
    torch.testing.assert_close(objective.teacher.backbone.get_parameter("norm.weight"), start + 0.1)
    assert objective.schedules(PROGRESS) == {"teacher_momentum": pytest.approx(0.9)}


# --- real runs -------------------------------------------------------------------------------------------------------


def test_a_run_learns_without_collapse(digit_shards, tmp_path):
    more = ("budget.steps=40", "monitor.log_every=5", "monitor.pictures_every=40", "monitor.doctor_every=20")
    assert pretrain(runs.small("ijepa", digit_shards, tmp_path / "run", *more)).finished
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]
    assert records[-1]["target_std"] > 0.3
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


def test_two_processes_train_like_one(digit_shards, tmp_path):
    more = ("monitor.log_every=1", "budget.steps=4")
    pretrain(runs.small("ijepa", digit_shards, tmp_path / "alone", *more))
    launched = runs.launch("ijepa", *runs.overrides("ijepa", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    for value in ("loss", "grad_norm"):
        assert [record[value] for record in both] == pytest.approx([record[value] for record in alone], rel=1e-4)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.context_share=0.9", "objective.context_share = 0.9 keeps 14 of the 16 patches of a 16x16 image"),
        ("objective.context_share=0.01", "keeps 0 of the 16 patches"),
        ("objective.target_aspect=[2,1]", "is not a range of aspect ratios"),
        ("objective.target_scale=[0,1]", "is not a range of shares"),
        ("objective.mask_ratio=0.5", "unknown key objective.mask_ratio"),
        ("model.name=test_convnext", "vil_* model"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, override, expected):
    more = ["model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.img_size=64"]
    with pytest.raises(UserError) as caught:
        pretrain(runs.small("ijepa", digit_shards, tmp_path / "run", override, *more * ("convnext" in override)))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_predictor_whose_heads_do_not_divide_its_width_is_refused():
    with pytest.raises(UserError, match="predictor_heads = 3 does not divide"):
        ijepa(predictor="vit", predictor_heads=3)


def test_features_that_depend_on_the_place_alone_have_no_deviation():
    objective = ijepa()
    objective.targets = lambda images: F.layer_norm(torch.randn(24, 32), (32,)).expand(len(images), -1, -1)
    assert float(objective(batch(), PROGRESS).logs["target_std"]) < 1e-6
