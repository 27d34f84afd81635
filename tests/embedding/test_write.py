"""`selfvil embed`: rows against single forward passes, both formats, restarts, failures, bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from pyarrow import parquet

import selfvil
from images import png_chunk, random_image
from runs import REPOSITORY, environment
from selfvil.cli import main
from selfvil.data.index import open_shards
from selfvil.data.read import PNG_SIGNATURE, decode_image
from selfvil.data.views import CenterCrop
from selfvil.embedding import parts, write
from selfvil.embedding.encoder import Encoded, Encoder
from selfvil.embedding.formats import ParquetWriter
from selfvil.embedding.write import embed
from selfvil.errors import UserError
from selfvil.weights import load_pretrained
from tars import png, write_tar

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
KEYS = [*(f"cats/{i}.png" for i in range(5)), *(f"dogs/old/{i}.jpg" for i in range(5, 10))]


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def alone(model, file) -> tuple[np.ndarray, np.ndarray]:
    """Embedding (D,) and patches (H, W, C) of one image, by its own forward pass."""
    backbone, normalisation, _ = load_pretrained(model)
    image = decode_image(file.read_bytes(), 3)
    view = CenterCrop(normalisation.img_size, normalisation.mean, normalisation.std)
    with torch.no_grad():
        patches = backbone.eval().forward_features(view(image)[None])[0]  # (4, 6, 32)
    flat = patches.flatten(0, 1)
    return torch.cat([flat[0], flat[-1], flat.mean(0)]).numpy(), patches.numpy()


def contents(file):
    """Everything but the metadata of a Parquet file."""
    return parquet.read_table(file).replace_schema_metadata()


# --- values ----------------------------------------------------------------------------------------------------------


def test_a_folder_to_parquet(photos, model, tmp_path, caplog):
    """Each row equals a forward pass of its image alone; the damaged image is left out and named."""
    out = embed(photos, model, tmp_path / "a" / "photos.parquet", patches=True, workers=0, device="cpu")
    table = parquet.read_table(out)
    assert table["key"].to_pylist() == KEYS
    assert table["label"].to_pylist() == [0] * 5 + [1] * 5
    for key, feature, patches in zip(KEYS, table["feature"].to_pylist(), table["patches"].to_pylist()):
        expected, grid = alone(model, photos / key)
        np.testing.assert_allclose(feature, expected, atol=2e-5)
        np.testing.assert_allclose(np.reshape(patches, (4, 6, 32)), grid, atol=2e-5)
    facts = json.loads(table.schema.metadata[b"selfvil"])
    assert facts["left_out_first"] == [["cats/3b.jpg", "not an image file of a known format"]]
    assert facts["patches"] == [4, 6, 32]
    assert facts["classes"] == ["cats", "dogs"]
    assert facts["readout"] == "first_last_mean"
    assert facts["normalisation"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "img_size": [16, 24]}
    assert facts["version"] == selfvil.__version__
    assert facts["dataset"] == [str(photos)]
    assert "1 of 11 images cannot be read and are left out: cats/3b.jpg" in caplog.text
    assert "notes.txt" in caplog.text
    assert [path.name for path in out.parent.iterdir()] == ["photos.parquet"]


def test_numpy_files_have_the_same_rows(photos, model, tmp_path):
    table = parquet.read_table(embed(photos, model, tmp_path / "p.parquet", patches=True, workers=0, device="cpu"))
    embed(photos, model, tmp_path / "p.npy", patches=True, workers=0, device="cpu")
    features = np.load(tmp_path / "p.npy", mmap_mode="r")
    assert features.shape == (10, 96)
    assert features.dtype == np.float32
    assert features.tolist() == table["feature"].to_pylist()
    assert np.load(tmp_path / "p.patches.npy").reshape(10, -1).tolist() == table["patches"].to_pylist()
    assert np.load(tmp_path / "p.labels.npy").tolist() == table["label"].to_pylist()
    assert (tmp_path / "p.keys.txt").read_text().splitlines() == KEYS
    assert json.loads((tmp_path / "p.meta.json").read_text())["images"] == 10


def test_in_memory_and_float16_and_another_size(photos, model, tmp_path):
    found = selfvil.embed(photos, model, workers=0, device="cpu", readout="mean", img_size=(24, 32), patches=True)
    assert found.keys == KEYS
    assert found.features.shape == (10, 32)
    assert found.patches.shape == (10, 6, 8, 32)
    np.testing.assert_allclose(found.features, found.patches.mean((1, 2)), atol=1e-5)
    half = embed(photos, model, tmp_path / "h.parquet", readout="mean", img_size=(24, 32), dtype="float16", workers=0,
                 device="cpu")  # fmt: skip
    stored = np.array(parquet.read_table(half)["feature"].to_pylist())
    assert stored.tolist() == found.features.astype(np.float16).astype(np.float64).tolist()


def test_unlabelled_shards_have_no_label_column_and_workers_change_nothing(shards, model, tmp_path):
    pattern = f"{shards}/set-{{000000..000002}}.tar"
    files = [
        embed(pattern, model, tmp_path / f"{workers}.parquet", workers=workers, batch_size=7, device="cpu")
        for workers in (0, 2)
    ]
    table = contents(files[0])
    assert table.schema.names == ["key", "feature"]
    opened = open_shards(pattern)
    assert table["key"].to_pylist() == [opened.key(i) for i in range(30)]
    assert table.equals(contents(files[1]))


def test_keys_that_occur_in_several_shards_get_the_name_of_the_shard(model, tmp_path, caplog):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("0.png", png(1)), (f"{name}.png", png(2))])
    found = embed(tmp_path, model, workers=0, device="cpu")
    assert found.keys == ["a/0", "a/a", "b/0", "b/b"]
    assert "'0' and perhaps others occur in several shards (a.tar and b.tar)" in caplog.text


# --- killed, damaged, full -------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 images: 8 of the 30 images."""
    monkeypatch.setattr(write, "_PART_IMAGES", 4)


def options(**more):
    return {"workers": 0, "batch_size": 2, "device": "cpu"} | more


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_an_interrupted_embedding_continues(shards, model, tmp_path, monkeypatch, suffix):
    """The result is that of an uninterrupted one, byte for byte, although one part was damaged meanwhile."""
    straight, out = tmp_path / "straight" / f"x{suffix}", tmp_path / f"x{suffix}"
    embed(shards, model, straight, **options())
    written, encoded = parts.PartFolder.write, Encoder.encode
    numbers, passes = [], []

    def interrupted(folder, number, part):
        if len(numbers) == 3:
            raise KeyboardInterrupt
        numbers.append(number)
        written(folder, number, part)

    with monkeypatch.context() as patched:
        patched.setattr(parts.PartFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(shards, model, out, **options())
    assert numbers == [0, 1, 2]
    assert not out.exists()
    damaged = tmp_path / f"x{suffix}.partial" / "part-00000001.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    monkeypatch.setattr(
        Encoder, "encode", lambda self, x, patches=False: passes.append(len(x)) or encoded(self, x, patches)
    )
    embed(shards, model, out, **options())
    assert sum(passes) == 1 + 30 - 8  # the test of the model, and all images but those of two parts
    assert out.read_bytes() == straight.read_bytes()
    assert not damaged.parent.exists()


def test_a_killed_process_and_two_processes(shards, model, tmp_path):
    """After kill -9, the same command on two processes gives the rows of one process."""
    straight = embed(shards, model, tmp_path / "straight.parquet", **options())
    out = tmp_path / "out.parquet"
    words = [str(shards), "--model", str(model), "--out", str(out), "--batch-size", "2", "--workers", "1"]
    code = f"""
import os, signal, sys
from selfvil.embedding import parts, write
from selfvil.cli import main
write._PART_IMAGES = 4
written = parts.PartFolder.write
def killed(folder, number, part):
    if number == 2 and os.environ.get("KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    written(folder, number, part)
parts.PartFolder.write = killed
main(["embed", *{words!r}])
"""
    (tmp_path / "run.py").write_text(code)
    here = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 240}
    killed = subprocess.run([sys.executable, tmp_path / "run.py"], env=environment(KILL="1"), **here)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out.parquet.partial").glob("part-*.npz"))) == 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, str(tmp_path / "run.py")], env=environment(), **here)
    assert done.returncode == 0, done.stderr
    assert "2 of 8 parts are finished" in done.stderr
    assert done.stdout.count("30 embeddings of 96 values") == 1
    assert contents(out).equals(contents(straight))


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_embedding_are_refused(shards, model, other_model, tmp_path, monkeypatch):
    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(write, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(shards, model, out, **options())
    with pytest.raises(UserError, match=r"parts of another embedding; different: model\. .*--overwrite"):
        embed(shards, other_model, out, **options())
    with pytest.raises(UserError, match="different: images, number of images"):
        embed(f"{shards}/set-000000.tar", model, out, **options())
    with pytest.raises(UserError, match="different: batch size, readout"):
        embed(shards, model, out, **options(readout="mean", batch_size=3))
    assert len(list((tmp_path / "x.parquet.partial").glob("part-*"))) == 8
    embed(shards, other_model, out, **options(overwrite=True))
    assert contents(out).equals(contents(embed(shards, other_model, tmp_path / "y.parquet", **options())))


def test_a_folder_of_the_user_is_not_used_for_parts(shards, model, tmp_path):
    (tmp_path / "x.npy.partial").mkdir()
    (tmp_path / "x.npy.partial" / "part-thesis").write_text("mine")
    with pytest.raises(UserError, match=r"x\.npy\.partial is not a folder of `selfvil embed`"):
        embed(shards, model, tmp_path / "x.npy", **options(overwrite=True))
    assert (tmp_path / "x.npy.partial" / "part-thesis").read_text() == "mine"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("where", ["part", "output"])
def test_a_full_disk_loses_nothing(shards, model, tmp_path, monkeypatch, where):
    out = tmp_path / "x.parquet"
    out.write_text("old")
    target = (np, "savez") if where == "part" else (ParquetWriter, "add")
    original, calls = getattr(*target), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise FULL
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*target, full)
        with pytest.raises(UserError, match=r"cannot be written: No space left .* run the same command again"):
            embed(shards, model, out, **options(overwrite=True))
    assert out.read_text() == "old"
    finished = sorted(path.name for path in (tmp_path / "x.parquet.partial").glob("*[zt]"))
    assert len(finished) == (2 if where == "part" else 8)
    embed(shards, model, out, **options(overwrite=True))
    assert len(contents(out)) == 30


def test_a_disk_that_is_too_small_is_refused_first(shards, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 20_000))
    with pytest.raises(UserError, match=r"has 0\.02 MB free, but 30 images need 0\.0230 MB|need 0\.023 MB"):
        embed(shards, model, tmp_path / "x.npy", **options())
    assert list(tmp_path.iterdir()) == []


# --- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(photos, model, tmp_path, capsys):
    (tmp_path / "x.keys.txt").write_text("mine")
    error = refusal(capsys, "embed", photos, "--model", model, "--out", tmp_path / "x.npy")
    assert "x.keys.txt exists: add --overwrite" in error
    assert (tmp_path / "x.keys.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.csv"], "x.csv ends in '.csv'; expected a file ending in .parquet or .npy"),
        (["--out", "x"], "has no extension"),
        (["--readout", "cls"], "needs a class token"),
        (["--readout", "best"], "There is no readout 'best'; choose one of"),
        (["--img-size", "big"], "--img-size big is not possible"),
        (["--img-size", "3x5x7"], "--img-size 3x5x7 is not possible"),
        (["--img-size", "0"], "an image size of 0 is not possible"),
        (["--img-size", "15"], "does not take images of 15 x 15 pixels"),
        (["--network", "teacher"], "is an export and holds one network"),
        (["--image", "gif"], "image extension 'gif' is not known"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options(photos, model, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(words[::2], words[1::2]))
    options = {"--model": model, "--out": "x.npy", "--workers": 0} | given
    assert message in refusal(capsys, "embed", photos, *(word for pair in options.items() for word in pair))
    assert list(tmp_path.iterdir()) == []


def test_wrong_images(photos, model, tmp_path, capsys):
    def error(images):
        return refusal(capsys, "embed", images, "--model", model, "--out", tmp_path / "x.npy", "--workers", 0)

    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in error(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "empty holds no images (1 .txt)" in error(tmp_path / "empty")
    assert "there is no folder" in error(tmp_path / "missing")
    assert "0.png is one image; expected a folder" in error(photos / "cats" / "0.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    header = (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (tmp_path / "broken" / "b.png").write_bytes(bomb)
    assert "none of the 2 images can be read; the first is a.png" in error(tmp_path / "broken")
    assert not list(tmp_path.glob("x.*"))
    random_image(0, 1, 1).save(tmp_path / "broken" / "c.png")
    found = embed(tmp_path / "broken", model, workers=0, device="cpu")  # an image of one pixel has an embedding
    assert found.keys == ["c.png"]
    assert found.left_out[1][0] == "b.png"
    assert "400000000 pixels" in found.left_out[1][1]
    write_tar(tmp_path / "twice.tar", [("k.png", png(1)), ("l.png", png(2)), ("k.png", png(3))])
    assert "the key 'k' occurs twice in" in error(tmp_path / "twice.tar")
    (tmp_path / "lines").mkdir()
    random_image(0).save(tmp_path / "lines" / "a\nb.png")
    assert "has a line break" in error(tmp_path / "lines")


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (np.nan, "float32", "the features of cats/1.png hold NaN or infinity: the weights of the model are broken"),
    (1e5, "float16", "the features of cats/1.png are up to 1e.05, beyond float16: use --dtype float32"),
])  # fmt: skip
def test_features_that_no_file_should_hold(photos, model, tmp_path, monkeypatch, value, dtype, message):
    original = Encoder.encode

    def broken(self, images, patches=False):
        features = original(self, images, patches).features.copy()
        features[1:, 5] = value
        return Encoded(features, None)

    monkeypatch.setattr(Encoder, "encode", broken)
    with pytest.raises(UserError, match=message):
        embed(photos, model, tmp_path / "x.npy", workers=0, dtype=dtype, device="cpu")
    assert not (tmp_path / "x.npy").exists()
