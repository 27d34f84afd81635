"""What was built for one kind of source works for all: statistics, packing and inspecting."""

import numpy as np
import pytest

from http_store import serve
from images import encode, random_image
from selfvil.data import stats
from selfvil.data.images import open_images, open_mixture
from selfvil.data.index import open_shards
from selfvil.data.inspect import inspect
from selfvil.data.pack import pack
from selfvil.data.read import decode_image
from selfvil.data.verify import verify_pack
from selfvil.errors import UserError
from tars import png, write_tar
from written_sources import CLASSES, KINDS, write_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def named(request, tmp_path):
    """What the user would name: a source of this kind with 13 images."""
    if request.param != "remote":
        yield write_source(request.param, tmp_path / request.param)
        return
    with serve(write_source("shards", tmp_path / "shards")) as server:
        yield f"{server.url}/{{0..1}}.tar"


every_kind = pytest.mark.parametrize("named", [*KINDS, "remote"], indirect=True)


@every_kind
def test_every_source_is_inspected_measured_and_packed(named, tmp_path):
    opened = open_images(named)
    report = inspect(named, workers=1).report
    assert (report.images, report.problems, report.formats, report.labelled) == (13, [], {"PNG": 13}, 13)
    found = stats.measure(opened)
    assert stats.save(opened, found).is_file()
    with pytest.raises(UserError, match="has the same value in all pixels"):  # it is found, and these are plain images
        stats.load(open_images(named), 3)
    packed = pack(named, tmp_path / "packed", workers=1)
    verified = verify_pack(tmp_path / "packed", 1)
    assert (packed.samples, packed.skipped, verified.unchanged, verified.problems) == (13, [], 13, [])
    again = open_shards(tmp_path / "packed")
    labels = {opened.read(i): int(opened.labels[i]) for i in range(13)}
    assert labels == {png(i): i % 3 for i in range(13)}
    assert {again.read(i): int(again.labels[i]) for i in range(13)} == labels


@pytest.mark.parametrize("named", ["csv", "parquet"], indirect=True)
def test_packing_a_table_keeps_names_of_classes_and_refuses_masks(named, tmp_path):
    pack(named, tmp_path / "packed", workers=1)
    assert (tmp_path / "packed" / "classes.txt").read_text().split() == CLASSES
    with pytest.raises(UserError, match="has no masks"):
        pack(named, tmp_path / "masked", mask="png", workers=1)
    with pytest.raises(UserError, match="are kept as they are"):
        pack(named, tmp_path / "named", classes=CLASSES, workers=1)


@every_kind
def test_interrupted_packing_of_every_source_continues(named, tmp_path, monkeypatch):
    pack(named, tmp_path / "whole", samples_per_shard=4, workers=1)

    def interrupted(done, total):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("selfvil.data.pack._CHUNK", 6)
        with pytest.raises(KeyboardInterrupt):
            pack(named, tmp_path / "again", samples_per_shard=4, workers=1, progress=interrupted)
    continued = []
    pack(named, tmp_path / "again", samples_per_shard=4, workers=1, progress=lambda done, _: continued.append(done))
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert (tmp_path / "whole" / "sources.tsv").read_bytes() == (tmp_path / "again" / "sources.tsv").read_bytes()


def test_statistics_of_a_mixture_are_those_of_its_sources_by_their_shares(tmp_path):
    """With the weights 3 and 1, the pixels of the first source count three times as often as those of the second."""
    names = []
    for number, bright in enumerate((0.2, 0.9)):
        shown = [random_image(10 * number + i).point(lambda value, bright=bright: value * bright) for i in range(8)]
        members = [(f"{i}.png", encode(image, "PNG")) for i, image in enumerate(shown)]
        names.append(write_tar(tmp_path / f"{number}.tar", members))
    mixture = open_mixture([(names[0], 3), (names[1], 1)])
    with pytest.raises(UserError, match="have not been measured"):
        stats.load(mixture, 3)
    for name in names:
        part = open_images(name)
        stats.save(part, stats.measure(part))
    found = stats.load(mixture, 3)
    pixels = [np.concatenate([_pixels(each.read(i)) for i in range(8)]) for each in mixture.parts()]
    expected = np.concatenate([*[pixels[0]] * 3, pixels[1]])
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, expected.std(0), rtol=1e-9)
    assert found.images == 16
    with pytest.raises(UserError, match="is for 3 channels"):
        stats.load(mixture, 1)


def _pixels(data):
    return np.asarray(decode_image(data), np.float64).reshape(-1, 3) / 255


def test_statistics_beside_shards_are_no_shards(tmp_path):
    shards = open_shards(write_source("shards", tmp_path / "shards"))
    path = stats.save(shards, stats.measure(shards))
    assert path.parent == tmp_path / "shards"
    (tmp_path / "shards" / "classes.txt").unlink()
    assert len(open_shards(f"{tmp_path}/shards/*")) == 13


def test_a_folder_named_by_a_dot_has_statistics_beside_it(tmp_path, monkeypatch):
    folder = write_source("folder", tmp_path / "folder")
    monkeypatch.chdir(folder)
    images = open_images(".")
    assert stats.save(images, stats.measure(images)) == tmp_path / "folder.stats.json"


@pytest.mark.parametrize("name", ["images.parquet", "images.csv?key=SECRET", "data.arrow"])
def test_tables_in_a_store_are_refused_in_one_sentence(name):
    with pytest.raises(UserError, match="only shards") as refused:
        open_images(f"https://example.org/{name}")
    assert "SECRET" not in str(refused.value)
