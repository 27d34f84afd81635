"""Data sets that cannot be scored: labels of different classes, too few images, the same images in both parts."""

import numpy as np
import pytest
from PIL import Image

from selfvil.data.index import open_shards
from selfvil.data.pack import pack
from selfvil.errors import UserError
from selfvil.evaluate import EVALUATIONS, evaluation, settings
from selfvil.evaluate.checks import check_classes, shared_images
from selfvil.evaluate.score import score
from selfvil.evaluate.task import Task
from selfvil.weights import Network, Normalisation
from small import network
from tars import png, write_tar


def shards(path, values: range, classes: int = 2):
    """A shard of plain images, value i with label i % classes."""
    files = [
        pair for i in values for pair in ((f"k{i}.cls", b"%d" % (i % classes)), (f"k{i}.png", png(i)))
    ]  # fmt: skip
    return open_shards(write_tar(path, files))


@pytest.fixture
def colours(tmp_path):
    """Three classes by colour, packed apart; the test images lack the second class."""
    shades = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for part, names in {"train": [*shades], "test": ["blue", "red"]}.items():
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(6):
                shade = tuple(abs(value - index - 10 * (part == "test")) for value in shades[name])
                Image.new("RGB", (8, 8), shade).save(tmp_path / part / name / f"{index}.png")
        pack(tmp_path / part, tmp_path / f"{part}-packed", workers=1)
    return tmp_path


def test_labels_of_another_order_of_classes_are_refused(colours, monkeypatch):
    """Colours separate these classes perfectly, and the score was 50 %: label 1 is green here and red there."""
    train, test = colours / "train-packed", colours / "test-packed"
    message = rf"label 1 is 'green' by {train}/classes.txt and 'red' by {test}/classes.txt.* --classes {train}/classes"
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8))
    monkeypatch.setattr("selfvil.evaluate.score.load_pretrained", lambda *_, **__: Network(network(), normalisation, 0))
    for name in EVALUATIONS.keys() - {"segment"}:  # its classes are pixels of masks
        with pytest.raises(UserError, match=message):
            score(colours, train, test, {name: settings(name)}, workers=0)
    pack(colours / "test", colours / "again", classes=["blue", "green", "red"], workers=1)
    (warning,) = check_classes(open_shards(train), open_shards(colours / "again"))
    assert "no test image in" in warning
    assert "has the label 1, which" in warning


def test_classes_that_cannot_be_compared_are_a_warning(colours):
    train, test = open_shards(colours / "train-packed"), open_shards(colours / "test-packed")
    lists = [part.paths[0].with_name("classes.txt") for part in (train, test)]
    for part, file in zip((train, test), lists):
        file.rename(file.with_suffix(".away"))
        warning, _ = check_classes(train, test)
        assert f"no classes.txt beside {part.paths[0]}, so whether its labels mean the same" in warning
        file.with_suffix(".away").rename(file)
    for file in lists:
        file.unlink()
    assert [text for text in check_classes(train, test) if "classes.txt" in text] == []


def test_the_image_of_a_sample_is_chosen(tmp_path):
    """Photographs are .png here and masks .jpg: without the choice, masks would be scored, which are all the same."""
    parts = []
    for part, values in (("train", range(20)), ("test", range(20, 30))):
        files = [
            file
            for i in values
            for file in ((f"k{i}.cls", b"%d" % (i % 2)), (f"k{i}.jpg", png(0)), (f"k{i}.png", png(i)))
        ]
        parts.append(write_tar(tmp_path / f"{part}.tar", files))
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfvil.evaluate.score.load_pretrained", lambda *_, **__: Network(network(), normalisation, 0))
        with pytest.raises(UserError, match="all 10 test images"):
            score(tmp_path, *parts, {"knn": settings("knn")}, workers=0)
        assert score(tmp_path, *parts, {"knn": settings("knn")}, image="png", workers=0)


def test_the_same_images_in_another_order_are_refused(tmp_path):
    train = shards(tmp_path / "train.tar", range(20))
    with pytest.raises(UserError, match=r"all 20 test images in .*test.tar are also training images in .*train.tar"):
        check_classes(train, shards(tmp_path / "test.tar", range(19, -1, -1)))
    with pytest.raises(UserError, match="all 4 test images"):
        check_classes(train, shards(tmp_path / "part.tar", range(4)))


def test_images_in_both_parts_are_refused_or_counted(tmp_path):
    train, test = shards(tmp_path / "train.tar", range(20)), shards(tmp_path / "test.tar", range(17, 37))
    with pytest.raises(UserError, match=r"^3 of the 20 test images in .*15 points too high.*--allow-shared"):
        check_classes(train, test)
    (warning,) = check_classes(train, test, allow_shared=True)
    assert warning.startswith("3 of the 20 test images in ")
    assert warning.endswith("accuracies may be up to 15 points too high")
    assert shared_images(train, test) == 3
    assert check_classes(train, shards(tmp_path / "new.tar", range(20, 40))) == []
    with pytest.raises(UserError, match="all 20 test images"):
        check_classes(train, train, allow_shared=True)


def photos(folder, numbers):
    """A folder of two classes, whose files have the same names in each such folder."""
    for place, number in enumerate(numbers):
        path = folder / "ab"[place % 2] / f"{place:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def test_images_packed_from_the_same_files_are_refused(tmp_path):
    """With another size they have other bytes. Equal names of different files mean nothing."""
    for name, numbers, size in [("train", range(20), None), ("test", range(17, 37), 16), ("new", range(40, 60), 16)]:
        pack(photos(tmp_path / name, numbers), tmp_path / f"{name}-packed", size=size, samples_per_shard=8, workers=1)
    train, test, new = (open_shards(tmp_path / f"{name}-packed") for name in ("train", "test", "new"))
    assert not np.isin(test.contents, train.contents).any()
    assert shared_images(train, test) == 3
    with pytest.raises(UserError, match=r"^3 of the 20 test images in .*packed from the same files"):
        check_classes(train, test)
    assert shared_images(train, new) == 0
    assert check_classes(train, new) == []
    one = open_shards(tmp_path / "test-packed" / "shard-000001.tar")  # a part of the shards
    assert (
        shared_images(train, one)
        + sum(shared_images(train, open_shards(tmp_path / "test-packed" / f"shard-{i:06d}.tar")) for i in (0, 2))
        == 3
    )


@pytest.mark.parametrize("kind", ["missing", "of others", "short", "random", "empty"])
def test_a_table_that_does_not_belong_to_the_shards_is_not_used(tmp_path, kind):
    for name, size in [("train", None), ("test", 16)]:
        pack(photos(tmp_path / name, range(20)), tmp_path / f"{name}-packed", size=size, workers=1)
    file = tmp_path / "test-packed" / "sources.tsv"
    lines = file.read_bytes().splitlines(True)
    assert shared_images(*(open_shards(tmp_path / f"{name}-packed") for name in ("train", "test"))) == 20
    file.unlink()
    if kind != "missing":
        broken = {
            "of others": [line.replace(b"shard-", b"other-") for line in lines], "short": lines[:7],
            "random": [np.random.default_rng(0).bytes(500)], "empty": [],
        }  # fmt: skip
        file.write_bytes(b"".join(broken[kind]))
    assert shared_images(*(open_shards(tmp_path / f"{name}-packed") for name in ("train", "test"))) == 0


def test_classes_without_test_images_are_a_warning(tmp_path):
    train = shards(tmp_path / "train.tar", range(20), classes=4)
    (warning,) = check_classes(train, shards(tmp_path / "test.tar", range(20, 30)))
    assert "has the label 2, 3, which" in warning
    assert "2 of 4 classes" in warning


def test_contents_depend_on_bytes_alone(tmp_path):
    one, other = shards(tmp_path / "a.tar", range(6)), shards(tmp_path / "b.tar", range(5, -1, -1), classes=3)
    assert one.contents.dtype == np.uint64
    assert one.contents.tolist() == other.contents.tolist()[::-1]
    assert len(set(one.contents.tolist())) == 6


@pytest.mark.parametrize(
    ("train", "classes", "name", "values", "message"),
    [
        (range(9), 2, "knn", {}, r"k-NN with k in \[10, 20, 100, 200\] needs at least 10 training images, found 9"),
        (range(9), 9, "linear", {}, "No class has two training images"),
        (range(20), 1, "linear", {}, "at least two classes"),
        (
            range(20),
            2,
            "few_label",
            {"labels_per_class": 11},
            "Class 0 has 10 training images, fewer than the 11 labels",
        ),
        (
            range(20),
            2,
            "finetune",
            {"labels_per_class": 11},
            "Class 0 has 10 training images, fewer than the 11 labels",
        ),
    ],
)
def test_too_few_training_images(tmp_path, train, classes, name, values, message):
    parts = shards(tmp_path / "a.tar", train, classes), shards(tmp_path / "b.tar", range(100, 110), classes)
    task = Task("pretrained", None, Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8)), *parts, create=lambda: None)
    with pytest.raises(UserError, match=message):
        evaluation(name).check(task, settings(name, values))
