"""Fine-tuning: which weights change at which rate, that it learns, that it is repeatable, and what is refused."""

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import selfvil
from selfvil import checkpoint, cli, footprint, optim
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate import classifier as classifiers
from selfvil.evaluate import finetune as module
from selfvil.evaluate import settings as parse_settings
from selfvil.evaluate.classifier import plan_micro_batch, train_classifier
from selfvil.evaluate.features import extract
from selfvil.evaluate.finetune import Settings, choose_heads, resize
from selfvil.evaluate.linear import linear_probe
from selfvil.evaluate.score import Row, as_json, as_table, score
from selfvil.export import export
from selfvil.models.adapter import adapt
from selfvil.start_from import start_backbone
from selfvil.timm_folder import atomic_folder, write_network
from selfvil.verification import verify
from selfvil.weights import Network, Normalisation, load_pretrained, model_arguments
from tars import write_tar

KWARGS = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 2}
SHORT = Settings(epochs=1, batch_size=30, base_lr=4e-3, layer_decay=0.9, drop_path=0.0, min_crop=0.8)
FAST = {"workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with one checkpoint of a random network."""
    torch.manual_seed(123)
    backbone = timm.create_model("vil_nano_patch4_32", **KWARGS)
    meta = {
        "format": 1, "step": 5, "samples": 640, "seconds": 1.0, "seed": 0, "export": "student",
        "networks": {"student": "backbone."}, "objective": {"name": "mae"},
        "model": {"name": "vil_nano_patch4_32", "kwargs": KWARGS},
        "data": {"pattern": "x.tar", "mean": [0.3], "std": [0.4], "fingerprint": "f", "num_samples": 9},
    }  # fmt: skip
    out = tmp_path_factory.mktemp("finetune") / "run"
    tensors = {"objective": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}
    checkpoint.save(out / "checkpoints", 5, tensors, meta)
    return out


def finetune(source, train, test, settings=SHORT, more: dict | None = None, **options) -> list[Row]:
    """Rows of the evaluation; more: settings on top of `settings`."""
    return score(source, train, test, {"finetune": settings.model_copy(update=more or {})}, **FAST | options)


@pytest.fixture
def parts(digit_shards):
    return str(digit_shards / "digits-000000.tar"), str(digit_shards / "digits-000001.tar")


def a_vit(drop_path: float = 0.0) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2,
        num_classes=10, drop_path_rate=drop_path,
    )  # fmt: skip


def a_vit_network(drop_path: float = 0.0) -> Network:
    torch.manual_seed(0)
    return Network(a_vit(drop_path), Normalisation((0.3,), (0.4,), (8, 8)), 0)


@pytest.mark.parametrize("name", ["vil", "vit"])
def test_each_layer_has_its_rate(name):
    model = timm.create_model("vil_nano_patch4_32", **KWARGS | {"num_classes": 10}) if name == "vil" else a_vit()
    scales = optim.layer_lr_scales(model, 0.5)
    assert scales.keys() == {name for name, _ in model.named_parameters()}
    # Stem, two layers (each a pair of blocks in a Vision-LSTM), head; the last norm goes with the last layer.
    expected = {"patch_embed": 0.125, "pos_embed": 0.125, "cls_token": 0.125,
                "blocks.0": 0.25, "blocks.1": 0.5, "norm": 0.5, "head": 1.0}  # fmt: skip
    for parameter, scale in scales.items():
        assert scale == next(value for prefix, value in expected.items() if parameter.startswith(prefix)), parameter


def test_the_optimizer_steps_at_these_rates(run, parts, monkeypatch):
    """By hand: after warm-up the head's rate is the cosine's, that of layers below it is decayed."""
    made, adamw = [], optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda *arguments: made.append(adamw(*arguments)) or made[-1])
    settings = Settings(epochs=2, batch_size=30, base_lr=1e-3, layer_decay=0.5, warmup=0.25)
    train_classifier(load_pretrained(run), "bilateral_concat", open_shards(parts[0]), settings)
    last = optim.cosine(7, 8, 1e-3 * 30 / 256, settings.min_lr, 2)
    assert {round(group["lr"] / last, 6) for group in made[0].param_groups} == {0.125, 0.25, 0.5, 1.0}
    assert {group["weight_decay"] for group in made[0].param_groups} == {0.05, 0.0}


def test_all_parameters_move_and_frozen_ones_do_not(run, parts):
    network = load_pretrained(run)
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    train, test = (open_shards(part) for part in parts)
    both = [
        extract(
            network.backbone, part, img_size=8, mean=[0.3], std=[0.4], readout="first_last_mean", **FAST,
        )
        for part in (train, test)
    ]  # fmt: skip
    features = module._split(network, ["bilateral_concat", "mean"], *both, torch.device("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in network.backbone.state_dict().items())
    assert {head: (len(a), len(b), a.x.shape[1]) for head, (a, b) in features.items()} == {
        "bilateral_concat": (120, 80, 64), "mean": (120, 80, 32)
    }  # fmt: skip
    for head, (found, _) in features.items():
        expected = extract(
            network.backbone, train, img_size=8, mean=[0.3], std=[0.4], readout=head, workers=0, device="cpu"
        )
        assert torch.equal(found.x, expected.x)

    still = Settings(epochs=1, batch_size=30, weight_decay=0.0, drop_path=0.0)
    after = train_classifier(network, "bilateral_concat", train, still).model.state_dict()
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not unmoved
    assert set(after) - set(before) == {"head.weight", "head.bias"}


def test_it_learns(run, parts):
    """Ten classes, 120 images, a random network to start from: far above the 10 % of chance."""
    settings = Settings(epochs=30, batch_size=20, base_lr=4e-2, layer_decay=1.0, drop_path=0.0, min_crop=0.8)
    classifier = train_classifier(load_pretrained(run), "bilateral_concat", open_shards(parts[0]), settings)
    accuracy = classifier.accuracy(open_shards(parts[1]), workers=0)
    assert accuracy > 50
    assert accuracy == classifier.accuracy(open_shards(parts[1]), batch_size=7, workers=0)


def test_the_same_seed_gives_the_same_weights(run, parts):
    train = open_shards(parts[0])
    settings = Settings(epochs=1, batch_size=30, drop_path=0.2)

    def weights(seed: int, workers: int = 0) -> dict[str, torch.Tensor]:
        torch.rand(seed + workers)  # what was drawn before does not matter
        network = load_pretrained(run, drop_path_rate=settings.drop_path)
        state = torch.get_rng_state()
        model = train_classifier(network, "mean", train, settings, seed=seed, workers=workers).model
        assert torch.equal(torch.get_rng_state(), state)
        return model.state_dict()

    first, again, other = weights(1), weights(1, workers=1), weights(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items() if value.ndim > 1)


@pytest.mark.parametrize("make", [lambda run: load_pretrained(run, drop_path_rate=0.3), lambda run: a_vit_network(0.3)])
def test_micro_batches_make_the_step_of_the_whole_batch(run, parts, make):
    """Gradients to rounding, with stochastic depth, and with a last micro-batch that is smaller."""
    settings = Settings(epochs=1, batch_size=60, drop_path=0.3, base_lr=1e-2, warmup=0, clip_norm=None)
    train = open_shards(parts[0])
    grads = []
    for micro_batch in (60, 16, 7):
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                optim, "clip_gradients", lambda params, _, made=made: made.append([p.grad.clone() for p in params])
            )
            train_classifier(make(run), "mean", train, settings, micro_batch=micro_batch)
        grads.append(made)
    for other in grads[1:]:
        for one, parts_of_it in zip(grads[0][0], other[0], strict=True):  # of the first step
            torch.testing.assert_close(parts_of_it, one, rtol=1e-4, atol=1e-6)
    assert any((first - second).abs().max() > 1e-3 for first, second in zip(grads[0][0], grads[0][1]))


def test_micro_batches_fit_into_free_memory(run, monkeypatch):
    """The default step of 1,024 images in as many parts as memory asks for."""
    backbone, normalisation, _ = load_pretrained(run)

    def planned(free: int, batch_size: int = 1024) -> int:
        monkeypatch.setattr(footprint, "free_bytes", lambda device: free)
        return plan_micro_batch(backbone, normalisation, batch_size, torch.device("cpu"), "fp32")

    one, two, nine = (
        footprint.saved_bytes(backbone, lambda count=count: backbone(torch.zeros(count, 1, 8, 8)))
        for count in (1, 2, 9)
    )
    assert nine == pytest.approx(one + 8 * (two - one), rel=0.01)
    fixed = one - (two - one) + footprint.update_bytes(backbone)
    assert planned(2**40) == 64
    assert planned(2**40, 1000) == 63  # 15 of 63 and one of 55, not one of 40
    assert planned(2**40, 40) == 40
    assert planned(2 * (fixed + 10 * (two - one)) + 2) == 10
    with pytest.raises(UserError, match=r"images of 8 x 8 pixels needs at least 0\.00 GiB, and 0\.00 GiB are free"):
        planned(fixed)


def test_the_default_batch_needs_little_memory(run, parts, monkeypatch):
    """120 images a step; what autograd keeps at once is that of the planned micro-batch."""
    sizes = []
    monkeypatch.setattr(classifiers, "_CPU_MICRO_BATCH", 32)
    network = load_pretrained(run)
    network.backbone.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    train_classifier(network, "mean", open_shards(parts[0]), Settings(epochs=2, warmup=0))
    assert sizes[:2] == [1, 2]  # measured
    assert sizes[2:] == [30, 30, 30, 30] * 2


@pytest.mark.parametrize("size", [16, (8, 12)])
def test_images_of_another_size(run, parts, size):
    """Positions of both architectures are resampled; what is scored and trained has that size."""
    shape = (size, size) if isinstance(size, int) else size
    for make in (lambda: load_pretrained(run), a_vit_network):
        network = resize(make(), size)
        assert network.normalisation.img_size == shape
        seen = []
        network.backbone.register_forward_pre_hook(lambda _, images, seen=seen: seen.append(images[0].shape[-2:]))
        classifier = train_classifier(network, "mean", open_shards(parts[0]), SHORT)
        classifier.accuracy(open_shards(parts[1]))
        assert set(seen) == {shape}
    with pytest.raises(UserError, match=r"cannot take images of 9 x 9 pixels \(img_size\)"):
        resize(load_pretrained(run), 9)


def test_rows_so_far_are_kept_when_a_later_one_fails(run, parts, monkeypatch):
    kept = []
    monkeypatch.setattr(classifiers.Classifier, "accuracy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(run, *parts, keep=lambda rows: kept.append(len(rows)))
    assert kept == [1, 2]


@pytest.fixture(scope="module")
def vit_export(tmp_path_factory) -> Path:
    """An export of a ViT, as `selfvil export` writes it."""
    kwargs = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    folder = tmp_path_factory.mktemp("vit") / "export"
    with atomic_folder(folder) as partial:
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
        write_network(partial, backbone, kwargs, Normalisation((0.3,), (0.4,), (8, 8)), {"samples_seen": 7}, "")
    return folder


@pytest.mark.parametrize(("kind", "readout"), [("run", None), ("run", "mean"), ("vit", None), ("vit", "mean")])
def test_the_fine_tuned_network_is_loaded_by_timm(run, vit_export, parts, tmp_path, monkeypatch, kind, readout):
    """With its head, its classes by name, its image size and its outputs; and it can be fine-tuned and scored again."""
    source = run if kind == "run" else vit_export
    made, train = [], module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda *a, **o: made.append(train(*a, **o)) or made[-1])
    more = {"readout": readout, "img_size": (8, 12), "out": str(tmp_path / "out"), "labels_per_class": 3}
    rows = finetune(source, *parts, more=more)
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(3, 1, 8, 12)
    with torch.no_grad():
        assert torch.equal(tuned(images), made[0].model.eval()(images))
    cfg = tuned.pretrained_cfg
    assert cfg["label_names"] == [str(label) for label in range(10)]
    assert (cfg["num_classes"], tuple(cfg["input_size"])) == (10, (1, 8, 12))
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(tuned))
    assert view(Image.new("L", (40, 40))).shape == (1, 8, 12)
    value = next(row.value for row in rows if row.protocol.startswith("fine-tuning"))
    assert f"- Accuracy: {value:.2f} % top-1 on 80 test images" in (tmp_path / "out" / "README.md").read_text()

    with torch.no_grad():
        assert torch.equal(selfvil.load_backbone(tmp_path / "out")(images), tuned(images))
    (verified,) = verify(tmp_path / "out")
    assert "README.md" not in verified
    again = load_pretrained(tmp_path / "out")
    assert again.normalisation.img_size == (8, 12)
    for row in finetune(tmp_path / "out", *parts):
        assert row.value >= 0
    start = timm.create_model(cfg["architecture"], **model_arguments(tmp_path / "out") | {"num_classes": 0})
    start_backbone(start, tmp_path / "out")
    tuned.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(start.eval()(images), tuned(images))


def test_classes_have_the_names_of_classes_txt(run, parts, tmp_path):
    """Also where training has only some of the labels, and where the list is shorter than the labels."""
    for part, path in zip(("train", "test"), parts):
        (tmp_path / f"{part}.tar").write_bytes(Path(path).read_bytes())
    (tmp_path / "classes.txt").write_text("".join(f"digit {label}\n" for label in range(9)))
    named = str(tmp_path / "train.tar"), str(tmp_path / "test.tar")
    finetune(run, *named, more={"readout": "mean", "out": str(tmp_path / "out")})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == [f"digit {label}" for label in range(9)] + ["9"]
    assert config["selfvil"]["fine_tuning"]["labels"] == list(range(10))
    assert config["selfvil"]["samples_seen"] == 640


def test_the_network_is_written_before_it_is_scored(run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers.Classifier, "accuracy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(run, *parts, more={"out": str(tmp_path / "out")})
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 10
    assert "- Accuracy: not scored yet" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_refused_before_training(run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for out, message in ((tmp_path / "mine", "not an empty folder"),
                         (tmp_path / "mine" / "thesis.txt", "not an empty folder"),
                         (tmp_path / "mine" / "thesis.txt" / "out", "Could not write")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            finetune(run, *parts, more={"out": str(out)})


def test_two_calls_give_the_same_rows(run, parts):
    calls = [finetune(run, *parts, seed=3) for _ in range(2)]
    assert [row.value for row in calls[0]] == [row.value for row in calls[1]]


def test_heads_of_each_architecture(run, parts):
    train = open_shards(parts[0])
    for made, head, width in (
        (lambda: load_pretrained(run), "bilateral_concat", 64), (lambda: load_pretrained(run), "mean", 32),
        (a_vit_network, "cls", 32), (a_vit_network, "mean", 32),
    ):  # fmt: skip
        network = made()
        model = train_classifier(network, head, train, SHORT).model.eval()
        assert model.head.weight.shape == (10, width)
        images = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            seen = adapt(model).read_out(images, head)
            torch.testing.assert_close(model(images), model.head(seen))
    assert choose_heads(load_pretrained(run).backbone) == ["bilateral_concat", "mean"]
    assert choose_heads(a_vit()) == ["cls", "mean"]
    assert choose_heads(timm.create_model("resnet18", num_classes=0)) == ["mean"]
    assert choose_heads(a_vit(), "mean") == ["mean"]


def test_stochastic_depth_is_that_of_the_settings(run, tmp_path):
    for source in (run, export(run, tmp_path / "out")):
        for rate in (0.0, 0.3):
            backbone = load_pretrained(source, drop_path_rate=rate).backbone
            rates = {part.drop_prob for part in backbone.modules() if hasattr(part, "drop_prob")}
            assert rates == ({rate} if rate else set())


def test_labels_need_not_count_from_zero(run, tmp_path):
    """Dark images are class 3, bright ones class 7."""
    for part, shift in (("train", 0), ("test", 5)):
        files = []
        for index in range(40):
            content, label = io.BytesIO(), (3, 7)[index % 2]
            Image.new("L", (8, 8), 200 * (label == 7) + shift + index).save(content, "PNG")
            files += [(f"{index:02d}.cls", b"%d" % label), (f"{index:02d}.png", content.getvalue())]
        write_tar(tmp_path / f"{part}.tar", files)
    settings = Settings(epochs=20, batch_size=20, base_lr=2e-2, layer_decay=1.0, drop_path=0.0)
    classifier = train_classifier(load_pretrained(run), "mean", open_shards(str(tmp_path / "train.tar")), settings)
    assert classifier.classes.tolist() == [3, 7]
    assert classifier.accuracy(open_shards(str(tmp_path / "test.tar")), workers=0) == 100


def test_few_labels(parts):
    shards = open_shards(parts[0])
    few, again, other = (module._FewLabels(shards, 3, seed) for seed in (0, 0, 1))
    assert len(few) == 30
    assert np.bincount(few.labels).tolist() == [3] * 10
    assert few.ids.tolist() == again.ids.tolist() != other.ids.tolist()
    for index, of_all in enumerate(few.ids.tolist()):
        assert few.read(index) == shards.read(of_all)
        assert (few.key(index), few.shard_of(index)) == (shards.key(of_all), shards.shard_of(of_all))
        assert few.labels[index] == shards.labels[of_all]


def test_table_of_all_rows(run, parts):
    rows = finetune(run, *parts, more={"labels_per_class": 4}, baselines=True, seed=2)
    assert [(row.network, row.protocol, row.readout) for row in rows] == [
        (network, f"{protocol}, 4 labels per class", head)
        for network in ("pretrained", "untrained")
        for protocol in ("linear probe", "fine-tuning, 1 epoch")
        for head in ("bilateral_concat", "mean")
    ]
    assert {(row.train_images, row.test_images, row.seed) for row in rows} == {(40, 80, 2)}
    assert {row.network: row.samples_seen for row in rows} == {"pretrained": 640, "untrained": 0}
    assert rows[2].settings["layer_decay"] == 0.9
    out = io.StringIO()
    Console(file=out, width=120).print(as_table(rows))
    assert all(text in out.getvalue() for text in ("fine-tuning, 1 epoch", "untrained", "bilateral_concat", "mean"))
    plain = json.loads(json.dumps(as_json(rows)))
    assert {"seed", "samples_seen", "seconds", "device", "versions", "commit", "settings"} <= plain[0].keys()


def test_the_frozen_rows_are_the_linear_probe(run, parts):
    (probe, tuned) = finetune(run, *parts, more={"readout": "bilateral_concat"}, precision="bf16")
    backbone = load_pretrained(run).backbone
    features = [
        extract(
            backbone, open_shards(part), img_size=8, mean=[0.3], std=[0.4], precision="bf16",
            readout="bilateral_concat", **FAST,
        )
        for part in parts
    ]  # fmt: skip
    assert probe.value == linear_probe(*features).accuracy
    assert tuned.settings["precision"] == "bf16"


def test_mistakes_are_refused_before_training(run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
    train, test = parts
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    bare = str(write_tar(tmp_path / "bare.tar", [("a.png", image.getvalue())]))
    strange = str(write_tar(tmp_path / "strange.tar", [("a.cls", b"77"), ("a.png", image.getvalue())]))
    for arguments, options, message in [
        ((tmp_path / "no", train, test), {}, "no folder"),
        ((run, str(tmp_path / "none-*.tar"), test), {}, "none-"),
        ((run, bare, test), {}, "have no label"),
        ((run, train, bare), {}, "have no label"),
        ((run, train, strange), {}, r"labels that no training image has: \[77\]"),
        ((run, train, train), {}, "are also training images"),
        ((run, train, test), {"more": {"labels_per_class": 100}}, "fewer than the 100 labels for each class"),
        ((run, train, test), {"more": {"readout": "first"}}, "head on 'first'; choose of: bilateral_concat, mean"),
        ((run, train, test), {"more": {"readout": "cls"}}, "head on 'cls'; choose of: bilateral_concat, mean"),
        ((run, train, test), {"network": "teacher"}, "no network 'teacher'"),
        ((run, train, test), {"precision": "fp8"}, "no precision 'fp8'"),
    ]:
        with pytest.raises(UserError, match=message):
            finetune(*arguments, **options)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"base_lr": 0.0}, {"base_lr": float("nan")}, {"layer_decay": 0.0},
     {"layer_decay": 1.1}, {"weight_decay": -0.1}, {"warmup": 1.0}, {"drop_path": 1.0}, {"label_smoothing": 1.0},
     {"min_crop": 0.0}, {"min_lr": -1.0}, {"clip_norm": 0.0}],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(UserError, match=rf"^finetune\.{name} = {value}: input should be"):
        parse_settings("finetune", wrong)


def test_few_steps_are_a_warning(run, parts, caplog):
    assert Settings(epochs=3, batch_size=1024).length(120) == (120, 3)
    assert Settings(epochs=1, batch_size=1000).length(10_400) == (1000, 10)
    finetune(run, *parts, more={"readout": "mean"})
    assert "only 4 steps of 30 images" in caplog.text


def test_divergence_is_an_error(run, parts):
    with pytest.raises(UserError, match=r"diverged: the loss of step \d+ is nan; lower base_lr"):
        train_classifier(
            load_pretrained(run), "mean", open_shards(parts[0]), Settings(epochs=6, batch_size=30, base_lr=1e38)
        )


def test_command(run, parts, tmp_path, capsys, monkeypatch):
    train, test = parts
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(run), "--train", train, "--test", test, "--workers", "0",
                        "epochs=1", "batch_size=60", "--json", str(tmp_path / "rows.json"),
                        "img_size=[12,8]", f"out={tmp_path / 'out'}"])  # fmt: skip
    script = Path(__file__).parents[2] / "eval" / "finetune.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script))
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "fine-tuning, 1 epoch" in printed
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert tuned.pretrained_cfg["input_size"] == (1, 12, 8)
    assert f"import selfvil; model = selfvil.load_backbone('{tmp_path / 'out'}')" in printed
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 4
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "finetune", str(run), "--train", train, "--test", test, "layer_decay=1.5"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "finetune.layer_decay = 1.5: input should be less than or equal to 1" in error
    assert "Traceback" not in error
