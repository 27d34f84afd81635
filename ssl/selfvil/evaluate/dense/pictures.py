"""Pictures of predictions beside truth: a row for each image, and the colour of each class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfvil.data.arrays import Pixels, to_rgb

_WIDTH = 480  # pixels of an image in a picture, at most


def colours(num_classes: int) -> np.ndarray:
    """uint8 (K, 3): a colour for each class; twenty that are easily told apart, then others around the hues."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    first = colormaps["tab20"](np.arange(20))[:, :3]
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours before their light forms
    more = [hsv_to_rgb((0.618034 * i % 1, 0.5 + 0.5 * (i % 3) / 2, 0.6 + 0.4 * (i % 2))) for i in range(num_classes)]
    table = np.concatenate([first[order], np.array(more).reshape(-1, 3)])[:num_classes]
    return (255 * table).round().astype(np.uint8)


def small(pixels: Pixels) -> np.ndarray:
    """An image as uint8 (H, W, 3), for a row of `draw`."""
    image = to_rgb(pixels)
    image.thumbnail((_WIDTH, _WIDTH))
    return np.asarray(image)


def painted(ids: np.ndarray, table: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Class ids (H, W), black where below 0, as uint8 RGB of the size of `like`."""
    rgb = np.where((ids >= 0)[..., None], table[np.clip(ids, 0, None)], 0).astype(np.uint8)
    return np.asarray(Image.fromarray(rgb).resize(like.shape[1::-1], Image.Resampling.NEAREST))


def draw(
    rows: Sequence[Mapping[str, np.ndarray]], names: Sequence[str], table: np.ndarray, shown: Sequence[int], title: str
) -> Any:
    """A matplotlib figure. rows: for each image, its panels by title. shown: ids of the classes of the legend."""
    from matplotlib.figure import Figure  # pyplot would select a backend and keep the figure open
    from matplotlib.patches import Patch

    columns = list(rows[0])
    ratio = float(np.median([row[columns[0]].shape[0] / row[columns[0]].shape[1] for row in rows]))
    entries = [Patch(facecolor=table[i] / 255, edgecolor="black", label=names[i]) for i in shown]
    entries.append(Patch(facecolor="black", edgecolor="black", label="ignored"))
    across = max(2, 2 * len(columns))
    legend = 0.25 * -(-len(entries) // across) + 0.2
    height = len(rows) * (2.6 * ratio + 0.08) + 0.6 + legend
    figure = Figure(figsize=(2.6 * len(columns), height), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, legend / height, 1, 1 - legend / height))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(axes, rows):
        for axis, column in zip(line, columns):
            axis.imshow(row[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row is rows[0]:
                axis.set_title(column, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=entries, loc="lower center", ncols=across, fontsize=8, frameon=False)
    return figure


def save(figure: Any, folder: Path, name: str) -> Path:
    """Write `figure` as NAME.png in `folder`, or NAME-2.png ... where that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{name}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.png"
    figure.savefig(path, dpi=120)
    return path
