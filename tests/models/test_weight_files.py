"""A weight file restores its network or raises an error; nothing in it is dropped without a message."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

from published_files import as_in_published_file
from selfvil.errors import UserError
from selfvil.models.published import checkpoint_filter_fn, our_names

NAME = "vil_tiny_patch16_224"
SMALL = {"embed_dim": 32, "depth": 1, "img_size": 32, "patch_size": 8}
IMAGES = (2, 3, 32, 32)


@pytest.fixture
def published(tmp_path):
    """A file in the published form with 7 classes, and its network."""
    network = timm.create_model(NAME, fc_norm=True, num_classes=7, **SMALL).eval()
    in_file = as_in_published_file(network.state_dict())
    network.load_state_dict(our_names(in_file))
    torch.save({"state_dict": in_file}, tmp_path / "published.th")
    return str(tmp_path / "published.th"), network


def from_path(file, **more):
    return timm.create_model(NAME, checkpoint_path=file, **{**SMALL, "num_classes": 7, **more}).eval()


def from_overlay(file, **more):
    overlay = {"file": file}
    return timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "num_classes": 7, **more}
    ).eval()


def from_config(file, **more):
    config = {"file": file, "num_classes": 7, "input_size": (3, 32, 32), "classifier": "head", "architecture": NAME,
              "first_conv": "patch_embed.proj"}  # fmt: skip
    return timm.create_model(NAME, pretrained=True, pretrained_cfg=config, **{**SMALL, "num_classes": 7, **more}).eval()


def from_timms_loader(file, strict=True, filtered=True, **more):
    network = timm.create_model(NAME, **{**SMALL, "num_classes": 7, **more}).eval()
    filter_fn = checkpoint_filter_fn if filtered else None
    timm.models.load_checkpoint(network, file, strict=strict, filter_fn=filter_fn)
    return network


def from_torch(file, strict=True, **more):
    network = timm.create_model(NAME, **{**SMALL, "num_classes": 7, **more}).eval()
    network.load_state_dict(torch.load(file, weights_only=True), strict=strict)
    return network


WAYS = [
    from_path, from_overlay, from_config, from_timms_loader, from_torch,
    lambda file, **more: from_timms_loader(file, strict=False, **more),
    lambda file, **more: from_timms_loader(file, filtered=False, **more),
    lambda file, **more: from_torch(file, strict=False, **more),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_restores_the_published_network(published, way):
    file, network = published
    loaded, images = way(file), torch.randn(IMAGES)
    assert torch.equal(loaded(images), network(images))
    finer = way(file, img_size=48)
    assert finer.pos_embed.shape[1:3] == (6, 6)
    assert torch.equal(finer.fc_norm.weight, network.fc_norm.weight)
    assert torch.equal(finer.head.weight, network.head.weight)


def test_new_classes_or_none_keep_the_norm(published):
    file, network = published
    assert torch.equal(from_config(file, num_classes=5).fc_norm.weight, network.fc_norm.weight)
    assert torch.equal(from_config(file, num_classes=0).fc_norm.weight, network.fc_norm.weight)
    for way in (from_path, from_torch):
        with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
            way(file, num_classes=5)


def test_a_norm_that_cannot_be_kept_is_reported(published, caplog):
    file, _ = published
    with caplog.at_level(logging.WARNING):
        for more in ({"global_pool": "avg", "num_classes": 0}, {"fc_norm": False}):
            caplog.clear()
            network = from_config(file, **more)
            assert isinstance(network.fc_norm, torch.nn.Identity)
            assert "norm of 64 pooled features in the weights is dropped" in caplog.text
        caplog.clear()
        assert from_config(file, global_pool="", num_classes=0)(torch.randn(IMAGES)).shape == (2, 4, 4, 32)
        assert not caplog.text


OTHERS = {
    "version 1": ({"conv": "causal1d"}, {}, r"version 1, the names vil_v1_\*"),
    "deeper": ({"depth": 2}, {}, "depth=2"),
    "narrower": ({"embed_dim": 16}, {}, "embed_dim=16"),
    "registers": ({"num_registers": 2}, {}, r"unknown, the first is reg_token.* num_registers=2"),
    "no registers": ({}, {"num_registers": 2}, r"missing, the first is reg_token"),
    "class token": ({"global_pool": "middle_cls"}, {}, r"unknown, the first is cls_token.*middle_cls"),
    "LayerScale": ({"init_values": 0.1}, {}, r"ls\.gamma.* init_values"),
    "no LayerScale": ({}, {"init_values": 0.1}, r"missing, the first is blocks.*ls\.gamma"),
    "directions": ({"traversal": "bidirectional"}, {}, "traversal with several directions"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("classes", [5, 7])
def test_weights_of_another_network_are_refused(tmp_path, other, classes):
    """With another number of classes timm loads with strict=False: missing weights would stay random."""
    theirs, ours, message = OTHERS[other]
    network = timm.create_model(NAME, **{**SMALL, "num_classes": 7, **theirs})
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        from_config(str(tmp_path / "model.safetensors"), num_classes=classes, **ours)


def test_another_patch_size_resamples_the_embedding_as_timm_does(published):
    file, network = published
    loaded = from_config(file, patch_size=4, img_size=16)
    expected = timm.layers.resample_patch_embed(network.patch_embed.proj.weight.detach(), [4, 4])
    assert torch.equal(loaded.patch_embed.proj.weight, expected)
    assert torch.equal(loaded.head.weight, network.head.weight)
    grey = from_config(file, patch_size=4, img_size=16, in_chans=1)
    assert grey(torch.randn(1, 1, 16, 16)).shape == (1, 7)
