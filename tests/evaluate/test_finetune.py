"""Fine-tuning: that it learns, is repeatable, resumes, uses several processes; what it writes, and what it refuses."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import runs
import selfvil
from selfvil import checkpoint, cli, footprint, machine, optim, trainer
from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate import finetune as module
from selfvil.evaluate import settings as parse_settings
from selfvil.evaluate.features import extract
from selfvil.evaluate.finetune import Settings, choose_heads, length, recipe
from selfvil.evaluate.linear import linear_probe
from selfvil.evaluate.score import Row, as_json, as_table, score
from selfvil.evaluate.task import Task
from selfvil.export import export
from selfvil.objectives.supervised import Supervised
from selfvil.recipe import parse
from selfvil.start_from import start_backbone
from selfvil.stop import Stopped
from selfvil.timm_folder import atomic_folder, write_network
from selfvil.trainer import Trainer
from selfvil.verification import verify
from selfvil.weights import Normalisation, load_pretrained, model_arguments
from tars import write_tar

KWARGS = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "num_classes": 0, "embed_dim": 32, "depth": 2}
SHORT = Settings(epochs=1, batch_size=30, base_lr=4e-3, layer_decay=0.9, drop_path=0.0, min_crop=0.8)
FAST = {"workers": 0, "device": "cpu", "trainer": Trainer()}
ONE = {"readout": "mean"}


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


def a_task(source, parts, **more) -> Task:
    network = load_pretrained(source)
    train, test = (open_shards(part) for part in parts)
    return Task(
        "pretrained", network, network.normalisation, train, test, lambda: load_pretrained(source), workers=0,
        source=str(source), trainer=Trainer(), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vit_export(tmp_path_factory) -> Path:
    """An export of a ViT, as `selfvil export` writes it."""
    kwargs = {"img_size": [8, 8], "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    folder = tmp_path_factory.mktemp("vit") / "export"
    with atomic_folder(folder) as partial:
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
        write_network(partial, backbone, kwargs, Normalisation((0.3,), (0.4,), (8, 8)), {"samples_seen": 7}, "")
    return folder


# --- the run ---------------------------------------------------------------------------------------------------------


def test_it_learns(run, parts):
    """Ten classes, 120 images, a random network to start from: far above the 10 % of chance."""
    more = {"epochs": 15, "batch_size": 20, "base_lr": 4e-2, "layer_decay": 1.0, "readout": "bilateral_concat"}
    assert finetune(run, *parts, more=more)[-1].value > 50


def test_the_recipe_is_that_of_the_settings(run, parts, tmp_path):
    task = a_task(run, parts, seed=5)
    settings = Settings(
        epochs=3, batch_size=40, base_lr=1e-3, warmup=0.25, layer_decay=0.5, weight_decay=0.1, drop_path=0.3, mixup=0.2,
        cutmix=0.4, randaugment=4, erasing=0.1, ema_decay=0.9, clip_norm=2.0, head_lr=2.0, min_crop=0.3, stride=1,
        img_size=(8, 12), label_smoothing=0.2, flip=False,
    )  # fmt: skip
    made = parse(recipe(task, settings, "mean", tmp_path, tmp_path / "start"), "here")
    assert made.model.create_kwargs() == KWARGS | {"img_size": [8, 12], "drop_path_rate": 0.3, "stride": 1}
    assert (made.model.start_from, made.model.start_heads) == (str(tmp_path / "start"), "new")
    assert (made.data.mean, made.data.std, made.run.seed, made.budget.steps) == ([0.3], [0.4], 5, 9)
    wanted = {"readout": "mean", "mixup": 0.2, "cutmix": 0.4, "randaugment": 4, "erasing": 0.1, "ema_decay": 0.9,
              "head_lr": 2.0, "crop_scale": [0.3, 1.0], "label_smoothing": 0.2, "flip": False,
              "three_augment": False, "color_jitter": 0.0}  # fmt: skip
    assert made.objective.model_dump(mode="json").items() >= wanted.items()
    wanted = {"batch_size": 40, "base_lr": 1e-3, "warmup": 0.25, "layer_decay": 0.5, "weight_decay": 0.1,
              "clip_norm": 2.0, "betas": [0.9, 0.999], "min_lr": 1e-6}  # fmt: skip
    assert made.optim.model_dump(mode="json").items() >= wanted.items()


def test_the_weights_follow_from_what_was_pretrained(run, parts, tmp_path):
    """After a step with a rate of nearly 0, they are those of the source; positions are resampled to other sizes."""
    more = {"run": str(tmp_path / "kept"), "epochs": 0.25, "base_lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0} | ONE
    finetune(run, *parts, more=more)
    tuned, before = load_pretrained(tmp_path / "kept" / "mean").backbone, load_pretrained(run).backbone
    for name, value in before.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-9)
    finetune(run, *parts, more=more | {"run": str(tmp_path / "large"), "img_size": (16, 12)})
    before.set_input_size((16, 12))
    torch.testing.assert_close(load_pretrained(tmp_path / "large" / "mean").backbone.pos_embed, before.pos_embed)


def test_two_calls_give_the_same_rows(run, parts):
    calls = [finetune(run, *parts, seed=3, more=ONE) for _ in range(2)]
    assert [row.value for row in calls[0]] == [row.value for row in calls[1]]


def test_an_interrupted_fine_tuning_continues_by_the_same_command(run, parts, tmp_path):
    """Stopped after 6 of 8 steps: the weights are those of a straight fine-tuning, bit for bit."""
    more = {"epochs": 2, "mixup": 0.8, "drop_path": 0.2, "ema_decay": 0.8} | ONE
    straight = finetune(run, *parts, more=more | {"run": str(tmp_path / "straight")})
    forward, calls = Supervised.forward, []

    def dies(self, *arguments):
        if self.training and arguments[1].total_steps == 8:  # not a forward pass that measures memory
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
        return forward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            finetune(run, *parts, more=more | {"run": str(tmp_path / "run")})
    assert checkpoint.newest(tmp_path / "run" / "mean" / "checkpoints").step in (5, 6)  # the last one may be unfinished
    again = finetune(run, *parts, more=more | {"run": str(tmp_path / "run")})
    assert [row.value for row in again] == [row.value for row in straight]
    runs.assert_same_state(tmp_path / "straight" / "mean", tmp_path / "run" / "mean")


def test_a_stopped_fine_tuning_has_the_status_of_a_run(run, parts, tmp_path, monkeypatch):
    """pause_minutes stops the run in the same way as a signal."""
    whole = module.recipe
    monkeypatch.setattr(
        module, "recipe", lambda *a: (made := whole(*a)) | {"budget": made["budget"] | {"pause_minutes": 1e-9}}
    )
    for more, message in (
        ({"run": str(tmp_path / "run")}, "the same command continues it"),
        ({}, "without run=FOLDER"),
    ):
        with pytest.raises(Stopped, match=message) as stopped:
            finetune(run, *parts, more=more | ONE)
        assert stopped.value.exit_status == 75


def test_a_kept_run_is_not_continued_from_another_network(run, vit_export, parts, tmp_path):
    finetune(run, *parts, more=ONE | {"run": str(tmp_path / "run")})
    with pytest.raises(UserError, match="holds the fine-tuning of another network than"):
        finetune(vit_export, *parts, more=ONE | {"run": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"another recipe \(optim.base_lr: 0.004 -> 0.001"):
        finetune(run, *parts, more=ONE | {"run": str(tmp_path / "run"), "base_lr": 1e-3})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_two_processes_give_the_rows_of_one(run, parts, tmp_path, strategy):
    """Started by torchrun, with a folder or without; weights to the rounding of sums."""
    words = [str(run), "--train", parts[0], "--test", parts[1], "--workers", "0", "epochs=2", "batch_size=40",
             "base_lr=4e-3", "mixup=0.8", "drop_path=0.1", "readout=mean"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if strategy == "zero1":
        pytest.importorskip("deepspeed")
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
            "DS_ACCELERATOR": "cpu",
        }
    rows = []
    for processes in (1, 2):
        file = tmp_path / f"rows-{processes}.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        command = [sys.executable, *torchrun, "eval/finetune.py", *words, f"run={tmp_path / str(processes)}"]
        done = subprocess.run(
            [*command, "--json", str(file)], cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=400,
            env=environment if processes == 2 else os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(file.read_text()))
    assert [row["metric"] for row in rows[0]] == [row["metric"] for row in rows[1]] == ["frozen_mean", "finetune_mean"]
    assert rows[0][0]["value"] == rows[1][0]["value"]
    assert rows[1][1]["settings"]["processes"] == 2
    one, two = (load_pretrained(tmp_path / str(processes) / "mean").backbone.state_dict() for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("readout", ["bilateral_concat", "mean"])
def test_long_sequences_of_both_blocks(parts, tmp_path, readout):
    """7 x 7 tokens for 4 x 4."""
    for name in ("vil_nano_patch4_32", "vil_mlp_nano_patch4_32"):
        with atomic_folder(tmp_path / name) as partial:
            kwargs = {key: value for key, value in KWARGS.items() if key != "num_classes"}
            backbone = timm.create_model(name, num_classes=0, **kwargs)
            write_network(partial, backbone, kwargs, Normalisation((0.3,), (0.4,), (8, 8)), {"samples_seen": 7}, "")
        more = {"readout": readout, "stride": 1, "out": str(tmp_path / f"{name}-out"), "batch_size": 120}
        assert [row.readout for row in finetune(tmp_path / name, *parts, more=more)] == [readout] * 2
        tuned = timm.create_model(f"local-dir:{tmp_path / name}-out", pretrained=True).eval()
        grid = tuned.forward_features(torch.zeros(1, 1, 8, 8)).shape[1:3]
        assert grid == (7, 7)


def test_few_steps_and_sizes_of_steps(run, parts, caplog):
    task = a_task(run, parts)
    assert length(task, Settings(epochs=3, batch_size=1024)) == (112, 3)  # of 120: it divides into 16 parts
    assert length(task, Settings(epochs=3, batch_size=50)) == (50, 7)
    assert length(task, Settings(epochs=1, batch_size=33, mixup=0.8)) == (32, 4)
    assert length(task, Settings(epochs=1, batch_size=33, labels_per_class=2)) == (20, 1)
    task.processes = type(task.processes)(0, 3)
    assert length(task, Settings(epochs=1, batch_size=100)) == (99, 1)
    finetune(run, *parts, more=ONE)
    assert "only 4 steps of 30 images" in caplog.text


def test_micro_batches_fit_into_machine(run, parts, tmp_path, monkeypatch):
    """In equal parts, that are even where images are mixed."""
    task, made = a_task(run, parts), []
    monkeypatch.setattr(trainer, "pretrain", lambda recipe, summarise: made.append(recipe.optim.accumulate))

    def parts_of(free: int, **settings) -> int:
        monkeypatch.setattr(machine, "free_bytes", lambda device: free)
        task.trainer.run(recipe(task, Settings(**settings), "mean", tmp_path, None), torch.device("cpu"))
        return made[-1]

    network = load_pretrained(run).backbone
    network.reset_classifier(10, "avg")
    one, two = (
        footprint.saved_bytes(network, lambda count=count: network(torch.zeros(count, 1, 8, 8))) for count in (1, 2)
    )
    fixed = footprint.update_bytes(network)
    assert parts_of(2**40) == 2  # 112 images on a CPU: at most 64
    assert parts_of(2**40, batch_size=60) == 1
    assert parts_of(2 * (fixed + 21 * (two - one)), batch_size=60, drop_path=0.0) == 3
    assert parts_of(2 * (fixed + 21 * (two - one)), batch_size=60, mixup=0.8, drop_path=0.0) == 3
    assert parts_of(2 * (fixed + 16 * (two - one)), batch_size=60, mixup=0.8, drop_path=0.0) == 5
    with pytest.raises(UserError, match=r"images of 8 x 8 pixels needs at least 0\.00 GiB, and 0\.00 GiB are free"):
        parts_of(fixed)
    monkeypatch.setattr(trainer.memory, "saved_bytes", lambda *_: torch.empty(2**29, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"four images of 8 x 8 pixels need more than the 0\.25 GiB that are free"):
        parts_of(2**28)


@pytest.mark.parametrize("name", ["vil", "vit"])
def test_each_layer_has_its_rate(vit_export, name):
    source = timm.create_model("vil_nano_patch4_32", **KWARGS | {"num_classes": 10})
    model = source if name == "vil" else selfvil.load_backbone(vit_export, num_classes=10)
    scales = optim.layer_lr_scales(model, 0.5)
    assert scales.keys() == {name for name, _ in model.named_parameters()}
    # Stem, two layers (each a pair of blocks in a Vision-LSTM), head; the last norm goes with the last layer.
    expected = {"patch_embed": 0.125, "pos_embed": 0.125, "cls_token": 0.125,
                "blocks.0": 0.25, "blocks.1": 0.5, "norm": 0.5, "head": 1.0}  # fmt: skip
    for parameter, scale in scales.items():
        assert scale == next(value for prefix, value in expected.items() if parameter.startswith(prefix)), parameter


# --- rows and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "readout"), [("run", None), ("run", "mean"), ("vit", None), ("vit", "mean")])
def test_the_fine_tuned_network_is_loaded_by_timm(run, vit_export, parts, tmp_path, kind, readout):
    """With its head, its classes by name, its image size and its outputs; and it can be fine-tuned and scored again."""
    source, kept = run if kind == "run" else vit_export, tmp_path / "runs"
    more = {"readout": readout, "img_size": (8, 12), "out": str(tmp_path / "out"), "labels_per_class": 3}
    rows = finetune(source, *parts, more=more | {"run": str(kept)})
    head = readout or ("cls" if kind == "vit" else "bilateral_concat")
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(3, 1, 8, 12)
    with torch.no_grad():
        assert torch.equal(tuned(images), load_pretrained(kept / head).backbone.eval()(images))
    cfg = tuned.pretrained_cfg
    assert cfg["label_names"] == [str(label) for label in range(10)]
    assert (cfg["num_classes"], tuple(cfg["input_size"])) == (10, (1, 8, 12))
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(tuned))
    assert view(Image.new("L", (40, 40))).shape == (1, 8, 12)
    value = next(row.value for row in rows if row.protocol.startswith("fine-tuning"))
    assert f"- Accuracy: {value:.2f} % top-1 on 80 test images" in (tmp_path / "out" / "README.md").read_text()
    own = score(tmp_path / "out", *parts, {"accuracy": parse_settings("accuracy")}, **FAST)
    assert next((row.measure, row.value) for row in own) == ("top-1", value)

    with torch.no_grad():
        assert torch.equal(selfvil.load_backbone(tmp_path / "out")(images), tuned(images))
    (verified,) = verify(tmp_path / "out")
    assert "README.md" not in verified
    again = load_pretrained(tmp_path / "out")
    assert again.normalisation.img_size == (8, 12)
    assert [row.metric for row in finetune(tmp_path / "out", *parts, more={"readout": head})] == [
        f"frozen_{head}", f"finetune_{head}"
    ]  # fmt: skip
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
    monkeypatch.setattr(module, "rank_of_truth", lambda *_, **__: 1 / 0)
    kept = []
    with pytest.raises(ZeroDivisionError):
        finetune(run, *parts, more={"out": str(tmp_path / "out")}, keep=lambda rows: kept.append(len(rows)))
    assert kept == [1, 2]  # rows so far are kept when a later one fails
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 10
    assert "- Accuracy: not scored yet" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_refused_before_training(run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no fine-tuning: choose a new folder"):
        finetune(run, *parts, more={"run": str(tmp_path / "mine")})
    for out, message in ((tmp_path / "mine", "not an empty folder"),
                         (tmp_path / "mine" / "thesis.txt", "not an empty folder"),
                         (tmp_path / "mine" / "thesis.txt" / "out", "Could not write")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            finetune(run, *parts, more={"out": str(out)})


def test_heads_of_each_architecture(run, vit_export):
    vil, vit = (load_pretrained(source).backbone for source in (run, vit_export))
    assert choose_heads(vil) == ["bilateral_concat", "mean"]
    assert choose_heads(vit) == ["cls", "mean"]
    assert choose_heads(timm.create_model("resnet18", num_classes=0)) == ["mean"]
    assert choose_heads(vit, "mean") == ["mean"]


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
    two = str(tmp_path / "train.tar"), str(tmp_path / "test.tar")
    more = {"epochs": 20, "batch_size": 20, "base_lr": 2e-2, "layer_decay": 1.0, "out": str(tmp_path / "out")} | ONE
    assert finetune(run, *two, more=more)[-1].value == 100
    assert selfvil.load_backbone(tmp_path / "out").num_classes == 2
    assert score(tmp_path / "out", *two, {"accuracy": parse_settings("accuracy")}, **FAST)[0].value == 100


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
            readout="bilateral_concat", workers=0, device="cpu",
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


def test_divergence_is_an_error(run, parts):
    with pytest.raises(UserError, match=r"(loss|grad_norm).* became NaN or infinite by step \d+ .*Lower optim.base_lr"):
        finetune(run, *parts, more={"epochs": 6, "base_lr": 1e38} | ONE)


def test_inside_a_run_it_is_refused_with_the_command(run, parts, tmp_path, digit_shards):
    from selfvil.pretrain import pretrain

    entry = [f"eval.finetune.train={parts[0]}", f"eval.finetune.test={parts[1]}"]
    with pytest.raises(
        UserError, match=r"eval.finetune: fine-tuning is a training run of its own.*selfvil eval finetune"
    ):
        pretrain(runs.small("mae", digit_shards, tmp_path / "run", *entry))


def test_command(run, parts, tmp_path, capsys, monkeypatch):
    train, test = parts
    monkeypatch.setenv("COLUMNS", "140")  # the table's lines are not wrapped
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
