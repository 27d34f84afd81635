"""Pictures of a run: what the objective sees, and how the loss went."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from selfvil.errors import UserError
from selfvil.monitor.metrics import read_metrics

COLLAPSED = 0.05
"""A teacher whose entropy is within this share of 0 or of ln K says the same, or nothing, of every image."""


def save_picture(picture: Tensor, path: Path, min_width: int = 480) -> Path:
    """Write an RGB picture (3, H, W) in [0, 1] as PNG; small ones are enlarged by a whole factor, pixels kept."""
    factor = max(1, min_width // picture.shape[-1])
    array = (picture.float().cpu().numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    array = array.repeat(factor, axis=0).repeat(factor, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def loss_curve(run: Path, out: Path) -> Path:
    """Draw the training loss over the images seen; beneath it the signs of collapse, where there is a teacher, and the
    learning rate.

    Raises:
        UserError: the folder holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run / "metrics.jsonl"
    records = [record for record in read_metrics(path) if record["kind"] == "train"] if path.exists() else []
    if not records:
        raise UserError(f"{path} holds no training metrics: is {run} the folder of a run that has begun?")
    panels = {"loss": ["loss"], "share of ln K": ["teacher_entropy", "teacher_spread"], "learning rate": ["lr"]}
    panels = {title: names for title, names in panels.items() if names[0] in records[0]}
    heights = [3 if title == "loss" else 1.2 for title in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, sharex=True, figsize=(7, 1.1 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    samples = [record["samples"] for record in records]
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            axis.plot(samples, [record[name] for record in records], linewidth=1, label=name.replace("_", " "))
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.set_ylim(0, 1)
            axis.axhspan(0, COLLAPSED, color="tab:red", alpha=0.15)
            axis.axhspan(1 - COLLAPSED, 1, color="tab:red", alpha=0.15)
            axis.legend(loc="lower right", ncols=len(names), fontsize="small")
    axes[0].set_title(run.name)
    axes[-1].set_xlabel("images seen")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out
