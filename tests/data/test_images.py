"""Opening images by what they are, and the sentence for each source that cannot be used."""

import json
import os
import re

import pytest

from selfvil.data.imagefiles import ImageFiles
from selfvil.data.images import open_images, open_mixture
from selfvil.data.mixture import reduce_weights
from selfvil.data.parquet import ParquetImages
from selfvil.data.read import DamagedImage
from selfvil.errors import UserError
from tars import labelled, png, write_tar
from written_sources import write_source

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def refused(source, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        open_images(source)
    assert "\n" not in str(caught.value)


def table(tmp_path, text: str):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    path = tmp_path / "t.csv"
    path.write_text(text)
    return path


def parquet(tmp_path, columns: dict, name: str = "t.parquet"):
    pq.write_table(pyarrow.table(columns), tmp_path / name)
    return tmp_path / name


# --- a folder -----------------------------------------------------------------------------------------------------


def test_files_are_read_once_and_then_only_if_they_changed(tmp_path, monkeypatch):
    folder = write_source("folder", tmp_path / "f", 6)
    names = ImageFiles.__init__.__globals__
    original, read = names["read_file"], []
    monkeypatch.setitem(names, "read_file", lambda path: (read.append(path), original(path))[1])
    before = open_images(folder)
    assert len(read) == 6
    open_images(folder)
    assert len(read) == 6
    (folder / "cat" / "003.png").write_bytes(png(99))
    (folder / "owl" / "new.png").write_bytes(png(50))
    after = open_images(folder)
    assert sorted(os.path.basename(path) for path in read[6:]) == ["003.png", "new.png"]
    assert "there are 7 samples, 6 before" in after.changed
    with pytest.raises(DamagedImage, match="its bytes have changed since they were indexed"):
        before.read([before.key(i) for i in range(6)].index("cat/003.png"))


def test_odd_files_of_a_folder(tmp_path):
    """Hidden files are ignored, loops are not followed, odd names are kept, unreadable files are damaged samples."""
    for name in (".hidden.png", "a b.png", 'c,"d.png', "\u00e9\n.png", "sub/.x/1.png", "sub/2.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(png(2))
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
    for _ in range(2):
        images = open_images(tmp_path)
        keys = [images.key(i) for i in range(len(images))]
        assert keys == ["a b.png", "broken.png", 'c,"d.png', "sub/2.PNG", "\u00e9\n.png", "\udcff.png"]
        with pytest.raises(DamagedImage, match="cannot be read: No such file"):
            images.read(1)
        assert images.read(5) == png(2)
    (tmp_path / "nothing").write_bytes(png(3))
    assert open_images(tmp_path).read(1) == png(3)
    os.mkfifo(tmp_path / "pipe.png")
    piped = open_images(tmp_path)
    with pytest.raises(DamagedImage, match="is no regular file"):
        piped.read(3)


def test_the_index_of_a_folder_survives_damage(tmp_path, monkeypatch):
    """A damaged index is built again; without a cache folder there is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_source("folder", tmp_path / "f", 6)
    expected = open_images(folder).fingerprint
    (saved,) = (tmp_path / "cache" / "selfvil" / "index").glob("*.files")
    content = saved.read_bytes()
    for place in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        saved.write_bytes(damaged)
        assert open_images(folder).fingerprint == expected, place
    for length in range(0, len(content), 101):
        saved.write_bytes(content[:length])
        assert open_images(folder).fingerprint == expected, length
    saved.unlink()
    saved.parent.rmdir()
    saved.parent.write_text("a file where the folder should be")
    assert open_images(folder).fingerprint == expected


def test_folders_that_cannot_be_used(tmp_path):
    refused(tmp_path, "holds no images; expected files ending in")
    write_source("parquet", tmp_path / "p")
    (tmp_path / "p" / "a.png").write_bytes(png(0))
    refused(tmp_path / "p", r"holds a data set in Parquet or Arrow files, and a\.png; give")
    write_tar(tmp_path / "s.tar", labelled(2))
    (tmp_path / "a.png").write_bytes(png(0))
    refused(tmp_path, r"holds both images and \.tar files")
    refused(tmp_path / "a.png", "is one image; expected a folder")


# --- a table ------------------------------------------------------------------------------------------------------


def test_tables_of_paths(tmp_path):
    images = open_images(table(tmp_path, "\ufefflabel, Path\n" + f"3,b.png\n,{tmp_path}/a.png\n\n"))
    assert [images.read(i) for i in range(2)] == [png(2), png(1)]
    assert images.labels.tolist() == [3, -1]
    named = open_images(table(tmp_path, "path,label\nb.png,owl\na.png,cat\n"))
    assert (named.labels.tolist(), named.classes) == ([1, 0], ["cat", "owl"])
    assert open_images(table(tmp_path, "path\nb.png\n")).labels is None
    assert open_images(table(tmp_path, "path,label\na.png,-3\nb.png,1\n")).classes == ["-3", "1"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "its first line is ''; expected the names of columns"),
        ("a.png,1\n", r"its first line is 'a\.png,1'; expected the names of columns, with one column path"),
        ("path,label\n", "lists no images"),
        ("path,label\na.png\n", "line 2 has 1 values, and the first line 2 columns"),
        ("path,label\na,b.png,1\n", "line 2 has 3 values"),
        ("path\na.png\n./a.png\n", r"1 files are listed more than once, the first is .*a\.png in rows 1 and 2"),
        ("path\na.png\nc.png\nd.png\n", r"2 of the 3 files do not exist: c\.png, d\.png; paths are relative to"),
        ("path,label\na.png,1000001\n", "the label 1000001 is no class number from 0 to 1,000,000"),
        ("path,label\na.png," + "9" * 5000 + "\n", "the label 9+.* is no class number from 0 to 1,000,000"),
        ('path,label\n"",1\n', "row 1 has no path"),
        ("path\n\0\n", "row 1 has no path|line contains NUL"),
        ("path\n" + "x" * 200_000 + "\n", "is no valid CSV file: field larger than field limit"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, pattern):
    refused(table(tmp_path, text), pattern)


def test_parquet_tables_that_cannot_be_used(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    assert open_images(parquet(tmp_path, {"path": ["a.png"], "label": ["x"]})).classes == ["x"]
    refused(parquet(tmp_path, {"file": ["a.png"]}), "has the columns file; expected image with the bytes of images, or")
    refused(parquet(tmp_path, {"path": [3]}), "row 1 has no path")
    refused(parquet(tmp_path, {"path": ["a.png"], "label": [1.5]}), "its labels are of the type float")
    refused(parquet(tmp_path, {"path": ["a.png", None]}), "row 2 has no path")


# --- a Hugging Face data set --------------------------------------------------------------------------------------


def test_parquet_files_are_converted_once(tmp_path, caplog):
    folder = write_source("parquet", tmp_path / "p")
    first = sorted(folder.glob("*.parquet"))[:1]
    for source in (folder, f"{folder}/*.parquet", first, f"{folder}/train-{{00000..00001}}-of-00002.parquet"):
        images = open_images(source)
        assert isinstance(images, ParquetImages)
        assert images.shard_of(0) == first[0]
        assert images.key(0) == "000000000"
    assert caplog.text.count("is converted to a shard") == 2
    images = open_images(parquet(tmp_path, {"image": [png(0), png(1)], "label": ["b", "a"]}))
    assert (images.labels.tolist(), images.classes, images.read(1)) == ([1, 0], ["a", "b"], png(1))


def test_data_sets_that_cannot_be_used(tmp_path):
    refused(parquet(tmp_path, {"image": [{"path": "x.png", "bytes": None}]}), "row 0 holds only the path of an image")
    refused(parquet(tmp_path, {"image": pyarrow.array([None], pyarrow.binary())}), "row 0 holds no image; expected its")
    refused(parquet(tmp_path, {"image": [3]}), "row 0 holds no image")
    refused(parquet(tmp_path, {"image": pyarrow.array([], pyarrow.binary())}), "has no rows")
    refused(parquet(tmp_path, {"image": [png(0)], "label": [-7]}), "the label of row 0 is -7; expected a class number")
    refused(parquet(tmp_path, {"image": [png(0)], "label": [1.5]}), r"the label of row 0 is 1\.5")
    content = parquet(tmp_path, {"image": [png(i) for i in range(50)]}).read_bytes()
    for name, data in (("cut", content[:-9]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        refused(tmp_path / f"{name}.parquet", f"{name}.parquet (is damaged, or no parquet file|cannot be read)")
    refused(tmp_path / "missing.parquet", "missing shard")
    saved = write_source("arrow", tmp_path / "saved")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    refused(saved, "is no description of a saved data set: it names no files of this folder")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x"}], "_indices_files": [{}]}))
    refused(saved, "holds a selection of rows")
    (saved / "dataset_dict.json").write_text("{}")
    refused(saved, "holds several splits")


def test_flipped_bytes_of_a_parquet_file_end_in_a_sentence_or_an_image(tmp_path):
    content = parquet(tmp_path, {"image": [png(i) for i in range(5)]}).read_bytes()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path = tmp_path / f"{place}.parquet"
        path.write_bytes(damaged)
        try:
            assert 0 < len(open_images(path)) <= 5
        except UserError as error:
            assert re.match(rf"{re.escape(str(path))}[ :]", str(error)), error  # noqa: PT017


# --- mixtures -----------------------------------------------------------------------------------------------------


def test_weights_are_reduced():
    assert reduce_weights([2, 4]) == (1, 2)
    assert reduce_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert reduce_weights([1e-3, 1.0]) == (1, 1000)
    with pytest.raises(UserError, match=r"the weights 0\.123457, 1 repeat only after 1,123,457 images"):
        reduce_weights([0.123457, 1.0])


def test_names_and_limits_of_a_mixture(tmp_path):
    sources = [write_source("folder", tmp_path / name / "train", 4) for name in "ab"]
    images = open_mixture([(source, 1) for source in sources])
    assert images.names == ["train_0", "train_1"]
    assert images.source_of(4) == "train_1"
    images.check_step(8)
    with pytest.raises(UserError, match="a step of 10 images takes 5 of train_0, which has 4 images"):
        images.check_step(10)
    assert open_mixture([(sources[0], 3)]).paths == [sources[0]]
