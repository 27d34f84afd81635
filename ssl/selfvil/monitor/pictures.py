"""Pictures of a run: what the objective sees, and how the loss went."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from selfvil.errors import UserError
from selfvil.monitor.metrics import read_metrics


def save_picture(picture: Tensor, path: Path, min_width: int = 480) -> Path:
    """Write an RGB picture (3, H, W) in [0, 1] as PNG; small ones are enlarged by a whole factor, pixels kept."""
    factor = max(1, min_width // picture.shape[-1])
    array = (picture.float().cpu().numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    array = array.repeat(factor, axis=0).repeat(factor, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def loss_curve(run: Path, out: Path) -> Path:
    """Draw the training loss, and the learning rate beneath it, over the images seen.

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
    samples = [record["samples"] for record in records]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(3, 1), layout="constrained"
    )
    above.plot(samples, [record["loss"] for record in records], linewidth=1)
    above.set_ylabel("loss")
    above.set_title(run.name)
    above.grid(alpha=0.3)
    below.plot(samples, [record["lr"] for record in records], linewidth=1, color="tab:orange")
    below.set_ylabel("learning rate")
    below.set_xlabel("images seen")
    below.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out
