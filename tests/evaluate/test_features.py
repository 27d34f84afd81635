"""Features: the right tokens of the right images, in their order, with their labels."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate.features import LAST_BLOCKS, TOKENS, choose_readout, extract, extract_all, raw_pixels
from selfvil.models.adapter import adapt

LOOK = {"img_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def write_shard(path: Path, images: list[np.ndarray], labels: list[int | None]) -> str:
    """A shard of PNG images (H, W, 3) uint8; None leaves a label out."""
    with tarfile.open(path, "w") as tar:
        for index, (pixels, label) in enumerate(zip(images, labels)):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            members = {"png": content.getvalue()} | ({} if label is None else {"cls": str(label).encode()})
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{index:04d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(path)


def made_images(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def shards(tmp_path):
    return open_shards(write_shard(tmp_path / "a.tar", made_images(11), [i % 3 for i in range(11)]))


def tiny(name: str = "vil_nano_patch4_32") -> nn.Module:
    sizes = {"vil_nano_patch4_32": {"depth": 1}, "vit_tiny_patch16_224": {"depth": 1, "patch_size": 8}}[name]
    return timm.create_model(name, img_size=16, num_classes=0, **sizes)


def test_each_row_belongs_to_its_image(shards):
    backbone = tiny().eval()
    images = torch.from_numpy(np.stack(made_images(11))).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(LOOK["mean"])[:, None, None]) / torch.tensor(LOOK["std"])[:, None, None]
    with torch.no_grad():
        tokens = backbone.forward_features(images).flatten(1, 2)
    expected = torch.cat([tokens[:, 0], tokens[:, -1], tokens.mean(1)], dim=1)
    for batch_size, workers in ((4, 0), (11, 0), (3, 2)):
        features = extract(backbone, shards, **LOOK, batch_size=batch_size, workers=workers, device="cpu")
        assert torch.allclose(features.x, expected, atol=1e-4)
        assert features.y.tolist() == [i % 3 for i in range(11)]
        assert features.x.dtype == torch.float32
        assert not features.x.requires_grad
        assert len(features.to("cpu")) == 11


def test_the_mode_of_the_network_is_restored(shards):
    backbone = timm.create_model(
        "vil_nano_patch4_32", img_size=16, depth=1, num_classes=0, drop_path_rate=0.9, pos_drop_rate=0.5
    )
    for mode in (True, False):
        backbone.train(mode)
        first, second = (extract(backbone, shards, **LOOK, workers=0, device="cpu") for _ in range(2))
        assert torch.equal(first.x, second.x)  # stochastic depth and dropout are off
        assert backbone.training is mode
    with pytest.raises(UserError):
        extract(backbone.train(), shards, **LOOK, readout="cls", workers=0, device="cpu")
    assert backbone.training


def test_bf16_is_close_and_float32(shards):
    backbone = tiny()
    exact = extract(backbone, shards, **LOOK, workers=0, device="cpu")
    rough = extract(backbone, shards, **LOOK, workers=0, device="cpu", precision="bf16")
    assert rough.x.dtype == torch.float32
    assert not torch.equal(rough.x, exact.x)
    assert torch.nn.functional.cosine_similarity(rough.x, exact.x).min() > 0.99


def test_readouts_of_each_architecture():
    images = torch.randn(2, 3, 16, 16)
    vil, vit = tiny().eval(), tiny("vit_tiny_patch16_224").eval()
    assert (choose_readout(vil), choose_readout(vit)) == ("first_last_mean", "cls_mean")
    tokens, grid = vit.forward_features(images), vil.forward_features(images)
    assert torch.equal(adapt(vit).read_out(images, "cls"), tokens[:, 0])
    assert torch.equal(adapt(vit).read_out(images, "mean"), tokens[:, 1:].mean(1))
    assert torch.equal(adapt(vit).read_out(images, "bilateral_concat"), torch.cat([tokens[:, 1], tokens[:, -1]], 1))
    assert torch.equal(adapt(vit).read_out(images, "cls_mean"), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    assert torch.equal(adapt(vil).read_out(images, "bilateral_concat"), torch.cat([grid[:, 0, 0], grid[:, -1, -1]], 1))
    assert torch.allclose(adapt(vil).read_out(images, "mean"), grid.mean((1, 2)), atol=1e-6)
    both = torch.cat([adapt(vil).read_out(images, "bilateral_concat"), adapt(vil).read_out(images, "mean")], 1)
    assert torch.equal(adapt(vil).read_out(images, "first_last_mean"), both)


def test_other_architectures():
    images = torch.randn(2, 3, 64, 64)
    convolutional = timm.create_model("resnet18", num_classes=0).eval()
    assert choose_readout(convolutional) == "mean"
    expected = convolutional.forward_features(images).mean((2, 3))
    assert torch.allclose(adapt(convolutional).read_out(images, "mean"), expected, atol=1e-6)
    headless = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, class_token=False, global_pool="avg")
    assert choose_readout(headless) == "mean"
    with pytest.raises(UserError, match="needs a class token, which VisionTransformer does not have"):
        choose_readout(headless, "cls")
    with pytest.raises(UserError, match="no readout 'middle'; choose one of: bilateral_concat, mean"):
        choose_readout(headless, "middle")

    class Pooled(nn.Module):
        def forward_features(self, x):
            return x.mean((2, 3))

    with pytest.raises(UserError, match=r"features of shape \[2, 3\]; expected tokens"):
        adapt(Pooled()).read_out(images, "mean")


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vit_tiny_patch16_224"])
def test_several_readouts_in_one_pass_are_those_of_a_pass_each(shards, name):
    """Bit for bit, the last blocks' intermediate tokens included; tokens are float16 in a file."""
    backbone, usual = tiny(name), choose_readout(tiny(name))
    names = [usual, "mean", LAST_BLOCKS, TOKENS]
    together = extract_all(backbone, shards, names, **LOOK, workers=0, device="cpu")
    for readout in names:
        alone = extract(backbone, shards, readout=readout, **LOOK, workers=0, device="cpu")
        assert torch.equal(together[readout].x, alone.x)
        assert torch.equal(together[readout].y, alone.y)
    tokens = together[TOKENS].x
    assert tokens.dtype == torch.float16
    assert tokens.ndim == 3
    assert torch.allclose(tokens.float().mean(dim=1), together["mean"].x, atol=1e-3)


def test_a_network_without_patches_has_one_block(shards):
    backbone = timm.create_model("resnet18", num_classes=0)
    found = extract_all(backbone, shards, [LAST_BLOCKS, TOKENS, "mean"], **LOOK, workers=0, device="cpu")
    assert torch.equal(found[LAST_BLOCKS].x, found["mean"].x.repeat(1, 2))
    assert found[TOKENS].x.shape[2] == 512


def test_raw_pixels(shards):
    features = raw_pixels(shards, 16, workers=0)
    expected = torch.from_numpy(np.stack(made_images(11))).permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.allclose(features.x, expected, atol=1e-6)
    assert raw_pixels(shards, (8, 4), channels=1, workers=0).x.shape == (11, 32)


def test_unlabelled_shards(tmp_path):
    part = open_shards(write_shard(tmp_path / "part.tar", made_images(3), [0, None, 1]))
    none = open_shards(write_shard(tmp_path / "none.tar", made_images(3), [None] * 3))
    with pytest.raises(UserError, match=r"1 of the 3 images in .*part\.tar have no label.*selfvil pack"):
        extract(tiny(), part, **LOOK, workers=0, device="cpu")
    with pytest.raises(UserError, match=r"3 of the 3 images in .*none\.tar have no label"):
        raw_pixels(none, 16, workers=0)


def test_damaged_images_are_left_out(tmp_path, caplog):
    images = made_images(5)
    path = write_shard(tmp_path / "a.tar", images, [0, 1, 2, 3, 4])
    content = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmember("0002.png").offset_data
    content[offset : offset + 100] = bytes(100)
    Path(path).write_bytes(content)
    features = raw_pixels(open_shards(path), 16, workers=0)
    assert features.y.tolist() == [0, 1, 3, 4]
    expected = torch.from_numpy(np.stack(images))[[0, 1, 3, 4]].permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.allclose(features.x, expected, atol=1e-6)
    assert "1 of 5 images cannot be read" in caplog.text
    assert "0002" in caplog.text
