"""Several networks under one protocol: their accuracy beside what they cost.

    found = compare(["exported", "runs/mae", "vit_small_patch16_224"], "train.tar", "test.tar")
    draw(found, "compared.png")

Each network gets the images at its own size and normalisation. All have the same training and test images, and the same
protocols; speeds are measured in rounds that all networks share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from selfvil.data.base import Pattern
from selfvil.errors import UserError
from selfvil.evaluate.features import ALONE, Precision
from selfvil.evaluate.processes import Processes
from selfvil.evaluate.score import Row, as_json, score
from selfvil.evaluate.speed import Cost, measure
from selfvil.settings import Section
from selfvil.weights import load_pretrained

_AXES: dict[str, Callable[[Cost], float]] = {
    "images/s": lambda cost: cost.images_per_second,
    "parameters, millions": lambda cost: cost.parameters / 1e6,
}
_MARKERS = "osD^v<>P"  # networks differ by shape too, for readers who do not tell colours apart


@dataclass(frozen=True)
class Comparison:
    """rows: the scores of all networks; costs: of each source, by the name that `distinct_names` makes of it."""

    rows: list[Row]
    names: dict[str, str]
    costs: dict[str, Cost]

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(row.protocol for row in self.rows))

    def row(self, name: str, protocol: str) -> Row | None:
        found = [row for row in self.rows if self.names[row.source] == name and row.protocol == protocol]
        return found[0] if found else None

    def as_json(self) -> dict[str, Any]:
        """Plain values: `networks` by name with their costs, and `scores`, the rows of `selfvil eval --json`."""
        sources = {name: source for source, name in self.names.items()}
        first = next(iter(self.costs.values()))
        networks = {
            name: {"source": sources[name], **cost.as_json(), "speed_over_first": round(cost.ratio(first), 3)}
            for name, cost in self.costs.items()
        }
        return {"networks": networks, "scores": as_json(self.rows)}


def compare(
    sources: Sequence[str],
    train: Pattern,
    test: Pattern,
    evaluations: Mapping[str, Section] | None = None,
    *,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    keep: Callable[[list[Row]], None] | None = None,
    processes: Processes = ALONE,
    **options: Any,
) -> Comparison | None:
    """Score every source with the same evaluations, then time all of them together.

    Args:
        sources: exports, runs, checkpoints or names of timm models; at least two.
        train, test, evaluations, options: as for `score`.
        keep: called with all rows so far after each new one.
        processes: which share the images; every one calls this, and the others than the main process return None.

    Raises UserError as `score`, if a source is given twice, or if a setting names a file or folder, to which every
    network would write. Every source is loaded once before the first is scored.
    """
    if len(sources) < 2:
        raise UserError(f"A comparison needs at least two networks, got {len(sources)}: selfvil eval compare A B ...")
    names = distinct_names(sources)
    for name, each in (evaluations or {}).items():
        for key in ("out", "run"):
            if (path := getattr(each, key, None)) is not None:
                raise UserError(
                    f"{name}.{key} = {path}: every network of a comparison would write there; leave {key} out, or "
                    f"score each network by a command of its own"
                )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for source in sources:
        load_pretrained(source)
    rows: list[Row] = []

    def keep_all(of_one: list[Row]) -> None:
        if keep is not None:
            keep(rows + of_one)

    for source in sources:
        rows += score(
            source, train, test, evaluations, device=device, precision=precision, keep=keep_all, processes=processes,
            **options,
        )  # fmt: skip
    if not processes.is_main:
        return None
    networks = {names[source]: load_pretrained(source) for source in sources}
    return Comparison(rows, names, measure(networks, device=device, precision=precision))


def distinct_names(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each source: the end of its path, as long as needed to tell them apart.

    Raises UserError for a source that is given twice.
    """
    paths = {source: Path(source).parts for source in sources}
    if len(paths) < len(sources):
        twice = next(source for source in sources if list(sources).count(source) > 1)
        raise UserError(f"{twice} is given twice: give every network once.")
    for length in range(1, max(map(len, paths.values())) + 1):
        names = {source: "/".join(parts[-length:]) for source, parts in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    return {source: source for source in sources}


# --- table and chart -------------------------------------------------------------------------------------------------


def as_table(found: Comparison) -> Table:
    """A column for each network: accuracies with their 95 % intervals, then what a forward pass costs."""
    first, (name, *_) = found.rows[0], found.costs
    table = Table(title=f"Accuracy in percent: {first.train_images:,} train / {first.test_images:,} test images")
    table.add_column("")
    for network in found.costs:
        table.add_column(network, justify="right", overflow="fold")
    for protocol in found.protocols:
        rows = {network: found.row(network, protocol) for network in found.costs}
        best = max(row.value for row in rows.values() if row is not None)
        cells = {network: "" if row is None else _value(row) for network, row in rows.items()}
        bold = {network for network, row in rows.items() if row is not None and row.value == best}
        table.add_row(protocol, *(Text(text, "bold" if n in bold else "") for n, text in cells.items()))
    table.add_section()
    batch = found.costs[name].batch_size
    for label, of_cost in {
        "pixels": lambda cost: "{} x {}".format(*cost.img_size),
        f"images/s, batches of {batch}": lambda cost: f"{cost.images_per_second:,.4g}",
        f"speed over {name}": lambda cost: f"{cost.ratio(found.costs[name]):.2f}",
        "memory of a batch, MB": lambda cost: f"{cost.memory / 1e6:,.0f}",
        "parameters, M": lambda cost: f"{cost.parameters / 1e6:,.2f}",
        "multiply-adds of an image, G": lambda cost: f"{cost.multiply_adds / 1e9:,.3g}",
    }.items():
        table.add_row(label, *map(of_cost, found.costs.values()))
    return table


def _value(row: Row) -> str:
    if row.interval is None:
        return f"{row.value:.2f}"
    low, high = row.interval
    return f"{row.value:.2f} ({low:.1f}–{high:.1f})"


def draw(found: Comparison, out: Path) -> Path:
    """Write a chart: accuracy against images per second, and against parameters, a line of panels for each protocol."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    protocols, axes = found.protocols, _AXES.items()
    figure = Figure(figsize=(9, 0.6 + 2.8 * len(protocols)), layout="constrained")
    panels = figure.subplots(len(protocols), len(axes), squeeze=False, sharey="row", sharex="col")
    for line, protocol in zip(panels, protocols):
        for panel, (label, of_cost) in zip(line, axes):
            for index, (name, cost) in enumerate(found.costs.items()):
                if (row := found.row(name, protocol)) is not None:
                    low, high = row.interval or (row.value, row.value)
                    bars = [[max(0.0, row.value - low)], [max(0.0, high - row.value)]]
                    marker = _MARKERS[index % len(_MARKERS)]
                    panel.errorbar(of_cost(cost), row.value, bars, fmt=marker, color=f"C{index}", capsize=3, label=name)
            values = [of_cost(cost) for cost in found.costs.values()]
            panel.set_xscale("log")
            panel.set_xlim(min(values) / 1.6, max(values) * 1.6)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.margins(y=0.15)
            panel.grid(True, alpha=0.3)
            if protocol == protocols[-1]:
                panel.set_xlabel(label)
        line[0].set_ylabel(f"{protocol}, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(found.costs)))
    figure.savefig(out, dpi=150)
    return out
