"""DINOv2: KoLeo and Gram anchoring equal the published ones, on several processes as on one."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from safetensors.torch import load_file, save_file
from torch import Tensor

import runs
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.dinov2 import DINOv2, DINOv2Settings, gram_distance
from selfvil.objectives.sinkhorn import sinkhorn_knopp
from selfvil.objectives.teacher import Center
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics
from small import MODELS, Views, network, random_views

VALUES = Path(__file__).with_name("published_dinov2.safetensors")
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=3)


def dinov2(name: str = MODELS[0], **settings) -> DINOv2:
    torch.manual_seed(0)
    settings = {"out_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 1, "local_crop_size": 8} | settings
    return DINOv2(network(name), DINOv2Settings(**settings), ImageSpec((16, 24), 4, 3, (0.5, 0.4, 0.3), (0.2,) * 3))


def batch(count: int = 4) -> Views:
    return random_views([(16, 24), (16, 24), (8, 8)], count)


# --- the published code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """Values that test_ibot.py compares with the published code."""
    return load_file(VALUES)


def test_koleo_equals_the_published_one(values):
    vectors = values["koleo/vectors"].clone().requires_grad_()
    loss = KoLeoLoss()(vectors)
    loss.backward()
    torch.testing.assert_close(loss, values["koleo/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors.grad, values["koleo/gradient"], rtol=1e-4, atol=1e-6)


def test_gram_distance_equals_the_published_one(values):
    patches = values["gram/patches"].clone().requires_grad_()
    loss = gram_distance(patches, values["gram/anchor"])
    loss.backward()
    torch.testing.assert_close(loss, values["gram/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(patches.grad, values["gram/gradient"], rtol=1e-4, atol=1e-7)


def test_gram_distance_equals_the_definition_of_the_paper():
    """Pair by pair; rotation and scale of the features have no effect."""
    patches, anchor = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    terms = [
        (F.cosine_similarity(patches[b, i], patches[b, j], 0) - F.cosine_similarity(anchor[b, i], anchor[b, j], 0)) ** 2
        for b in range(2) for i in range(3) for j in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(gram_distance(patches, anchor), torch.stack(terms).mean())
    turned = patches @ torch.linalg.qr(torch.randn(4, 4)).Q * 3
    assert gram_distance(turned, patches) < 1e-12


# --- several processes -----------------------------------------------------------------------------------------------


def test_collectives_of_two_processes_equal_one_with_all_rows(tmp_path):
    """Two gloo processes with equal numbers of vectors and different numbers of patches, once none at all."""
    sizes = {"uneven": (5, 2), "empty": (0, 3), "vectors": (4, 4), "student": (5, 5)}
    parts = {name: [torch.rand(count, 6) * 2 - 1 for count in counts] for name, counts in sizes.items()}
    parts["student"][1] = parts["student"][0].clone()  # the same on both
    save_file({f"{name}-{rank}": x[rank] for name, x in parts.items() for rank in (0, 1)}, tmp_path / "tensors")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(__file__).with_name("two_processes.py")), str(tmp_path / "tensors"), str(tmp_path / "out")]
    done = subprocess.run([*torchrun, *script], env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [load_file(tmp_path / f"out-{rank}.safetensors") for rank in (0, 1)]

    joined = {name: torch.cat(x) for name, x in parts.items()}
    for name in ("uneven", "empty"):
        torch.testing.assert_close(torch.cat([each[name] for each in found]), sinkhorn_knopp(joined[name], 0.05))
    alone = sinkhorn_knopp(parts["uneven"][0], 0.05)
    assert not torch.allclose(alone, found[0]["uneven"], rtol=0.1, atol=0.01)
    center = Center(6, 0.9)
    center.add(torch.cat([joined["uneven"], joined["empty"]]))
    center.update()
    vectors = joined["vectors"].requires_grad_()
    loss = KoLeoLoss()(vectors)
    loss.backward()
    for each in found:
        torch.testing.assert_close(each["center"], center.value)
        torch.testing.assert_close(each["loss"], loss.detach())
        torch.testing.assert_close(each["teacher"], 0.25 * parts["student"][0])
    torch.testing.assert_close(torch.cat([each["gradient"] for each in found]), vectors.grad)


@pytest.mark.parametrize("centring", ["softmax", pytest.param("sinkhorn", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(digit_shards, tmp_path, centring):
    more = ["monitor.log_every=1", "budget.steps=4", f"objective.centring={centring}", "objective.gram_weight=1",
            "objective.gram_start=0.5"]  # fmt: skip
    pretrain(runs.small("dinov2", digit_shards, tmp_path / "alone", *more))
    launched = runs.launch("dinov2", *runs.overrides("dinov2", digit_shards, tmp_path / "both", *more), processes=2)
    assert launched.returncode == 0, launched.stderr
    alone, both = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("alone", "both"))
    for key in ("loss", "patch_loss", "koleo"):
        assert [record[key] for record in both] == pytest.approx([record[key] for record in alone], rel=1e-3)
    ours, theirs = (checkpoint.newest(tmp_path / run / "checkpoints").tensors("objective") for run in ("alone", "both"))
    # AdamW's first steps depend on the gradient's sign only, so gradients near 0 give steps that differ.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_weighted_sum_of_its_terms(name):
    objective, views = dinov2(name, koleo_weight=0.3, gram_weight=2.0, gram_start=0.1), batch()
    for parameter in objective.gram.parameters():
        parameter.mul_(1.5)
    output = objective(views, Progress(step=1, total_steps=10, steps_per_epoch=5, seed=3))
    large = torch.cat(views.views[:2])
    masked = objective.mask(views.positions, PROGRESS)
    features = adapt(objective.backbone).masked_features(large, masked, objective.mask_token)
    vectors, patches = objective.vectors_and_patches(objective.backbone, features)
    koleo = torch.tensor(0.0)
    for crop in vectors.chunk(2):
        distances = torch.cdist(*[F.normalize(crop, dim=-1)] * 2) + 10 * torch.eye(4)
        koleo = koleo - distances.min(dim=1).values.log().mean()
    adapter = adapt(objective.gram.backbone)
    anchor = adapter.split_tokens(adapter.forward_features(large))[1]
    torch.testing.assert_close(output.logs["koleo"], koleo.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logs["gram"], gram_distance(patches, anchor).detach(), rtol=1e-4, atol=1e-7)
    logs = output.logs
    parts = logs["image_loss"] + logs["patch_loss"] + 0.3 * logs["koleo"] + 2 * logs["gram"]
    torch.testing.assert_close(output.loss.detach(), parts)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_student_learns_and_none_of_the_others(name):
    objective = dinov2(name, gram_weight=1.0, gram_start=0.01)
    objective(batch(), Progress(step=1, total_steps=10, steps_per_epoch=5, seed=3)).loss.backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in objective.named_parameters() if not name.startswith(("teacher.", "gram."))}


def test_koleo_increases_the_distances_between_images():
    vectors = (torch.ones(6, 4) + 0.01 * torch.randn(6, 4)).requires_grad_()
    optimizer, before = torch.optim.SGD([vectors], lr=0.1), F.normalize(vectors.detach(), dim=-1)
    for _ in range(50):
        optimizer.zero_grad()
        KoLeoLoss()(vectors).backward()
        optimizer.step()
    after = F.normalize(vectors.detach(), dim=-1)
    assert torch.pdist(after).mean() > 10 * torch.pdist(before).mean()


def test_identical_images_give_finite_gradients():
    objective, views = dinov2(), batch()
    views.views = [view[:1].expand_as(view) for view in views.views]
    output = objective(views, PROGRESS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_is_close_to_fp32(name):
    settings = {"gram_weight": 1.0, "gram_start": 0.01}
    progress = Progress(step=1, total_steps=10, steps_per_epoch=5, seed=3)
    expected = dinov2(name, **settings)(batch(), progress).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dinov2(name, **settings)(batch(), progress)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)
    assert dinov2(name, **settings).bfloat16().gram.backbone.patch_embed.proj.weight.dtype == torch.float32


# --- Gram anchoring --------------------------------------------------------------------------------------------------


def test_the_anchor_is_the_teacher_at_gram_start():
    objective = dinov2(gram_weight=1.0, gram_start=0.25, teacher_momentum=0.5)
    first = math.ceil(0.25 * 10)
    for step in range(5):
        progress = Progress(step=step, total_steps=10, steps_per_epoch=5, seed=3)
        assert ("gram" in objective(batch(), progress).logs) == (step >= first)
        with torch.no_grad():
            for parameter in objective.backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        objective.after_step(progress)
        if step == first - 1:
            then = {name: value.clone() for name, value in objective.teacher.backbone.state_dict().items()}
    held = objective.gram.backbone.state_dict()
    assert all(torch.equal(held[name], value) for name, value in then.items())
    assert not torch.equal(held["patch_embed.proj.weight"], objective.teacher.backbone.patch_embed.proj.weight)


@pytest.mark.parametrize("finished", [True, False])
def test_the_anchor_is_replaced_gram_refreshes_times(digit_shards, tmp_path, finished):
    """It equals the teacher of the last refresh, whether it began as a finished run or as the run's own teacher."""
    more = ["objective.gram_weight=1", "objective.gram_refreshes=2", "budget.steps=8", "run.checkpoint_every=1",
            "run.keep_checkpoints=9"]  # fmt: skip
    if finished:
        pretrain(runs.small("dinov2", digit_shards, tmp_path / "old", "budget.steps=1"))
        more += [f"objective.gram_from={tmp_path / 'old'}"]
        expected = {1: "old/1", 2: "run/2", 3: "run/2", 4: "run/2", 5: "run/5", 8: "run/5"}
    else:
        more += ["objective.gram_start=0.25"]
        expected = {2: "run/2", 3: "run/2", 4: "run/4", 5: "run/4", 6: "run/6", 8: "run/6"}
    pretrain(runs.small("dinov2", digit_shards, tmp_path / "run", *more))

    def saved(name: str) -> dict[str, Tensor]:
        run, step = name.split("/")
        return checkpoint.load(tmp_path / run / "checkpoints" / f"step-{int(step):08d}").tensors("objective")

    for step, origin in expected.items():
        teacher, held = saved(origin), saved(f"run/{step}")
        anchor = [name for name in held if name.startswith("gram.")]
        assert anchor
        assert all(torch.equal(held[name], teacher[name.replace("gram.", "teacher.")]) for name in anchor), step


def test_a_finished_run_can_be_the_anchor(digit_shards, tmp_path):
    """A run or an export of it, of another width; the checkpoints of the new run hold the same anchor."""
    pretrain(runs.small("ibot", digit_shards, tmp_path / "old", "budget.steps=2", "model.embed_dim=48"))
    export(tmp_path / "old", tmp_path / "exported")
    teacher = checkpoint.newest(tmp_path / "old" / "checkpoints").tensors("objective")
    for source in ("old", "exported"):
        more = ["objective.gram_weight=1", f"objective.gram_from={tmp_path / source}", "budget.steps=3"]
        objective = build_objective(runs.small("dinov2", digit_shards, tmp_path / source, *more))
        held = objective.gram.backbone.state_dict()
        assert all(torch.equal(value, teacher[f"teacher.backbone.{name}"]) for name, value in held.items())
    assert pretrain(runs.small("dinov2", digit_shards, tmp_path / "new", *more)).finished
    saved = checkpoint.newest(tmp_path / "new" / "checkpoints").tensors("objective")
    assert all(torch.equal(saved[f"gram.backbone.{name}"], value) for name, value in held.items())


# --- a real run, and mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_a_run_learns_without_collapse(digit_shards, tmp_path, centring):
    """The losses fall; with Sinkhorn-Knopp all prototypes are used, and targets differ between images."""
    more = ["budget.steps=40", "optim.base_lr=0.005", "monitor.log_every=5", "objective.hidden_dim=256",
            "objective.bottleneck_dim=64", "objective.teacher_momentum=0.996", f"objective.centring={centring}",
            "monitor.pictures_every=40"]  # fmt: skip
    assert pretrain(runs.small("dinov2", digit_shards, tmp_path / "run", *more)).finished
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["kl"] < 0.7 * records[0]["kl"]
    assert records[-1]["patch_loss"] < records[0]["patch_loss"]
    assert records[-1]["koleo"] < records[0]["koleo"]
    assert all(record["teacher_spread"] > record["teacher_entropy"] + 0.1 for record in records)
    assert all((record["teacher_spread"] > 0.995) == (centring == "sinkhorn") for record in records)
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.gram_weight=1"], "gram_weight = 1.0 without a trained anchor: set gram_from"),
        (["objective.gram_weight=1", "objective.gram_from=nowhere"], "objective.gram_from: There is no folder nowhere"),
        (["optim.batch_size=1"], "one of a single image has none: raise optim.batch_size"),
        (["objective.koleo_weight=0", "optim.batch_size=4", "objective.centring=sinkhorn"], "one of 4 images on all"),
        (["objective.koleo_weight=-1"], "objective.koleo_weight = -1"),
        (["objective.gram_refreshes=3"], "gram_refreshes = 3 without an anchor: set gram_weight"),
    ],
)
def test_wrong_settings_are_refused_with_a_clear_message(digit_shards, tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        pretrain(runs.small("dinov2", digit_shards, tmp_path / "run", *overrides))
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_anchor_of_another_grid_or_normalisation_is_refused(digit_shards, tmp_path):
    old = ["budget.steps=1", "model.patch_size=8", "data.mean=[0.5]"]
    pretrain(runs.small("ibot", digit_shards, tmp_path / "old", *old))
    more = ["objective.gram_weight=1", f"objective.gram_from={tmp_path / 'old'}"]
    with pytest.raises(UserError, match=r"old has 2x2 patches and the recipe's model has 4x4"):
        build_objective(runs.small("dinov2", digit_shards, tmp_path / "run", *more))
    more += ["model.patch_size=8"]
    with pytest.raises(UserError, match=r"old was trained on images of mean \[0\.5\] .* set data\.mean"):
        build_objective(runs.small("dinov2", digit_shards, tmp_path / "run", *more))


def test_an_anchor_of_another_architecture_cannot_be_replaced(digit_shards, tmp_path):
    pretrain(runs.small("ibot", digit_shards, tmp_path / "old", "budget.steps=1", "model.embed_dim=48"))
    more = ["objective.gram_weight=1", f"objective.gram_from={tmp_path / 'old'}", "objective.gram_refreshes=1"]
    with pytest.raises(UserError, match=r"gram_refreshes = 1 replaces .* another architecture .* gram_refreshes to 0"):
        build_objective(runs.small("dinov2", digit_shards, tmp_path / "run", *more))
