"""Curves of the runs over images seen, steps and training time, on charts that all runs share."""

import math
import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from selfvil.diagnostics.rules import RULES
from selfvil.reporting.charts import MOST_POINTS, Chart, Line, draw, short, window
from selfvil.reporting.elements import capitalised, details, element, note
from selfvil.reporting.runs import AXES, Run, metric_name

TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "images_per_second": "images per second",
    "teacher_entropy": "entropy of the teacher's outputs, share of ln K",
    "teacher_spread": "spread of the teacher's outputs, share of ln K",
    "kl": "distance of student and teacher, share of ln K",
}
"""Titles of the values of training; others have their name in metrics.jsonl."""

VITALS = {
    "relative_lr": "learning rate over typical weight",
    "speed": "length of a step over all weights",
    "explained": "share learned (0: one prediction for all images)",
    "teacher_lag": "steps by which the teacher lags",
    "teacher_follows": "distance the teacher moved over the student's",
    "feature_std": "feature standard deviation (1: isotropic)",
    "rank_share": "RankMe over its maximum",
    "alpha_req": "α-ReQ",
    "lidar_share": "LiDAR of two views, over its maximum",
    "horizon": "shortest memory of a block, in tokens",
    "saturated": "most saturated gates of a block",
    "grad_norm/patch_embed": "gradient norm, patch embedding",
    "grad_norm/blocks": "gradient norm, blocks",
    "grad_norm/heads": "gradient norm, heads",
    "grad_reach": "gradient of patches over heads",
}
"""Vital signs that are drawn, with their titles."""

TERMS = {
    "RankMe": "the number of directions that the features use: the exponential of their singular values' entropy "
    "(Garrido et al., 2023)",
    "α-ReQ": "how fast the eigenvalues of the features' covariance fall; near 1 is healthy (Agrawal et al., 2022)",
    "LiDAR": "the rank of what separates images from each other, against views of one image (Thilak et al., 2023)",
    "gates": "numbers from 0 to 1 with which an mLSTM block keeps or forgets its memory at each token; saturated: "
    "stuck near 0 or 1",
    "memory": "tokens after which a block's memory has fallen to 1/e",
    "teacher": "a running mean of the trained network, whose outputs are the targets",
}
"""Terms of the vital signs, explained below their charts."""

_NOT_DRAWN = {"samples", "epoch", "loss_spike"}
_TIMES = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def axis_inputs() -> list[Element]:
    """Radio buttons that choose the horizontal axis of all charts after them, by the style sheet; see `axis_labels`."""
    return [
        element(
            "input", type="radio", name_="axis", id=f"axis-{axis}", class_="axis", checked="checked" if not i else None
        )
        for i, axis in enumerate(AXES)
    ]


def axis_labels() -> Element:
    """What is clicked to choose the horizontal axis."""
    labels = [element("label", title, for_=f"axis-{axis}") for axis, title in AXES.items()]
    return element("p", "Horizontal axis: ", *labels, class_="axes")


def training_charts(runs: Sequence[Run]) -> list[Element]:
    """Loss, for each objective on its own; gradient norm; learning rates; throughput; and the other values logged."""
    objectives = dict.fromkeys(run.record.recipe.objective.name for run in runs)
    charts = []
    for name in objectives:
        same = [run for run in runs if run.record.recipe.objective.name == name]
        charts.append(_figure(same, "loss", "train", "loss" if len(objectives) == 1 else f"loss of {name}"))
    main = ["grad_norm", "lr", "images_per_second"]
    charts += [_figure(runs, key, "train", TITLES[key]) for key in main]
    others = [key for key in dict.fromkeys(key for run in runs for key in run.keys("train")) if _is_other(key, runs)]
    more = [_figure(runs, key, "train", TITLES.get(key, key)) for key in others if key not in main]
    return [_grid(charts), *([details("More values that were logged", _grid(more))] if any_drawn(more) else [])]


def score_charts(runs: Sequence[Run]) -> list[Element]:
    """Scores during training; of k-NN only k = 20 outside <details>, where that was measured."""
    keys = list(dict.fromkeys(key for run in runs for key in run.keys("eval")))
    figures = {key: _figure(runs, key, "eval", f"{metric_name(key)}, percent") for key in keys}

    def is_detail(key: str) -> bool:
        found = re.fullmatch(r"(.*)knn_\d+", key)
        return found is not None and f"{found[1]}knn_20" in keys and key != f"{found[1]}knn_20"

    shown, hidden = ([figures[key] for key in keys if is_detail(key) == wanted] for wanted in (False, True))
    return [_grid(shown), *([details("Other numbers of neighbours", _grid(hidden))] if hidden else [])] if keys else []


def vital_charts(runs: Sequence[Run]) -> list[Element]:
    """Vital signs that a run took, with the borders of the healthy range."""
    bounds = {rule.value: (rule.low, rule.high) for rule in RULES}
    names = [name for name in VITALS if any(run.series(name, "doctor") for run in runs)]
    figures = []
    for name in names:
        borders = [bound for bound in bounds.get(name, ()) if math.isfinite(bound)]
        log = name.startswith(("grad", "speed", "teacher", "horizon"))
        figures.append(_figure(runs, name, "doctor", VITALS[name], borders, log))
    shown = " ".join(VITALS[name] for name in names)
    terms = [
        each for term, text in TERMS.items() if term in shown for each in (element("dt", term), element("dd", text))
    ]
    return [
        note("Dashed lines: borders of the healthy range."), _grid(figures), details("Terms", element("dl", *terms))
    ] if names else []  # fmt: skip


def smoothing(runs: Sequence[Run]) -> Element:
    """How the lines of these runs are drawn, in a sentence."""
    wide = {window(len(run.series("loss"))) for run in runs}
    text = (
        f"Strong lines: means of {' or '.join(str(each) for each in sorted(wide) if each > 1)} neighbouring records of "
        "metrics.jsonl; faint lines: the records themselves. " if max(wide) > 1
        else "Lines are the records of metrics.jsonl, not smoothed. "
    )  # fmt: skip
    if any(len(run.series("loss")) > MOST_POINTS for run in runs):
        text += "Of many records, the smallest and the largest of neighbouring ones are drawn. "
    return note(
        text + "Each record is a mean over monitor.log_every steps. Single values far outside the others are cut off. "
        "Training time is that of the steps, without evaluations, pictures and saves.",
        element("span", " Point at a chart to read its values.", class_="script"),
    )


def any_drawn(figures: Sequence[Element]) -> bool:
    return any(figure.find(".//svg") is not None for figure in figures)


def _is_other(key: str, runs: Sequence[Run]) -> bool:
    """Whether a logged value is drawn below the main ones; a weight decay only if it changes or differs."""
    if key == "weight_decay":
        return len({value for run in runs for _, value in run.series(key)}) > 1
    return key not in _NOT_DRAWN | {"loss"} and not key.startswith("epoch/")


def _grid(figures: Sequence[Element]) -> Element:
    return element("div", *figures, class_="charts")


def _figure(
    runs: Sequence[Run], key: str, kind: str, title: str, borders: Sequence[float] = (), log: bool = False
) -> Element:
    """A chart over each axis, of which the page shows one, with the last values in its caption."""
    series = {run.letter: run.series(key, kind) for run in runs}
    values = [value for points in series.values() for _, value in points] + list(borders)
    if kind == "train" and key in ("loss", "grad_norm"):
        log = max(values, default=1.0) > 50 * min(values, default=1.0)
    log = log and min(values, default=0.0) > 0
    heading = element("h3", capitalised(title))
    if not any(series.values()):
        return element("figure", heading, note("No run has recorded it yet."))
    charts = [_over(axis, runs, series, title, borders, log) for axis in AXES]
    last = [
        element("span", element("b", run.letter, class_=run.style), f" {short(series[run.letter][-1][1])} \u2002")
        for run in runs if series[run.letter]
    ]  # fmt: skip
    absent = [run.letter for run in runs if not series[run.letter]]
    caption = element(
        "figcaption", "Last: ", *last, f"Not recorded: {', '.join(absent)}." if absent else None,
        " Logarithmic axis." if log else None,
    )  # fmt: skip
    return element("figure", heading, *charts, caption)


def _over(
    axis: str,
    runs: Sequence[Run],
    series: dict[str, list[tuple[int, float]]],
    title: str,
    borders: Sequence[float],
    log: bool,
) -> Element:
    """The chart over one axis, or a sentence why there is none."""
    along = {run.letter: run.along(axis, [step for step, _ in series[run.letter]]) for run in runs}
    label, unit = AXES[axis], 1.0
    if axis == "seconds":
        longest = max((x for positions in along.values() for x in positions or ()), default=0.0)
        _, unit, name = next(each for each in _TIMES if longest >= each[0])
        label = f"{label}, {name}"
    lines = [
        Line(run.letter, run.style, [(x / unit, value) for x, (_, value) in zip(positions, series[run.letter])])
        for run in runs if (positions := along[run.letter])
    ]  # fmt: skip
    if not lines:
        return element("div", note(f"The runs have no record of {AXES[axis]}."), class_=f"over {axis}")
    return element("div", draw(Chart(title, label, lines, log, borders)), class_=f"over {axis}")
