"""Pictures of a run: the objective's picture as PNG, and the learning curves."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from selfvil.errors import UserError
from selfvil.records import METRICS, read_metrics

COLLAPSED = 0.02
"""A teacher whose entropy is within this share of 0 or of ln K has the same output for every image."""


def save_picture(picture: Tensor, path: Path) -> Path:
    """Write an RGB picture (3, H, W) in [0, 1] as PNG; see `png`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture))
    return path


def png(picture: Tensor, min_width: int = 480) -> bytes:
    """An RGB picture (3, H, W) in [0, 1] as PNG; small ones are enlarged by an integer factor, without smoothing."""
    factor = max(1, min_width // picture.shape[-1])
    array = (picture.float().cpu().numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    array = array.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def loss_curve(run: Path, out: Path) -> Path:
    """Draw the learning curves of the run in folder `run` (see `curves_figure`) to the file `out`.

    Raises:
        UserError: the folder holds no metrics.
    """
    path = run / METRICS
    records = read_metrics(path)
    if not any(record["kind"] == "train" for record in records):
        raise UserError(f"{path} holds no training metrics: is {run} the folder of a run that has begun?")
    out.parent.mkdir(parents=True, exist_ok=True)
    curves_figure(records, run.name).savefig(out, dpi=110)
    return out


def curves_figure(records: list[dict[str, Any]], title: str) -> Any:
    """The scores during the run, if there are some, the training loss over the images seen, the learning rate and, with
    a teacher, the signs of collapse. Of k-NN, only the accuracy with 20 neighbours, or else with the fewest.

    records: of a metrics.jsonl, some of them of kind "train".
    """
    from matplotlib.figure import Figure  # pyplot would select a backend and keep the figure open

    scored = [record for record in records if record["kind"] == "eval"]
    records = [record for record in records if record["kind"] == "train"]
    scores = _shown_scores(scored)
    panels = {"score, percent": scores} if scores else {}
    panels |= {"loss": ["loss"], "share of ln K": ["teacher_entropy", "teacher_spread"], "learning rate": ["lr"]}
    panels = {name: keys for name, keys in panels.items() if keys == scores or any(keys[0] in r for r in records)}
    heights = [3 if name in ("loss", "score, percent") else 1.2 for name in panels]
    figure = Figure(figsize=(7, 1.1 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    images_of_step = records[-1]["samples"] / records[-1]["step"]
    for axis, (name, keys) in zip(axes, panels.items()):
        for key in keys:
            found = scored if keys == scores else records
            values = [record.get(key, math.nan) for record in found]  # absent if all steps were skipped
            samples = [record.get("samples", record["step"] * images_of_step) for record in found]
            dots = {"marker": "o", "markersize": 3} if keys == scores else {}
            axis.plot(samples, values, linewidth=1, label=key.replace("knn_", "k-NN, k = ").replace("_", " "), **dots)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if name == "share of ln K":
            axis.set_ylim(0, 1)
            axis.axhspan(0, COLLAPSED, color="tab:red", alpha=0.15)
            axis.axhspan(1 - COLLAPSED, 1, color="tab:red", alpha=0.15)
        if len(keys) > 1:
            axis.legend(loc="lower right", ncols=len(keys), fontsize="small")
    axes[0].set_title(title)
    axes[-1].set_xlabel("images seen")
    return figure


def _shown_scores(scored: list[dict[str, Any]]) -> list[str]:
    """Names of the scores in records of kind "eval" that are drawn."""
    keys = dict.fromkeys(key for record in scored for key in record if key not in ("step", "kind"))
    neighbours = [key for key in keys if key.startswith("knn_")]
    shown = neighbours[:1] if "knn_20" not in neighbours else ["knn_20"]
    return [*shown, *(key for key in keys if key not in neighbours)]
