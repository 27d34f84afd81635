"""Registers the Vision-LSTM models with timm, on import."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from selfvil.models.published import checkpoint_filter_fn
from selfvil.models.vision_lstm import VisionLSTM


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


_URL = "https://ml.jku.at/research/vision_lstm/download/"

default_cfgs = generate_default_cfgs(
    {
        "vil_tiny_patch16_224.nxai_e800_in1k": _cfg(_URL + "vil2_tiny16_e800_in1k.th"),
        "vil_tiny_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil2_tiny16_e400_in1k.th"),
        "vil_small_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil2_small16_e400_in1k.th"),
        "vil_base_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil2_base16_e400_in1k.th"),
        "vil_large_patch16_224.untrained": _cfg(),
        "vil_nano_patch4_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8)),
        "vil_mlp_nano_patch4_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8)),
        "vil_mlp_tiny_patch16_224.untrained": _cfg(),
        "vil_mlp_small_patch16_224.untrained": _cfg(),
        "vil_mlp_base_patch16_224.untrained": _cfg(),
        "vil_v1_tiny_patch16_224.nxai_e800_in1k": _cfg(_URL + "vil_tiny16_e800_in1k.th"),
        "vil_v1_tiny_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil_tiny16_e400_in1k.th"),
        "vil_v1_tiny_plus_patch16_224.nxai_e800_in1k": _cfg(_URL + "vil_tinyplus16_e800_in1k.th"),
        "vil_v1_tiny_plus_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil_tinyplus16_e400_in1k.th"),
        # As in the published code, these are the weights of the network without overlap.
        "vil_v1_tiny_plus_patch16_stride8_224.nxai_e800_in1k": _cfg(
            _URL + "vil_tinyplus16_e800_in1k.th", pool_size=(27, 27)
        ),
        "vil_v1_small_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil_small16_e400_in1k.th"),
        "vil_v1_small_plus_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil_smallplus16_e400_in1k.th"),
        "vil_v1_small_plus_patch16_stride8_224.nxai_e400_in1k": _cfg(
            _URL + "vil_smallplus16_e400_in1k_stride8.th", pool_size=(27, 27)
        ),
        "vil_v1_base_patch16_224.nxai_e400_in1k": _cfg(_URL + "vil_base16_e400_in1k.th"),
        "vil_v1_base_patch16_stride8_224.nxai_e400_in1k": _cfg(
            _URL + "vil_base16_e400_in1k_stride8.th", pool_size=(27, 27)
        ),
    }
)

_VERSION_1 = {
    "conv": "causal1d",
    "bias": False,
    "global_pool": "bilateral_avg",
    "norm_eps": 1e-5,
    "fc_norm": True,
    "fc_norm_eps": 1e-6,
}
# Stride 8 is half a patch: 27 × 27 = 729 tokens at 224 px. Positions of 14 × 14 patches are resampled to 27 × 27.


def _create(variant: str, pretrained: bool, device: Any = None, dtype: Any = None, **kwargs: Any) -> VisionLSTM:
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            VisionLSTM,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **kwargs,
        )
    return model.to(dtype=dtype)


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T: 6 M parameters, 1.5 GMAC at 224 px."""
    return _create("vil_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, **kwargs})


@register_model
def vil_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S: 23 M parameters, 5.1 GMAC at 224 px."""
    return _create("vil_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, **kwargs})


@register_model
def vil_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B: 89 M parameters, 18.6 GMAC at 224 px."""
    return _create("vil_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 12, **kwargs})


@register_model
def vil_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """A small ViL for 32 × 32 images and for tests; not a published size."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6}
    return _create("vil_nano_patch4_32", pretrained, **{**sizes, **kwargs})


@register_model
def vil_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-L, of the depth and width of ViT-L; not a published size."""
    return _create("vil_large_patch16_224", pretrained, **{"embed_dim": 1024, "depth": 24, **kwargs})


@register_model
def vil_mlp_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """A small Vision-LSTM with MLPs for 32 × 32 images and for tests: 0.7 M parameters."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 3}
    return _create("vil_mlp_nano_patch4_32", pretrained, **{"block": "mlp", **sizes, **kwargs})


@register_model
def vil_mlp_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T with MLPs, of the depth, width and parameters of ViT-T (6 M)."""
    return _create("vil_mlp_tiny_patch16_224", pretrained, **{"block": "mlp", "embed_dim": 192, "depth": 6, **kwargs})


@register_model
def vil_mlp_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S with MLPs, of the depth, width and parameters of ViT-S (22 M)."""
    return _create("vil_mlp_small_patch16_224", pretrained, **{"block": "mlp", "embed_dim": 384, "depth": 6, **kwargs})


@register_model
def vil_mlp_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B with MLPs, of the depth, width and parameters of ViT-B (86 M)."""
    return _create("vil_mlp_base_patch16_224", pretrained, **{"block": "mlp", "embed_dim": 768, "depth": 6, **kwargs})


def _create_v1(variant: str, pretrained: bool, **kwargs: Any) -> VisionLSTM:
    return _create(variant, pretrained, **{**_VERSION_1, **kwargs})


@register_model
def vil_v1_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T of version 1, 24 blocks."""
    return _create_v1("vil_v1_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, **kwargs})


@register_model
def vil_v1_tiny_plus_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T+ of version 1, 29 blocks."""
    return _create_v1("vil_v1_tiny_plus_patch16_224", pretrained, **{"embed_dim": 192, "depth": 14.5, **kwargs})


@register_model
def vil_v1_tiny_plus_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T+ of version 1, 29 blocks, with overlapping patches: 729 tokens at 224 px."""
    return _create_v1(
        "vil_v1_tiny_plus_patch16_stride8_224", pretrained, **{"embed_dim": 192, "depth": 14.5, "stride": 8, **kwargs}
    )


@register_model
def vil_v1_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S of version 1, 24 blocks."""
    return _create_v1("vil_v1_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, **kwargs})


@register_model
def vil_v1_small_plus_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S+ of version 1, 26 blocks."""
    return _create_v1("vil_v1_small_plus_patch16_224", pretrained, **{"embed_dim": 384, "depth": 13, **kwargs})


@register_model
def vil_v1_small_plus_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S+ of version 1, 26 blocks, with overlapping patches: 729 tokens at 224 px."""
    return _create_v1(
        "vil_v1_small_plus_patch16_stride8_224", pretrained, **{"embed_dim": 384, "depth": 13, "stride": 8, **kwargs}
    )


@register_model
def vil_v1_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B of version 1, 24 blocks."""
    return _create_v1("vil_v1_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 12, **kwargs})


@register_model
def vil_v1_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B of version 1, 24 blocks, with overlapping patches: 729 tokens at 224 px."""
    return _create_v1(
        "vil_v1_base_patch16_stride8_224", pretrained, **{"embed_dim": 768, "depth": 12, "stride": 8, **kwargs}
    )
