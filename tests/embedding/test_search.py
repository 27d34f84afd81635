"""Neighbours and duplicates against scikit-learn and plain loops; broken files; picture sheets."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.neighbors import NearestNeighbors

from images import random_image
from selfvil.cli import main
from selfvil.embedding import formats, search
from selfvil.embedding.formats import Layout, Rows, open_writer
from selfvil.embedding.reader import open_embeddings
from selfvil.embedding.search import Query, duplicates, neighbours
from selfvil.embedding.write import embed
from selfvil.errors import UserError


def write(path: Path, features: np.ndarray, keys=None, block: int = 8) -> Path:
    """An embedding file of these rows, in row groups of `block` rows."""
    keys = [f"k{i}" for i in range(len(features))] if keys is None else keys
    layout = Layout(len(features), features.shape[1], None, False, features.dtype)
    writer = open_writer(path.parent, path, layout, {"format": 1, "source": "none"})
    for i in range(0, len(features), block):
        writer.add(Rows(keys[i : i + block], None, features[i : i + block], None))
        if path.suffix == ".parquet":
            writer._flush()
    writer.close()
    return path


@pytest.fixture
def points():
    """100 rows: 60 random, and 40 near one of the first 10, at different distances."""
    random = np.random.default_rng(0)
    first = random.normal(size=(60, 12))
    near = first[random.integers(0, 10, 40)] * random.uniform(0.5, 2, (40, 1)) + random.normal(size=(40, 12)) * 0.2
    return random.permutation(np.concatenate([first, near])).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles, strips and blocks that divide the rows unevenly."""
    monkeypatch.setattr(search, "_TILE", 7)
    monkeypatch.setattr(search, "_STRIP", 3)
    monkeypatch.setattr(search, "_OUTER_BYTES", 30 * 12 * 4)
    monkeypatch.setattr("selfvil.embedding.reader._BLOCK_ROWS", 9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_neighbours_are_those_of_scikit_learn(points, tmp_path, suffix):
    file = open_embeddings(write(tmp_path / f"x{suffix}", points))
    assert len(file.spans) > 10
    asked = [0, 7, 99, 50]
    found = neighbours(file, search.find_queries(file, [f"k{row}" for row in asked]), k=6)
    reference = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(points.astype(np.float64))
    distances, rows = reference.kneighbors(points[asked].astype(np.float64))
    assert [[each.row for each in row] for row in found] == rows[:, 1:].tolist()
    assert [[each.key for each in row] for row in found] == [[f"k{each}" for each in row] for row in rows[:, 1:]]
    values = [[each.similarity for each in row] for row in found]
    np.testing.assert_allclose(values, 1 - distances[:, 1:], atol=1e-6)


def test_ties_and_few_rows(tmp_path):
    """Equal neighbours are in the order of the file, and a query has at most N - 1; a zero has similarity 0."""
    rows = np.array([[1, 0], [0, 1], [2, 0], [0, 0], [3, 0], [-1, 0]], np.float32)
    file = open_embeddings(write(tmp_path / "x.parquet", rows, block=2))
    (found,) = neighbours(file, search.find_queries(file, ["k2"]), k=50)
    assert [(each.row, each.similarity) for each in found] == [(0, 1), (4, 1), (1, 0), (3, 0), (5, -1)]
    (found,) = neighbours(file, [Query("other", None, np.array([1, 0], np.float32))], k=4)
    assert [each.row for each in found] == [0, 2, 4, 1]
    huge = open_embeddings(write(tmp_path / "huge.npy", rows * np.float32(1e30)))
    assert [each.row for each in neighbours(huge, search.find_queries(huge, ["k2"]))[0]] == [0, 4, 1, 3, 5]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [0.99, 0.9, 0.5, -1.0])
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_duplicates_are_those_of_plain_loops(points, tmp_path, threshold, suffix):
    file = open_embeddings(write(tmp_path / f"x{suffix}", points))
    found = duplicates(file, threshold, device="cpu")
    unit = points.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similar = unit @ unit.T
    group, pairs = list(range(100)), 0
    for i in range(100):
        for j in range(i):
            if similar[i, j] >= threshold - 1e-6:
                pairs += 1
                group = [group[j] if each == group[i] else each for each in group]
    sets = [[row for row in range(100) if group[row] == name] for name in sorted(set(group))]
    expected = sorted((rows for rows in sets if len(rows) > 1), key=lambda rows: (-len(rows), rows[0]))
    assert found.groups == expected
    assert found.pairs == pairs
    assert found.images - found.removable == len(sets)
    np.fill_diagonal(similar, -1)
    np.testing.assert_allclose(found.nearest, similar.max(1), atol=1e-6)
    np.testing.assert_allclose(found.quantiles()[0.5], np.median(similar.max(1)), atol=1e-6)
    assert found.above(0.9) == (similar.max(1) >= 0.9 - 1e-6).sum()


def test_equal_images_reach_a_threshold_of_one(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5, 384)).astype(np.float32)
    found = duplicates(open_embeddings(write(tmp_path / "x.npy", np.concatenate([rows, rows * 3]))), 1.0, device="cpu")
    assert found.groups == [[i, i + 5] for i in range(5)]
    single = duplicates(open_embeddings(write(tmp_path / "one.npy", rows[:1])), 0.5, device="cpu")
    assert (single.groups, single.pairs, single.nearest.tolist()) == ([], 0, [-1])


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(photos, model, tmp_path):
    return embed(photos, model, tmp_path / "photos.parquet", workers=0, device="cpu")


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_neighbours_command(embedded, photos, tmp_path, capsys):
    """A key and the path of the same image have the same neighbours; the sheet shows the images themselves."""
    path = photos / "dogs" / "old" / "7.jpg"
    run(
        "neighbours", embedded, "cats/2.png", path, "--k", 3, "--out", tmp_path / "s.png", "--json", tmp_path / "n.json"
    )
    assert "cats/2.png" in capsys.readouterr().out
    by_key, by_path = json.loads((tmp_path / "n.json").read_text())["queries"]
    assert by_key["row"] == 2
    assert "cats/2.png" not in [each["key"] for each in by_key["neighbours"]]
    assert by_path["row"] is None
    assert by_path["neighbours"][0]["key"] == "dogs/old/7.jpg"
    assert by_path["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet)
    shown = random_image(2, 22, 28, "L").convert("RGB")  # 28 x 22 pixels, enlarged four times
    expected = np.asarray(shown).repeat(4, 0).repeat(4, 1)
    top, left = 30 + 128 - 88, 10 + (128 - 112) // 2
    assert (pixels[top : top + 88, left : left + 112] == expected).all()
    assert pixels.shape[1] == 10 + 4 * 138


def test_duplicates_command(photos, model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(16):
        random_image(min(i, 4), 20, 30).save(folder / f"{i:02d}.png")
    file = embed(folder, model, tmp_path / "x.npy", workers=0, device="cpu")
    run("duplicates", file, "--threshold", 0.9999, "--json", tmp_path / "d.json", "--out", tmp_path / "d.png")
    out = capsys.readouterr().out
    assert "12 of 16 images are in 1 groups of near-duplicates (66 pairs" in out
    assert "leaves 5 images" in out
    groups = json.loads((tmp_path / "d.json").read_text())["groups"]
    assert groups == [[f"{i:02d}.png" for i in range(4, 16)]]
    with Image.open(tmp_path / "d.png") as sheet:
        assert sheet.width == 10 + 11 * 138  # ten images, and how many more
    run("duplicates", file, "--threshold", -1)
    assert "16 of 16 images are in 1 groups" in capsys.readouterr().out


def test_wrong_queries(embedded, photos, model, other_model, tmp_path, capsys):
    def error(*words):
        return refusal(capsys, "neighbours", embedded, *words)

    assert "'cats/22.png' is no key" in error("cats/22.png")
    assert "did you mean cats/2.png" in error("cats/22.png")
    assert "did you mean dogs/old/7.jpg" in error("7.jpg")
    assert "its first key is cats/0.png" in error("zzzzzzzz")
    assert "3b.jpg cannot be read: not an image file" in error(photos / "cats" / "3b.jpg")
    assert "has other weights" in error(photos / "cats" / "0.png", "--model", other_model)
    assert "cannot be loaded" in error(photos / "cats" / "0.png", "--model", tmp_path / "moved")
    assert "expected a file ending in .png" in error("cats/0.png", "--out", tmp_path / "s.jpg")
    assert "cannot be opened" in error("cats/0.png", "--out", tmp_path / "s.png", "--images", tmp_path / "moved")
    assert "is given twice" in error("cats/0.png", "--json", embedded)
    assert "--threshold 98.0 is not possible" in refusal(capsys, "duplicates", embedded, "--threshold", 98)


def test_images_that_are_gone_are_shown_as_such(photos, model, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        random_image(i).save(folder / f"{i}.png")
    file = embed(folder, model, tmp_path / "x.npy", workers=0, device="cpu")
    (folder / "1.png").unlink()
    run("neighbours", file, "0.png", "--out", tmp_path / "s.png")
    assert (tmp_path / "s.png").exists()


def test_files_that_are_no_embeddings(tmp_path, capsys):
    def error(file):
        return refusal(capsys, "duplicates", file)

    assert "there is no file" in error(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("mine")
    assert "text.parquet is no Parquet file, or damaged" in error(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "other.parquet")
    assert "other.parquet has no metadata of selfvil" in error(tmp_path / "other.parquet")
    facts = {b"selfvil": b'{"format": 1}'}
    parquet.write_table(pyarrow.table({"key": ["a"]}).replace_schema_metadata(facts), tmp_path / "key.parquet")
    assert "lacks the column key, or feature" in error(tmp_path / "key.parquet")
    facts = {b"selfvil": b'{"format": 99, "version": "9.9"}'}
    parquet.write_table(pyarrow.table({"key": ["a"]}).replace_schema_metadata(facts), tmp_path / "new.parquet")
    assert "was written by a newer selfvil (9.9)" in error(tmp_path / "new.parquet")
    np.save(tmp_path / "bare.npy", np.zeros((2, 3), np.float32))
    assert "bare.meta.json cannot be read" in error(tmp_path / "bare.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    assert "is no .npy file, or damaged" in error(tmp_path / "object.npy")
    short = write(tmp_path / "short.npy", np.zeros((3, 3), np.float32), ["a", "b"])
    assert "expected a row of float32 or float16 for each key" in error(short)
    whole = write(tmp_path / "cut.npy", np.ones((50, 3), np.float32))
    whole.write_bytes(whole.read_bytes()[:-40])
    assert "damaged" in error(whole)
    broken = np.ones((4, 3), np.float32)
    broken[2, 1] = np.nan
    for name in ("nan.npy", "nan.parquet"):
        assert "the features of k2 hold NaN or infinity" in error(write(tmp_path / name, broken))
    twice = write(tmp_path / "twice.npy", np.ones((4, 3), np.float32), ["a", "b", "a", "c"])
    assert "the key 'a' occurs 2 times in" in refusal(capsys, "neighbours", twice, "a")


def test_a_file_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for use in (lambda: formats.require_format(tmp_path / "x.parquet"), lambda: open_embeddings(Path(__file__))):
        with pytest.raises(UserError, match=r"Parquet needs pyarrow: pip install 'selfvil\[embed\]'"):
            use()


def test_neighbours_of_another_width_are_refused(tmp_path):
    file = open_embeddings(write(tmp_path / "x.npy", torch.rand(4, 3).numpy()))
    with pytest.raises(UserError, match="the queries have 5 values"):
        neighbours(file, [Query("other", None, np.ones(5, np.float32))])
