"""Heads: readouts take the tokens they name, and a ViT takes images of any size as timm's own would."""

import pytest
import timm
import torch
from torch import nn

from selfvil.errors import UserError
from selfvil.models.heads import ProjectionHead, choose_readout, read_out, take_any_size

VIL, VIT = "vil_nano_patch4_32", "vit_tiny_patch16_224"


def network(name: str = VIL, **kwargs) -> nn.Module:
    kwargs = {"embed_dim": 32, "depth": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 0} | kwargs
    return timm.create_model(name, **kwargs | ({"num_heads": 2} if name == VIT else {}))


def test_readouts_take_the_tokens_they_name():
    vil, vit = network(), network(VIT)
    take_any_size(vit)
    images = torch.randn(2, 3, 8, 16)
    patches, tokens = vil.forward_features(images).flatten(1, 2), vit.forward_features(images)
    assert tokens.shape == (2, 1 + 8, 32)
    expected = {
        "first": patches[:, 0], "last": patches[:, 7], "mean": patches.mean(dim=1),
        "bilateral_concat": torch.cat([patches[:, 0], patches[:, 7]], dim=1),
    }  # fmt: skip
    expected["first_last_mean"] = torch.cat([expected["bilateral_concat"], expected["mean"]], dim=1)
    for name, rows in expected.items():
        assert torch.equal(read_out(vil, images, name), rows)
        assert choose_readout(vil, name) == (name, rows.shape[1])
    assert torch.equal(read_out(vit, images, "cls"), tokens[:, 0])
    torch.testing.assert_close(read_out(vit, images, "mean"), tokens[:, 1:].mean(dim=1))
    assert choose_readout(vil) == ("bilateral_concat", 64)
    assert choose_readout(vit) == ("cls", 32)


def test_readouts_of_extra_tokens():
    images = torch.randn(2, 3, 8, 16)
    for settings, readout, width in (
        ({"global_pool": "registers", "num_registers": 3}, "registers", 96),
        ({"global_pool": "middle_cls"}, "cls", 32),
    ):
        backbone = network(**settings)
        assert choose_readout(backbone) == (readout, width)
        pooled = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        assert torch.equal(read_out(backbone, images, readout), pooled)
        tokens = read_out(backbone, images, f"{readout}_mean")
        assert tokens.shape == (2, choose_readout(backbone, f"{readout}_mean")[1])
    assert choose_readout(network(num_registers=2)) == ("bilateral_concat", 64)


def test_a_vit_made_to_take_any_size_is_timms_own():
    """The same function as with `dynamic_img_size=True`, at every size, with the same parameters."""
    plain, dynamic = network(VIT), network(VIT, dynamic_img_size=True)
    dynamic.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 24)
    expected = plain.forward_features(images)
    take_any_size(plain)
    torch.testing.assert_close(plain.forward_features(images), expected)
    for size in ((16, 24), (8, 8), (24, 12)):
        images = torch.randn(2, 3, *size)
        assert torch.equal(plain.forward_features(images), dynamic.forward_features(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "readout", "usable"),
    [
        (VIL, {}, "cls", "bilateral_concat, mean, first, last, middle_patch, first_last_mean$"),
        (
            VIT,
            {"class_token": False, "global_pool": "avg"},
            "cls",
            "bilateral_concat, mean, first, last, middle_patch, first_last_mean$",
        ),
        (VIT, {}, "middle", "bilateral_concat, mean, first, last, middle_patch, first_last_mean, cls, cls_mean$"),
    ],
)
def test_a_readout_without_its_token_is_refused(name, kwargs, readout, usable):
    with pytest.raises(UserError, match=rf"objective.readout = '{readout}' is not possible with \w+; .*: {usable}"):
        choose_readout(network(name, **kwargs), readout)


def test_a_vit_without_class_token_is_read_by_its_mean():
    assert choose_readout(network(VIT, class_token=False, global_pool="avg")) == ("mean", 32)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_logits_are_cosines_times_lengths(norm_last_layer):
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, norm_last_layer=norm_last_layer)
    with torch.no_grad():
        head.last_layer_length.uniform_(0.5, 2)
    x = torch.randn(3, 6)
    expected = torch.nn.functional.cosine_similarity(head.mlp(x)[:, None], head.last_layer[None], dim=-1)
    torch.testing.assert_close(head(x), expected * head.last_layer_length.T)
    head(x).sum().backward()
    assert (head.last_layer_length.grad is None) == norm_last_layer
