"""Pictures of a run: what its objective recorded, and what its newest checkpoint computes from training images."""

import io
import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from selfvil.build import build_objective, image_spec
from selfvil.checkpoint import Checkpoint
from selfvil.diagnostics.checkup import Record, training_images
from selfvil.diagnostics.gates import horizons, record_forget_gates
from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.monitor.pictures import png
from selfvil.monitor.saliency import pca_colours, readout_saliency
from selfvil.objectives.base import Progress
from selfvil.records import CHECKPOINTS, PICTURES
from selfvil.reporting.charts import Line, Point
from selfvil.reporting.elements import element, image, note, picture
from selfvil.reporting.runs import Run
from selfvil.weights import load_network, open_checkpoint

IMAGES = 8
"""Images shown."""

GATE_IMAGES = 128
"""Images over which forget gates are averaged."""

LARGEST = 6_000_000
"""Bytes of a recorded picture that the page includes, at most."""


def objective_pictures(run: Run) -> list[Element]:
    """The first and the newest picture that the run recorded, or a new one from its newest checkpoint.

    Raises UserError if there is none, or none can be read.
    """
    saved = _recorded(run.record.folder)
    if not saved:
        return [_drawn(run)]
    name = run.record.recipe.objective.name
    chosen = [saved[0], saved[-1]] if len(saved) > 1 else saved
    return [
        _stored(path, run.captioned(f"input and output of {name} at step {step:,}"), f"Step {step:,}")
        for step, path in chosen
    ]


def _recorded(folder: Path) -> list[tuple[int, Path]]:
    found = (
        (re.fullmatch(r"step-(\d{1,15})\.png", path.name), path) for path in (folder / PICTURES).glob("step-*.png")
    )
    return sorted((int(match[1]), path) for match, path in found if match)


def _stored(path: Path, description: str, caption: str) -> Element:
    try:
        if path.stat().st_size > LARGEST:
            return note(f"Not shown: {path.name} has {path.stat().st_size / 1e6:.0f} MB, which is too much for a page.")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            opened.verify()
    except (OSError, SyntaxError, ValueError) as error:  # of the classes that Pillow raises for damaged files
        return note(f"Not shown: {path.name} cannot be read ({error}).")
    return picture(content, description, caption)


def _drawn(run: Run) -> Element:
    record, checkpoint = run.record, _newest(run)
    objective = build_objective(record.recipe, False).eval()
    objective.load_state_dict(checkpoint.tensors("objective"))
    (batch,) = training_images(record, IMAGES, objective.views())
    per_epoch = checkpoint.meta["data"]["num_samples"] / record.recipe.optim.batch_size
    progress = Progress(checkpoint.step, record.total_steps, per_epoch, record.recipe.run.seed)
    drawn = objective.picture(batch, progress)
    name = record.recipe.objective.name
    if drawn is None:
        raise UserError(f"the objective {name} draws no picture")
    return picture(
        png(drawn),
        run.captioned(f"input and output of {name} at step {checkpoint.step:,}"),
        f"Step {checkpoint.step:,}",
    )


def _newest(run: Run) -> Checkpoint:
    folder = run.record.folder
    if not (folder / CHECKPOINTS).is_dir():
        every = run.record.recipe.run.checkpoint_every
        raise UserError(f"there is no checkpoint yet: the run saves one every {every} steps")
    return open_checkpoint(folder)


class Backbone:
    """The backbone of a run's newest checkpoint. Raises UserError if it cannot be loaded."""

    def __init__(self, run: Run) -> None:
        checkpoint = _newest(run)
        self.run, self.step = run, checkpoint.step
        self.network: nn.Module = load_network(checkpoint).backbone.eval()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def feature_strips(backbone: Backbone) -> list[Element]:
    """The first training images in a row; below it the principal components of their features, and the saliency of
    their readout, if the network has patches. Raises UserError."""
    record: Record = backbone.run.record
    if not adapt(backbone.network).has_patches:
        raise UserError(f"{record.recipe.model.name} has no patches")
    (batch,) = training_images(record, IMAGES)
    images = batch.views[0]
    shown = image_spec(record.recipe).rgb(images)
    size = max(48, *images.shape[-2:])
    heat, captioned = _heat(readout_saliency(backbone.network, images)), backbone.run.captioned
    rows = [
        ("Images", shown, captioned(f"{len(images)} training images")),
        ("Features", pca_colours(backbone.network, images), captioned("the features of their patches, as colours")),
        ("Readout", heat, captioned("sensitivity of the readout to each patch")),
    ]  # fmt: skip
    return [
        element("div", element("span", name), image(_strip(content, size), description), class_="strip")
        for name, content, description in rows
    ]


def _heat(saliency: Tensor) -> Tensor:
    """Values (B, H, W) in [0, 1] as colours (B, 3, H, W), on a logarithmic scale from a thousandth."""
    from matplotlib import colormaps

    scale = (1 + saliency.clamp_min(1e-3).log10() / 3).cpu().numpy()
    return torch.from_numpy(colormaps["magma"](scale)[..., :3]).float().permute(0, 3, 1, 2)


def _strip(images: Tensor, size: int) -> bytes:
    """Images (B, 3, H, W) in [0, 1] side by side as PNG, each about `size` pixels high, with transparent gaps."""
    factor = max(1, round(size / images.shape[-2]))
    pixels = (images.float().cpu().numpy().transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    padded = np.pad(opaque, ((0, 0), (0, 0), (0, max(2, size // 16)), (0, 0)))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(padded), axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()


@torch.no_grad()
def memory_line(backbone: Backbone) -> Line:
    """Tokens after which the memory of each block's heads has fallen to 1/e: dots, and their median as a line.

    Raises UserError if the network has no forget gates, or the images cannot be read.
    """
    with record_forget_gates(backbone.network) as gates:
        for batch in training_images(backbone.run.record, GATE_IMAGES):
            backbone.network(batch.views[0])
    if not gates:
        raise UserError(f"{backbone.run.record.recipe.model.name} has no forget gates")
    heads: dict[int, list[float]] = {}
    for name, passes in gates.items():
        heads.setdefault(int(name.split("_")[0]), []).extend(_positive(horizons(passes)))
    dots: list[Point] = [(block, tokens) for block, all_tokens in sorted(heads.items()) for tokens in all_tokens]
    middle: list[Point] = [(block, float(np.median(tokens))) for block, tokens in sorted(heads.items()) if tokens]
    return Line(backbone.run.letter, backbone.run.style, middle, dots)


def _positive(tokens: Any) -> list[float]:
    return [float(each) for each in tokens.tolist() if 0 < each < float("inf")]
