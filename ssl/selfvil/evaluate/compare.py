"""Several networks under one protocol: their accuracy beside what they cost.

    found = compare(["exported", "runs/mae", "vit_small_patch16_224"], "train.tar", "test.tar", {"knn": settings("knn")})
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

from selfvil.errors import UserError
from selfvil.evaluate.features import Precision
from selfvil.evaluate.score import Row, as_json, score
from selfvil.evaluate.speed import Cost, measure
from selfvil.settings import Section
from selfvil.weights import load_pretrained


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
    train: str,
    test: str,
    evaluations: Mapping[str, Section],
    *,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    keep: Callable[[list[Row]], None] | None = None,
    **options: Any,
) -> Comparison:
    """Score every source with the same evaluations, then time all of them together.

    Args:
        sources: exports, runs, checkpoints or names of timm models; at least two.
        train, test, evaluations, options: as for `score`.
        keep: called with all rows so far after each new one.

    Raises UserError as `score`, or if a source is given twice. Every source is loaded once before the first is scored.
    """
    if len(sources) < 2:
        raise UserError(f"A comparison needs at least two networks, got {len(sources)}: selfvil eval compare A B ...")
    names = distinct_names(sources)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for source in sources:
        load_pretrained(source)
    rows: list[Row] = []

    def keep_all(of_one: list[Row]) -> None:
        if keep is not None:
            keep(rows + of_one)

    for source in sources:
        rows += score(
            source, train, test, evaluations, device=device, precision=precision, keep=keep_all, **options
        )  # fmt: skip
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
    """One line for each network: accuracies with their 95 % intervals, speed, memory, parameters."""
    first = found.rows[0]
    table = Table(
        title=f"Accuracy in percent on {first.test_images:,} test images ({first.train_images:,} to fit on); "
        f"forward pass in batches of {next(iter(found.costs.values())).batch_size}"
    )
    table.add_column("network")
    for protocol in found.protocols:
        table.add_column(protocol, justify="right")
    for column in ("pixels", "images/s", "memory, MB", "parameters, M", "multiply-adds, G"):
        table.add_column(column, justify="right")
    best = {protocol: max(row.value for row in found.rows if row.protocol == protocol) for protocol in found.protocols}
    for name, cost in found.costs.items():
        cells = []
        for protocol in found.protocols:
            row = found.row(name, protocol)
            text = "" if row is None else _value(row)
            cells.append(f"[bold]{text}[/bold]" if row is not None and row.value == best[protocol] else text)
        height, width = cost.img_size
        table.add_row(
            name, *cells, f"{height} x {width}", f"{cost.images_per_second:,.0f}", f"{cost.memory / 1e6:,.0f}",
            f"{cost.parameters / 1e6:,.2f}", f"{cost.multiply_adds / 1e9:,.3g}",
        )  # fmt: skip
    return table


def _value(row: Row) -> str:
    if row.interval is None:
        return f"{row.value:.2f}"
    low, high = row.interval
    return f"{row.value:.2f} ({low:.1f} to {high:.1f})"


def draw(found: Comparison, out: Path) -> Path:
    """Write a chart: accuracy against images per second, and against parameters, a line of panels for each protocol."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(found.protocols)), layout="constrained")
    panels = figure.subplots(len(found.protocols), 2, squeeze=False, sharey="row")
    axes = (("images/s", lambda cost: cost.images_per_second), ("parameters, millions", lambda c: c.parameters / 1e6))
    for line, protocol in zip(panels, found.protocols):
        for panel, (label, of_cost) in zip(line, axes):
            for index, (name, cost) in enumerate(found.costs.items()):
                row = found.row(name, protocol)
                if row is None:
                    continue
                low, high = row.interval or (row.value, row.value)
                bars = [[max(0.0, row.value - low)], [max(0.0, high - row.value)]]
                panel.errorbar(of_cost(cost), row.value, bars, fmt="o", color=f"C{index}", capsize=3)
                panel.annotate(name, (of_cost(cost), row.value), xytext=(6, 4), textcoords="offset points", fontsize=8)
            panel.set_xlabel(label)
            panel.set_xscale("log")
            panel.margins(x=0.25, y=0.15)
            panel.grid(True, alpha=0.3)
        line[0].set_ylabel(f"{protocol}, {found.rows[0].measure}, %")
    out = Path(out)
    figure.savefig(out, dpi=150)
    return out
