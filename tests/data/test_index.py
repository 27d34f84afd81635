"""Shards as one list: patterns of files, and the content of an index."""

import gzip
import io
import os
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from selfvil.data import files as shard_files
from selfvil.data import index
from selfvil.data import shard as shard_index
from selfvil.data.base import DamagedSample
from selfvil.data.index import IndexReport, index_shards, open_shards
from selfvil.data.patterns import expand_shards
from selfvil.data.tar import members
from selfvil.errors import UserError
from tars import labelled, open_files, png, write_tar


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", labelled(5))


# --- patterns -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in (
        "t-000000.tar",
        "t-000001.tar",
        "t-000002.tar",
        "v-000000.tar",
        "t-000000.tar.index.npz",
        "x[1]{a}.tar",
    ):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("t-{000000..000002}.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("t-{000002..000000}.tar", ["t-000002.tar", "t-000001.tar", "t-000000.tar"]),
        ("{v,t}-000000.tar", ["v-000000.tar", "t-000000.tar"]),
        ("t-*", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("{v,t}-00000?.tar", ["v-000000.tar", "t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        (".", ["t-000000.tar", "t-000001.tar", "t-000002.tar", "v-000000.tar", "x[1]{a}.tar"]),
        ("~/v-000000.tar", ["v-000000.tar"]),
        ("x[1]{a}.tar", ["x[1]{a}.tar"]),
        (["v-*.tar", "t-000001.tar"], ["v-000000.tar", "t-000001.tar"]),
        (Path("v-000000.tar"), ["v-000000.tar"]),
    ],
)
def test_patterns(folder, pattern, names):
    assert [path.name for path in expand_shards(pattern)] == names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("t-{000001..000004}.tar", ["2 of the 4", "t-000003.tar", "t-000004.tar", "holds t-000000.tar"]),
        ("t-00000.tar", ["missing shard", "t-00000.tar", "t-000000.tar"]),
        ("nowhere/t-000000.tar", ["missing shard", "no folder nowhere"]),
        ("emty", ["there is no folder emty", "did you mean empty?"]),
        ("nowhere/below", ["there is no folder nowhere/below"]),
        ("t-{000000..000002.tar", ["unbalanced"]),
        ("u-*.tar", ["no file matches u-*.tar", "t-000000.tar"]),
        ("t-{0..99999999}.tar", ["more than"]),
        ("empty", ["holds no .tar"]),
        ("", ["no shards given"]),
        ([], ["no shards given"]),
        (["t-000000.tar", ""], ["no shards given"]),
        (["t-000000.tar", "./t-000000.tar"], ["given twice"]),
        (["t-*.tar", "t-000001.tar"], ["t-000001.tar is given twice"]),
        ("/dev/null", ["no regular file"]),
    ],
)
def test_wrong_patterns_are_explained(folder, pattern, words):
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as error:
        expand_shards(pattern)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_only_the_first_missing_shards_are_named(tmp_path):
    with pytest.raises(UserError, match="980 more"):
        expand_shards(f"{tmp_path}/{{0000..0999}}.tar")


# --- the content of an index --------------------------------------------------------------------------------------


def test_samples_keys_labels(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(5))
    write_tar(tmp_path / "b.tar", labelled(4, first=5))
    shards = open_shards(f"{tmp_path}/{{a,b}}.tar")
    assert len(shards) == 9
    assert [shards.read(i) for i in range(9)] == [png(i) for i in range(9)]
    assert [shards.key(i) for i in (8, 0, 4, 5)] == ["k8", "k0", "k4", "k5"]
    assert [shards.shard_of(i).name for i in (0, 4, 5, 8)] == ["a.tar", "a.tar", "b.tar", "b.tar"]
    assert shards.labels is not None
    assert shards.labels.dtype == np.int32
    assert shards.labels.tolist() == [i % 3 for i in range(9)]
    assert shards.num_classes == 3
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            shards.read(outside)


def test_report(tmp_path):
    write_tar(tmp_path / "a.tar", [*labelled(5), ("only.txt", b"no image")])
    seen = []
    report = index_shards(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report == IndexReport(1, 5, 5, 3, (0, 2), (tmp_path / "a.tar").stat().st_size, 1)
    assert "5 images in 1 shard (" in str(report)
    assert seen == [(1, 1)]


def test_webdatasets_convention(tmp_path):
    """Key up to the first dot of the file name; consecutive members with one key are one sample; `__x__` is skipped."""
    write_tar(
        tmp_path / "a.tar",
        [
            ("__meta__/m.png", b"skipped"), ("d.1/x.json", b"{}"), ("d.1/x.JPG", b"one"), ("d.1/x.seg.png", b"mask"),
            ("./y.png", b"mask"), ("./y.jpg", b"two"), ("./y.cls", b" 7\n"), ("README", b"none"), (".hidden", b"none"),
            ("z.left.jpg", b"no image member"), ("x.png.gz", gzip.compress(b"three")), ("x.cls", b"-1"),
        ],
    )  # fmt: skip
    shards = open_shards(tmp_path)
    assert [shards.key(i) for i in range(len(shards))] == ["d.1/x", "./y", "x"]
    assert [shards.read(i) for i in range(len(shards))] == [b"one", b"two", b"three"]
    assert shards.labels.tolist() == [-1, 7, -1]
    assert shards.num_classes == 8
    assert shards.ignored == 1
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)]
    assert theirs == ["d.1/x", "./y", "z", "x"]


def test_the_image_can_be_chosen_and_a_default_choice_gives_a_warning(tmp_path, caplog):
    """A photograph KEY.png with its mask KEY.jpg: by default the JPEG is used, with a warning."""
    files = [(f"k{i}.{name}", data) for i in range(5) for name, data in (("png", png(i)), ("jpg", b"mask"))]
    write_tar(
        tmp_path / "a.tar", [*files, ("one.png", png(9)), ("four.png.gz", gzip.compress(png(7))), ("four.bmp", b"")]
    )
    report = index_shards(tmp_path)
    assert "5 samples have 2 images per key: jpg is used, png not" in str(report)
    assert "5 samples have 2 images per key" in caplog.text
    assert "data.image" in caplog.text
    assert open_shards(tmp_path).read(0) == b"mask"

    caplog.clear()
    for _ in range(2):  # built, then loaded
        chosen = open_shards(tmp_path, image="png")
        assert [chosen.read(i) for i in range(7)] == [*map(png, range(5)), png(9), png(7)]
        assert chosen.key(4) == "k4"
    assert chosen.several == {("png", "jpg"): 5, ("png.gz", "bmp"): 1}
    assert not caplog.text, "who chose need not be warned"
    assert open_shards(tmp_path).read(0) == b"mask", "each choice has its own index"
    with pytest.raises(UserError, match="expected one of jpg"):
        open_shards(tmp_path, image="gif")


@pytest.mark.parametrize("name", ["x.JFIF", "x.jpe", "x.apng", "x.mpo"])
def test_other_extensions_of_known_formats_are_images(tmp_path, name):
    write_tar(tmp_path / "a.tar", [(name, b"image"), ("x.txt", b"caption")])
    assert open_shards(tmp_path).read(0) == b"image"


def test_names_with_dots_are_explained_briefly(tmp_path, caplog):
    files = [(f"IMG.2020.{i:05d}.jpg", png(0)) for i in range(2000)]
    with pytest.raises(UserError, match=r"before its first dot.*selfvil pack") as error:
        open_shards(write_tar(tmp_path / "a.tar", files))
    assert len(str(error.value)) < 1000
    open_shards(write_tar(tmp_path / "b.tar", [*files, ("x.png", png(0))]))
    assert "before its first dot" in caplog.text
    assert len(caplog.text) < 1000


def test_unlabelled_shards_have_no_labels(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"cat")])
    shards = open_shards(tmp_path)
    assert shards.labels is None
    assert shards.num_classes == 0


@pytest.mark.parametrize(
    "text", [b"cat", b"", b"1.5", b"-3", b"9" * 18, b"9" * 5000, b"\xff\xfe", b"1_0", "٣".encode()]
)
def test_labels_that_are_no_class_numbers_are_ignored(tmp_path, text, caplog):
    write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.cls", text), ("b.png", png(1)), ("b.cls", b"1")])
    assert open_shards(tmp_path).labels.tolist() == [-1, 1]
    assert "no class numbers" in caplog.text


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    names = ["n" * 90, "d" * 120 + "/" + "n" * 90, "ü/ж", "b" * 96]
    if format != tarfile.USTAR_FORMAT:
        names += ["n" * 180, "d" * 200 + "/" + "é" * 120, "e" * 3000 + "/x"]
    write_tar(tmp_path / "a.tar", [(f"{name}.png", png(i)) for i, name in enumerate(names)], format)
    shards = open_shards(tmp_path)
    assert [shards.key(i) for i in range(len(shards))] == names
    assert [shards.read(i) for i in range(len(shards))] == [png(i) for i in range(len(names))]


def test_folders_links_and_gnu_tar(tmp_path, monkeypatch):
    """Members that are no regular files are skipped, as in tarfile."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in [
            ("d", tarfile.DIRTYPE, ""),
            ("l.png", tarfile.SYMTYPE, "x.png"),
            ("f", tarfile.FIFOTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("x.png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    with open(tmp_path / "a.tar", "rb") as file:
        assert [member.name for member in members(file, tmp_path)] == ["x.png"]


def test_sizes_in_binary_and_in_pax_records(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = len(png(0))
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + info.size.to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    info.pax_headers, info.size = {"size": str(info.size)}, 0
    pax = bytearray(tarfile.TarInfo.create_pax_header(info, {**info.get_info(), "name": "b.png"}, "utf-8"))
    padded = png(0).ljust(-(-len(png(0)) // 512) * 512, b"\0")
    (tmp_path / "a.tar").write_bytes(bytes(header) + padded + bytes(pax) + padded + bytes(1024))
    shards = open_shards(tmp_path)
    assert [shards.read(i) for i in range(len(shards))] == [png(0), png(0)]


def test_names_with_paths_are_only_names(tmp_path):
    write_tar(tmp_path / "a.tar", [("../../../etc/passwd.png", png(0)), ("/etc/shadow.png", png(1))])
    before = sorted(tmp_path.iterdir())
    shards = open_shards(tmp_path)
    assert [shards.read(i) for i in range(2)] == [png(0), png(1)]
    assert set(tmp_path.iterdir()) - set(before) == {tmp_path / "a.tar.index.npz"}


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["SELFVIL_BOMB"],)


def test_pickled_members_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFVIL_BOMB", str(tmp_path / "boom"))
    bomb = pickle.dumps(_Bomb())
    write_tar(tmp_path / "a.tar", [(f"a.{kind}", bomb) for kind in ("pyd", "pkl", "pickle", "pth", "cls", "png")])
    shards = open_shards(tmp_path)
    assert shards.read(0) == bomb
    assert not (tmp_path / "boom").exists()


def test_real_shards(shared_data):
    shards = open_shards(f"{shared_data}/cifar10/cifar10-test-{{000000..000001}}.tar")
    assert (len(shards), shards.num_classes) == (10_000, 10)
    assert (np.bincount(shards.labels) == 1000).all()
    with tarfile.open(shards.shard_of(7000)) as tar:
        assert shards.read(7000) == tar.extractfile(f"{shards.key(7000)}.jpg").read()
        assert shards.labels[7000] == int(tar.extractfile(f"{shards.key(7000)}.cls").read())
    photos = open_shards(f"{shared_data}/photos")
    assert (len(photos), photos.labels) == (600, None)


def test_camvids_photographs_are_preferred_to_their_masks(shared_data):
    shards = open_shards(f"{shared_data}/camvid/camvid-val-000000.tar")
    assert len(shards) == 101
    assert all(Image.open(io.BytesIO(shards.read(i))).format == "JPEG" for i in range(101))


def test_fingerprint_depends_only_on_content(tmp_path, shard):
    first = open_shards(shard).fingerprint
    copy = tmp_path / "elsewhere.tar"
    copy.write_bytes(shard.read_bytes())
    assert open_shards(copy).fingerprint == first
    for i, files in enumerate([labelled(4), labelled(5)[2:] + labelled(5)[:2], [("k0.cls", b"2"), *labelled(5)[1:]]]):
        assert open_shards(write_tar(tmp_path / f"other{i}.tar", files)).fingerprint != first


# --- the sidecar --------------------------------------------------------------------------------------------------


def sidecar(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npz")


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The shards that were indexed."""
    walked: list[Path] = []
    build = shard_index._build
    monkeypatch.setattr(shard_index, "_build", lambda path, image: walked.append(path) or build(path, image))
    return walked


def test_the_index_is_built_once(shard, builds):
    first = open_shards(shard)
    assert sidecar(shard).is_file()
    again = open_shards(shard)
    assert builds == [shard]
    assert again.fingerprint == first.fingerprint
    assert again.labels.tolist() == first.labels.tolist()
    assert [again.key(i) for i in range(5)] == [f"k{i}" for i in range(5)]
    assert not [path for path in shard.parent.iterdir() if path.name.startswith(".")]


def test_a_changed_shard_is_indexed_again(shard, builds):
    open_shards(shard)
    write_tar(shard, labelled(3))
    assert len(open_shards(shard)) == 3
    content = shard.read_bytes()
    shard.write_bytes(content)
    os.utime(shard, ns=(0, 12345))
    assert len(open_shards(shard)) == 3
    assert len(builds) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "npy", "columns", "keys", "pickle"])
def test_a_damaged_sidecar_is_built_again(shard, builds, damage, tmp_path, monkeypatch):
    expected = open_shards(shard).fingerprint
    path = sidecar(shard)
    content = path.read_bytes()
    saved = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        place = content.index(saved["crcs"].tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "npy":
        np.save(path.open("wb"), np.zeros(3))
    elif damage == "columns":
        np.savez(path, **(saved | {"sizes": saved["sizes"][:3]}))
    elif damage == "keys":
        np.savez(path, **(saved | {"keys": saved["keys"][:3]}))
    else:
        monkeypatch.setenv("SELFVIL_BOMB", str(tmp_path / "boom"))
        np.savez(path, **(saved | {"labels": np.array([_Bomb()] * 5)}))
    assert open_shards(shard).fingerprint == expected
    assert len(builds) == 2
    assert open_shards(shard).key(4) == "k4"
    assert len(builds) == 2
    assert not (tmp_path / "boom").exists()


def test_a_read_only_folder_uses_the_cache(shard, builds, monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    shard.parent.chmod(0o555)
    try:
        for _ in range(2):
            shards = open_shards(shard)
            assert [shards.key(i) for i in range(5)] == [f"k{i}" for i in range(5)]
        assert not sidecar(shard).exists()
    finally:
        shard.parent.chmod(0o755)
    assert builds == [shard]
    assert len(list((cache / "selfvil" / "index").iterdir())) == 1


def test_an_index_that_cannot_be_saved_is_built_each_time(shard, builds, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    shard.parent.chmod(0o555)
    try:
        for _ in range(2):
            assert open_shards(shard).key(4) == "k4"
    finally:
        shard.parent.chmod(0o755)
    assert set(builds) == {shard}
    assert "could not be saved" in caplog.text


# --- reading ------------------------------------------------------------------------------------------------------


def test_changed_bytes_are_detected(shard):
    shards = open_shards(shard)
    place = shard.read_bytes().index(png(3)) + 20
    with open(shard, "r+b") as file:
        file.seek(place)
        file.write(bytes([png(3)[20] ^ 1]))
    with pytest.raises(DamagedSample, match="CRC") as error:
        shards.read(3)
    assert (error.value.shard, error.value.key) == (shard, "k3")
    assert shards.read(2) == png(2)


def test_a_shard_truncated_or_deleted_while_open_damages_only_its_samples(shard):
    shards = open_shards(shard)
    os.truncate(shard, shard.read_bytes().index(png(3)) + 5)
    assert shards.read(2) == png(2)
    for i in (3, 4):
        with pytest.raises(DamagedSample, match="ends inside"):
            shards.read(i)
    shards = pickle.loads(pickle.dumps(shards))  # a copy with no file open
    shard.unlink()
    with pytest.raises(DamagedSample, match="cannot be read"):
        shards.read(0)


def test_compressed_members_are_checked(tmp_path, monkeypatch):
    packed = gzip.compress(b"image" * 100)
    files = [
        ("a.png.gz", packed),
        ("b.png.gz", packed[:-9]),
        ("c.png.gz", packed[:-8] + bytes(8)),
        ("d.png.gz", b"\x1f\x8bx"),
    ]
    write_tar(tmp_path / "a.tar", files)
    shards = open_shards(tmp_path)
    assert shards.read(0) == b"image" * 100
    for i in (1, 2, 3):
        with pytest.raises(DamagedSample, match="unpacked"):
            shards.read(i)
    monkeypatch.setattr(index, "MAX_BYTES", 499)
    with pytest.raises(DamagedSample, match="499"):
        shards.read(0)


def test_few_descriptors_are_open_and_all_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_OPEN_FILES", 3)
    for i in range(8):
        write_tar(tmp_path / f"{i}.tar", labelled(1, first=i))
    shards = open_shards(tmp_path)
    for i in [0, 1, 2, 3, 4, 5, 6, 7, 0, 7, 3]:
        assert shards.read(i) == png(i)
    assert sorted(path.name for path in open_files(tmp_path)) == ["0.tar", "3.tar", "7.tar"]
    del shards
    assert open_files(tmp_path) == []


def test_memory_is_twelve_bytes_and_a_label_per_sample(tmp_path):
    """Measured on the arrays; names are not in memory."""
    write_tar(tmp_path / "a.tar", labelled(50))
    shards = open_shards(tmp_path)
    assert sum(value.nbytes for value in vars(shards).values() if isinstance(value, np.ndarray)) == 50 * (12 + 4)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > shard_files._OPEN_FILES


def test_copies_for_other_processes_read_the_same(shard):
    shards = open_shards(shard)
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy.read(i) for i in range(5)] == [png(i) for i in range(5)]
    child = os.fork()
    if child == 0:
        os._exit(0 if all(shards.read(i) == png(i) for i in range(5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shards.read(1) == png(1)
