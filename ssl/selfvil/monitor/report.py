"""`selfvil report RUN`: a run as one self-contained HTML page, with its pictures and without scripts.

A section that needs absent images or an absent checkpoint has the reason in place of its content.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from selfvil.diagnostics.checkup import NOTHING_JUDGED, Record, examine, rows, training_images
from selfvil.diagnostics.gates import horizons, record_forget_gates
from selfvil.diagnostics.rules import RULES
from selfvil.errors import UserError
from selfvil.files import write_text
from selfvil.models.adapter import adapt
from selfvil.monitor.pictures import curves_figure, png
from selfvil.monitor.saliency import pca_colours, readout_saliency
from selfvil.objectives.base import Objective, Progress
from selfvil.recipe import Recipe
from selfvil.records import SCORE_COLUMNS, newest_picture, read_scores
from selfvil.weights import load_network, open_checkpoint

Build = Callable[[Recipe, bool], Objective]
"""Builds the objective of a recipe; the second argument is whether to load model.start_from."""

IMAGES = 8
"""Images shown."""

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

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } tr.alarm { color: #b00020; font-weight: 600; } img { max-width: 100%; max-height: 60em; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; } p.note, figcaption, caption { color: #555; }
figure { margin: 1em 0; } caption { text-align: left; padding-bottom: .3em; } summary { cursor: pointer; }
div.wide { overflow-x: auto; } td { overflow-wrap: anywhere; min-width: 4em; }
dt { font-weight: 600; } dd { margin: 0 0 .5em; }
"""

TERMS = {
    "RankMe": "the number of directions that the features use: the exponential of their singular values' entropy "
    "(Garrido et al., 2023)",
    "α-ReQ": "how fast the eigenvalues of the features' covariance fall; near 1 is healthy (Agrawal et al., 2022)",
    "LiDAR": "the rank of what separates images from each other, against views of one image (Thilak et al., 2023)",
    "gate": "a number from 0 to 1 with which an mLSTM block keeps or forgets its memory at each token; saturated: "
    "stuck near 0 or 1",
    "memory, in tokens": "tokens after which a block's memory has fallen to 1/e",
    "trivial loss": "the loss of giving one prediction for all images",
    "teacher": "a running mean of the trained network, whose outputs are the targets",
}
"""Terms of the vital signs, explained below their picture."""

_PICTURE = "input and output of the objective for some images"
"""Caption of an objective's picture."""


def write_report(record: Record, out: Path, build: Build) -> Path:
    """Write the page to the file `out`, through a temporary file, and return it. Raises UserError."""
    title = f"{record.folder.resolve().name}: {record.recipe.objective.name} on {record.recipe.model.name}"
    sections: list[tuple[str, Callable[[], str]]] = [
        ("The run", lambda: _facts(record)),
        ("The doctor", lambda: _doctor(record)),
        ("Learning curves", lambda: _curves(record)),
        ("Vital signs", lambda: _vitals(record)),
        ("Scores", lambda: _scores(record)),
        ("Input and output of the objective", lambda: _objective(record, build)),
        ("Features", lambda: _features(record)),
        ("Memory of the blocks", lambda: _horizons(record)),
        ("Recipe", lambda: _recipe(record)),
    ]
    body = "".join(f"<h2>{escape(name)}</h2>\n{_or_reason(make)}\n" for name, make in sections)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise UserError(f"the report {out} cannot be written: {error}") from None
    return out


def _or_reason(make: Callable[[], str]) -> str:
    try:
        return make()
    except UserError as error:
        return f'<p class="note">Not shown: {escape(str(error))}</p>'


def _recipe(record: Record) -> str:
    return (
        "<details><summary>Every setting of the run, defaults included (selfvil explain KEY has its meaning)</summary>"
        f"<pre>{escape(record.recipe.to_yaml())}</pre></details>"
    )


# --- from the files of the run ---------------------------------------------------------------------------------------


def _facts(record: Record) -> str:
    last = next(entry for entry in reversed(record.metrics) if entry["kind"] == "train")
    launch = record.launches[-1] if record.launches else {}
    seconds = record.summary["seconds"] if record.summary else None
    facts = {
        "Status": _status(record),
        "Steps": f"{last['step']:,} of {record.total_steps:,}",
        "Images seen": f"{last['samples']:,} ({last['epoch']:.1f} epochs)",
        "Loss": f"{last['loss']:.4f}" if "loss" in last else "not known: the last steps were skipped",
        "Wall time": f"{seconds / 60:.1f} minutes in {len(record.launches)} launch(es)" if seconds else "not known",
        "Device": f"{launch.get('processes', '?')} × {launch.get('device', '?')}, {record.recipe.run.precision}",
        "Seed": str(record.recipe.run.seed),
        "Commit": launch.get("commit") or "not known",
        "Versions": ", ".join(f"{name} {version}" for name, version in launch.get("versions", {}).items()),
        "Command": launch.get("command", "?"),
    }
    note = '<p class="note">The last line of metrics.jsonl is incomplete, as after a kill; that record is not '
    return _table([], facts.items(), "From run.json and metrics.jsonl.") + (note + "shown.</p>" if record.cut else "")


def _status(record: Record) -> str:
    if record.summary is None:
        return "running, or killed before its first stop"
    return "finished" if record.summary["finished"] else "stopped"


def _doctor(record: Record) -> str:
    doctor = examine(record)
    if not rows(doctor):
        raise UserError(NOTHING_JUDGED)
    alarms = "".join(f"<p><b>Step {alarm.step:,}.</b> {escape(alarm.sentence)}</p>" for alarm in doctor.alarms.values())
    header = ["symptom", "value", "healthy", "verdict", "advice"]
    return (alarms or "<p>No alarm.</p>") + _table(
        header, rows(doctor), "Measured values with their healthy ranges; advice where there is an alarm."
    )


def _curves(record: Record) -> str:
    return _png(
        curves_figure(record.metrics, record.folder.resolve().name),
        "Loss: what training minimises, as means between two log lines. Learning rate: of the schedule. Share "
        "of ln K, with a teacher: entropy of its outputs over the largest possible one; in the red bands its outputs "
        "no longer distinguish images.",
    )


def _vitals(record: Record) -> str:
    entries = [entry for entry in record.metrics if entry["kind"] == "doctor"]
    names = [name for name in VITALS if any(name in entry for entry in entries)]
    if not names:
        raise UserError("the run took no vital signs (monitor.doctor_every is null, or longer than the run so far)")
    figure, axes = _figure(-(-len(names) // 3), 3, (10, 2.2 * -(-len(names) // 3)))
    bands = {rule.value: rule for rule in RULES}
    for axis, name in zip(axes.flat, names):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points), marker=".", linewidth=1)
        axis.set_title(VITALS[name], fontsize="small")
        axis.tick_params(which="both", labelsize="x-small")
        axis.grid(alpha=0.3)
        if name.startswith(("grad", "speed", "teacher")) and all(value > 0 for _, value in points):
            axis.set_yscale("log")
        if name in bands:
            for bound in (bands[name].low, bands[name].high):
                if math.isfinite(bound):
                    axis.axhline(bound, color="tab:red", linestyle="--", linewidth=1)
        if axis.get_yscale() == "log":
            _plain_numbers(axis)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_axis_off()
    shown = " ".join(VITALS[name] for name in names)
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in TERMS.items() if term in shown)
    caption = "Over the steps. Dashed: the border of the healthy range."
    return _png(figure, caption) + (f"<details><summary>Terms</summary><dl>{terms}</dl></details>" if terms else "")


def _scores(record: Record) -> str:
    entries = [entry for entry in record.metrics if entry["kind"] == "eval"]
    parts = []
    if entries:
        names = [name for name in entries[-1] if name not in ("step", "kind")]
        lines = [
            [f"{entry['step']:,}", *(f"{entry[name]:.2f} %" if name in entry else "" for name in names)]
            for entry in entries
        ]
        parts.append(_table(["step", *names], lines, "During the run: top-1 accuracy on the test images."))
    if scores := read_scores(record.folder):
        lines = [[str(row.get(name, "")) for name in SCORE_COLUMNS] for row in scores]
        caption = "scores.json: top-1 accuracy in percent; deviation over draws or seeds; readout: tokens used."
        parts.append(_table(SCORE_COLUMNS, lines, caption))
    if not parts:
        raise UserError("no scores: add entries to eval in the recipe, or selfvil eval ... --json RUN/scores.json")
    return "".join(parts)


# --- from the newest checkpoint --------------------------------------------------------------------------------------


def _objective(record: Record, build: Build) -> str:
    """The newest picture of the run, or a new one from its newest checkpoint."""
    if saved := newest_picture(record.folder):
        return _img(saved.read_bytes(), f"{saved.name}: {_PICTURE}")
    checkpoint = open_checkpoint(record.folder)
    objective = build(record.recipe, False).eval()
    objective.load_state_dict(checkpoint.tensors("objective"))
    (batch,) = training_images(record, IMAGES, objective.views())
    per_epoch = checkpoint.meta["data"]["num_samples"] / record.recipe.optim.batch_size
    picture = objective.picture(batch, Progress(checkpoint.step, record.total_steps, per_epoch, record.recipe.run.seed))
    if picture is None:
        raise UserError(f"the objective {record.recipe.objective.name} draws no picture")
    return _img(png(picture), f"Step {checkpoint.step:,}: {_PICTURE}")


def _features(record: Record) -> str:
    checkpoint = open_checkpoint(record.folder)
    backbone = load_network(checkpoint).backbone.eval()
    if not adapt(backbone).has_patches:
        raise UserError(f"{record.recipe.model.name} has no patches")
    (batch,) = training_images(record, IMAGES)
    images = batch.views[0]
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (record.recipe.data.mean, record.recipe.data.std))
    shown = (images * scale + shift).clamp(0, 1)[:, :3].expand(-1, 3, -1, -1)
    saliency = readout_saliency(backbone, images)
    from matplotlib.colors import LogNorm

    figure, axes = _figure(3, len(images), (1.4 * len(images), 4.4))
    listed = zip(shown.permute(0, 2, 3, 1), pca_colours(backbone, images).permute(0, 2, 3, 1), saliency)
    for column, (image, colours, heat) in zip(axes.T, listed):
        column[0].imshow(image.numpy())
        column[1].imshow(colours.numpy())
        column[2].imshow(heat.numpy(), cmap="magma", norm=LogNorm(1e-3, 1, clip=True))
        for axis in column:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, label in zip(axes[:, 0], ("image", "features", "readout")):
        axis.set_ylabel(label)
    return _png(
        figure,
        f"Step {checkpoint.step:,}. Features: three principal components of the patches of all "
        "images, as red, green and blue. Readout: its sensitivity to each patch's embedding; brightest: the maximum "
        "of this image, black: a thousandth of it.",
    )


def _horizons(record: Record) -> str:
    checkpoint = open_checkpoint(record.folder)
    backbone = load_network(checkpoint).backbone.eval()
    with torch.no_grad(), record_forget_gates(backbone) as gates:
        for batch in training_images(record, 128):
            backbone(batch.views[0])
    if not gates:
        raise UserError(f"{record.recipe.model.name} has no forget gates")
    figure, axes = _figure(1, 1, (8, 3.2))
    axis = axes[0, 0]
    scans = {tuple(name.split("_")): passes for name, passes in gates.items()}
    for direction, marker in (("forward", "o"), ("backward", "s"), ("down", "v"), ("up", "^")):
        blocks = {int(block): horizons(passes) for (block, way), passes in scans.items() if way == direction}
        points = [(block, tokens) for block, heads in blocks.items() for tokens in heads.tolist()]
        if points:
            axis.scatter(*zip(*points), marker=marker, alpha=0.7, label=direction)
    num_tokens = max(f.shape[-1] for passes in gates.values() for f in passes)
    axis.axhline(num_tokens, color="tab:grey", linestyle="--", linewidth=1, label=f"the image, {num_tokens} tokens")
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_xticks(sorted({int(block) for block, _ in scans}))
    axis.set_ylabel("tokens to 1/e")
    axis.grid(alpha=0.3)
    _plain_numbers(axis)
    figure.legend(loc="outside upper right", ncols=5, fontsize="small")
    return _png(
        figure,
        f"Step {checkpoint.step:,}, 128 images. A point is a head: tokens after which its memory has "
        "fallen to 1/e, by the mean of its forget gates.",
    )


# --- HTML ------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], content: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table. Empty cells have a dash, and empty columns are left out."""
    listed = [list(cells) for cells in content]
    kept = [column for column in range(len(listed[0]) if listed else 0) if any(cells[column] for cells in listed)]
    head = "".join(f'<th scope="col">{escape(header[column])}</th>' for column in kept) if header else ""
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines += [f"<tr>{head}</tr>"] if head else []
    for cells in listed:
        alarm = ' class="alarm"' if any(cell.startswith("ALARM") for cell in cells) else ""
        lines.append(f"<tr{alarm}>" + "".join(f"<td>{escape(cells[column] or '–')}</td>" for column in kept) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _img(data: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _png(figure: Any, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _img(buffer.getvalue(), caption)


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 20 and 0.3 instead of 2·10¹ and 3·10⁻¹."""
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}" if axis.get_ylim()[1] < 10 * axis.get_ylim()[0] else "")


def _figure(height: int, width: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would select a backend and keep the figure open

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(height, width, squeeze=False)
