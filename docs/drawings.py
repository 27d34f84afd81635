"""The drawings of the explanation pages, as SVG, computed by the code that they explain.

No order, mask or weight is written here by hand: scans are traced through a real network, poolings and the mLSTM are
differentiated or applied, masks and sample orders are drawn by the functions that training uses. The build of the site
calls `draw_all`; `python docs/drawings.py FOLDER` writes the files.
"""

import sys
from html import escape
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from selfvil.data import loader
from selfvil.data.base import Images
from selfvil.data.order import Order
from selfvil.models import VisionLSTM
from selfvil.models.blocks import TRAVERSALS
from selfvil.models.layers import GatedScan
from selfvil.models.layout import Grid, TokenLayout
from selfvil.models.masking import MASKS, kept_ids, sample_mask
from selfvil.models.pooling import POOLINGS
from selfvil.objectives.base import keyed_noise
from selfvil.ops import mlstm

BLUE, ORANGE, GREEN, GREY, LIGHT, INK = "#1f6feb", "#d9730d", "#1a7f37", "#8c959f", "#eaeef2", "#24292f"
GRID: Grid = (3, 4)
"""Rows and columns of patches in the drawings of scans: different, so that rows are not mistaken for columns."""


class Canvas:
    """An SVG picture on a white background, which is readable in a light and in a dark page."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img" font-family="system-ui, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#ffffff"/>',
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{BLUE}"/></marker></defs>',
        ]

    def square(self, x: float, y: float, side: float, fill: str = LIGHT, stroke: str = "#ffffff", **more: Any) -> None:
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        place = f'x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"'
        self.parts.append(f'<rect {place} rx="2" fill="{fill}" stroke="{stroke}"{extra}/>')

    def text(self, x: float, y: float, text: object, size: float = 12, fill: str = INK, anchor: str = "middle") -> None:
        style = f'font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(str(text))}</text>')

    def path(self, points: list[tuple[float, float]]) -> None:
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2" stroke-linejoin="round" '
            f'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


# --- traversals ------------------------------------------------------------------------------------------------------


def scan_orders(traversal: str, grid: Grid = GRID) -> list[list[list[int]]]:
    """For each of four blocks, the patch ids of each of its scans in the order of the scan.

    The order is measured: a token is scanned after another one if its output depends on the other's input.
    """
    model = VisionLSTM(
        img_size=grid, patch_size=1, in_chans=1, num_classes=0, embed_dim=16, depth=2, traversal=traversal, conv="none"
    ).eval()
    found: list[list[int]] = []
    original = GatedScan.scan

    def scan(self: GatedScan, x: Tensor, layout: TokenLayout, *args: Any) -> Tensor:
        ids = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
        rows = TokenLayout(grid)
        ids = (ids if layout.grid == grid else rows.to_columns(ids)).flatten()  # of the sequence that is scanned
        leaf = x.detach().requires_grad_()
        probe = torch.rand(x.shape[-1])  # the plain sum of a normalised vector is constant: its gradient is 0
        with torch.enable_grad():
            y = original(self, leaf, layout, *args)
            reached = [torch.autograd.grad(y[0, i] @ probe, leaf, retain_graph=True)[0][0] for i in range(len(ids))]
        earlier = torch.stack([gradient.abs().sum(dim=1) > 0 for gradient in reached]).sum(dim=1)
        found.append(ids[earlier.argsort()].tolist())
        return original(self, x, layout, *args)

    with mock.patch.object(GatedScan, "scan", scan), torch.no_grad():
        model(torch.rand(1, 1, *grid))
    directions = TRAVERSALS[traversal].directions
    return [found[first : first + directions] for first in range(0, len(found), directions)]


def traversal(name: str) -> str:
    """Two blocks, or four where the pairs of blocks differ; the scans of one block are joined by a plus."""
    blocks = scan_orders(name)
    blocks = blocks if blocks[:2] != blocks[2:] else blocks[:2]
    blocks = blocks if len(blocks[0]) == 1 else blocks[:1]
    side, gap = 24, 30
    width, height = GRID[1] * side, GRID[0] * side
    scans = [(number, order) for number, block in enumerate(blocks) for order in block]
    canvas = Canvas(len(scans) * (width + gap) + 10, height + 46, f"Order of the patches in each scan: {name}")
    for index, (number, order) in enumerate(scans):
        left, top = 18 + index * (width + gap), 32
        for id in range(GRID[0] * GRID[1]):
            canvas.square(left + id % GRID[1] * side, top + id // GRID[1] * side, side)
        canvas.path([(left + (id % GRID[1] + 0.5) * side, top + (id // GRID[1] + 0.5) * side) for id in order])
        title = f"block {number + 1}" if len(blocks) > 1 else f"every block, scan {index + 1}"
        canvas.text(left + width / 2, 20, title, 11)
        if index:
            canvas.text(left - gap / 2, top + height / 2 + 5, "+" if len(blocks[0]) > 1 else "→", 15, GREY)
    return canvas.svg()


# --- poolings --------------------------------------------------------------------------------------------------------


def pooled_tokens(name: str, num_patches: int, num_extra: int) -> tuple[set[int], set[int], int]:
    """Extra tokens and patches that a pooling depends on, and the width of its result in tokens."""
    extra, patches = torch.rand(1, num_extra, 3, requires_grad=True), torch.rand(1, num_patches, 3, requires_grad=True)
    pooled = POOLINGS[name](extra, patches)
    used = torch.autograd.grad(pooled.sum(), (extra, patches), allow_unused=True, materialize_grads=True)
    first, second = (set(gradient[0].abs().sum(dim=1).nonzero().flatten().tolist()) for gradient in used)
    return first, second, pooled.shape[1] // 3


def poolings() -> str:
    """One row for each pooling: the sequence of 12 patches and its extra tokens; those that are pooled are blue."""
    names, count = ["bilateral_concat", "bilateral_avg", "avg", "middle_patch", "middle_cls", "registers"], 12
    canvas = Canvas(480, len(names) * 40 + 14, "Tokens of the sequence that each pooling uses")
    for row, name in enumerate(names):
        num_extra = {"middle_cls": 1, "registers": 4}.get(name, 0)
        extra, patches, width = pooled_tokens(name, count, num_extra)
        layout = TokenLayout.of(torch.zeros(1, count, 1), GRID, num_extra=num_extra, columns=False)
        numbers = torch.arange(count + num_extra)
        if num_extra:
            numbers = layout.insert_extra(numbers[:count].view(1, -1, 1), numbers[count:].view(1, -1, 1)).flatten()
        y = 10 + row * 40
        canvas.text(8, y + 16, name, 12, anchor="start")
        for place, number in enumerate(numbers.tolist()):
            is_extra = number >= count
            used = number - count in extra if is_extra else number in patches
            canvas.square(
                118 + place * 18, y + 2, 16, BLUE if used else LIGHT, stroke=ORANGE if is_extra else "#ffffff"
            )
        canvas.text(470, y + 16, f"{width} C" if width > 1 else "C", 12, GREY, "end")
    return canvas.svg()


# --- dropped tokens and masks ----------------------------------------------------------------------------------------


def _hidden(kind: str, grid: Grid, ratio: float) -> Tensor:
    """The mask (N,) of sample 0 of a run with seed 0."""
    noise = keyed_noise(0, torch.tensor([0]), grid[0] * grid[1])
    return sample_mask(kind, noise, grid, round(grid[0] * grid[1] * ratio))[0]


def dropping() -> str:
    """A grid of patches, the sequence of the kept ones, and the grid of the convolution."""
    grid, side = (6, 6), 22
    hidden = _hidden("random", grid, 0.75)
    keep = kept_ids(hidden[None], int((~hidden).sum()))
    layout = TokenLayout.of(torch.zeros(1, keep.shape[1], 1), grid, keep, columns=False)
    on_grid = layout.to_grid(keep.unsqueeze(-1).float() + 1).flatten().int().tolist()  # 0 where nothing was kept
    canvas = Canvas(
        360, 290, "Dropped patches: the sequence holds the kept ones, the convolution has zeros for the others"
    )
    for left, title in ((20, "patches of the image"), (208, "grid of the convolution")):
        canvas.text(left + 3 * side, 20, title)
        for id in range(grid[0] * grid[1]):
            kept = on_grid[id] > 0 if left > 20 else not bool(hidden[id])
            x, y = left + id % grid[1] * side, 30 + id // grid[1] * side
            canvas.square(x, y, side, BLUE if kept else LIGHT)
            label = id if left == 20 or kept else 0
            canvas.text(x + side / 2, y + 15, label, 10, "#ffffff" if kept else GREY)
    canvas.text(180, 196, "sequence of the mLSTM")
    count = keep.shape[1]
    left = 180 - count * 14
    for place, id in enumerate(keep[0].tolist()):
        canvas.square(left + place * 28, 222, 26, BLUE)
        canvas.text(left + place * 28 + 13, 239, id, 11, "#ffffff")
    canvas.path([(left, 212), (left + count * 28, 212)])
    canvas.path([(left + count * 28, 262), (left, 262)])
    canvas.text(180, 280, "odd blocks: from the left; even blocks: from the right", 11, GREY)
    return canvas.svg()


def masks() -> str:
    """The kinds of masks on a grid of 14 by 14 patches, of which 75 % are hidden."""
    grid, side = (14, 14), 8
    canvas = Canvas(len(MASKS) * 126 + 10, 152, "Kinds of masks: blue patches are kept")
    for column, kind in enumerate(MASKS):
        hidden = _hidden(kind, grid, 0.75).tolist()
        canvas.text(10 + column * 126 + 56, 20, kind)
        for id, is_hidden in enumerate(hidden):
            x, y = 10 + column * 126 + id % 14 * side, 30 + id // 14 * side
            canvas.square(x, y, side, LIGHT if is_hidden else BLUE, stroke_width=0.5)
    return canvas.svg()


# --- the operator ----------------------------------------------------------------------------------------------------


def mlstm_weights(forget: float, reverse: bool, num_tokens: int = 12) -> np.ndarray:
    """The matrix W (N, N) with h = W v, for equal queries and keys and equal gates: v is the identity."""
    ones = torch.ones(1, 1, num_tokens, 4)
    gates = torch.zeros(1, 1, num_tokens)
    v = torch.eye(num_tokens).view(1, 1, num_tokens, num_tokens)
    return mlstm(ones, ones, v, gates, gates + forget, reverse=reverse, backend="reference")[0, 0].numpy()


def operator() -> str:
    """The weights of each token's output for the inputs of all tokens, for two forget gates and both directions."""
    cases = [("forward, forget gate 0.95", 2.94, False), ("forward, forget gate 0.5", 0.0, False),
             ("reverse, forget gate 0.95", 2.94, True)]  # fmt: skip
    side = 9
    canvas = Canvas(len(cases) * 150 + 10, 172, "Weights of the mLSTM: row i is the output of token i")
    for column, (title, forget, reverse) in enumerate(cases):
        weights = mlstm_weights(forget, reverse)
        left = 24 + column * 150
        canvas.text(left + 54, 20, title, 10.5)
        for (row, other), weight in np.ndenumerate(weights / weights.max()):
            shade = LIGHT if weight == 0 else BLUE
            opacity = 1 if weight == 0 else 0.12 + 0.88 * float(weight)
            canvas.square(
                left + other * side, 30 + row * side, side, shade, fill_opacity=f"{opacity:.3f}", stroke_width=0.5
            )
        canvas.text(left + 54, 156, "input token j →", 10, GREY)
        canvas.text(left - 8, 86, "i", 10, GREY)
    return canvas.svg()


# --- the order of samples --------------------------------------------------------------------------------------------


def spans(
    length: int, batch_size: int, rank: int, world_size: int, start_step: int, stop_step: int
) -> list[loader.Span]:
    """First and last position of each batch of one process, as the training loader requests them."""
    with mock.patch.object(loader, "_batches_despite_worker_death", lambda samples, spans, workers: spans()):
        batches: Any = loader.train_batches(
            mock.create_autospec(Images), [], seed=0, batch_size=batch_size, rank=rank, world_size=world_size,
            start_step=start_step, stop_step=stop_step,
        )  # fmt: skip
        return list(batches)


def order() -> str:
    """Two epochs of 12 images in batches of 4, on one process and on two."""
    length, batch, side = 12, 4, 30
    ids = Order(length, seed=0).ids(np.arange(2 * length)).tolist()
    canvas = Canvas(length * side + 96, 252, "The images of two epochs, in batches of 4, on one and on two processes")
    colours = [BLUE, GREEN]
    for epoch in range(2):
        top = 34 + epoch * 122
        canvas.text(8, top - 14, f"epoch {epoch + 1}", 12, anchor="start")
        for line, world in enumerate((1, 2)):
            y = top + line * 44
            canvas.text(8, y + 19, f"{world} process{'es' if world > 1 else ''}", 11, GREY, "start")
            for rank in range(world):
                for first, last in spans(length, batch, rank, world, epoch * 3, epoch * 3 + 3):
                    for position in range(first, last):
                        x = 84 + (position - epoch * length) * side + (position // batch) % 3 * 3
                        canvas.square(x, y, side - 2, colours[rank])
                        canvas.text(x + side / 2 - 1, y + 19, ids[position], 11, "#ffffff")
    return canvas.svg()


def draw_all() -> dict[str, str]:
    """File name -> SVG of every drawing. torch's random numbers are not disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawings = {f"traversal_{name}.svg": traversal(name) for name in TRAVERSALS}
        others = {"poolings": poolings, "dropping": dropping, "masks": masks, "operator": operator, "order": order}
        return drawings | {f"{name}.svg": draw() for name, draw in others.items()}


if __name__ == "__main__":
    for file, text in draw_all().items():
        Path(sys.argv[1], file).write_text(text, encoding="utf-8")
