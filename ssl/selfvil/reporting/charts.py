"""Charts as inline SVG: lines over a common axis, and scores with their intervals.

A chart is drawn 360 units wide, so that its text has its full size on a phone. Colours are those of the page's style
sheet, which has a light and a dark scheme. On screens, page.js shows values at the pointer; it finds them from the
drawn paths and the attributes data-x, data-y and data-log of the chart.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from selfvil.reporting.elements import element

WIDTH, HEIGHT = 360, 214
LEFT, TOP, RIGHT, BOTTOM = 50, 10, 22, 36
"""Margins around the plot: numbers of the vertical axis, nothing, letters of the lines, the horizontal axis."""

SMOOTHED_FROM = 60
"""Records from which a line is smoothed."""

MOST_POINTS = 400
"""Points drawn for a line; of more, the smallest and the largest value in each of equal parts of the axis are kept."""

Point = tuple[float, float]

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """The values of one run. points, dots: finite, sorted by their first number; dots are not connected."""

    letter: str
    style: str
    points: Sequence[Point]
    dots: Sequence[Point] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis. borders: values with dashed horizontal lines. log: logarithmic vertical axis.
    whole: whether the horizontal axis has only whole numbers."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log: bool = False
    borders: Sequence[float] = ()
    whole: bool = False


def draw(chart: Chart) -> Element:
    """The chart as an <svg>, with a description in words. Lines without points are left out.

    Values far outside the others are cut off at the border of the plot: the axis covers every smoothed line and the
    central 98 % of the values.
    """
    lines = [line for line in chart.lines if line.points or line.dots]
    smooth = [smoothed(line.points) for line in lines]
    x_axis = _Axis.linear(_span([0.0, *(x for line in lines for x, _ in [*line.points, *line.dots])]), 5, chart.whole)
    heights = [y for line, mean in zip(lines, smooth) for y in _typical(line, mean)] + list(chart.borders)
    y_axis = _Axis.log(_span(heights)) if chart.log else _Axis.linear(_span(heights), 5, pad=0.04)
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: Point) -> Point:
        return x_axis.share(point[0]) * plot_width, (1 - y_axis.share(point[1])) * plot_height

    grid, texts, marks, labels = [], [], [], []
    for value, label in zip(y_axis.ticks, _labels(y_axis)):
        y = place((x_axis.low, value))[1]
        grid.append(element("path", d=f"M0 {y:.1f}H{plot_width}", class_="grid"))
        texts.append(_text(LEFT - 6, TOP + y + 4, label, "end"))
    for value, label in zip(x_axis.ticks, _labels(x_axis)):
        x = place((value, y_axis.low))[0]
        anchor = "end" if x > plot_width - 8 else "middle"
        texts.append(_text(LEFT + x + (8 if anchor == "end" else 0), HEIGHT - BOTTOM + 15, label, anchor))
    texts.append(_text(LEFT + plot_width / 2, HEIGHT - 4, chart.x_label, "middle"))
    for border in chart.borders:
        grid.append(element("path", d=f"M0 {place((x_axis.low, border))[1]:.1f}H{plot_width}", class_="border"))
    taken: list[Point] = []
    for line, mean in zip(lines, smooth):
        if line.dots:
            marks.append(_path([place(point) for point in line.dots], f"dots {line.style}", dots=True))
        if mean is not line.points:
            marks.append(_path([place(point) for point in thinned(line.points)], f"raw {line.style}"))
        if line.points:
            drawn = [place(point) for point in thinned(mean)]
            marks.append(_path(drawn, f"line {line.style}", data_letter=line.letter))
            x, y = _free_place(drawn[-1], taken, plot_height)
            if line.letter:
                labels.append(_text(LEFT + x + 6, TOP + y + 4, line.letter, "start", f"letter {line.style}"))
    # The inner <svg> cuts off what lies outside the plot.
    plot = element("svg", *grid, *marks, x=LEFT, y=TOP, width=plot_width, height=plot_height)
    return element(
        "svg", element("title", describe(chart)), plot, *texts, *labels,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart",
        data_plot=f"{LEFT} {TOP} {plot_width} {plot_height}",
        data_x=f"{x_axis.low!r} {x_axis.high!r}", data_y=f"{y_axis.low!r} {y_axis.high!r}",
        data_log=int(chart.log), data_unit=chart.x_label,
    )  # fmt: skip


def describe(chart: Chart) -> str:
    """The chart in words: for each line its first and last value, with the lowest and the highest."""
    parts = []
    for line in chart.lines:
        values = [y for _, y in line.points]
        if len(values) > 1:
            parts.append(
                f"{line.letter or 'It goes'} from {short(values[0])} to {short(values[-1])}, lowest "
                f"{short(min(values))}, highest {short(max(values))}"
            )
        elif values:
            parts.append(f"{line.letter} {short(values[0])}")
    return f"{chart.title} over {chart.x_label}. {'; '.join(parts)}."


@dataclass(frozen=True)
class Mark:
    """A score in a chart of intervals. value, low, high: in percent; low and high are None without an interval.
    style: CSS class of its colour."""

    letter: str
    style: str
    value: float
    low: float | None
    high: float | None
    text: str


def draw_intervals(title: str, groups: Sequence[tuple[str, Sequence[Mark]]]) -> Element:
    """Scores as points on a common axis, with bars for their intervals: a row for each mark, below its group's name."""
    marks = [mark for _, group in groups for mark in group]
    axis = _Axis.linear(_span(v for m in marks for v in (m.value, m.low, m.high) if v is not None), 4, pad=0.06)
    left, right, row = 34, 24 + 6.1 * max(len(mark.text) for mark in marks), 19
    width = WIDTH - left - right
    height = sum(24 + row * len(group) for _, group in groups) + 26
    grid, content, y = [], [], 0.0
    for value in axis.ticks:
        x = left + axis.share(value) * width
        grid.append(element("path", d=f"M{x:.1f} 0V{height - 20}", class_="grid"))
        content.append(_text(x, height - 5, short(value), "middle"))
    for name, group in groups:
        content.append(_text(2, y + 16, name if len(name) < 60 else f"{name[:58]}…", "start", "group"))
        y += 24
        for mark in group:
            middle, x = y + row / 2, left + axis.share(mark.value) * width
            content.append(_text(left - 10, middle + 4, mark.letter, "end", f"letter {mark.style}"))
            if mark.low is not None and mark.high is not None:
                ends = left + axis.share(mark.low) * width, left + axis.share(mark.high) * width
                content.append(
                    element("path", d=f"M{ends[0]:.1f} {middle}H{ends[1]:.1f}", class_=f"interval {mark.style}")
                )
            content.append(element("path", d=f"M{x:.1f} {middle}h0", class_=f"point {mark.style}"))
            content.append(_text(WIDTH - right + 12, middle + 4, mark.text, "start", "value"))
            y += row
    words = "; ".join(f"{name}: " + ", ".join(f"{mark.letter} {mark.text}" for mark in group) for name, group in groups)
    return element(
        "svg", element("title", f"{title}. {words}."), *grid, *content,
        viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chart",
    )  # fmt: skip


# --- values ----------------------------------------------------------------------------------------------------------


def window(count: int) -> int:
    """Records over which a line of `count` records is averaged: a twentieth, an odd number; 1 for short lines."""
    return 1 if count < SMOOTHED_FROM else count // 20 // 2 * 2 + 1


def smoothed(points: Sequence[Point]) -> Sequence[Point]:
    """The centred moving average of the values over `window` records, fewer at both ends; or `points` themselves."""
    half = window(len(points)) // 2
    if not half:
        return points
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    index = np.arange(len(points))
    reach = np.minimum(half, np.minimum(index, len(points) - 1 - index))  # the same on both sides: no shift
    means = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return [(x, float(mean)) for (x, _), mean in zip(points, means)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """At most `most` of the points: first and last, and of equal runs of records the smallest and the largest value."""
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), (most - 2) // 2):
        values = [points[i][1] for i in part]
        kept |= {int(part[int(np.argmin(values))]), int(part[int(np.argmax(values))])}
    return [points[i] for i in sorted(kept)]


def short(value: float) -> str:
    """A number with at most four significant digits: 0.0012, 12.5, 4,000, 20k, 1.3M, 2.5e-07."""
    size = abs(value)
    for unit, suffix in _UNITS:
        if max(unit, 1e4) <= size < 1e15:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:,.0f}" if 1000 <= size < 1e4 else f"{value:.4g}"


def _labels(axis: "_Axis") -> list[str]:
    """The numbers of an axis in one notation: 0, 5k, 10k rather than 0, 5,000, 10k."""
    largest = max((abs(tick) for tick in axis.ticks), default=0.0)
    if axis.logarithmic or not 1e4 <= largest < 1e15:
        return [short(tick) for tick in axis.ticks]
    unit, suffix = next((unit, suffix) for unit, suffix in _UNITS if unit <= largest or suffix == "k")
    return [f"{tick / unit:.4g}{suffix if tick else ''}" for tick in axis.ticks]


def _typical(line: Line, mean: Sequence[Point]) -> list[float]:
    values = [y for _, y in [*line.points, *line.dots]]
    if len(values) < 20:
        return values
    low, high = np.quantile(values, [0.01, 0.99])
    means = [y for _, y in mean]
    return [float(low), float(high), min(means, default=float(low)), max(means, default=float(high))]


def _span(values: Iterable[float]) -> Point:
    listed = list(values)
    return min(listed), max(listed)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def linear(cls, span: Point, count: int, whole: bool = False, pad: float = 0.0) -> "_Axis":
        """An axis of these values. pad: margin on both sides, as a share of their range; equal values get one too."""
        from matplotlib.ticker import MaxNLocator

        low, high = span
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
            margin = 0.5 * abs(low) or 0.5
            low, high = low - margin, high + margin
        low, high = low - pad * (high - low), high + pad * (high - low)
        ticks = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
        step = float(ticks[1] - ticks[0])
        inside = [float(tick) for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step]
        return cls(low, high, tuple(0.0 if abs(tick) < 1e-9 * step else tick for tick in inside))

    @classmethod
    def log(cls, span: Point) -> "_Axis":
        """A logarithmic axis of positive values, with 1, 2 and 5 of each decade, or with powers of ten alone."""
        low, high = span
        if high < 1.5 * low:
            low, high = low / 1.5, high * 1.5
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if high < 100 * low else (1,)
        step = max(1, len(decades) // 6)
        every = [digit * 10.0**decade for decade in decades[::step] for digit in digits]
        return cls(low, high, tuple(tick for tick in every if low <= tick <= high), True)

    def share(self, value: float) -> float:
        """Where a value lies on the axis, from 0 to 1; a logarithmic axis has values up to 0 below its start."""
        if not self.logarithmic:
            share = (value - self.low) / (self.high - self.low)
        elif value <= 0:
            return -1.0
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return min(max(share, -1.0), 2.0)  # far outside the plot either way


# --- elements --------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, content: str, anchor: str, style: str = "tick") -> Element:
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=style)


def _path(points: Sequence[Point], style: str, dots: bool = False, **attributes: object) -> Element:
    """A line through the points, or a dot at each. One point alone is a dot, by the round ends of lines."""
    places = [f"{x:.2f} {y:.2f}" for x, y in points]
    if dots:
        drawn = "".join(f"M{place}h0" for place in places)
    else:
        drawn = "M" + "L".join(places if len(places) > 1 else places * 2)
    return element("path", d=drawn, class_=style, **attributes)


def _free_place(end: Point, taken: list[Point], height: float) -> Point:
    """A place for a letter near the end of its line, away from those in `taken`; it is added to them."""
    for shift in sorted(range(-8, 9), key=lambda shift: (abs(shift), -shift)):
        place = end[0], min(max(end[1] + 7 * shift, 2.0), height - 2)
        if all(abs(place[0] - x) > 11 or abs(place[1] - y) > 11 for x, y in taken):
            break
    taken.append(place)
    return place
