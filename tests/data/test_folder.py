"""A folder of images has the interface of shards."""

import os
import pickle

import numpy as np
import pytest

from images import random_image
from selfvil.data.folder import FolderImages
from selfvil.data.images import open_images
from selfvil.data.index import Shards
from selfvil.data.loader import ordered_batches
from selfvil.data.read import DamagedImage
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from tars import labelled, write_tar


@pytest.fixture
def folder(tmp_path):
    for name in ("b/0.png", "a/deep/1.png", "a/2.png", "b/3.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(int(name[-5])).save(tmp_path / name, "JPEG" if name.endswith("JPG") else "PNG")
    return tmp_path


def test_keys_bytes_and_labels(folder):
    images = pickle.loads(pickle.dumps(open_images(folder)))
    assert [images.key(i) for i in range(len(images))] == ["a/2.png", "a/deep/1.png", "b/0.png", "b/3.JPG"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert (images.classes, images.num_classes) == (["a", "b"], 2)
    assert images.read(2) == (folder / "b" / "0.png").read_bytes()
    assert images.shard_of(2) == folder
    (folder / "b" / "0.png").unlink()
    with pytest.raises(DamagedImage, match="No such file"):
        images.read(2)
    assert open_images(folder / "a").labels is None


def test_the_fingerprint_changes_with_the_images(folder):
    """With bytes and labels, not with names and times."""
    before = open_images(folder).fingerprint
    assert open_images(str(folder)).fingerprint == before
    os.utime(folder / "a" / "2.png", ns=(1, 1))
    (folder / "b" / "0.png").rename(folder / "b" / "1.png")
    again = open_images(folder)
    assert (again.fingerprint, again.changed) == (before, "")
    random_image(9).save(folder / "a" / "2.png")
    changed = open_images(folder)
    assert changed.fingerprint != before
    assert changed.changed == f"{folder} changed since it was last indexed: 1 of 4 samples have other bytes"
    (folder / "a" / "2.png").rename(folder / "b" / "2.png")
    assert open_images(folder).fingerprint not in (before, changed.fingerprint)


def test_folders_of_shards_and_other_paths(folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "s.tar", labelled(3))
    (shards / "classes.txt").write_text("a\nb\nc\n")
    assert isinstance(open_images(shards), Shards)
    assert isinstance(open_images(shards / "s.tar"), Shards)
    assert isinstance(open_images([shards / "s.tar"]), Shards)
    assert isinstance(open_images(folder / "a"), FolderImages)
    random_image(0).save(shards / "0.png")
    with pytest.raises(UserError, match=r"holds both images and \.tar files"):
        open_images(shards)
    with pytest.raises(UserError, match="image extension 'gif' is not known"):
        open_images(folder, image="gif")
    with pytest.raises(UserError, match="no shards given"):
        open_images("")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_of_their_batch(folder, workers):
    """A batch may become empty; chosen batches are read in the given order."""
    for name in ("a/2.png", "a/deep/1.png", "b/3.JPG"):
        (folder / name).write_bytes(b"x")
    images, view = open_images(folder), CenterCrop(8, [0.5] * 3, [0.5] * 3)
    batches = list(ordered_batches(images, view, batch_size=2, workers=workers, skip_damaged=True))
    assert [batch.ids.tolist() for batch in batches] == [[], [2]]
    assert [batch.labels.tolist() for batch in batches] == [[], [1]]
    assert [[bad.key for bad in batch.bad] for batch in batches] == [["a/2.png", "a/deep/1.png"], ["b/3.JPG"]]
    assert batches[1].bad[0].replaced_by == -1
    assert np.array_equal(batches[1].views[0][0], view(random_image(0)))
    chosen = ordered_batches(images, view, batch_size=1, workers=workers, skip_damaged=True, numbers=[3, 2])
    assert [batch.ids.tolist() for batch in chosen] == [[], [2]]
