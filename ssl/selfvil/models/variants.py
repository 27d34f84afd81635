"""The Vision-LSTMs that timm knows by name. Importing this file registers them."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from selfvil.models.published import checkpoint_filter_fn
from selfvil.models.vil import VisionLSTM


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


_PUBLISHED = "https://ml.jku.at/research/vision_lstm/download/"

default_cfgs = generate_default_cfgs(
    {
        "vil_tiny_patch16_224.nxai_e800_in1k": _cfg(_PUBLISHED + "vil2_tiny16_e800_in1k.th"),
        "vil_tiny_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_tiny16_e400_in1k.th"),
        "vil_small_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_small16_e400_in1k.th"),
        "vil_base_patch16_224.nxai_e400_in1k": _cfg(_PUBLISHED + "vil2_base16_e400_in1k.th"),
        "vil_nano_patch4_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32)),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionLSTM:
    return build_model_with_cfg(
        VisionLSTM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _create_published(variant: str, pretrained: bool, **kwargs: Any) -> VisionLSTM:
    # The published weights were trained with a norm after Bilateral Concat; new networks go without. A configuration
    # that is no tag of ours comes from a folder or the hub, and says itself what it needs.
    published = pretrained and isinstance(kwargs.get("pretrained_cfg"), str | None)
    has_norm = published and kwargs.get("global_pool", "bilateral_concat") == "bilateral_concat"
    return _create(variant, pretrained, **{"fc_norm": has_norm, **kwargs})


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-T: 6 M parameters, 1.5 GMAC at 224 px."""
    return _create_published("vil_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 12, **kwargs})


@register_model
def vil_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-S: 23 M parameters, 5.1 GMAC at 224 px."""
    return _create_published("vil_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 12, **kwargs})


@register_model
def vil_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """ViL-B: 89 M parameters, 18.6 GMAC at 224 px."""
    return _create_published("vil_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 12, **kwargs})


@register_model
def vil_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionLSTM:
    """A small ViL for 32 × 32 images and for tests; not a published size."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6}
    return _create("vil_nano_patch4_32", pretrained, **{**sizes, **kwargs})
