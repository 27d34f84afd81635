"""Makes published_mae.safetensors: loss and gradients of a tiny published MAE.

    python tests/objectives/make_published_mae.py CHECKOUT [OUT]

CHECKOUT is a checkout of facebookresearch/mae. The published code uses an argument of timm's block and a name of numpy
that no longer exist, so both are restored while it is imported.
"""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models import vision_transformer


def import_published(checkout: str) -> ModuleType:
    """The published `models_mae`."""
    genuine = vision_transformer.Block

    def block(*args, qk_scale=None, **kwargs):
        return genuine(*args, **kwargs)

    vars(np)["float"] = float
    with patch.object(vision_transformer, "Block", block), patch.object(sys, "path", [checkout, *sys.path]):
        import models_mae
    return models_mae


def loss_and_gradients(
    published: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the published network with `noise` as its random numbers."""
    with patch("torch.rand", lambda *shape, device: noise):
        loss, _, _ = published(images, mask_ratio=0.75)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in published.named_parameters() if p.grad is not None}


def main() -> None:
    torch.manual_seed(0)
    published = import_published(sys.argv[1]).MaskedAutoencoderViT(
        img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
        decoder_num_heads=2, norm_pix_loss=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).double()  # fmt: skip
    images, noise = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, 16, dtype=torch.float64)
    loss, gradients = loss_and_gradients(published, images, noise)
    values = {"images": images, "noise": noise, "loss": loss}
    values |= {f"weight/{name}": weight.detach().clone() for name, weight in published.named_parameters()}
    # Two float64 values of each gradient are enough to detect a difference.
    values |= {f"gradient/{name}": summary(gradient) for name, gradient in gradients.items()}
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("published_mae.safetensors")
    save_file(values, out)
    print(f"{out}: {out.stat().st_size} bytes, loss {loss.item():.6f}")


def summary(gradient: torch.Tensor) -> torch.Tensor:
    """Norm of a gradient, and its product with one fixed direction."""
    direction = torch.linspace(-1, 1, gradient.numel(), dtype=gradient.dtype).sin()
    return torch.stack([gradient.norm(), gradient.flatten() @ direction])


if __name__ == "__main__":
    main()
