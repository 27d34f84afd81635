"""Supervised training: targets and losses against timm's, keyed randomness, EMA, rates, readouts, and refusals."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import runs
import small
from selfvil import checkpoint
from selfvil.build import build_objective, open_training, parameter_groups
from selfvil.data.index import open_shards
from selfvil.data.loader import Batch
from selfvil.data.subset import FewLabels
from selfvil.data.views import ClassifierCrop, seed_randomness
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.supervised import KeyedDepth, Supervised, SupervisedSettings
from selfvil.pretrain import pretrain
from selfvil.recipe import load
from selfvil.weights import class_labels, load_pretrained
from tars import write_tar

IMAGE = ImageSpec(small.SIZE, 4, 3, [0.5] * 3, [0.2] * 3)
PLAIN = {"three_augment": False, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0}
START = Progress(0, 10, 5.0, 7)


def objective(name: str = small.MODELS[0], backbone: dict | None = None, **settings) -> Supervised:
    torch.manual_seed(0)
    made = Supervised(small.network(name, **backbone or {}), SupervisedSettings(classes=5, **settings), IMAGE)
    with torch.no_grad():  # a head of nearly 0 would give all images equal scores
        for parameter in made.backbone.get_classifier().parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    return made


def batch(count: int = 8, first: int = 0) -> Batch:
    views = small.random_views([small.SIZE], count, first=first)
    positions = views.positions
    return Batch(views.views, positions, positions, positions * 3 % 5)


# --- the loss against timm's -----------------------------------------------------------------------------------------


def test_label_smoothing_is_timms():
    made = objective(label_smoothing=0.1, **PLAIN).double()
    each = batch()
    each.views = [each.views[0].double()]
    found = made(each, START)
    scores = made.backbone(each.views[0])
    assert found.loss.item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(scores, each.labels).item(), rel=1e-6)
    assert found.logs["accuracy"] == 100 * (scores.argmax(1) == each.labels).float().mean()


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms_on_pairs_of_neighbours(alphas):
    """The images in timm's order, first with last: 0 2 4 6 7 5 3 1, so that neighbours are mixed."""
    mixup, cutmix = alphas
    made = objective(**PLAIN | {"mixup": mixup, "cutmix": cutmix}, label_smoothing=0.1)
    each, order = batch(), [0, 2, 4, 6, 7, 5, 3, 1]
    seed_randomness(7, 0, 1_000)
    mixer = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=5)
    images, targets = mixer(each.views[0][order].clone(), each.labels[order])
    found, mixed = made.mix(each, 7)
    torch.testing.assert_close(found[order], images, rtol=0, atol=0)
    torch.testing.assert_close(mixed[order], targets, rtol=0, atol=0)
    assert not torch.equal(found, each.views[0])
    expected = SoftTargetCrossEntropy()(made.backbone(found), mixed)
    torch.testing.assert_close(made(each, START).loss, expected)


def test_mixing_depends_on_seed_and_position_only():
    """Neither on the division into micro-batches, nor on torch's and numpy's generators, which it leaves alone."""
    made = objective(mixup=0.8, cutmix=1.0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole, targets = made.mix(batch(16), 7)
    torch.rand(3)
    for size in (2, 4, 8):
        parts = [made.mix(batch(size, first), 7) for first in range(0, 16, size)]
        assert torch.equal(torch.cat([images for images, _ in parts]), whole)
        assert torch.equal(torch.cat([part for _, part in parts]), targets)
    assert not torch.equal(made.mix(batch(16), 8)[0], whole)
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    far = batch(16)
    far.positions = far.positions + 128 - 4  # the first four are of another group than the rest
    (first, rest), _ = made.mix(far, 7)[1].split([4, 12]), None
    assert torch.equal(made.mix(batch_at(far, slice(0, 4)), 7)[1], first)
    assert torch.equal(made.mix(batch_at(far, slice(4, 16)), 7)[1], rest)


def batch_at(whole: Batch, rows: slice) -> Batch:
    return Batch([whole.views[0][rows]], whole.positions[rows], whole.ids[rows], whole.labels[rows])


def test_the_last_of_an_odd_number_is_not_mixed():
    made = objective(mixup=0.8)
    images, targets = made.mix(batch(5), 7)
    assert torch.equal(images[4], batch(5).views[0][4])
    assert targets[4].tolist() == F.one_hot(batch(5).labels, 5)[4].tolist()


def test_trivial_loss_is_that_of_the_best_constant():
    """By gradient descent on a constant vector of scores, in float64."""
    for settings in (PLAIN, PLAIN | {"mixup": 0.8, "cutmix": 1.0}):
        made = objective(label_smoothing=0.1, **settings)
        each = batch(20)
        _, targets = made.mix(each, 7)
        if not made.mixup:
            targets = 0.9 * F.one_hot(targets, 5) + 0.1 / 5
        constant = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([constant], max_iter=100)

        def loss(constant=constant, targets=targets):
            constant.grad = None
            value = -(targets.double() * F.log_softmax(constant, 0)).sum(1).mean()
            value.backward()
            return value

        optimizer.step(loss)
        assert made.trivial_loss(batch(4)) is None
        assert float(made.trivial_loss(each)) == pytest.approx(loss().item(), rel=1e-5)


# --- views -----------------------------------------------------------------------------------------------------------


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 30)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("more", [{}, {"three_augment": True, "jitter": 0.3}, {"erasing": 1.0}, {"randaugment": 9}])
def test_views_of_every_mode(mode, more):
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    if mode == "RGBA" and "randaugment" in more:
        with pytest.raises(ValueError, match="alpha channel"):
            ClassifierCrop(16, (0.5, 1), [0.5] * 4, [0.2] * 4, **more)
        return
    view = ClassifierCrop((16, 20), (0.5, 1), [0.5] * channels, [0.2] * channels, **more)
    seen = []
    for position in range(20):
        seed_randomness(1, position, 0)
        seen.append(view(photo(mode)))
        seed_randomness(1, position, 0)
        assert torch.equal(view(photo(mode)), seen[-1])
        assert seen[-1].shape == (channels, 16, 20)
        assert seen[-1].dtype == torch.float32
    assert len({float(each.sum()) for each in seen}) == 20


def test_three_augment_makes_one_of_three_images():
    """A crop of the whole image, not flipped: grey, inverted from 128, or blurred."""
    view = ClassifierCrop((30, 40), (1, 1), [0.0] * 3, [1.0] * 3, three_augment=True, flip=False)
    view._box = lambda width, height: (0, 0, width, height)
    plain = torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255
    grey = torch.from_numpy(np.array(photo().convert("L"))) / 255
    solarised = torch.where(plain * 255 < 128, plain, 1 - plain)
    kinds = []
    for position in range(60):
        seed_randomness(0, position, 0)
        made = view(photo())
        if torch.allclose(made, grey.expand(3, -1, -1)):
            kinds.append("grey")
        elif torch.allclose(made, solarised, atol=1e-6):
            kinds.append("inverted")
        else:  # a blur keeps the mean, and makes neighbours more alike
            assert made.mean() == pytest.approx(float(plain.mean()), abs=0.01)
            assert made.diff(dim=2).abs().mean() <= plain.diff(dim=2).abs().mean()
            kinds.append("blurred")
    assert all(kinds.count(kind) >= 10 for kind in ("grey", "inverted", "blurred"))


def test_randaugment_is_timms():
    view = ClassifierCrop((30, 40), (1, 1), [0.5] * 3, [0.2] * 3, randaugment=9, flip=False)
    hparams = {
        "translate_const": 13,
        "img_mean": (128,) * 3,
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": 9.99,
    }
    timms = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    view._box = lambda width, height: (0, 0, width, height)
    for position in range(30):
        seed_randomness(0, position, 0)
        made = view(photo())
        seed_randomness(0, position, 0)
        torch.testing.assert_close(made, view.normalise(timms(photo())))


def test_erasing_replaces_a_rectangle_by_noise():
    plain = ClassifierCrop((30, 40), (1, 1), [0.5] * 3, [0.2] * 3, flip=False)
    view = ClassifierCrop((30, 40), (1, 1), [0.5] * 3, [0.2] * 3, flip=False, erasing=1.0)
    for position in range(20):
        seed_randomness(0, position, 0)
        before = plain(photo())
        seed_randomness(0, position, 0)
        rows, columns = torch.nonzero((view(photo()) != before).any(dim=0), as_tuple=True)
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert len(rows) == height * width  # a full rectangle
        assert 0.01 * 1200 < len(rows) < 0.36 * 1200


# --- the network -----------------------------------------------------------------------------------------------------

READOUTS = [
    ("vil_nano_patch4_32", {}, "bilateral_concat", 64),
    ("vil_nano_patch4_32", {}, "mean", 32),
    ("vil_nano_patch4_32", {"global_pool": "middle_cls"}, "cls", 32),
    ("vil_nano_patch4_32", {"global_pool": "registers", "num_registers": 2}, "registers", 64),
    ("vil_mlp_nano_patch4_32", {}, "bilateral_concat", 64),
    ("vil_mlp_nano_patch4_32", {}, "mean", 32),
    ("vil_mlp_nano_patch4_32", {"global_pool": "middle_cls"}, "cls", 32),
    ("vil_mlp_nano_patch4_32", {"global_pool": "registers", "num_registers": 2}, "registers", 64),
    ("vit_tiny_patch16_224", {}, "cls", 32),
    ("vit_tiny_patch16_224", {}, "mean", 32),
]


@pytest.mark.parametrize(("name", "kwargs", "readout", "width"), READOUTS)
def test_each_readout_of_each_architecture(name, kwargs, readout, width):
    made = objective(name, kwargs, readout=readout, **PLAIN).eval()
    assert made.backbone.get_classifier().weight.shape == (5, width)
    each = batch()
    seen = adapt(made.backbone).read_out(each.views[0], readout)
    torch.testing.assert_close(made.backbone(each.views[0]), made.backbone.get_classifier()(seen))
    made.train()(each, START).loss.backward()
    assert all(p.grad is not None for p in made.backbone.parameters() if p.requires_grad)


def test_a_readout_without_its_token_is_refused():
    for name, readout in (("vil_nano_patch4_32", "cls"), ("vit_tiny_patch16_224", "bilateral_concat")):
        with pytest.raises(UserError, match=f"objective.readout = {readout!r} is not possible for a classifier"):
            objective(name, readout=readout)


@pytest.mark.parametrize(("name", "layers"), list(zip(small.MODELS, (4, 2, 8))))
def test_stochastic_depth_depends_on_seed_and_position_only(name, layers):
    """Layers with a rate above 0: two pairs of blocks, the second block of a ViT, two pairs of mLSTM and MLP."""
    made = objective(name, {"drop_path_rate": 0.5}, **PLAIN).train()
    assert all(isinstance(depth, KeyedDepth) for depth in made.depths)
    assert len(made.depths) == layers
    with torch.no_grad():
        whole = made(batch(8), START).loss
        parts = torch.stack([made(batch(4, first), START).loss for first in (0, 4)]).mean()
        torch.testing.assert_close(parts, whole)
        assert made(batch(8), Progress(0, 10, 5.0, 8)).loss != whole


def test_keyed_depth_keeps_the_mean():
    depth, ones = KeyedDepth(0.25).train(), torch.ones(10_000, 2)
    depth.draws = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    kept = depth(ones)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert kept.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(depth.eval()(ones), ones)


def test_ema_follows_the_formula():
    made = objective(ema_decay=0.9, **PLAIN)
    expected = {name: value.double() for name, value in made.ema.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(made.backbone.parameters(), lr=0.5)
    for step in range(4):
        made(batch(), START).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.after_step(Progress(step, 4, 5.0, 0))
        for name, value in made.backbone.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in made.ema.backbone.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert made.exported() is made.ema.backbone
    assert not any(parameter.requires_grad for parameter in made.ema.parameters())


def test_rates_of_layers_and_head(tmp_path):
    recipe = load("cifar10_finetune", [
        "data.train=x.tar", f"run.out={tmp_path}", "model.start_from=null", "model.depth=2", "model.embed_dim=32",
        "optim.layer_decay=0.5", "objective.head_lr=3", "objective.classes=10",
    ])  # fmt: skip
    made = build_objective(recipe)
    rates = {}
    for group in parameter_groups(recipe, made):
        for name in group["names"]:
            rates[name] = group["lr_scale"] * (made.lr_scales(START) | {"backbone": 1.0})[group["tag"]]
    expected = {"patch_embed": 0.125, "pos_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "norm": 0.5, "head": 3.0}
    for name, rate in rates.items():
        assert rate == next(x for prefix, x in expected.items() if name.startswith(f"backbone.{prefix}")), name


# --- the recipe and its data -----------------------------------------------------------------------------------------


def recipe(shards, out, *more: str):
    return runs.small("supervised", shards, out, *more)


def test_classes_are_found_in_the_data(digit_shards, tmp_path):
    found, shards = open_training(recipe(digit_shards, tmp_path / "run", "objective.classes=null"))
    assert (found.objective.classes, len(shards)) == (10, 200)
    few = recipe(digit_shards, tmp_path / "run", "objective.classes=null", "data.labels_per_class=3", "run.seed=4")
    found, shards = open_training(few)
    assert len(shards) == 30
    assert np.bincount(shards.labels).tolist() == [3] * 10
    given, _ = open_training(recipe(digit_shards, tmp_path / "run", "objective.classes=[9,8,7,6,5,4,3,2,1,0,20]"))
    assert given.objective.labels() == [*range(10), 20]


def test_few_labels_are_a_data_set_of_their_own(digit_shards):
    shards = open_shards(str(digit_shards / "digits-*.tar"))
    few, again, other = (FewLabels(shards, 3, seed) for seed in (0, 0, 1))
    assert few.ids.tolist() == again.ids.tolist() != other.ids.tolist()
    assert few.fingerprint == again.fingerprint != other.fingerprint != shards.fingerprint
    for index, of_all in enumerate(few.ids.tolist()):
        assert few.read(index) == shards.read(of_all)
        assert (few.key(index), few.shard_of(index)) == (shards.key(of_all), shards.shard_of(of_all))
        assert few.labels[index] == shards.labels[of_all]
        assert few.contents[index] == shards.contents[of_all]
    with pytest.raises(UserError, match="class 1 has 19 images"):
        FewLabels(shards, 100, 0)


def test_what_cannot_be_trained_is_refused_in_a_sentence(digit_shards, tmp_path):
    image = (digit_shards.parent / "images" / "0" / "0000.png").read_bytes()
    bare = write_tar(tmp_path / "bare.tar", [(f"{i}.png", image) for i in range(50)])
    alike = write_tar(
        tmp_path / "alike.tar", [(f"{i}.{e}", c) for i in range(50) for e, c in (("cls", b"2"), ("png", image))]
    )
    out = tmp_path / "run"
    for more, message in [
        ([f"data.train={bare}"], "50 of the 50 images have no label, and the objective supervised needs one"),
        ([f"data.train={alike}"], "all 50 images have the label 2: give at least two classes"),
        (["objective.classes=5"], "images have the label 5, which is not among the 5 classes"),
        (["data.labels_per_class=50"], r"data.labels_per_class: 50 labels for each class were asked for, and class"),
        (["optim.batch_size=30", "optim.accumulate=2"], "a micro-batch of one process has 15"),
        (["model.global_pool=avg", "objective.readout=registers"], "objective.readout = 'registers' is not possible"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrain(recipe(digit_shards, out, *more))
        assert not out.exists()
    for more, message in [
        (["objective.classes=1"], "at least two classes"), (["objective.classes=[3,3]"], "different labels"),
        (["objective.randaugment=9", "objective.color_jitter=0.3"], "takes the place of three_augment"),
        (["objective.ema_decay=1"], "ema_decay"), (["objective.randaugment=11"], "randaugment"),
        (["model.stride=5"], "stride 5 does not fit patches of 4 pixels .* must divide 12, and be at most 4"),
        (["model.name=resnet18", "model.patch_size=null", "model.stride=2"], r"stride: only vil_\* models have that"),
        (["model.name=vit_tiny_patch16_224", "model.stride=2"], r"stride: only vil_\* models have that"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            recipe(digit_shards, out, *more)


# --- runs ------------------------------------------------------------------------------------------------------------

FULL = ["objective.ema_decay=0.8", "model.drop_path_rate=0.2", "objective.erasing=0.25", "optim.layer_decay=0.8"]


def test_a_resumed_run_equals_a_straight_one(digit_shards, tmp_path):
    """Mixing, augmentation, stochastic depth and EMA included: bit for bit."""
    pretrain(recipe(digit_shards, tmp_path / "whole", *FULL))
    interrupted = recipe(digit_shards, tmp_path / "run", *FULL)
    with pytest.MonkeyPatch.context() as patch:
        forward, calls = Supervised.forward, []

        def dies(self, *arguments):
            calls.append(1)
            if self.training and len(calls) > 11:
                raise KeyboardInterrupt
            return forward(self, *arguments)

        patch.setattr(Supervised, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(interrupted)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 5
    assert pretrain(interrupted).finished
    runs.assert_same_state(tmp_path / "whole", tmp_path / "run")


def test_the_export_is_a_timm_model_with_classes(digit_shards, tmp_path):
    pretrain(recipe(digit_shards, tmp_path / "run", "budget.steps=2", "objective.ema_decay=0.5", "model.stride=2"))
    saved = load_pretrained(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out")
    tuned = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(tuned(images), saved.backbone.eval()(images))
        assert tuned.forward_features(images).shape[1:3] == (7, 7)  # (16 - 4) / 2 + 1
    assert tuned.pretrained_cfg["label_names"] == [str(label) for label in range(10)]
    assert class_labels(out) == class_labels(tmp_path / "run") == list(range(10))
    ema = checkpoint.newest(tmp_path / "run" / "checkpoints").tensors("objective")["ema.backbone.head.weight"]
    assert torch.equal(ema, tuned.head.weight)
    assert isinstance(load_pretrained(tmp_path / "run", num_classes=0).backbone.head, nn.Identity)


def test_a_classifier_continues_at_another_size(digit_shards, tmp_path):
    """As published: at 192 pixels and then, with the same classifier, at 224; or with a new one."""
    pretrain(recipe(digit_shards, tmp_path / "run", "budget.steps=1"))
    before = load_pretrained(tmp_path / "run").backbone
    larger = [f"model.start_from={tmp_path / 'run'}", "model.img_size=24"]
    kept = build_objective(recipe(digit_shards, tmp_path / "next", *larger, "model.start_heads=load")).backbone
    new = build_objective(recipe(digit_shards, tmp_path / "next", *larger, "model.start_heads=new")).backbone
    assert torch.equal(kept.head.weight, before.head.weight)
    assert not torch.equal(new.head.weight, before.head.weight)
    before.set_input_size(24)
    for name, value in before.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(kept.state_dict()[name], value)
            assert torch.equal(new.state_dict()[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(digit_shards, tmp_path, strategy):
    """To the rounding of sums: the same mixing, views and stochastic depth, on half the images each."""
    pretrain(recipe(digit_shards, tmp_path / "one", *FULL))
    environment = {"ACCELERATE_USE_FSDP": "true"} if strategy == "fsdp" else {}
    arguments = runs.overrides("supervised", digit_shards, tmp_path / "two", *FULL)
    launched = runs.launch("supervised", *arguments, processes=2, **environment)
    assert launched.returncode == 0, launched.stderr
    ours, theirs = runs.state(tmp_path / "one"), runs.state(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.startswith("objective/"):
            torch.testing.assert_close(
                theirs[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
