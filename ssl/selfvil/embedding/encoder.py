"""A pretrained backbone with all that determines its embeddings: readout, image size, precision.

Shapes: B images, D values of an embedding, H × W patches, C channels of a patch.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate.features import Precision, choose_readout
from selfvil.models.adapter import READOUTS, adapt
from selfvil.weights import Normalisation, load_pretrained


class Encoded(NamedTuple):
    """features: float32 (B, D). patches: float32 (B, H, W, C), or None."""

    features: np.ndarray
    patches: np.ndarray | None


@dataclass(frozen=True)
class Encoder:
    """Turns images into embeddings, always in the same way. Made by `load_encoder`.

    normalisation: of the images, with the size that they are resized and cropped to. dim: D. grid: (H, W), or None if
    the features of the network have no grid of patches. channels: C, of a patch.
    """

    backbone: nn.Module
    normalisation: Normalisation
    readout: str
    precision: Precision
    device: torch.device
    dim: int = 0
    grid: tuple[int, int] | None = None
    channels: int = 0

    @property
    def view(self) -> CenterCrop:
        """From a decoded image to the network's input, float32 (C, height, width)."""
        return CenterCrop(self.normalisation.img_size, self.normalisation.mean, self.normalisation.std)

    @torch.inference_mode()
    def encode(self, images: Tensor, patches: bool = False) -> Encoded:
        """Images (B, in_chans, height, width), normalised, to embeddings on the CPU, and the features of patches."""
        adapter = adapt(self.backbone)
        autocast: Any = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        images = images.to(self.device, non_blocking=True)
        with autocast:
            features = adapter.forward_features(images)
            prefix, tokens = adapter.split_tokens(features)
            rows = READOUTS[self.readout](prefix, tokens).float().cpu().numpy()
            grid = adapter.patch_grid(features, images) if patches else None
        return Encoded(rows, None if grid is None else tokens.unflatten(1, grid).float().cpu().numpy())

    def weights_digest(self) -> str:
        """16 hex digits that depend on every weight and buffer of the backbone."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def load_encoder(
    source: str | Path,
    *,
    network: str | None = None,
    readout: str | None = None,
    img_size: int | Sequence[int] | None = None,
    precision: Precision = "fp32",
    device: torch.device | str | None = None,
) -> Encoder:
    """Load a backbone for embeddings, and encode one grey image as a test.

    Args:
        source: whatever `load_pretrained` accepts: an export, a run, a checkpoint ...
        network: which network of a run that has several; None takes its default.
        readout: one of `READOUTS`; None: the architecture's usual one for frozen features.
        img_size: pixels, or height and width; None: the size of pretraining.
        precision: float32, or bf16 autocast.
        device: None: a GPU if there is one.

    Raises UserError: the source cannot be loaded; an unknown readout or precision; a size the network does not take.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"There is no precision {precision!r}; choose one of: fp32, bf16.")
    size = _pair(img_size)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from None
    loaded = load_pretrained(source, network=network)
    backbone, normalisation = loaded.backbone.to(place).eval(), loaded.normalisation
    readout = choose_readout(backbone, readout)
    if size is not None and size != normalisation.img_size:
        normalisation = replace(normalisation, img_size=size)
        adapt(backbone).enable_dynamic_img_size()
    encoder = Encoder(backbone, normalisation, readout, precision, place)
    height, width = normalisation.img_size
    try:
        rows, patches = encoder.encode(torch.zeros(1, normalisation.channels, height, width), patches=True)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{adapt(backbone).name} does not take images of {height} x {width} pixels ({str(error).splitlines()[0]}); "
            f"choose another --img-size, such as {' x '.join(map(str, loaded.normalisation.img_size))}, or a multiple "
            "of the patch size"
        ) from None
    grid = None if patches is None else (patches.shape[1], patches.shape[2])
    return replace(encoder, dim=rows.shape[1], grid=grid, channels=0 if patches is None else patches.shape[3])


def _pair(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if img_size is None:
        return None
    sides = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= 8192 for side in sides):
        raise UserError(f"an image size of {img_size} is not possible; expected height and width, 1 to 8,192 pixels")
    return sides[0], sides[1]
