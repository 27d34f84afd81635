"""The model card (README.md) of an export: facts from the checkpoint, the run's folder and the written files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from selfvil.checkpoint import Checkpoint
from selfvil.exporting import exported_program, onnx, published, quantise
from selfvil.models.adapter import adapt
from selfvil.records import METRICS, SCORE_COLUMNS, RunRecord, read_metrics, read_record, read_scores
from selfvil.timm_folder import (
    FOLDER,
    MODES,
    card,
    describe,
    fact_lines,
    header,
    inline,
    licence_lines,
    view_lines,
)  # fmt: skip
from selfvil.weights import CONFIG, HEADS, WEIGHTS, Normalisation

TAGS = ["image-feature-extraction", "self-supervised-learning", "vision-lstm"]

Files = Mapping[str, Mapping[str, Any]]
"""File of a format -> its facts, as in config.json under "selfvil", "formats"."""


def run_card(
    backbone: nn.Module,
    saved: Checkpoint,
    network: str,
    normalisation: Normalisation,
    files: Files,
    *,
    run: Path | None,
    with_recipe: bool,
    with_heads: bool,
    licence: str | None,
) -> str:
    """The card of a pretrained backbone. run: the folder of its run, if the checkpoint is still in it."""
    meta = saved.meta
    name, method = meta["model"]["name"], meta["objective"]["name"]
    settings = {key: value for key, value in meta["objective"].items() if key != "name"}
    record = read_record(run) if run else RunRecord()
    scores = read_scores(run) if run else []
    data, epochs = meta["data"], meta["samples"] / max(1, meta["data"]["num_samples"])
    launch = record.launches[-1] if record.launches else {}
    head = meta.get("classifier")
    labels = "without labels" if head is None else f"with labels of {len(head['labels'])} classes"
    facts = {
        "Architecture": f"{name}, {published.size(backbone) / 1e6:.2f} M parameters, {inline(meta['model']['kwargs'])}",
        "Network": f"{network}, one of {', '.join(sorted(meta['networks']))}",
        "Objective": f"{method}, {inline(settings)}",
        "Images": f"{data['num_samples']:,} {labels}, `{data['pattern']}` (fingerprint {data['fingerprint']})",
        "Normalisation": describe(normalisation),
        "Budget": f"{saved.step:,} steps, {meta['samples']:,} images seen ({epochs:.3g} epochs), "
        f"{meta['seconds'] / 3600:.2f} hours",
        "Device": f"{launch.get('processes', '?')} x {launch['device']}" if "device" in launch else None,
        "Seed": meta["seed"],
        "Versions": ", ".join(f"{key} {value}" for key, value in launch.get("versions", {}).items()) or None,
        "Commit": launch.get("commit"),
    }
    load = [
        f'backbone = selfvil.load_backbone("{FOLDER}")  # verifies weights and config.json first',
        *view_lines(normalisation, "backbone"),
        "features = backbone.forward_features(view(image)[None])"
        if head is None
        else "name = backbone.pretrained_cfg['label_names'][backbone(view(image)[None]).argmax()]",
    ]
    own = {"recipe.yaml": "the whole recipe of the run"} if with_recipe else {}
    own |= {HEADS: "the rest of the objective, for `model.start_from`"} if with_heads else {}
    more = [
        *(["recipe.yaml holds the whole recipe.", ""] if with_recipe else []),
        *_metric_lines(run, record),
        *_score_lines(scores),
        *_file_lines({WEIGHTS: "weights, for timm and selfvil", CONFIG: "architecture and normalisation"} | own, files),
        *format_lines(files, normalisation),
        *_limit_lines(backbone, normalisation, scores, data["num_samples"]),
    ]
    photo = normalisation.channels in MODES
    if head is not None:
        intro = "A classifier: a backbone with a linear layer, trained on images with labels."
        tags = ["image-classification", "vision-lstm"]
        return card(f"{name}, trained with labels", tags, load, facts, intro, more, licence, photo)
    intro = "A backbone pretrained on images without labels. It has no classifier: use its features, or fine-tune it."
    return card(f"{name}, pretrained by {method}", TAGS, load, facts, intro, more, licence, photo)


def files_card(config: Mapping[str, Any], normalisation: Normalisation, files: Files, licence: str | None) -> str:
    """The card of a folder that holds only further formats of an existing export. config: that export's."""
    name, origin = config["architecture"], config["selfvil"]
    facts = {
        "Architecture": f"{name}, {inline(config['model_args'])}",
        "Network": origin.get("network"),
        "Weights": f"those of an export whose {WEIGHTS} has the SHA-256 {origin['sha256']}",
        "Images seen": f"{origin['samples_seen']:,}",
        "Normalisation": describe(normalisation),
    }
    lines = [
        *header("onnx" if onnx.FILE in files else "pytorch", TAGS, licence),
        f"# {name}, further formats",
        "",
        f"Formats of an exported network besides timm's. The export that has {WEIGHTS} has its full card.",
        "",
        "## How it was made",
        "",
        *fact_lines(facts),
        *_file_lines({CONFIG: "architecture and normalisation"}, files),
        *format_lines(files, normalisation),
        *licence_lines(licence),
    ]
    return "\n".join(lines)


# --- scores ----------------------------------------------------------------------------------------------------------


def _metric_lines(run: Path | None, record: RunRecord) -> list[str]:
    """The last values that the run itself recorded."""
    if run is None:
        return []
    last: dict[str, Any] = {}
    for entry in read_metrics(run / METRICS):
        if entry["kind"] in ("eval", "doctor"):
            last |= {key: value for key, value in entry.items() if isinstance(value, float)}
    if record.summary is not None and record.summary.loss is not None:
        last = {"loss": record.summary.loss} | last
    if not last:
        return []
    values = (f"- {key}: {value:.4g}" for key, value in last.items())
    return ["## Last metrics of the run", "", *values, ""]


def _score_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of the rows that `selfvil eval ... --json RUN/scores.json` wrote, or nothing."""
    if not rows:
        return []
    columns = [*SCORE_COLUMNS]
    for name, neighbour in (("measure", "value"), ("interval", "deviation")):
        if any(row.get(name) is not None for row in rows):
            columns.insert(columns.index(neighbour) + (name == "interval"), name)
    table = [columns, ["---"] * len(columns)]
    table += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return ["## Scores", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " to ".join(_cell(each) for each in value)
    return "" if value is None else str(value).replace("|", r"\|").replace("\n", " ")


# --- files -----------------------------------------------------------------------------------------------------------


def _file_lines(own: Mapping[str, str], files: Files) -> list[str]:
    kinds = {
        onnx.FILE: "ONNX, float32",
        quantise.FILE: "ONNX, linear maps in int8",
        exported_program.FILE: "torch.export",
        published.FILE: "weights under the names of NX-AI/vision-lstm",
    }
    entries = {**own, **{file: kinds[file] for file in files}, "manifest.json": "size and SHA-256 of every other file"}
    return ["## Files", "", *(f"- `{file}`: {what}" for file, what in entries.items()), ""]


def format_lines(files: Files, normalisation: Normalisation) -> list[str]:
    """What each further file holds, and code that runs it."""
    lines: list[str] = []
    if onnx.FILE in files:
        lines += [
            "## ONNX", "", *_graph_lines(files[onnx.FILE]),
            "```python", *_onnx_code(files[onnx.FILE], normalisation), "```", "",
        ]  # fmt: skip
    if quantise.FILE in files:
        lines += ["### int8", "", *_int8_lines(files[quantise.FILE])]
    if exported_program.FILE in files:
        facts = files[exported_program.FILE]
        height, width = facts["img_size"]
        lines += [
            "## torch.export", "", *_graph_lines(facts),
            "torch unpickles parts of a .pt2 file when it loads it: a file which somebody changed can run code.",
            "Load it only if you trust where it comes from. model.safetensors and the ONNX file cannot run code.",
            "",
            "```python",
            "import torch",
            f'folder = "{FOLDER}"',
            f'network = torch.export.load(f"{{folder}}/{exported_program.FILE}").module()',
            f"images = torch.randn(1, {normalisation.channels}, {height}, {width})  # normalised as above",
            f"{', '.join(facts['outputs'])}{',' if len(facts['outputs']) == 1 else ''} = network(images)",
            "```",
            "",
        ]  # fmt: skip
    if published.FILE in files:
        facts = files[published.FILE]
        found = published.Published(facts["constructor"], facts["arguments"], facts["without_head"])
        lines += [
            "## The published code", "", "For the code of NX-AI/vision-lstm, which loads it without unpickling:", "",
            "```python", *published.code(found, FOLDER), "```", "",
        ]  # fmt: skip
    return lines


def _graph_lines(facts: Mapping[str, Any]) -> list[str]:
    height, width = facts["img_size"]
    sizes = f"{height} x {width} pixels only"
    if multiple := facts["img_size_multiple"]:
        rows, columns = multiple
        sizes = f"any height that is a multiple of {rows} and any width of {columns}, from {2 * rows} x {2 * columns} "
        sizes += "(onnxruntime crops other sizes to these at the right and the bottom)"
    meaning = {
        "pooled": "pooled features (batch, D), as `network(images)` without a classifier",
        "patches": "the map of patch features after the final norm (batch, C, rows, columns)",
        "logits": "class scores (batch, classes)",
    }
    note = [f"- Note: {facts['note']}."] if facts.get("note") else []
    return [
        f"- Input `{facts['input']}`: float32 (batch, {len(facts['mean'])}, height, width), normalised; any batch; "
        f"{sizes}",
        *(f"- Output `{name}`: {meaning[name]}" for name in facts["outputs"]),
        f"- Largest difference from torch: {facts['largest_difference']:.1e}",
        *note,
        "",
    ]


def _onnx_code(facts: Mapping[str, Any], shown: Normalisation) -> list[str]:
    height, width = shown.img_size
    shape = "pixels.transpose(2, 0, 1)[None]" if shown.channels > 1 else "pixels[None, None]"
    mean, std = ([round(v, 6) for v in values] for values in (shown.mean, shown.std))
    outputs = ", ".join(facts["outputs"]) + ("," if len(facts["outputs"]) == 1 else "")
    if shown.channels in MODES:
        pixels = [
            f'image = Image.open("photo.jpg").convert("{MODES[shown.channels]}").resize(({width}, {height}), '
            "Image.BICUBIC)",
            f"pixels = (np.asarray(image, np.float32) / 255 - np.float32({mean})) / np.float32({std})",
        ]
    else:
        pixels = [
            f'values = np.load("tile.npy")  # ({height}, {width}, {shown.channels}); uint8 / 255, uint16 / 65535',
            f"pixels = (np.float32(values) - np.float32({mean})) / np.float32({std})",
        ]
    return [
        "import numpy as np, onnxruntime",
        *(["from PIL import Image"] if shown.channels in MODES else []),
        f'folder = "{FOLDER}"',
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{onnx.FILE}")',
        *pixels,
        f'{outputs} = session.run(None, {{"{facts["input"]}": {shape}}})',
    ]


def _int8_lines(facts: Mapping[str, Any]) -> list[str]:
    smaller = facts["bytes_of_float32"] / facts["bytes"]
    lines = [
        f"`{quantise.FILE}` has the same input and outputs, and is {smaller:.1f} times smaller: "
        f"{facts['bytes'] / 1e6:.1f} MB. Its features are less exact:",
        "",
        f"- Cosine similarity of its pooled features with those of float32, on {facts['images']} images: mean "
        f"{facts['cosine_mean']:.4f}, lowest {facts['cosine_lowest']:.4f}",
    ]
    if knn := facts.get("knn"):
        lines.append(
            f"- k-NN accuracy (k = {knn['k']}, {knn['train_images']:,} train, {knn['test_images']:,} test images): "
            f"{knn['int8']:.2f} %, float32 {knn['float32']:.2f} %"
        )
    return [*lines, ""]


# --- use and limits --------------------------------------------------------------------------------------------------


def _limit_lines(
    backbone: nn.Module, shown: Normalisation, scores: Sequence[Mapping[str, Any]], num_images: int
) -> list[str]:
    height, width = shown.img_size
    other = (
        "Images of other sizes" if adapt(backbone).supports_any_img_size else "Other image sizes need another network"
    )
    sizes = f"Pretrained at {height} x {width} pixels. {other}"
    sizes += ", whose features are not evaluated." if adapt(backbone).supports_any_img_size else "."
    measured = sorted({str(row.get("protocol")) for row in scores if row.get("protocol")})
    evaluated = f"Evaluated by {', '.join(measured)} only." if measured else "No evaluation of it is recorded."
    return [
        "## Intended use and limits",
        "",
        "- For features of images: nearest neighbours, linear classifiers, fine-tuning, dense tasks.",
        f"- {sizes}",
        f"- Pretrained on {num_images:,} images whose domain this card does not know. On images of another domain, its "
        "features may be worse than those of a general backbone: compare before use.",
        f"- {evaluated}",
        "- Not evaluated for bias, for robustness to corrupted images, or for decisions about people or safety.",
        "- It repeats the biases of its images.",
        "",
    ]
