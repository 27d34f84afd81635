"""Packing: the round trip, the same bytes for the same input, and no partial output."""

import io
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from selfvil.data import pack as pack_module
from selfvil.data.index import open_shards
from selfvil.data.pack import pack
from selfvil.data.read import decode_image
from selfvil.errors import UserError


def image(value: int, height: int = 9, width: int = 12, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def classes_folder(tmp_path) -> Path:
    """90 images of three classes, some nested, some of other formats; 2 that cannot be read; hidden and other files."""
    folder = tmp_path / "source"
    for value in range(90):
        kind = ("png", "jpg", "webp", "bmp")[value % 4]
        path = folder / ("bee", "ant", "cat")[value % 3] / ("deep/er" if value % 5 == 0 else "") / f"a.b {value}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(value).save(path)
    (folder / "ant" / "broken.jpg").write_bytes((folder / "ant" / "a.b 1.jpg").read_bytes()[:100])
    (folder / "bee" / "text.PNG").write_text("hello\nworld")
    (folder / "bee" / "._a.jpg").write_bytes(b"of another system")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"")
    (folder / "cat" / "notes.txt").write_text("no image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


def test_round_trip_of_a_folder_with_classes(classes_folder, tmp_path):
    seen = []
    out = tmp_path / "new" / "out"
    report = pack(
        classes_folder, out, name="train", samples_per_shard=40, workers=1, progress=lambda *step: seen.append(step)
    )
    assert (report.samples, report.shards, report.classes) == (90, 3, 3)
    assert [name for name, _ in report.skipped] == ["ant/broken.jpg", "bee/text.PNG"]
    assert (out / "skipped.txt").read_text().startswith("ant/broken.jpg: cannot be decoded")
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"
    assert seen[-1] == (92, 92)
    assert "90 images in 3 shards" in str(report)
    assert "2 unreadable" in str(report)

    shards = open_shards(f"{out}/train-{{000000..000002}}.tar")
    sources = dict(line.split("\t") for line in (out / "sources.tsv").read_text().splitlines())
    assert len(shards) == len(sources) == 90
    for i in range(90):
        source = classes_folder / sources[shards.key(i)]
        assert shards.read(i) == source.read_bytes(), "files are kept as they are"
        assert shards.labels[i] == ["ant", "bee", "cat"].index(sources[shards.key(i)].split("/")[0])
    assert len(set(shards.labels[:40].tolist())) == 3, "classes are mixed over the shards"
    assert report.bytes == sum(path.stat().st_size for path in shards.paths)
    assert len(list(out.glob("*.npz"))) == 3, "the index is there already"


def test_result_does_not_depend_on_workers_or_time(classes_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "_CHUNK", 7)
    for name, workers in (("one", 1), ("three", 3), ("default", None)):
        pack(classes_folder, tmp_path / name, samples_per_shard=25, workers=workers)
        for path in classes_folder.rglob("*.png"):
            os.utime(path, (1, 1))
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three") == contents(tmp_path / "default")
    pack(classes_folder, tmp_path / "seed", samples_per_shard=25, workers=1, seed=1)
    assert contents(tmp_path / "seed")["shard-000000.tar"] != one["shard-000000.tar"]
    assert multiprocessing.active_children() == []


def test_webdataset_reads_what_we_pack(classes_folder, tmp_path):
    pack(classes_folder, tmp_path / "out", samples_per_shard=40, workers=1)
    shards = open_shards(tmp_path / "out")
    theirs = list(webdataset.WebDataset([str(path) for path in shards.paths], shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [shards.key(i) for i in range(90)]
    for i, sample in enumerate(theirs):
        (name,) = sample.keys() & {"png", "jpg", "webp", "bmp"}
        assert sample[name] == shards.read(i)
        assert int(sample["cls"]) == shards.labels[i]
    with tarfile.open(shards.paths[0]) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


@pytest.mark.parametrize("layout", ["flat", "one class", "mixed"])
def test_folders_without_classes_have_no_labels(tmp_path, layout):
    for value in range(6):
        inner = {"flat": ".", "one class": "photos", "mixed": "." if value % 2 else f"c{value}"}[layout]
        (tmp_path / "in" / inner).mkdir(parents=True, exist_ok=True)
        image(value).save(tmp_path / "in" / inner / f"{value}.png")
    report = pack(tmp_path / "in", tmp_path / "out", workers=1)
    assert (report.samples, report.classes) == (6, 0)
    assert open_shards(tmp_path / "out").labels is None
    assert not (tmp_path / "out" / "classes.txt").exists()
    assert "no labels" in str(report)


def test_given_classes_keep_test_labels_as_in_training(tmp_path):
    for name in ("bee", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
        image(1).save(tmp_path / "in" / name / "x.png")
    report = pack(tmp_path / "in", tmp_path / "out", classes=["ant", "bee", "cat"], workers=1)
    assert report.classes == 3
    assert sorted(open_shards(tmp_path / "out").labels.tolist()) == [1, 2]
    with pytest.raises(UserError, match="there is cat"):
        pack(tmp_path / "in", tmp_path / "other", classes=["ant", "bee"])
    image(1).save(tmp_path / "in" / "x.png")
    with pytest.raises(UserError, match="outside"):
        pack(tmp_path / "in", tmp_path / "other", classes=["ant", "bee", "cat"])
    assert not (tmp_path / "other").exists()


def test_the_size_of_shards_is_limited(classes_folder, tmp_path):
    pack(classes_folder, tmp_path / "out", shard_bytes=6000, workers=1)
    with_many = sorted((tmp_path / "out").glob("*.tar"))
    assert len(with_many) > 3
    for path in with_many:
        with tarfile.open(path) as tar:
            sizes = [member.size for member in tar]
        assert sum(sizes) <= 6000 or len(sizes) == 2
    assert len(open_shards(with_many)) == 90


def test_members_have_the_extension_of_their_format(tmp_path):
    (tmp_path / "in").mkdir()
    image(0).save(tmp_path / "in" / "wrong.jpg", "PNG")
    image(1).save(tmp_path / "in" / "right.JPEG", "JPEG")
    image(2, mode="L").save(tmp_path / "in" / "grey.pgm")
    image(3).save(tmp_path / "in" / "photo.mpo.jpg", "MPO", save_all=True, append_images=[image(4)])
    pack(tmp_path / "in", tmp_path / "out", workers=1)
    sources = dict(line.split("\t") for line in (tmp_path / "out" / "sources.tsv").read_text().splitlines())
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        extensions = {sources[Path(name).stem]: Path(name).suffix for name in tar.getnames()}
    assert extensions == {"wrong.jpg": ".png", "right.JPEG": ".jpg", "grey.pgm": ".ppm", "photo.mpo.jpg": ".jpg"}


def test_shrinking(tmp_path):
    (tmp_path / "in").mkdir()
    image(0, 100, 60).save(tmp_path / "in" / "a.png")
    image(1, 60, 100).save(tmp_path / "in" / "b.jpg")
    image(2, 20, 300).save(tmp_path / "in" / "small.jpg")
    clear = image(3, 100, 100, "RGBA")
    clear.putalpha(128)
    clear.save(tmp_path / "in" / "d.webp", lossless=True)
    image(4, 90, 90, "L").save(tmp_path / "in" / "e.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(5, 60, 120).save(tmp_path / "in" / "turned.jpg", exif=exif)
    pack(tmp_path / "in", tmp_path / "out", size=30, workers=1)
    shards = open_shards(tmp_path / "out")
    sources = [line.split("\t")[1] for line in (tmp_path / "out" / "sources.tsv").read_text().splitlines()]
    opened = {name: Image.open(io.BytesIO(shards.read(i))) for i, name in enumerate(sources)}
    assert {name: (each.format, each.mode, each.size) for name, each in opened.items()} == {
        "a.png": ("PNG", "RGB", (30, 50)),
        "b.jpg": ("JPEG", "RGB", (50, 30)),
        "small.jpg": ("JPEG", "RGB", (300, 20)),
        "d.webp": ("PNG", "RGBA", (30, 30)),
        "e.png": ("PNG", "L", (30, 30)),
        "turned.jpg": ("JPEG", "RGB", (30, 60)),
    }
    assert shards.read(sources.index("small.jpg")) == (tmp_path / "in" / "small.jpg").read_bytes()
    expected = image(0, 100, 60).resize((30, 50), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(opened["a.png"]), np.asarray(expected))


def test_shards_are_packed_again(shared_data, tmp_path):
    report = pack(f"{shared_data}/cifar10/cifar10-test-000000.tar", tmp_path / "out", samples_per_shard=3000, workers=2)
    assert (report.samples, report.shards, report.classes) == (5000, 2, 10)
    assert (tmp_path / "out" / "classes.txt").read_text() == (shared_data / "cifar10" / "classes.txt").read_text()
    before, after = open_shards(f"{shared_data}/cifar10/cifar10-test-000000.tar"), open_shards(tmp_path / "out")
    crcs = {before.crcs[i]: before.labels[i] for i in range(5000)}
    assert sorted(after.crcs) == sorted(before.crcs)
    assert all(crcs[after.crcs[i]] == after.labels[i] for i in range(5000))


def test_real_photographs_are_resized_in_parallel(shared_data, tmp_path):
    pack(f"{shared_data}/photos/photos-000000.tar", tmp_path / "out", size=48, workers=2)
    shards = open_shards(tmp_path / "out")
    assert len(shards) == 200
    assert all(min(decode_image(shards.read(i)).size) == 48 for i in range(200))


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_an_output_folder_with_files_is_refused(classes_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="already holds files"):
        pack(classes_folder, out)
    assert contents(out) == {"shard-000000.tar": b"precious"}
    with pytest.raises(UserError, match="already holds files"):
        pack(classes_folder, out / "shard-000000.tar")
    (tmp_path / "empty").mkdir()
    assert pack(classes_folder, tmp_path / "empty", workers=1).samples == 90


def test_sources_without_images_are_errors(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "in"
    with pytest.raises(UserError, match="there is no folder"):
        pack(folder, out)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no images"):
        pack(folder, out)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no images"):
        pack(folder, out)
    with pytest.raises(UserError, match="is a file"):
        pack(folder / "notes.txt", out)
    (folder / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images.*x\.png"):
        pack(folder, out)
    (folder / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="both images and"):
        pack(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    "options", [{"name": "a/b"}, {"name": "a.b"}, {"name": ""}, {"samples_per_shard": 0}, {"size": 0}, {"workers": 0}]
)
def test_impossible_options_are_refused(classes_folder, tmp_path, options):
    with pytest.raises(UserError):
        pack(classes_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_classes_do_not_rename_the_labels_of_shards(classes_folder, tmp_path):
    pack(classes_folder, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="classes are for a folder"):
        pack(tmp_path / "out", tmp_path / "again", classes=["x"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_pack_leaves_nothing(classes_folder, tmp_path, monkeypatch, workers, error):
    monkeypatch.setattr(pack_module, "_CHUNK", 5)

    def stop(done: int, total: int) -> None:
        if done > 40:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        pack(classes_folder, tmp_path / "out", samples_per_shard=10, workers=workers, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert multiprocessing.active_children() == []


def test_cyclic_links_are_followed_once(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    image(0).save(tmp_path / "in" / "a" / "x.png")
    (tmp_path / "in" / "a" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a")
    report = pack(tmp_path / "in", tmp_path / "out", workers=1)
    sources = (tmp_path / "out" / "sources.tsv").read_text()
    assert report.samples == 2
    assert "a/x.png" in sources
    assert "b/x.png" in sources


def test_unusual_file_names_are_packed(tmp_path):
    (tmp_path / "in").mkdir()
    names = [b"tab\there.png", b"new\nline.png", b"\xff\xfe.png", "ü ж.png".encode(), b"-rf.png", b"{a,b}[0].png"]
    for name in names:
        shutil.copyfile(_saved(tmp_path), os.path.join(os.fsencode(tmp_path / "in"), name))
    assert pack(tmp_path / "in", tmp_path / "out", workers=1).samples == len(names)
    assert len((tmp_path / "out" / "sources.tsv").read_text().splitlines()) == len(names)


def _saved(folder: Path) -> Path:
    image(0).save(folder / "one.png")
    return folder / "one.png"
