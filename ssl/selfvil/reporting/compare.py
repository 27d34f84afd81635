"""What is compared: scores with intervals, settings that differ, and the sentences of the first section."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from selfvil.diagnostics.wording import setting
from selfvil.records import SCORES
from selfvil.reporting.runs import Run, metric_name, number

MEASURES = {"mIoU": "mean IoU", "top-1": "top-1 accuracy"}

_EXPLAINED = 6
"""Settings that differ, at most, in a sentence."""


_LOSS = "A loss shows the progress of a run; how useful the features are is shown by scores."


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A score in percent of one network of a run. low, high: its interval, of 95 % unless its row has another;
    deviation: over draws or seeds. computed: whether the interval was computed here. details: of the row. seen: images
    on which the network was trained, if known."""

    run: Run
    network: str
    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    computed: bool = False
    details: Any = None
    seen: float | None = None

    @property
    def text(self) -> str:
        """41.2 [40.1, 42.2], or 41.2 ± 0.5, or 41.2"""
        if self.low is not None and self.high is not None:
            return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.value:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Protocol:
    """Scores that may be compared: the same protocol and measure, and as many training and test images.

    images: such as "2,000 train, 1,000 test"; "" for scores during training.
    """

    name: str
    measure: str
    images: str
    scores: list[Score] = field(default_factory=list)

    @property
    def conditions(self) -> str:
        return f"{self.measure}; {self.images} images" if self.images else self.measure

    @property
    def title(self) -> str:
        return f"{self.name} ({self.conditions})"

    def pretrained(self) -> list[Score]:
        """Scores of the runs themselves, without baselines, the best first; one for each run."""
        found: dict[str, Score] = {}
        for score in self.scores:
            if score.network == "pretrained":
                found.setdefault(score.run.letter, score)
        return sorted(found.values(), key=lambda score: -score.value)


def read_protocols(runs: Sequence[Run]) -> list[Protocol]:
    """The scores of all runs: of scores.json first, then the last ones that were taken during training.

    A row of top-1 accuracy without interval and deviation gets Wilson's 95 % interval (1927) for its test images.
    Rows without a finite value are left out.
    """
    found: dict[tuple[str, str, str], Protocol] = {}

    def add(protocol: str, measure: str, images: str, score: Score) -> None:
        found.setdefault((protocol, measure, images), Protocol(protocol, measure, images)).scores.append(score)

    for run in runs:
        for row in run.scores:
            value, measure = number(row.get("value")), str(row.get("measure") or "top-1")
            if value is None:
                continue
            counts = {name: row.get(f"{name}_images") for name in ("train", "test")}
            images = ", ".join(f"{n:,} {name}" for name, n in counts.items() if isinstance(n, int))
            low, high, computed = _interval(row, value, measure)
            network = str(row.get("network") or "pretrained")
            add(
                str(row.get("protocol") or "unnamed protocol"), MEASURES.get(measure, measure), images,
                Score(run, network, value, low, high, number(row.get("deviation")), computed, row.get("details"),
                      number(row.get("samples_seen"))),
            )  # fmt: skip
    for run in runs:
        for key in run.keys("eval"):
            step, value = run.series(key, "eval")[-1]
            seen = positions[0] if (positions := run.along("samples", [step])) else None
            add(metric_name(key), "during training", "", Score(run, "pretrained", value, seen=seen))
    return list(found.values())


def _interval(row: dict[str, Any], value: float, measure: str) -> tuple[float | None, float | None, bool]:
    given, count = row.get("interval"), row.get("test_images")
    if isinstance(given, list | tuple) and len(given) == 2:
        low, high = number(given[0]), number(given[1])
        if low is not None and high is not None and low <= high:
            return low, high, False
    whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
    if whole and measure == "top-1" and number(row.get("deviation")) is None and 0 <= value <= 100:
        return *wilson(value, count), True  # type: ignore[arg-type]
    return None, None, False


def wilson(percent: float, count: int) -> tuple[float, float]:
    """95 % interval in percent of a share of `count` independent trials (Wilson, 1927)."""
    z, share = 1.959964, percent / 100
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return 100 * (middle - half), 100 * (middle + half)


# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A key of the recipe and its value in each run, as text; None where the run's recipe has no such key."""

    key: str
    values: list[str | None]


def differing_settings(runs: Sequence[Run]) -> list[Setting]:
    """Keys whose values differ between the runs, but for run.out, which always does."""
    flat = [_flat(run.record.recipe.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    found = [Setting(key, [each.get(key) for each in flat]) for key in keys if key != "run.out"]
    return [each for each in found if len(set(each.values)) > 1]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """{"optim.base_lr": "0.004"}; entries of `eval` are numbered."""
    if isinstance(value, dict) and value:
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        inner = {str(i): each for i, each in enumerate(value)}.items()
    else:
        return {prefix: str(value).lower() if isinstance(value, bool) else setting(value)}
    found: dict[str, str] = {}
    for key, each in inner:
        found |= _flat(each, f"{prefix}.{key}" if prefix else str(key))
    return found


# --- sentences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Which run is best by one measure: text follows the best run's name; reasons: how its recipe differs."""

    what: str
    best: Run
    text: str
    reasons: str = ""


def ranked(protocols: Sequence[Protocol]) -> list[Protocol]:
    """One protocol of each family, such as k-NN for several k, in the order in which they inform: those of most runs
    first, those with intervals before others, scores.json before scores during training."""
    families: dict[tuple[str, str, str], Protocol] = {}
    for protocol in sorted(protocols, key=lambda each: not re.search(r"\b20\b", each.name)):
        families.setdefault((re.sub(r"\d+", "", protocol.name), protocol.measure, protocol.images), protocol)

    def rank(protocol: Protocol) -> tuple[int, bool, bool]:
        scores = protocol.pretrained()
        return -len(scores), not protocol.images, not all(score.low is not None for score in scores)

    return sorted((each for each in families.values() if each.pretrained()), key=rank)


def findings(runs: Sequence[Run], protocols: Sequence[Protocol], most: int = 3) -> list[Finding]:
    """Which run is best by the protocols that most runs have, and by the loss where losses can be compared."""
    shared = [protocol for protocol in ranked(protocols) if len(protocol.pretrained()) > 1]
    found, explained = [], set[tuple[str, str]]()
    for protocol in shared[:most]:
        best, second = protocol.pretrained()[:2]
        pair = best.run.letter, second.run.letter
        reasons = "" if pair in explained else _reasons(best.run, second.run)
        explained.add(pair)
        found.append(Finding(protocol.title, best.run, _better(best, second), reasons))
    for _, together in groupby(sorted(runs, key=_loss_key), key=_loss_key):
        same = [run for run in together if run.series("loss")]
        if len(same) > 1:
            found.append(_loss_finding(same))
    return found


def _better(best: Score, second: Score) -> str:
    gap = best.value - second.value
    if gap == 0:
        return f"and {second.run.letter} have the same score, {best.text} %."
    text = f"is best with {best.text} %; next is {second.run.letter} with {second.text} %, {gap:.1f} points less."
    if best.seen != second.seen and best.seen is not None and second.seen is not None:
        text += f" They had seen different numbers of images then: {best.seen:,.0f} and {second.seen:,.0f}."
    if best.low is None or second.high is None:
        return text + (" So small a difference may be chance." if gap < 1 else "")
    if best.low > second.high:
        return f"{text} Their intervals do not overlap."
    return f"{text} Their intervals overlap, so the difference may be chance."


def _reasons(best: Run, second: Run) -> str:
    """The settings of both recipes that differ; those of the objective and the optimizer first."""
    differ = differing_settings([best, second])
    if not differ:
        return f"The recipes of {best.letter} and {second.letter} are the same."
    sections = ["objective", "optim", "model", "budget", "data"]
    order = {name: index for index, name in enumerate(sections)}
    shared = sorted((e for e in differ if None not in e.values), key=lambda e: order.get(e.key.split(".")[0], 9))
    listed = [f"{each.key} {each.values[0]} instead of {each.values[1]}" for each in shared[:_EXPLAINED]]
    more = len(differ) - len(listed)
    return (
        f"How {best.letter} differs from {second.letter}: {', '.join(listed)}"
        f"{f', and {more} more settings' if more > 0 else ''}."
    )


def _loss_finding(runs: Sequence[Run]) -> Finding:
    """The lowest loss of runs with one objective, after as many images as all of them have seen."""
    seen = {run.letter: run.train[-1]["samples"] for run in runs}
    common = min(seen.values())
    (low, _, best), (next_low, _, second) = sorted((run.smooth_loss(common), run.letter, run) for run in runs)[:2]
    after = f"after {common:,} images{', the most that all have seen' if max(seen.values()) > common else ''}"
    text = f"has the lowest {after}: {low:.4g}; next is {second.letter} with {next_low:.4g}."
    if low == next_low:
        text = f"and {second.letter} have the same {after}: {low:.4g}."
    return Finding(f"loss of {best.record.recipe.objective.name}", best, text, _LOSS)


def _loss_key(run: Run) -> str:
    """The same for runs whose losses can be compared: the same objective, settings and images."""
    recipe, model = run.record.recipe, run.record.recipe.model
    return str((recipe.objective.model_dump(mode="json"), recipe.data.train, model.img_size, model.patch_size))


def cautions(runs: Sequence[Run], protocols: Sequence[Protocol]) -> list[str]:
    """Reasons why a comparison of these runs may mislead."""
    found = []
    seen = {run.letter: run.train[-1]["samples"] for run in runs if run.train}
    if len(set(seen.values())) > 1:
        found.append(
            "The runs trained on different numbers of images: " + _each({k: f"{v:,}" for k, v in seen.items()})
        )
    losses = {run.letter: _loss_key(run) for run in runs}
    if len(set(losses.values())) > 1:
        found.append(
            "Losses of different objectives, or of one with different settings, cannot be compared; compare scores."
        )
    models = {run.letter: run.record.recipe.model.name for run in runs}
    if len(set(models.values())) > 1:
        found.append("The networks differ: " + _each(models))
    ids: dict[tuple[str, ...], str] = {}
    for run in runs:
        identity = tuple(str(launch.get("started")) for launch in run.record.launches)
        if identity and identity in ids:
            found.append(f"{ids[identity]} and {run.letter} began at the same second: one may be a copy of the other.")
        ids.setdefault(identity, run.letter)
    if any(score.computed for protocol in protocols for score in protocol.scores):
        found.append(
            f"Where a row of {SCORES} has no interval, Wilson's 95 % interval for its number of test images is given. "
            "It does not include the variation between seeds."
        )
    if len(runs) > 1 and not any(protocol.pretrained()[1:] for protocol in protocols):
        found.append(
            "No two runs have scores of the same protocol: add entries to eval in the recipes, or run selfvil eval ... "
            f"--json RUN/{SCORES} for each."
        )
    return found


def _each(values: dict[str, str]) -> str:
    return ", ".join(f"{letter} {value}" for letter, value in values.items()) + "."
