"""The evaluation `segment` from shards to scores, and what it refuses."""

import io
import json
import logging
import math
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from images import png_chunk
from masked_shards import masked_image, png, write_masked
from runs import REPOSITORY, environment
from selfvil import checkpoint
from selfvil.data.index import open_shards
from selfvil.data.read import PNG_SIGNATURE
from selfvil.errors import UserError
from selfvil.evaluate import segment, settings
from selfvil.evaluate.dense.masks import open_masked
from selfvil.evaluate.score import score
from selfvil.evaluate.task import Task
from selfvil.monitor.evaluations import check_evaluations, run_evaluations
from selfvil.recipe import load
from selfvil.weights import Network, Normalisation

SHORT = {"iterations": 30, "batch_size": 4, "max_patches": 600, "crop_size": 16, "lr": 0.05, "bootstrap": 100}
MODEL = {"img_size": [16, 16], "patch_size": 4, "num_classes": 0, "embed_dim": 16, "depth": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("masked")
    return write_masked(folder / "train", 8), write_masked(folder / "test", 5, first=100)


def task(train: str, test: str, **changed) -> Task:
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3, (16, 16))

    def create() -> Network:
        torch.manual_seed(0)
        return Network(timm.create_model("vil_nano_patch4_32", **MODEL), normalisation, 0)

    options = {"name": "pretrained", "network": create(), "workers": 0} | changed
    return Task(normalisation=normalisation, train=open_shards(train), test=open_shards(test), create=create, **options)


def scores(subject: Task, **values) -> dict:
    chosen = settings("segment", SHORT | values)
    segment.check(subject, chosen)
    return {each.metric: each for each in segment.evaluate(subject, chosen)}


def save_run(folder: Path) -> Path:
    """A run folder with one checkpoint of a random network."""
    backbone = timm.create_model("vil_nano_patch4_32", **MODEL)
    meta = {
        "format": 1, "step": 5, "samples": 640, "seconds": 1.0, "seed": 0, "export": "student",
        "networks": {"student": "backbone."}, "objective": {"name": "mae"},
        "model": {"name": "vil_nano_patch4_32", "kwargs": MODEL},
        "data": {"pattern": "x.tar", "mean": [0.5] * 3, "std": [0.25] * 3, "fingerprint": "f", "num_samples": 9},
    }  # fmt: skip
    tensors = {"objective": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}
    checkpoint.save(folder / "checkpoints", 5, tensors, meta)
    return folder


# --- scores ----------------------------------------------------------------------------------------------------------


def test_where_colour_decides_raw_pixels_are_right(parts):
    found = scores(task(*parts, name="raw pixels", network=None), iterations=200)
    assert list(found) == ["segment_knn", "segment_logistic", "segment_linear"]
    assert found["segment_knn"].value == 100
    assert found["segment_logistic"].value == 100
    assert found["segment_linear"].value > 80  # bilinear logits round the corners of cells of four pixels
    assert found["segment_knn"].readout == "4 x 4 pixels"


def test_a_score_holds_all_that_is_measured(parts):
    for found in scores(task(*parts)).values():
        labelled = sum(int((masked_image(i)[1] != 255).sum()) for i in range(100, 105))
        details = json.loads(json.dumps(found.details))
        matrix = np.array(details["confusion"])
        assert matrix.shape == (3, 3)
        assert matrix.sum() == labelled  # every labelled pixel of images of four sizes is predicted once
        ious = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
        assert list(details["iou"].values()) == pytest.approx(100 * ious, abs=1e-3)
        assert found.value == pytest.approx(100 * ious.mean())
        assert details["pixel_accuracy"] == pytest.approx(100 * matrix.trace() / labelled, abs=1e-3)
        assert found.interval[0] <= found.value <= found.interval[1]
        assert (found.measure, found.train_images, found.test_images) == ("mIoU", 8, 5)


def test_the_same_seed_gives_the_same_scores(parts):
    first, again = scores(task(*parts)), scores(task(*parts))
    assert [each.details["confusion"] for each in first.values()] == [
        each.details["confusion"] for each in again.values()
    ]
    other = scores(task(*parts, seed=1), protocols="linear")
    assert other["segment_linear"].details["confusion"] != first["segment_linear"].details["confusion"]


def test_ignored_classes_are_not_scored(parts):
    """Ignoring class 1 leaves two classes, and the pixels of the third out of every count."""
    found = scores(task(*parts, name="raw pixels", network=None), protocols=["knn"], ignore=[1, 255])["segment_knn"]
    assert found.details["iou"] == {"class 0": 100, "class 1": None, "class 2": 100}
    assert np.array(found.details["confusion"])[1].sum() == 0


def test_images_are_resized_and_scored_at_the_size_of_the_mask(parts):
    found = scores(task(*parts, name="raw pixels", network=None), protocols=["knn"], short_side=48)["segment_knn"]
    labelled = sum(int((masked_image(i)[1] != 255).sum()) for i in range(100, 105))
    assert np.sum(found.details["confusion"]) == labelled
    assert found.value > 70


def test_pictures_and_earlier_files_are_kept(parts, tmp_path):
    for _ in range(2):
        found = scores(task(*parts), protocols=["knn", "logistic"], out=str(tmp_path / "new" / "pictures"))
    names = sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir())
    assert names == ["segment_pretrained-2.png", "segment_pretrained.png"]
    with Image.open(found["segment_knn"].details["pictures"][0]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    large = {tuple(colour) for colour, count in zip(colours.tolist(), counts) if count > 500}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (0, 0, 0)} <= large  # three classes and ignored


def test_masks_beside_images_are_found(tmp_path, parts):
    train = write_masked(tmp_path / "train", 4, mask="png")
    shards = open_shards(train, image="bmp")
    assert len(open_masked(shards)) == 4
    assert (open_masked(shards).counts == open_masked(open_shards(parts[0])).counts[:4]).all()
    with pytest.raises(UserError, match=r"4 of the 4 images .* have no mask .*expected KEY\.tiff"):
        open_masked(shards, "tiff")


def test_palette_indices_are_ids(tmp_path):
    mask = Image.fromarray(masked_image(0)[1], "P")
    mask.putpalette(list(range(255, -1, -1)) * 3)
    file = io.BytesIO()
    mask.save(file, "PNG")
    changed = open_masked(open_shards(write_masked(tmp_path, 2, k0={"mask.png": file.getvalue()})))
    plain = open_masked(open_shards(write_masked(tmp_path / "plain", 2)))
    assert (changed.counts == plain.counts).all()


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path, parts, caplog):
    damaged = png(masked_image(1)[0])
    damaged = damaged[: len(damaged) // 2]
    train = write_masked(tmp_path, 4, k1={"png": damaged})
    with caplog.at_level(logging.WARNING):
        found = scores(task(train, parts[1]))
    assert "1 images cannot be read and are left out (first: k1" in caplog.text
    assert all(math.isfinite(each.value) for each in found.values())


def test_baselines_and_a_run_are_scored_by_the_command(parts, tmp_path):
    rows = score(
        save_run(tmp_path / "run"), *parts, {"segment": settings("segment", SHORT | {"iterations": 5})},
        baselines=True, workers=0, device="cpu",
    )  # fmt: skip
    assert [(row.network, row.metric) for row in rows] == [
        (network, f"segment_{name}")
        for network in ("pretrained", "untrained", "raw pixels")
        for name in ("knn", "logistic", "linear")
    ]


def test_it_is_an_entry_of_a_recipe(parts, tmp_path):
    """During a run the same network has the same scores, under the names of metrics."""
    values = {"train": parts[0], "test": parts[1]} | SHORT
    words = [f"eval.segment.{key}={value}" for key, value in values.items()]
    model = [f"model.{key}={value}" for key, value in MODEL.items() if key != "num_classes"]
    recipe = load("photos_laptop", [*words, *model, "model.name=vil_nano_patch4_32", "data.workers=0"])
    assert check_evaluations(recipe) == []
    backbone = timm.create_model(recipe.model.name, **recipe.model.create_kwargs()).eval()
    found = run_evaluations(recipe, [0], backbone, torch.device("cpu"), guard=lambda what: nullcontext())
    assert list(found) == ["segment_knn", "segment_logistic", "segment_linear"]
    assert all(0 <= value <= 100 for value in found.values())


@pytest.mark.timeout(200)
def test_two_processes_give_the_scores_of_one(parts, tmp_path):
    run, out = save_run(tmp_path / "run"), tmp_path / "two.json"
    values = [f"{key}={value}" for key, value in SHORT.items()]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "eval/segment.py", run,
         "--train", parts[0], "--test", parts[1], "--workers", "0", "--json", out, *values],
        cwd=REPOSITORY, check=True, env=environment(OMP_NUM_THREADS="1"), timeout=180, capture_output=True,
    )  # fmt: skip
    alone = score(run, *parts, {"segment": settings("segment", SHORT)}, workers=0, device="cpu")
    together = json.loads(out.read_text())
    assert len(together) == 3
    for one, both in zip(alone, together):
        if one.metric != "segment_linear":  # crops of other batches: equal to rounding
            assert one.details["confusion"] == both["details"]["confusion"]
        assert one.value == pytest.approx(both["value"], abs=0.5)
        assert one.interval == pytest.approx(both["interval"], abs=0.5)


# --- refusals --------------------------------------------------------------------------------------------------------

_IMAGE, _MASK = masked_image(0)
_SMALL = png(np.zeros((1, 1, 3), np.uint8))
_LONG = png(np.zeros((8, 20_000, 3), np.uint8))
_HUGE = (
    PNG_SIGNATURE
    + png_chunk(b"IHDR", struct.pack(">2I5B", 20_000, 20_000, 8, 2, 0, 0, 0))
    + png_chunk(b"IDAT", zlib.compress(bytes(100)))
    + png_chunk(b"IEND", b"")
)
REFUSED = {
    "another size": ({"mask.png": png(_MASK[:-4])}, "its mask has 48 × 28 pixels, the image 48 × 32 pixels"),
    "no mask": ({"mask.png": b""}, "1 of the 4 images in .* have no mask .first: k0"),
    "rgb": ({"mask.png": png(_IMAGE)}, "its mask has the mode RGB; expected one channel of 8 bits"),
    "16 bits": ({"mask.png": png(_MASK.astype(np.uint16))}, "its mask has the mode I;16"),
    "no picture": ({"mask.png": b"no picture"}, "not an image file of a known format"),
    "truncated": ({"mask.png": png(_MASK)[:70]}, "its mask cannot be decoded|cannot be decoded"),
    "one pixel": ({"png": _SMALL, "mask.png": png(np.zeros((1, 1), np.uint8))}, "segmentation needs at least 8 on a"),
    "long": ({"png": _LONG, "mask.png": png(np.zeros((8, 20_000), np.uint8))}, "needs at most 8,192 on a side"),
    "id out of range": (
        {"mask.png": png(np.where(_MASK == 0, 7, _MASK).astype(np.uint8))},
        "class id 7, but .*names 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_masks_and_images_are_refused(name, tmp_path, parts):
    members, message = REFUSED[name]
    train = write_masked(tmp_path, 4, k0=members)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(UserError, match=message):
        scores(task(train, parts[1]))


def test_a_huge_image_is_refused_by_its_header(tmp_path, parts):
    with pytest.raises(UserError, match=r"k0: cannot be decoded: .*400000000 pixels"):
        scores(task(write_masked(tmp_path, 4, k0={"png": _HUGE}), parts[1]))


def test_wrong_classes_are_refused(tmp_path, parts):
    train, test = parts
    with pytest.raises(UserError, match=r"8 of the 8 test images are also training images .* in train"):
        scores(task(train, train))
    with pytest.raises(UserError, match=r"hold only ignored pixels \(ignore = \[0, 1, 2, 255\]\)"):
        scores(task(train, test), ignore=[0, 1, 2, 255])
    with pytest.raises(UserError, match="one class only, id 2"):
        scores(task(train, test), ignore=[0, 1, 255])
    new = {f"k{i}": {"mask.png": png(np.full_like(masked_image(i)[1], 5))} for i in range(100, 102)}
    with pytest.raises(UserError, match=r"classes that no training mask has: 5. .*ignore=\[255,5\]"):
        scores(task(train, write_masked(tmp_path, 4, first=100, **new)))


def test_a_class_named_void_is_reported(tmp_path, parts):
    train = write_masked(tmp_path, 4)
    (tmp_path / "classes.txt").write_text("red\ngreen\nVoid\n")
    warnings = segment.check(task(train, parts[1]), settings("segment", SHORT))
    assert any("class 2 is named 'Void'" in each and "ignore=[2,255]" in each for each in warnings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocols": ["nearest"]}, "protocols"),
        ({"stride": 600}, "stride = 600 is more than crop_size = 512"),
        ({"scale": [2, 0.5]}, "two ascending numbers"),
        ({"ignore": [256]}, "ignore"),
        ({"k": []}, "k"),
        ({"max_patches": 0}, "max_patches"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        settings("segment", values)


def test_networks_without_patch_features_are_refused(parts):
    def network(backbone) -> Network:
        return Network(backbone, Normalisation((0.5,) * 3, (0.25,) * 3, (224, 224)), 0)

    with pytest.raises(UserError, match="VisionLSTM gives no patch features of layers = 9"):
        scores(task(*parts), layers=9)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1,), embed_dim=24, num_heads=(1,))
    with pytest.raises(UserError, match="cannot take crops of several sizes"):
        scores(task(*parts, network=network(swin)))


def test_one_training_image_needs_no_choice(tmp_path, parts):
    train = write_masked(tmp_path, 1)
    with pytest.raises(UserError, match="there is one training image"):
        scores(task(train, parts[1]))
    found = scores(task(train, parts[1]), k=1, distances="l2", c=1, protocols=["knn", "logistic"])
    assert found["segment_knn"].details["chosen"]["k"] == 1
