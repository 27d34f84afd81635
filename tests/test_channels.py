"""Runs, evaluations and exports on images with 12 channels of 16 bits, and on other numbers of channels."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv

import runs
import selfvil
from images import dicom, npy, png16, tifffile_bytes
from selfvil.build import build_objective, open_training
from selfvil.cli import app
from selfvil.data import stats
from selfvil.data.arrays import decode_pixels
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.data.pack import pack
from selfvil.errors import UserError
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.mae import reconstruction
from selfvil.pretrain import pretrain
from selfvil.recipe import load, read
from selfvil.weights import load_export
from tars import write_tar

BANDS = 12
SMALL = [
    "model.img_size=16", "model.patch_size=4", "model.embed_dim=32", "model.depth=1", f"model.in_chans={BANDS}",
    "data.stats=auto", "data.workers=0", "run.precision=fp32", "run.threads=1", "optim.batch_size=40",
    "budget.epochs=null", "budget.samples=null", "budget.steps=6", "monitor.log_every=3", "monitor.tensorboard=false",
    "monitor.pictures_every=3", "monitor.doctor_every=3", "run.checkpoint_every=3",
]  # fmt: skip
_OBJECTIVES = {name: overrides for name, overrides in runs._SMALL.items() if name != "distill"}


def tile(i):
    """A tile of uint16 whose two classes differ in the relation of bands; the values are dark, as reflectances are."""
    rng = np.random.default_rng(i)
    spectrum = 300 + 150 * np.arange(BANDS) if i % 2 else 2100 - 150 * np.arange(BANDS)
    field = rng.normal(0, 1, (20, 20, 1)) * 120 + rng.normal(0, 40, (20, 20, BANDS))
    return np.clip(spectrum + field, 0, 65535).astype(np.uint16)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Shards of 80 training and 40 test tiles, and the measured statistics."""
    folder = tmp_path_factory.mktemp("tiles")
    for name, first, count in (("train", 0, 80), ("test", 80, 40)):
        members = []
        for i in range(first, first + count):
            data = tifffile_bytes(tile(i), planarconfig="contig", compression="zlib", predictor=True)
            members += [(f"{i:04d}.tif", data), (f"{i:04d}.cls", b"%d" % (i % 2))]
        write_tar(folder / f"{name}.tar", members)
    shards = open_shards(folder / "train.tar")
    stats.save(shards, stats.measure(shards))
    return folder


def recipe(name, tiles, out, *more):
    own = [text for text in _OBJECTIVES[name] if text not in runs._GREY]
    if name == "supervised":
        own = [text for text in own if "randaugment" not in text] + ["objective.randaugment=null"]
    overrides = [f"data.train={tiles}/train.tar", f"run.out={out}", *own, *SMALL, *more]
    return load(runs.PACKAGED[name], overrides)


@pytest.mark.parametrize("name", sorted(_OBJECTIVES))
def test_every_objective_trains_on_twelve_bands(tiles, tmp_path, name):
    found = pretrain(recipe(name, tiles, tmp_path / "run", "budget.steps=2", "monitor.pictures_every=2"))
    assert found.finished
    assert np.isfinite(found.loss)
    written = read(tmp_path / "run" / "recipe.yaml")
    assert written.data.stats == "given"
    assert len(written.data.mean) == BANDS
    pictures = list((tmp_path / "run").rglob("*.png"))
    assert pictures
    assert all(Image.open(picture).mode == "RGB" for picture in pictures)


@pytest.mark.parametrize("name", sorted(_OBJECTIVES))
@pytest.mark.parametrize(("channels", "shown"), [(2, (0, 0, 0)), (BANDS, (7, 3, 1))])
def test_the_picture_of_every_objective_shows_the_chosen_channels(tiles, tmp_path, name, channels, shown):
    statistics = ["data.stats=given", f"data.mean={[0.5] * channels}", f"data.std={[0.2] * channels}"]
    more = [f"model.in_chans={channels}", *statistics, f"monitor.picture_channels={list(shown)}"]
    objective = build_objective(recipe(name, tiles, tmp_path / "run", *more), False)
    images = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    views = [images] * len(objective.views())
    batch = SimpleNamespace(views=views, positions=torch.arange(3), labels=torch.tensor([0, 1, 0]))
    tile = objective.picture(batch, Progress(0, 10, 5.0, 0))[:, :16, :16]
    expected = (images[0, list(shown)] / 5 + 0.5).clamp(0, 1)
    if name in ("ibot", "dinov2"):  # masked patches have the mean colour
        expected = torch.where(tile == 0.5, tile, expected)
        assert float((tile == 0.5).float().mean()) < 0.6
    torch.testing.assert_close(tile, expected)


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mae"
    pretrain(recipe("mae", tiles, out))
    return out


def selfvil_command(*arguments):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_is_evaluated_exported_and_embedded(tiles, trained, tmp_path):
    train, test = tiles / "train.tar", tiles / "test.tar"
    selfvil_command("eval", "knn", trained, "--train", train, "--test", test, "--json", tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert max(row["value"] for row in rows) > 90, "the spectra of the classes differ"
    out = tmp_path / "export"
    selfvil.export(trained, out)
    config = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [BANDS, 16, 16]
    measured = stats.load(open_shards(train), BANDS)
    assert (config["mean"], config["std"]) == (measured.mean, measured.std)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    images = torch.randn(2, BANDS, 16, 16)
    assert torch.equal(loaded.eval()(images), load_export(out).backbone.eval()(images))
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(out))
    (tmp_path / "tile.tif").write_bytes(tifffile_bytes(tile(3), planarconfig="contig"))
    names = {}
    exec(code.replace('"tile.tif"', f'"{tmp_path / "tile.tif"}"'), names)  # the card's own code
    assert names["features"].shape[0] == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.npy").write_bytes(npy(tile(i)))
    vectors = selfvil.Embedder(str(out)).transform([tile(0), tile(1), str(folder / "1.npy")])
    np.testing.assert_allclose(vectors[1], vectors[2], rtol=1e-6)
    selfvil.embed(folder, out, tmp_path / "embeddings.npy")
    selfvil_command("neighbours", tmp_path / "embeddings.npy", folder / "1.npy", "--out", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.slow
def test_other_commands_take_twelve_bands(tiles, trained, tmp_path):
    images = "--train", tiles / "train.tar", "--test", tiles / "test.tar", "--workers", 0
    selfvil_command("export", trained, tmp_path / "export", "--onnx", "--int8", "--torch-export", *images[:4])
    assert {"model.onnx", "model.int8.onnx", "model.pt2"} <= {path.name for path in (tmp_path / "export").iterdir()}
    selfvil_command("verify", tmp_path / "export")
    selfvil_command("embed", tiles / "test.tar", "--model", trained, "--out", tmp_path / "e.npy", "--workers", 0)
    selfvil_command("duplicates", tmp_path / "e.npy", "--out", tmp_path / "sheet.png")
    selfvil_command("eval", "linear_grid", trained, *images, "epochs=1")
    selfvil_command("eval", "finetune", trained, *images, "epochs=1", "batch_size=16")
    selfvil_command("eval", "compare", "knn", trained, tmp_path / "export", *images)


def test_a_picture_of_twelve_bands_shows_the_chosen_ones():
    spec = ImageSpec((8, 8), 4, BANDS, [0.03] * BANDS, [0.01] * BANDS, shown=(7, 3, 1))
    images = torch.randn(2, BANDS, 8, 8)
    shown = spec.rgb(images)
    assert torch.allclose(shown, (images[:, [7, 3, 1]] / 5 + 0.5).clamp(0, 1))
    picture = reconstruction(images, torch.zeros(2, 4), torch.zeros(2, 4, 16 * BANDS), spec, normalised=True)
    assert picture.shape == (3, 16, 24)
    grey = ImageSpec((8, 8), 4, 2, [0.03] * 2, [0.01] * 2)
    assert grey.rgb(images[:, :2]).shape == (2, 3, 8, 8)
    photo = ImageSpec((8, 8), 4, 3, [0.5] * 3, [0.2] * 3)
    assert torch.equal(photo.rgb(images[:, :3]), (images[:, :3] * 0.2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_resumed_run_equals_a_straight_one(tiles, tmp_path, name):
    more = [] if name == "mae" else ["data.channel_drop=0.3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pretrain(recipe(name, tiles, straight, *more))
    pretrain(recipe(name, tiles, stopped, *more, "budget.pause_minutes=1e-9"))
    for _ in range(8):
        if pretrain(recipe(name, tiles, stopped, *more)).finished:
            break
    runs.assert_same_state(straight, stopped)


def test_batches_do_not_depend_on_workers_and_processes(tiles, tmp_path):
    settings, shards = open_training(recipe("dino", tiles, tmp_path / "run", "data.channel_drop=0.3"))
    views = build_objective(settings).views()

    def batches(**how):
        found = train_batches(shards, views, seed=1, batch_size=16, stop_step=2, channels=BANDS, **how)
        return [view for batch in found for view in batch.views]

    whole = batches()
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(workers=2), strict=True))
    parts = [batches(rank=rank, world_size=2) for rank in range(2)]
    assert all(torch.equal(torch.cat(rows), view) for *rows, view in zip(*parts, whole, strict=True))


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_rgb_weights_start_other_channels_by_timms_rule(tmp_path, channels):
    rgb = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2, img_size=16, patch_size=4)
    save_file(rgb.state_dict(), tmp_path / "rgb.safetensors")
    values = [0.5] * channels
    settings = load("cifar10_lejepa", [
        "model.name=vit_tiny_patch16_224", "model.img_size=16", "model.patch_size=4", "model.embed_dim=32",
        "model.depth=1", "model.num_heads=2", f"model.in_chans={channels}", f"data.mean={values}", f"data.std={values}",
        f"model.start_from={tmp_path / 'rgb.safetensors'}", "model.start_heads=new", "objective.local_crop_size=8",
    ])  # fmt: skip
    found = build_objective(settings).backbone.state_dict()
    expected = adapt_input_conv(channels, rgb.state_dict()["patch_embed.proj.weight"])
    assert torch.equal(found["patch_embed.proj.weight"], expected)
    assert torch.equal(found["blocks.0.attn.qkv.weight"], rgb.state_dict()["blocks.0.attn.qkv.weight"])


def test_weights_of_other_channels_are_refused(trained, tiles, tmp_path):
    values = [0.5] * 5
    other = [f"data.mean={values}", f"data.std={values}", "data.stats=given", "model.in_chans=5"]
    with pytest.raises(UserError, match=r"has shape \[32, 12, 4, 4\], expected \[32, 5, 4, 4\]"):
        build_objective(
            recipe("mae", tiles, tmp_path / "new", f"model.start_from={trained}", "model.start_heads=new", *other)
        )


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.stats=given"], r"data\.mean has 1 values, but model\.in_chans is 12: give 12, or measure them"),
        (["model.in_chans=33"], r"model\.in_chans = 33"),
        (["monitor.picture_channels=[1, 2, 12]"], r"picture_channels \[1, 2, 12\] must be numbers of ch.*0 to 11"),
        (["data.channel_drop=1"], r"data\.channel_drop = 1"),
    ],
)  # fmt: skip
def test_wrong_recipes(tiles, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        recipe("mae", tiles, tmp_path, *overrides)


def test_what_is_not_possible_with_twelve_bands(tiles, tmp_path):
    def refused(message, name, *more):
        with pytest.raises(UserError, match=message):
            pretrain(recipe(name, tiles, tmp_path / "run", *more))

    refused(r"data\.channel_drop: the targets of the objective mae depend on all", "mae", "data.channel_drop=0.2")
    randaugment = ["objective.randaugment=5", "objective.three_augment=false", "objective.color_jitter=0"]
    refused(r"objective\.randaugment is for grey and RGB images, and model\.in_ch", "supervised", *randaugment)
    refused(r"data\.augment = device is for images of 8 bits", "mae", "data.augment=device")
    five = [f"data.mean={[0.5] * 5}", f"data.std={[0.5] * 5}", "data.stats=given", "model.in_chans=5"]
    refused(r"samples in a row could not be read.*it has 12 channels, 5 are expected", "mae", *five)
    refused("have not been measured", "mae", f"data.train={tiles}/test.tar")


def test_scans_in_hounsfield_units_train_on_one_channel(tmp_path):
    """Their mean is far outside of 0 to 1."""
    members = [(f"{i}.dcm", dicom(tile(i)[:, :, 0], RescaleSlope=1, RescaleIntercept=-2000)) for i in range(40)]
    shards = open_shards(write_tar(tmp_path / "train.tar", members))
    stats.save(shards, stats.measure(shards))
    settings = recipe("dino", tmp_path, tmp_path / "run", "model.in_chans=1", "budget.steps=1")
    assert np.isfinite(pretrain(settings).loss)


# --- packing ------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_bit(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.tif": tifffile_bytes(tile(0), planarconfig="contig"), "b.npy": npy(tile(1)),
        "c.png": png16(tile(2)[:, :, :3]), "d.dcm": dicom(tile(3)[:, :, 0]),
        "e.tif": tifffile_bytes([tile(4)[:, :, i] for i in range(BANDS)]),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "broken.npy").write_bytes(files["b.npy"][:-1])
    report = pack(folder, tmp_path / "out", workers=1)
    shards = open_shards(tmp_path / "out")
    assert sorted(shards.read(i) for i in range(len(shards))) == sorted(files.values())
    assert "broken.npy" in str(report.skipped)
    pack(folder, tmp_path / "small", workers=1, size=14)
    small = open_shards(tmp_path / "small")
    sizes = {np.asarray(decode_pixels(small.read(i), None)).shape[:2] for i in range(len(small))}
    assert sizes == {(14, 14)}


def test_index_measures_and_saves(tiles, tmp_path):
    shard = tmp_path / "train.tar"
    os.link(tiles / "train.tar", shard)
    output = selfvil_command("index", shard, "--stats", "--workers", 2)
    assert "80 images, 32,000 pixels, 12 channels" in output
    assert f"saved in {shard}.stats.json" in output
    assert stats.load(open_shards(shard), BANDS) == stats.load(open_shards(tiles / "train.tar"), BANDS)
