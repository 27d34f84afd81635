"""`selfvil report RUN...`: one or several runs as one self-contained HTML page.

Sections that every run has come in the order of a reader's questions: which run is better and why, can this be trusted,
how did it come about, and what was run. A part that is missing has the reason in its place.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from selfvil.diagnostics.checkup import NOTHING_JUDGED, examine, rows
from selfvil.diagnostics.collapse import Doctor
from selfvil.errors import UserError
from selfvil.files import require_writable, write_text
from selfvil.monitor.console import duration
from selfvil.records import SCORES
from selfvil.reporting import curves
from selfvil.reporting.charts import Chart, Line, Mark, draw, draw_intervals, short
from selfvil.reporting.compare import (
    Protocol,
    Score,
    cautions,
    differing_settings,
    findings,
    ranked,
    read_protocols,
)
from selfvil.reporting.elements import Content, badge, capitalised, details, element, note, page, section, table
from selfvil.reporting.pictures import Backbone, feature_strips, memory_line, objective_pictures
from selfvil.reporting.runs import Run, read_runs

log = logging.getLogger("selfvil")

PAGE = "report.html"


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a page about one run or several, and return its path.

    The page needs no other file and no network. Runs may be finished, running, killed or damaged: each is shown with
    what its folder holds. The folders are only read, but for the page itself.

    Args:
        runs: folder of a run, or folders of at most 24 runs.
        out: the file; None: report.html in the folder of the only run, or in the current folder for several runs. An
            existing file is replaced only if it is such a page.
        progress: called with (done, total) as the checkpoints of the runs are evaluated.

    Raises:
        UserError: a folder holds no run or is given twice, or the file cannot be written; before any long work.
    """
    folders = [Path(runs)] if isinstance(runs, str | os.PathLike) else [Path(run) for run in runs]
    read = read_runs(folders)
    target = _target(folders, out)
    text = _page(read, progress)
    try:
        write_text(target, text)
    except OSError as error:
        raise UserError(f"the report {target} cannot be written: {error}") from None
    return target


def _target(folders: Sequence[Path], out: str | os.PathLike[str] | None) -> Path:
    """The file to write. Raises UserError if it cannot be written, or exists and is no page of this module."""
    in_run = folders[0] / PAGE
    target = Path(out).expanduser() if out is not None else in_run if len(folders) == 1 else Path(PAGE)
    require_writable(target)
    target = Path(os.path.realpath(target))
    if target.exists():
        if not target.is_file():
            raise UserError(f"{target} is no regular file; give the name of an HTML file")
        with open(target, "rb") as file:
            ours = b'content="selfvil' in file.read(4096)
        if target.stat().st_size and not ours and target != in_run.resolve():
            raise UserError(f"{target} exists and is no report of selfvil, so it is kept; give another file")
    return target


def _page(runs: Sequence[Run], progress: Callable[[int, int], None]) -> str:
    several = len(runs) > 1
    recipe = runs[0].record.recipe
    title = (
        f"{len(runs)} runs compared" if several else f"{runs[0].name}: {recipe.objective.name} on {recipe.model.name}"
    )
    legend = element("ul", *(element("li", *_name(run), title=run.name) for run in runs), class_="legend")
    protocols, doctors = read_protocols(runs), {run.letter: _doctor(run) for run in runs}
    networks = {}
    for done, run in enumerate(runs):
        progress(done, len(runs))
        networks[run.letter] = _network(run)
    sections = [
        section("At a glance", *_glance(runs, protocols, doctors)),
        *([section("Settings that differ", *_settings(runs))] if several else []),
        section("Scores", *_scores(runs, protocols)),
        section("Curves", *_curves(runs)),
        section("Doctor", *_doctors(runs, doctors)),
        section("Vital signs", *_vitals(runs)),
        section("Pictures", *_pictures(runs)),
        section("Features", *_features(runs, networks)),
        section("Memory of the blocks", *_memory(runs, networks)),
        section("Budget and hardware", _budget(runs, networks)),
        section("Recipes and commands" if several else "Recipe and command", *_recipes(runs)),
    ]
    return page(title, [legend] if several else [], [*curves.axis_inputs(), *sections])


@dataclass(frozen=True)
class Network:
    """What the newest checkpoint of a run gives; a str is the sentence why something is missing."""

    step: int | None
    parameters: int | None
    features: list[Element] | str
    memory: Line | str


def _network(run: Run) -> Network:
    """Load, evaluate and release the network of one run, so that the page of many needs the memory of one."""
    backbone = _attempt(lambda: Backbone(run))
    if isinstance(backbone, str):
        return Network(None, None, backbone, backbone)
    features, memory = _attempt(lambda: feature_strips(backbone)), _attempt(lambda: memory_line(backbone))
    return Network(backbone.step, backbone.parameters, features, memory)


def _attempt(make: Callable[[], Any]) -> Any:
    """What `make` returns, or a sentence why it cannot be made: one damaged run must not spoil the page of others."""
    try:
        return make()
    except UserError as error:
        return str(error)
    except Exception as error:  # decoders, networks and their weights raise different classes
        log.debug("a part of the report cannot be made", exc_info=True)
        return f"{type(error).__name__}: {error}"


def _name(run: Run) -> list[Content]:
    return [badge(run.letter, run.style), " " if run.letter else None, element("span", run.name, class_="name")]


def _missing(run: Run, reason: str) -> Element:
    """The sentence in place of something of a run that is missing."""
    return note(badge(run.letter, run.style), f" Not shown: {reason}" if run.letter else f"Not shown: {reason}")


def _head(run: Run, otherwise: str) -> Content:
    """The head of a run's column: its letter and, for a page of one run, `otherwise`."""
    return badge(run.letter, run.style) if run.letter else otherwise


def _of_each(runs: Sequence[Run], cell: Callable[[Run], Content]) -> list[Content]:
    return [cell(run) for run in runs]


# --- which run is better, and why ------------------------------------------------------------------------------------


def _glance(runs: Sequence[Run], protocols: Sequence[Protocol], doctors: dict[str, Doctor | str]) -> Iterator[Element]:
    for found in findings(runs, protocols):
        doctor = doctors[found.best.letter]
        alarms = [] if isinstance(doctor, str) else [name.replace("_", " ") for name in doctor.alarms]
        yield element(
            "p", element("strong", capitalised(found.what), ": "), *_name(found.best), f" {found.text} ",
            element("span", f"Its doctor raised an alarm: {', '.join(alarms)}.", class_="alarm") if alarms else None,
            element("span", found.reasons, class_="reasons") if found.reasons else None, class_="finding",
        )  # fmt: skip
    yield element("div", *(_card(run, protocols, doctors[run.letter]) for run in runs), class_="cards")
    warnings = cautions(runs, protocols)
    if warnings:
        yield element("div", element("h3", "Before you conclude"), element("ul", *(element("li", w) for w in warnings)))


def _card(run: Run, protocols: Sequence[Protocol], doctor: Doctor | str) -> Element:
    recipe, losses = run.record.recipe, run.series("loss")
    facts: dict[str, str | None] = {
        "Objective": f"{recipe.objective.name} on {recipe.model.name}",
        "Images seen": _images(run),
        "Training time": None if run.seconds is None else duration(run.seconds),
        "Loss": f"{short(losses[0][1])} → {short(losses[-1][1])}" if losses else None,
    }
    own = ((each, score) for each in ranked(protocols) for score in each.pretrained() if score.run is run)
    for protocol, score in islice(own, 2):
        facts[capitalised(protocol.name)] = f"{score.text} %"
    facts["Doctor"] = _verdict(doctor)
    lines = [
        each for term, value in facts.items() if value is not None
        for each in (element("dt", term), element("dd", value, class_="alarm" if value.startswith("ALARM") else None))
    ]  # fmt: skip
    return element(
        "article", element("h3", *_name(run)), element("p", run.status.capitalize(), class_="status"),
        element("dl", *lines), *(note(sentence) for sentence in run.missing), class_=f"card {run.style}",
    )  # fmt: skip


def _images(run: Run) -> str | None:
    return f"{run.train[-1]['samples']:,} ({run.train[-1]['epoch']:.1f} epochs)" if run.train else None


def _doctor(run: Run) -> Doctor | str:
    """The doctor that judged a run, or the reason why none could."""
    if not run.train:
        return "nothing to judge: there are no metrics"
    doctor = _attempt(lambda: examine(run.record))
    return doctor if isinstance(doctor, str) or rows(doctor) else NOTHING_JUDGED


def _verdict(doctor: Doctor | str) -> str:
    if isinstance(doctor, str):
        return doctor[0].upper() + doctor[1:].partition(":")[0]
    if doctor.alarms:
        return "ALARM: " + ", ".join(name.replace("_", " ") for name in doctor.alarms)
    return "No alarm"


def _settings(runs: Sequence[Run]) -> Iterator[Element]:
    differ = differing_settings(runs)
    shared = [each for each in differ if None not in each.values]
    partial = [each for each in differ if None in each.values]
    header = ["key", *_of_each(runs, lambda run: _head(run, "value"))]
    if not differ:
        yield note("The recipes are the same, but for run.out.")
    if shared:
        content = [[element("code", each.key), *each.values] for each in shared]
        yield table(
            header, content, "Keys whose values differ. run.out is left out; selfvil explain KEY explains a key."
        )
    if partial:
        content = [[element("code", each.key), *each.values] for each in partial]
        yield details(f"{len(partial)} keys that only some of these recipes have", table(
            header, content, "Keys of one objective, or entries of eval. Dash: the recipe has no such key.",
        ))  # fmt: skip


# --- scores ----------------------------------------------------------------------------------------------------------


def _scores(runs: Sequence[Run], protocols: Sequence[Protocol]) -> Iterator[Element]:
    if not protocols:
        yield note(
            f"Not shown: no scores. Add entries to eval in the recipe, or run selfvil eval ... --json RUN/{SCORES}"
        )
        return
    figures, legend = [], "Points: scores. Bars: intervals, where they are known. Grey: not pretrained."
    for measure in dict.fromkeys(protocol.measure for protocol in protocols):
        chosen = [protocol for protocol in protocols if protocol.measure == measure]
        groups = [
            (_short_title(protocol), [_mark(score) for score in _ordered(protocol)]) for protocol in chosen
        ]  # fmt: skip
        title = f"{'Scores ' if measure == 'during training' else ''}{measure}, percent"
        figures.append(
            element(
                "figure",
                element("h3", capitalised(title)),
                draw_intervals(title, groups),
                element("figcaption", legend),
            )
        )
    yield element("div", *figures, class_="charts")
    header = ["protocol", *_of_each(runs, lambda run: _head(run, "score"))]
    content, extra = [], []
    for protocol in protocols:
        for network in dict.fromkeys(score.network for score in protocol.scores):
            name = protocol.name if network == "pretrained" else f"{protocol.name}, {network}"
            label = element("span", name, element("span", protocol.conditions, class_="sub"))
            found = {score.run.letter: score for score in protocol.scores if score.network == network}
            best = max((score.value for score in found.values()), default=0.0)
            content.append([label, *(_cell(found.get(run.letter), best, len(found) > 1) for run in runs)])
            extra += [
                (f"{score.run.name}: {name} ({protocol.measure})", score.details)
                for score in found.values()
                if score.details
            ]
    yield table(
        header, content, "Scores in percent, with [low, high] of their interval or ± their deviation over draws or "
        "seeds. Bold: the highest of a row. Scores during training are the last ones.",
    )  # fmt: skip
    for name, found in extra:
        yield details(f"Details of {name}", table([], _flattened(found), "Details of the row in scores.json."))


def _short_title(protocol: Protocol) -> str:
    return protocol.name + (f" · {protocol.images}" if protocol.images else "")


def _ordered(protocol: Protocol) -> list[Score]:
    """The scores of the runs, then those of the baselines."""
    return sorted(protocol.scores, key=lambda score: (score.network != "pretrained", score.network, score.run.letter))


def _mark(score: Score) -> Mark:
    baseline = score.network != "pretrained"
    text = score.text if not baseline else f"{score.value:.1f} {score.network}"
    return Mark(score.run.letter, "baseline" if baseline else score.run.style, score.value, score.low, score.high, text)


def _cell(score: Score | None, best: float, compared: bool) -> Content:
    if score is None:
        return None
    return element("strong" if compared and score.value == best else "span", score.text, class_="together")


def _flattened(found: Any, prefix: str = "", most: int = 200) -> list[list[Content]]:
    """Nested values as rows of a name and a text, at most `most`."""
    if isinstance(found, dict | list) and found:
        items = found.items() if isinstance(found, dict) else enumerate(found)
        inner: list[list[Content]] = []
        for key, value in items:
            inner += _flattened(value, f"{prefix} {key}".strip(), most - len(inner))
            if len(inner) >= most:
                break
        return inner
    return [[prefix or "value", f"{found:.4g}" if isinstance(found, float) else str(found)[:300]]]


# --- how it came about -----------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> Iterator[Element]:
    if not any(run.train or run.keys("eval") for run in runs):
        yield note("Not shown: there are no metrics yet.")
        return
    yield curves.axis_labels()
    yield from curves.training_charts(runs)
    if scores := curves.score_charts(runs):
        yield element("h3", "Scores during training", class_="part")
        yield from scores
    yield curves.smoothing(runs)


def _doctors(runs: Sequence[Run], doctors: dict[str, Doctor | str]) -> Iterator[Element]:
    judged: dict[str, dict[tuple[str, str], str]] = {}
    for run in runs:
        doctor = doctors[run.letter]
        if isinstance(doctor, str):
            yield _missing(run, doctor)
            continue
        for alarm in doctor.alarms.values():
            yield element(
                "p", badge(run.letter, run.style), element("strong", f" Step {alarm.step:,}. "), alarm.sentence
            )
        if not doctor.alarms:
            yield element("p", badge(run.letter, run.style), " No alarm.")
        judged[run.letter] = {}
        for symptom, value, healthy, verdict, _ in rows(doctor):
            text = f"{verdict}: {value}" if verdict.startswith("ALARM") else f"{value} ({verdict})"
            text = f"{value} ✓" if verdict == "healthy" else text
            judged[run.letter][symptom, healthy] = text
    found = list(dict.fromkeys(key for each in judged.values() for key in each))
    if found:
        header = ["symptom", "healthy", *_of_each(runs, lambda run: _head(run, "value"))]
        content = [
            [symptom, healthy, *(judged.get(run.letter, {}).get((symptom, healthy)) for run in runs)]
            for symptom, healthy in found
        ]
        yield table(header, content, "The latest value of each symptom, or the one that raised the alarm. ✓: healthy.")


def _vitals(runs: Sequence[Run]) -> Iterator[Element]:
    charts = curves.vital_charts(runs)
    if charts:
        yield curves.axis_labels()
    yield from charts
    for run in runs:
        if not run.keys("doctor"):
            yield _missing(
                run, "the run took no vital signs (monitor.doctor_every is null, or longer than the run so far)"
            )


def _pictures(runs: Sequence[Run]) -> Iterator[Element]:
    found = [_attempt(partial(objective_pictures, run)) for run in runs]
    columns = []
    for run, pictures in zip(runs, found):
        shown = [_missing(run, pictures)] if isinstance(pictures, str) else pictures
        title = element("h3", *_name(run)) if run.letter else None
        columns.append(element("div", title, element("div", *shown, class_="pair")))
    name = runs[0].record.recipe.objective.name if len(runs) == 1 else "each objective"
    yield note(f"Input and output of {name} for some training images, as the run recorded them.")
    yield element("div", *columns, class_="pictures")


def _features(runs: Sequence[Run], networks: dict[str, Network]) -> Iterator[Element]:
    shown, absent = [], []
    for run in runs:
        found = networks[run.letter]
        if isinstance(found.features, str):
            absent.append(_missing(run, found.features))
        else:
            caption = element("figcaption", *(_name(run) if run.letter else ()), f" Checkpoint of step {found.step:,}")
            shown.append(element("figure", *found.features, caption))
    if shown:
        yield note(
            "Features: three principal components of the patches of all images of a run, as red, green and blue; a "
            "colour has the same meaning in all images of one run, and none between runs. Readout: sensitivity of the "
            "readout to the embedding of each patch; brightest: the maximum of an image, black: a thousandth of it."
        )
        yield element("div", *shown, class_="pictures")
    yield from absent


def _memory(runs: Sequence[Run], networks: dict[str, Network]) -> Iterator[Element]:
    lines = [line for run in runs if isinstance(line := networks[run.letter].memory, Line) and line.points]
    if lines:
        title = "Tokens until a block's memory has fallen to 1/e"
        caption = (
            "A dot is a head, by the mean of its forget gates on 128 training images; the line is the median of the "
            "heads. Logarithmic axis."
        )
        chart = draw(Chart(title, "block", lines, log=True, whole=True))
        yield element(
            "div", element("figure", element("h3", title), chart, element("figcaption", caption)), class_="charts"
        )
    for run in runs:
        if isinstance(reason := networks[run.letter].memory, str):
            yield _missing(run, reason)


# --- what was run ----------------------------------------------------------------------------------------------------


def _budget(runs: Sequence[Run], networks: dict[str, Network]) -> Element:
    facts = {run.letter: _facts(run, networks[run.letter]) for run in runs}
    names = dict.fromkeys(name for each in facts.values() for name in each)
    content = [[name, *(facts[run.letter].get(name) for run in runs)] for name in names]
    header: list[Content] = ["", *_of_each(runs, lambda run: _head(run, run.name))]
    return table(header, content, "From run.json, metrics.jsonl and the newest checkpoint; device and versions "
                 "are those of the last launch.")  # fmt: skip


def _facts(run: Run, network: Network) -> dict[str, str | None]:
    summary, launches, recipe = run.record.summary, run.record.launches, run.record.recipe
    launch = launches[-1] if launches else {}
    versions = launch.get("versions")
    speed = run.series("images_per_second")
    steps = f"{run.train[-1]['step']:,}" if run.train else "0"
    return {
        "Status": run.status,
        "Steps": steps if run.total_steps is None else f"{steps} of {run.total_steps:,}",
        "Batch size": f"{recipe.optim.batch_size:,}",
        "Images seen": _images(run),
        "Training time": None if run.seconds is None else duration(run.seconds),
        "Wall time": duration(summary["seconds"]) if summary else None,
        "Launches": str(len(launches)) if launches else None,
        "Images per second": f"{speed[-1][1]:,.0f}" if speed else None,
        "Parameters": f"{network.parameters / 1e6:.2f} M in the backbone" if network.parameters else None,
        "Device": f"{launch.get('processes', '?')} × {launch.get('device', '?')}" if launch else None,
        "Strategy": _text(launch.get("strategy")),
        "Precision": recipe.run.precision,
        "Seed": str(recipe.run.seed),
        "Started": _text(launches[0].get("started"))[:16].replace("T", " ") if launches else None,
        "Commit": _text(launch.get("commit")),
        "Versions": _versions(versions, "selfvil", "torch"),
    }


def _versions(found: Any, *names: str) -> str | None:
    """Versions of the packages `names`, or of all, from run.json."""
    if not isinstance(found, dict):
        return None
    return ", ".join(f"{name} {version}" for name, version in found.items() if name in names or not names)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _recipes(runs: Iterable[Run]) -> Iterator[Element]:
    for run in runs:
        launch = run.record.launches[-1] if run.record.launches else {}
        facts = {
            "Folder": str(run.record.folder),
            "Command": _text(launch.get("command")),
            "Versions": _versions(launch.get("versions")) or "",
        }
        lines = [each for name, text in facts.items() if text for each in (element("dt", name), element("dd", text))]
        yield element(
            "details", element("summary", *_name(run), ": command, versions and every setting, defaults included"),
            element("dl", *lines), element("pre", run.record.recipe.to_yaml(), tabindex=0),
        )  # fmt: skip
