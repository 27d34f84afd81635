"""Large and small crops of an image, as DINO and related methods compare them.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (2020), section 3.4. The
first two of an image's crops are large.

Shapes: B images, V crops of each, C channels of an image, D features of a crop.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from selfvil.data.views import DINOCrop
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.objectives.base import ImageSpec, View
from selfvil.settings import Section, Size


def _ascending_share(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{list(scale)} is not a range of shares: expected two ascending numbers above 0 and up to 1")
    return scale


Scale = Annotated[tuple[float, float], AfterValidator(_ascending_share)]
"""Range of the share of an image's area that a random crop covers."""


Readout = Literal["bilateral_concat", "mean", "first", "last", "cls", "registers"] | None
"""How tokens become one vector: a name from `selfvil.models.adapter.READOUTS`; None: the backbone's default."""


class CropSettings(Section):
    """Settings of the crops; the defaults are DINO's."""

    global_crop_scale: Scale = (0.4, 1.0)
    """Range of the share of an image's area that a large crop covers; its size is model.img_size."""
    local_crop_scale: Scale = (0.05, 0.4)
    """Range of the share of an image's area that a small crop covers."""
    local_crops: int = Field(8, ge=0, le=64)
    """Number of small crops of each image."""
    local_crop_size: Size = (96, 96)
    """Height and width of a small crop, in pixels; both must be divisible by model.patch_size, unless that is null."""
    blur: bool = True
    """Blur some crops by up to 2 pixels, as published for images of 224 pixels; too much for images of 32 pixels."""
    flip: bool = True
    """Flip half of the crops left to right; false if a mirror image has another meaning, as with digits."""


def prepare_for_crops(backbone: nn.Module, settings: CropSettings, image: ImageSpec) -> None:
    """Make `backbone` take large and small crops.

    Raises UserError if small crops are not whole patches, or if the backbone cannot take crops of these sizes.
    """
    small = settings.local_crop_size
    if settings.local_crops and any(side < 1 or side % image.patch_size for side in small):
        raise UserError(
            f"objective.local_crop_size = {list(small)} is not divisible by model.patch_size = {image.patch_size}: "
            "both sides must be multiples of it"
        )
    adapter = adapt(backbone)
    adapter.enable_dynamic_img_size()
    if not adapter.has_patches:  # how small images may be is only known by a forward pass
        for key, size in (("model.img_size", image.size), ("objective.local_crop_size", small)):
            if key == "model.img_size" or settings.local_crops:
                require_size(backbone, image, size, key)


@torch.no_grad()
def require_size(backbone: nn.Module, image: ImageSpec, size: tuple[int, int], key: str) -> None:
    """Raise UserError if `backbone` cannot take images of that size; `key` is the recipe key of the size."""
    training = backbone.training
    backbone.eval()  # no running statistics may change
    try:
        adapt(backbone).forward_features(torch.zeros(1, image.in_chans, *size))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"{type(backbone).__name__} cannot take images of {size[0]}x{size[1]} pixels "
            f"({' '.join(str(error).split())}): raise {key}"
        ) from None
    finally:
        backbone.train(training)


def multi_crop(settings: CropSettings, image: ImageSpec, large: int = 2) -> list[View]:
    """`large` large and some small crops, with DINO's augmentation: that of its two large crops by turns."""

    def crop(size: Any, scale: tuple[float, float], blur: float, solarise: float = 0.0) -> View:
        blur = blur if settings.blur else 0.0
        return DINOCrop(
            size, scale, image.mean, image.std, blur=blur, solarise=solarise, flip=settings.flip,
            channel_drop=image.channel_drop,
        )  # fmt: skip

    scale, small = settings.global_crop_scale, settings.local_crop_scale
    first, second = crop(image.size, scale, blur=1.0), crop(image.size, scale, blur=0.1, solarise=0.2)
    return [
        *(second if number % 2 else first for number in range(large)),
        *(crop(settings.local_crop_size, small, blur=0.5) for _ in range(settings.local_crops)),
    ]


def crop_features(backbone: nn.Module, crops: Sequence[Tensor], readout: str) -> list[Tensor]:
    """Crops, each (B, C, H, W), to features (n·B, D): n consecutive crops of one size share a forward pass."""
    same_size = (torch.cat(list(group)) for _, group in groupby(crops, key=lambda crop: crop.shape))
    return [adapt(backbone).read_out(images, readout) for images in same_size]


def crops_picture(crops: Sequence[Tensor], image: ImageSpec) -> Tensor:
    """A picture (3, H, W) in [0, 1] with one row for each of up to 8 images: its crops, all at the same scale.

    crops: each (B, C, H, W).
    """
    height, width = (max(crop.shape[axis] for crop in crops) + 2 for axis in (-2, -1))
    columns = []
    for crop in crops:
        shown = image.rgb(crop[:8])
        columns.append(F.pad(shown, (0, width - shown.shape[-1], 0, height - shown.shape[-2]), value=1.0))
    return torch.cat(list(torch.cat(columns, dim=-1)), dim=-2)
