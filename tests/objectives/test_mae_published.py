"""MAE on a timm ViT with the published decoder: loss and gradients equal those of the published code."""

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from selfvil.objectives import mae as module
from selfvil.objectives.base import ImageSpec, Progress
from selfvil.objectives.mae import MAE, MAESettings
from small import Views

SCRIPT = Path(__file__).with_name("make_published_mae.py")
published_code = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
STORED = Path(__file__).with_name("published_mae.safetensors")
PROGRESS = Progress(step=0, total_steps=1, steps_per_epoch=1, seed=0)
NAMES = [
    (r"^decoder_blocks\.", "decoder."),
    (r"^decoder_pred\.", "decoder_head."),
    (r"^decoder_pos_embed$", "decoder_pos"),
    (r"^(?!decoder|mask_token)", "backbone."),
]


def ours(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the published network under our names."""
    renamed = {}
    for name, value in published.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.flatten() if name == "mask_token" else value
    return renamed


def build(size: int, patch: int, dim: int, depth: int, heads: int, **settings) -> MAE:
    backbone = timm.models.VisionTransformer(size, patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0)
    spec = ImageSpec((size, size), patch, 3, (0.5,) * 3, (0.2,) * 3)
    return MAE(backbone, MAESettings(decoder="vit", **settings), spec).double()


def take_weights(objective: MAE, published: dict[str, Tensor]) -> None:
    weights = ours(published)
    positions = weights.pop("decoder_pos")
    torch.testing.assert_close(objective.decoder_pos.double(), positions[0, 1:], rtol=0, atol=1e-6)
    assert not positions[0, 0].any()
    objective.decoder_pos = positions[0, 1:]  # as rounded there
    objective.load_state_dict(weights)


def loss_with(objective: MAE, images: Tensor, noise: Tensor, monkeypatch) -> Tensor:
    monkeypatch.setattr(module, "keyed_noise", lambda *arguments: noise)
    loss = objective(Views([images], torch.arange(len(images))), PROGRESS).loss
    loss.backward()
    return loss


def test_loss_and_gradients_equal_the_stored_ones(monkeypatch):
    values = load_file(STORED)
    objective = build(16, 4, 16, 1, 2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    take_weights(objective, {k.removeprefix("weight/"): v for k, v in values.items() if k.startswith("weight/")})
    loss = loss_with(objective, values["images"], values["noise"], monkeypatch)
    torch.testing.assert_close(loss, values["loss"], rtol=1e-12, atol=0)
    expected = ours({k.removeprefix("gradient/"): v for k, v in values.items() if k.startswith("gradient/")})
    found = {
        name: published_code.summary(p.grad) for name, p in objective.named_parameters() if name != "backbone.pos_embed"
    }
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def checkout() -> str:
    folder = os.environ.get("SELFVIL_PUBLISHED_MAE")
    if not folder:
        pytest.skip("SELFVIL_PUBLISHED_MAE does not name a checkout of facebookresearch/mae")
    return folder


def test_stored_values_equal_those_of_the_published_code(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), checkout(), str(tmp_path / "values")], check=True, timeout=120)
    torch.testing.assert_close(load_file(tmp_path / "values"), load_file(STORED), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients_equal_the_published_code_at_full_size(normalise, monkeypatch):
    """512 wide, 8 layers, 16 heads, at 224 pixels; loss and every gradient, in float64."""
    torch.manual_seed(0)
    published = published_code.import_published(checkout()).MaskedAutoencoderViT(
        embed_dim=96, depth=2, num_heads=3, norm_pix_loss=normalise,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).double()  # fmt: skip
    objective = build(224, 16, 96, 2, 3, decoder_depth=8, normalise_targets=normalise)
    take_weights(objective, published.state_dict())
    images, noise = torch.randn(2, 3, 224, 224, dtype=torch.float64), torch.rand(2, 196, dtype=torch.float64)
    expected, gradients = published_code.loss_and_gradients(published, images, noise)
    torch.testing.assert_close(loss_with(objective, images, noise, monkeypatch).detach(), expected, rtol=1e-12, atol=0)
    found = {name: p.grad for name, p in objective.named_parameters() if name != "backbone.pos_embed"}
    torch.testing.assert_close(found, ours(gradients), rtol=1e-9, atol=1e-12)
