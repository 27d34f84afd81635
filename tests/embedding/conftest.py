"""A small untrained network as an export, a folder of images, and shards of the same."""

import pytest
import torch

from images import random_image
from selfvil.data.pack import pack
from selfvil.timm_folder import write_network
from selfvil.weights import Normalisation
from small import network

SIZE = (16, 24)


def export(folder, seed=3):
    """An export of an untrained Vision-LSTM of 4 x 6 patches."""
    folder.mkdir()
    torch.manual_seed(seed)
    arguments = {"embed_dim": 32, "depth": 2, "img_size": SIZE, "patch_size": 4, "num_classes": 0}
    normalisation = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), SIZE)
    write_network(folder, network(), arguments, normalisation, {"samples_seen": 0}, "# untrained\n")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return export(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    return export(tmp_path_factory.mktemp("model") / "other", seed=4)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """11 images of different sizes and formats in two class subfolders, one of them damaged, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cats", "dogs/old"):
        (folder / name).mkdir(parents=True)
    for i in range(10):
        name = f"cats/{i}.png" if i < 5 else f"dogs/old/{i}.jpg"
        random_image(i, 20 + i, 30 - i, "L" if i == 2 else "RGB").save(folder / name)
    (folder / "cats" / "3b.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """30 unlabelled images in 3 shards."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "images").mkdir()
    for i in range(30):
        random_image(100 + i, 16, 24).save(folder / "images" / f"{i:02d}.png")
    pack(str(folder / "images"), folder / "packed", name="set", samples_per_shard=10, workers=1)
    return folder / "packed"
