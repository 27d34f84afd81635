"""Makes published_ijepa.safetensors: loss and gradients of a tiny published I-JEPA.

    python tests/objectives/make_published_ijepa.py CHECKOUT [OUT]

CHECKOUT is a checkout of facebookresearch/ijepa. The lines of its training loop that compute the loss are inside a
function of `main`, so they are repeated here, with the published networks, masks and schedule.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

MOMENTA = (0.9, 1.0)
STEPS = 10


def import_published(checkout: str) -> SimpleNamespace:
    """The published modules of networks and masks."""
    sys.path.insert(0, checkout)
    try:
        from src.masks import multiblock, utils
        from src.models import vision_transformer
    finally:
        sys.path.remove(checkout)
    return SimpleNamespace(masks=multiblock, mask_utils=utils, networks=vision_transformer)


def build(published: SimpleNamespace, size: int, patch: int, dim: int, depth: int, heads: int, width: int):
    """Encoder, predictor and target encoder in float64, with different weights."""
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    both = [
        published.networks.VisionTransformer(
            [size], patch, embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=True, norm_layer=norm
        ).double()
        for _ in range(2)
    ]
    predictor = published.networks.vit_predictor(
        num_patches=(size // patch) ** 2, embed_dim=dim, predictor_embed_dim=width, depth=depth, num_heads=heads
    ).double()
    with torch.no_grad():
        for network in (*both, predictor):
            for name, parameter in network.named_parameters():
                if parameter.requires_grad and "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape) / 4)
    return both[0], predictor, both[1]


def loss_and_gradients(published, encoder, predictor, target, images, keep, blocks) -> tuple[torch.Tensor, dict]:
    """keep: (B, K). blocks: (B, T, M)."""
    masks = list(blocks.unbind(1))
    with torch.no_grad():
        features = target(images)
        features = published.mask_utils.apply_masks(F.layer_norm(features, (features.shape[-1],)), masks)
    loss = F.smooth_l1_loss(predictor(encoder(images, [keep]), [keep], masks), features)
    loss.backward()
    gradients = {f"backbone.{name}": p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients | {name: p.grad for name, p in predictor.named_parameters() if p.grad is not None}


def main() -> None:
    torch.manual_seed(0)
    published = import_published(sys.argv[1])
    encoder, predictor, target = build(published, 32, 4, 8, 1, 2, 16)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    collator = published.masks.MaskCollator(32, 4, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), 1, 4, 4)
    _, (keep,), blocks = collator(list(images))
    blocks = torch.stack(blocks, dim=1)
    loss, gradients = loss_and_gradients(published, encoder, predictor, target, images, keep, blocks)
    values = {"images": images, "keep": keep, "blocks": blocks, "loss": loss}
    for prefix, network in (("backbone.", encoder), ("", predictor), ("teacher.backbone.", target)):
        values |= {f"weight/{prefix}{name}": p.detach().clone() for name, p in network.named_parameters()}
    # Two float64 values of each gradient are enough to detect a difference.
    values |= {f"gradient/{name}": summary(gradient) for name, gradient in gradients.items()}
    momenta = [MOMENTA[0] + i * (MOMENTA[1] - MOMENTA[0]) / STEPS for i in range(STEPS)]
    values["momenta"] = torch.tensor(momenta, dtype=torch.float64)
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("published_ijepa.safetensors")
    save_file({name: value.contiguous() for name, value in values.items()}, out)
    print(f"{out}: {out.stat().st_size} bytes, loss {loss.item():.6f}")


def summary(gradient: torch.Tensor) -> torch.Tensor:
    """Norm of a gradient, and its product with one fixed direction."""
    direction = torch.linspace(-1, 1, gradient.numel(), dtype=gradient.dtype).sin()
    return torch.stack([gradient.norm(), gradient.flatten() @ direction])


if __name__ == "__main__":
    main()
