"""The images of a folder or of shards: extensions, classes, masks, and a complete report."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.images import encode, random_image
from tests.tars import png, write_tar

from selfvil.data.index import index_shards, open_shards
from selfvil.data.pack import PackReport, pack
from selfvil.errors import MAX_MESSAGE, UserError


def write(folder: Path, *names: str, kind: str | None = None, image: Image.Image | None = None) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (random_image(number) if image is None else image).save(path, kind)


def packed(source: Path | str, **options) -> tuple[PackReport, dict[str, str], str]:
    """The report, KEY by source, and skipped.txt."""
    out = Path(options.pop("out", None) or f"{source}-packed")
    report = pack(source, out, workers=1, **options)
    lines = [line.split("\t")[:2] for line in (out / "sources.tsv").read_text().splitlines()]
    skipped = out / "skipped.txt"
    return report, {name: key for key, name in lines}, skipped.read_text() if skipped.exists() else ""


# --- extensions ---------------------------------------------------------------------------------------------------


def test_other_extensions_of_jpeg_are_packed(tmp_path):
    names = ["a.jfif", "b.JPE", "c.mpo", "d.apng", "e.jpg"]
    for name in names:
        write(tmp_path / "in", name, kind="PNG" if name == "d.apng" else "JPEG")
    report, sources, skipped = packed(tmp_path / "in")
    assert sorted(sources) == names
    assert (report.samples, skipped) == (5, "")


def test_files_of_other_extensions_are_counted_and_listed(tmp_path):
    write(tmp_path / "in", "a.jpg", "b.jpg")
    for name in ("x.gif", "deep/y.GIF", "z.avif", "w.heic", "README", "notes.txt", ".hidden.gif"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    report, _, skipped = packed(tmp_path / "in")
    assert "6 files are not images that can be packed: 2 .gif, 1 " in str(report)
    assert {line.split(":")[0] for line in skipped.splitlines()} == {
        "x.gif", "deep/y.GIF", "z.avif", "w.heic", "README", "notes.txt",
    }  # fmt: skip
    for path in (tmp_path / "in").glob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no images \(2 \.gif, "):
        pack(tmp_path / "in", tmp_path / "none")


# --- classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["nothing", "other files", "unreadable images"])
def test_a_class_without_images_keeps_its_label(tmp_path, content):
    """Otherwise, a test folder without images of one class would number all later classes differently."""
    write(tmp_path / "in", "ant/a.png", "cat/c.png", "dog/d.png")
    (tmp_path / "in" / "bee").mkdir()
    (tmp_path / "in" / ".git").mkdir()
    if content != "nothing":
        (tmp_path / "in" / "bee" / ("x.gif" if content == "other files" else "x.png")).write_bytes(b"no image")
    report, sources, _ = packed(tmp_path / "in")
    assert (tmp_path / "in-packed" / "classes.txt").read_text() == "ant\nbee\ncat\ndog\n"
    shards = open_shards(tmp_path / "in-packed")
    labels = {shards.key(i): int(shards.labels[i]) for i in range(3)}
    assert {name: labels[key] for name, key in sources.items()} == {"ant/a.png": 0, "cat/c.png": 2, "dog/d.png": 3}
    assert report.classes == 4
    assert "1 of 4 classes have no image: bee (1)" in str(report)


def test_a_class_called_none_is_a_class(tmp_path):
    write(tmp_path / "in", "None/a.png", "b/b.png")
    packed(tmp_path / "in")
    assert sorted(open_shards(tmp_path / "in-packed").labels.tolist()) == [0, 1]
    write(tmp_path / "in", "outside.png")
    with pytest.raises(UserError, match="an image outside of any"):
        pack(tmp_path / "in", tmp_path / "out", classes=["None", "b"])


def test_no_labels(tmp_path):
    write(tmp_path / "in", "a/a.png", "b/b.png")
    report, _, _ = packed(tmp_path / "in")
    assert report.classes == 2
    report, _, _ = packed(tmp_path / "in-packed", labels=False)
    assert report.classes == 0
    assert open_shards(tmp_path / "in-packed-packed").labels is None
    report, _, _ = packed(tmp_path / "in", out=tmp_path / "bare", labels=False)
    assert "no labels" in str(report)
    assert not (tmp_path / "bare" / "classes.txt").exists()
    with pytest.raises(UserError, match="exclude each other"):
        pack(tmp_path / "in", tmp_path / "x", labels=False, classes=["a", "b"])


@pytest.mark.parametrize("classes", [["a", "b", "a"], ["a", "", "b"]])
def test_a_list_of_classes_must_be_one_to_one(tmp_path, classes):
    write(tmp_path / "in", "a/a.png", "b/b.png")
    with pytest.raises(UserError, match="one different name in each line"):
        pack(tmp_path / "in", tmp_path / "x", classes=classes)


def test_labels_of_shards_from_1_to_10_are_ten_classes(tmp_path):
    """A large label does not lengthen classes.txt."""
    files = [(f"k{i}.{name}", data) for i in range(1, 11) for name, data in (("png", png(i)), ("cls", b"%d" % i))]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", files)
    report, _, _ = packed(tmp_path / "in")
    assert report.classes == 10
    assert "labels 1 to 10, without names" in str(report)
    assert not (tmp_path / "in-packed" / "classes.txt").exists()
    (tmp_path / "in" / "classes.txt").write_text("".join(f"name {i}\n" for i in range(10)))
    with pytest.raises(UserError, match="names 10 classes, but there is a label 10"):
        pack(tmp_path / "in", tmp_path / "again")


# --- several files of one name ------------------------------------------------------------------------------------


def masks_and_images(folder: Path, mask: str) -> dict[str, bytes]:
    folder.mkdir()
    masks = {}
    for i in range(4):
        random_image(i).save(folder / f"k{i}.jpg")
        masks[f"k{i}"] = encode(Image.fromarray(np.full((9, 12), i, np.uint8)), "PNG")
        (folder / f"k{i}.{mask}").write_bytes(masks[f"k{i}"])
    return masks


def members(shards_folder: Path) -> dict[str, dict[str, bytes]]:
    import webdataset

    paths = [str(path) for path in shards_folder.glob("*.tar")]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(paths, shardshuffle=False)}


@pytest.mark.parametrize(("suffix", "options"), [("mask.png", {}), ("png", {"mask": "png"})])
def test_masks_survive_packing_and_packing_again(tmp_path, suffix, options):
    masks = masks_and_images(tmp_path / "in", suffix)
    report, sources, _ = packed(tmp_path / "in", **options)
    assert report.samples == 4
    assert "4 samples have a mask" in str(report)
    found = members(tmp_path / "in-packed")
    assert {name[:2]: found[key]["mask.png"] for name, key in sources.items()} == masks

    packed(tmp_path / "in-packed", size=5)
    for key, sample in members(tmp_path / "in-packed-packed").items():
        before = np.asarray(
            Image.open(io.BytesIO(next(found[k] for k in found if k == _origin(tmp_path, key))["mask.png"]))
        )
        after = Image.open(io.BytesIO(sample["mask.png"]))
        assert after.size == Image.open(io.BytesIO(sample["jpg"])).size == (7, 5)
        assert set(np.unique(np.asarray(after))) == set(np.unique(before))


def _origin(tmp_path: Path, key: str) -> str:
    """The key, in the source shards, of the packed sample `key`."""
    lines = (tmp_path / "in-packed-packed" / "sources.tsv").read_text().splitlines()
    return dict(line.split("\t")[:2] for line in lines)[key].rpartition(":")[2]


def test_images_with_one_name_are_all_packed_unless_one_is_chosen(tmp_path):
    masks_and_images(tmp_path / "in", "png")
    report, _, _ = packed(tmp_path / "in")
    assert report.samples == 8
    assert "8 images share their name with another (.jpg, .png)" in str(report)
    report, sources, skipped = packed(tmp_path / "in", out=tmp_path / "chosen", image="png")
    assert sorted(sources) == [f"k{i}.png" for i in range(4)]
    assert "k0.jpg: not packed: of this name the .png file is the image" in skipped
    with pytest.raises(UserError, match="choose from jpg"):
        pack(tmp_path / "in", tmp_path / "x", image="gif")
    with pytest.raises(UserError, match="both png"):
        pack(tmp_path / "in", tmp_path / "x", image="png", mask="png")


def test_a_mask_without_an_image_is_reported(tmp_path):
    write(tmp_path / "in", "a.jpg")
    write(tmp_path / "in", "b.mask.png")
    report, sources, skipped = packed(tmp_path / "in")
    assert list(sources) == ["a.jpg"]
    assert "1 masks have no image" in str(report)
    assert "b.mask.png: not packed" in skipped


def test_second_images_of_shards_are_chosen_or_kept_as_masks(tmp_path):
    """An image KEY.png with a mask KEY.jpg, as in some data sets."""
    photo, mask = random_image(0), Image.fromarray(np.full((9, 12), 3, np.uint8))
    files = [("k.png", encode(photo, "PNG")), ("k.jpg", encode(mask, "JPEG", quality=100)), ("none.txt", b"")]
    shard = write_tar(tmp_path / "a.tar", files)
    report, _, _ = packed(shard, out=tmp_path / "default")
    assert "1 samples have 2 images per key: jpg is used, png not" in str(report)
    assert "1 samples have no image" in str(report)
    packed(shard, out=tmp_path / "chosen", image="png", mask="jpg")
    (sample,) = members(tmp_path / "chosen").values()
    assert sample["png"] == encode(photo, "PNG")
    assert np.asarray(Image.open(io.BytesIO(sample["mask.png"]))).tolist() == np.asarray(mask).tolist()


def test_camvids_masks_survive_packing(shared_data, tmp_path):
    packed(f"{shared_data}/camvid/camvid-val-000000.tar", out=tmp_path / "out", mask="png", size=90)
    samples = members(tmp_path / "out")
    assert len(samples) == 101
    for sample in samples.values():
        mask = Image.open(io.BytesIO(sample["mask.png"]))
        assert mask.size == Image.open(io.BytesIO(sample["jpg"])).size == (120, 90)
        assert np.asarray(mask).max() <= 11


# --- the report ---------------------------------------------------------------------------------------------------


def test_damage_pages_and_depth_are_reported(tmp_path):
    folder = tmp_path / "in"
    write(folder, "a.png", "b.jpg")
    data = bytearray((folder / "a.png").read_bytes())
    data[60] ^= 1
    (folder / "damaged.png").write_bytes(data)
    (folder / "pages.tif").write_bytes(encode(random_image(0), "TIFF", save_all=True, append_images=[random_image(1)]))
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(folder / "deep.png")
    report, _, skipped = packed(folder)
    text = str(report)
    assert "1 files hold several pages or frames" in text
    assert "have values up to only 4095" in text
    assert "--max-value 4095" in text
    listed = skipped + (folder.with_name("in-packed") / "warnings.txt").read_text()
    assert "damaged.png" in listed
    assert "pages.tif: it holds several pages" in listed
    report, _, skipped = packed(folder, out=tmp_path / "strict", strict=True, max_value=4095)
    assert "damaged.png" in skipped
    assert "--max-value" not in str(report)


def test_images_larger_than_training_needs_are_reported_with_measured_rates(tmp_path):
    write(tmp_path / "in", "a.jpg", "b.jpg", image=random_image(0, 900, 1200))
    report, _, _ = packed(tmp_path / "in")
    note = next(note for note in report.notes if "larger than training needs" in note)
    assert "median is 1.1 megapixels" in note
    assert "--size 320" in note
    report, _, _ = packed(tmp_path / "in", out=tmp_path / "small", size=320)
    assert "larger than" not in str(report)


# --- messages fit a screen ----------------------------------------------------------------------------------------

LONG = "n" * 240


def _folder(tmp_path: Path, count: int, name: str) -> Path:
    for i in range(count):
        write(tmp_path / "in", name.format(i=i))
    return tmp_path / "in"


def _pack_unknown_classes(tmp_path: Path) -> object:
    return pack(_folder(tmp_path, 60, "{i}" + LONG + "/a.png"), tmp_path / "out", classes=["x"])


def _pack_many_extensions(tmp_path: Path) -> object:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(100):
        (folder / f"x.{i}{LONG}").write_bytes(b"")
    return pack(folder, tmp_path / "out")


def _pack_report(tmp_path: Path) -> object:
    folder = _folder(tmp_path, 3, "{i}" + LONG + "/a.png")
    for i in range(100):
        (folder / f"empty {i:03d}{LONG}").mkdir()
        (folder / f"empty {i:03d}{LONG}" / f"x.{i}{LONG}").write_bytes(b"")
    return pack(folder, tmp_path / "out", workers=1)


def _pack_nothing_readable(tmp_path: Path) -> object:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}{LONG}.png").write_bytes(b"")
    return pack(folder, tmp_path / "out", workers=1)


def _pack_duplicate_classes(tmp_path: Path) -> object:
    return pack(_folder(tmp_path, 1, "a/x.png"), tmp_path / "out", classes=[LONG * 50] * 2)


def _pack_image_extension(tmp_path: Path) -> object:
    return pack(tmp_path, tmp_path / "out", image=LONG * 50)


def _index_dotted_names(tmp_path: Path) -> object:
    files = [(f"{LONG}.{i:05d}{LONG}.jpg", png(0)) for i in range(500)]
    return index_shards(write_tar(tmp_path / "a.tar", files))


def _index_without_images(tmp_path: Path) -> object:
    files = [(f"{'d' * 3000}/{i}.{name}", b"") for i in range(9) for name in ("txt", "json", "xml", "cls")]
    return index_shards(write_tar(tmp_path / "a.tar", files))


def _index_missing(tmp_path: Path) -> object:
    return index_shards([f"{tmp_path}/{LONG}-{{0000..0999}}.tar"])


def _index_broken(tmp_path: Path) -> object:
    for i in range(30):
        (tmp_path / f"{i}{LONG}.tar").write_bytes(b"x" * 5000)
    return index_shards(tmp_path)


def _index_twice(tmp_path: Path) -> object:
    return index_shards(write_tar(tmp_path / "a.tar", [("d" * 9000 + "/a.png", png(0))] * 2))


def _index_many_kinds(tmp_path: Path) -> object:
    kinds = ("jpg", "png", "webp", "tif", "bmp", "ppm", "pgm", "pbm", "pnm", "jpeg", "jpe")
    files = [(f"k{i}.{kind}", png(0)) for i in range(2, 11) for kind in kinds[:i]]
    return index_shards(write_tar(tmp_path / "a.tar", files))


@pytest.mark.parametrize(
    "case", [value for name, value in list(globals().items()) if name.startswith(("_pack_", "_index_"))]
)
def test_no_message_is_longer_than_a_screen(tmp_path, case, caplog):
    try:
        message = str(case(tmp_path))
    except UserError as error:
        message = str(error)
    assert 0 < len(message) <= MAX_MESSAGE
    for record in caplog.records:
        assert len(record.getMessage()) <= MAX_MESSAGE
