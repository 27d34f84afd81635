"""From a run to a backbone that others can load: `selfvil.load_backbone(OUT)`, or timm alone.

OUT/
    model.safetensors         the backbone, without a classifier
    config.json               what timm reads: architecture, arguments, normalisation
    manifest.json             size and SHA-256 of every other file, which timm does not look at
    README.md                 model card: what it is, how it came about, how to load it
    recipe.yaml               the run's recipe, where the run's folder is at hand
    heads/heads.safetensors   when asked for: the rest of the objective, to continue from
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from selfvil.checkpoint import Checkpoint, save_tensors
from selfvil.errors import UserError
from selfvil.manifest import sha256, write_manifest
from selfvil.models import VisionLSTM
from selfvil.run import read_recipe, read_record
from selfvil.version import __version__
from selfvil.weights import (
    CONFIG,
    HEADS,
    WEIGHTS,
    Normalisation,
    choose_network,
    load_export,
    load_network,
    open_checkpoint,
)

FORMAT = 2
"""2: a manifest covers all files. 1: config.json holds the digest of the weights, and nothing that of config.json."""
_SCORE_COLUMNS = ["network", "protocol", "value", "deviation", "readout", "train_images", "test_images"]

log = logging.getLogger(__name__)


def export(run: str | Path, out: str | Path, *, network: str | None = None, heads: bool = False) -> Path:
    """Write the pretrained backbone of `run` to the new folder `out`, and return it.

    run: a run folder (its newest valid checkpoint is taken) or one checkpoint folder. network: which one, where the
    objective has several; None takes the run's choice. heads: also write everything else of the objective.

    Written aside and renamed. Raises UserError if `out` is not empty, or as `open_checkpoint` and `load_network`.
    """
    out = need_new_folder(out)
    saved = open_checkpoint(run)
    backbone, normalisation, samples_seen = load_network(saved, network)
    network, prefix = choose_network(saved, network)
    arguments = saved.meta["model"]["kwargs"]
    ours: dict[str, Any] = {"network": network, "prefix": prefix, "samples_seen": samples_seen}
    with written_aside(out) as aside:
        if heads:
            rest = {name: t for name, t in saved.tensors("objective").items() if not name.startswith(prefix)}
            (aside / HEADS).parent.mkdir()  # beside the backbone, timm 1.0.20 would take this file for the weights
            save_tensors(rest, aside / HEADS)
            ours["heads_sha256"] = sha256(aside / HEADS)
        folder = _run_folder(saved)
        recipe = None if folder is None else _recipe_text(folder)
        if recipe is not None:
            (aside / "recipe.yaml").write_text(recipe, encoding="utf-8")
        card = model_card(backbone, saved, network, normalisation, with_recipe=recipe is not None)
        write_network(aside, backbone, arguments, normalisation, ours, card)
    return out


def _recipe_text(run: Path) -> str | None:
    """The recipe of a run as YAML; None, with a warning, where it is damaged and no checkpoint holds it."""
    try:
        return read_recipe(run).to_yaml()
    except UserError as error:
        log.warning("the export has no recipe.yaml: %s", error)
        return None


def need_new_folder(out: str | Path) -> Path:
    """The absolute path of a folder that is new or empty. Raises UserError if it is not, or cannot be made."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: choose a new one, nothing was overwritten.")
    try:
        aside = _aside(out)
        aside.mkdir(parents=True)
        aside.rmdir()
    except OSError as error:
        raise UserError(f"Could not write the export {out}: {error}") from error
    return out


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` if nothing fails. Raises UserError for an OSError."""
    aside = _aside(out)
    try:
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"Could not write the export {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial-{os.getpid()}")


def write_network(
    folder: Path,
    backbone: nn.Module,
    arguments: Mapping[str, Any],
    normalisation: Normalisation,
    ours: Mapping[str, Any],
    card: str,
    label_names: Sequence[str] = (),
) -> None:
    """Write weights, config.json, model card and a manifest of all that `folder` holds; load it once to verify it.

    arguments: of `timm.create_model`, as the backbone was made. ours: what config.json says about its origin.
    label_names: of the outputs of its classifier, if it has one.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_tensors(weights, folder / WEIGHTS)
    origin: dict[str, Any] = {"format": FORMAT, "version": __version__, "sha256": sha256(folder / WEIGHTS)}
    config = _timm_config(backbone, arguments, normalisation, label_names) | {"selfvil": origin | dict(ours)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(folder)
    loaded = load_export(folder).backbone.state_dict()
    if different := [name for name in weights if name not in loaded or not torch.equal(weights[name], loaded[name])]:
        raise UserError(f"The export would load other weights than were written, such as {different[0]}.")


def _timm_config(
    backbone: Any, arguments: Mapping[str, Any], normalisation: Normalisation, label_names: Sequence[str]
) -> dict[str, Any]:
    """What timm's "local-dir:" reads: how to build the model, and how its images were presented."""
    arguments = dict(arguments)
    if isinstance(backbone, (VisionLSTM, VisionTransformer)):
        # The default depends on the pooling, and a network of ours may have been given another one.
        arguments["fc_norm"] = not isinstance(backbone.fc_norm, nn.Identity)
    known, classes = backbone.pretrained_cfg, len(label_names)
    return {
        "architecture": known["architecture"],
        "num_classes": classes,
        "num_features": backbone.num_features,
        "model_args": arguments | {"num_classes": classes},
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [normalisation.channels, *normalisation.img_size],
            "fixed_input_size": known.get("fixed_input_size", False),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    } | ({"label_names": list(label_names)} if classes else {})


# --- the model card --------------------------------------------------------------------------------------------------


def model_card(
    backbone: nn.Module, saved: Checkpoint, network: str, normalisation: Normalisation, with_recipe: bool
) -> str:
    """Markdown: what the backbone is, where it comes from and how to load it, as far as the run tells."""
    meta = saved.meta
    name, objective = meta["model"]["name"], dict(meta["objective"])
    method = objective.pop("name")
    folder = _run_folder(saved)
    launches = read_record(folder).launches if folder else []
    launch = launches[-1] if launches else {}
    data = meta["data"]
    size = sum(parameter.numel() for parameter in backbone.parameters())
    facts = {
        "Architecture": f"{name}, {size / 1e6:.2f} M parameters, {_inline(meta['model']['kwargs'])}",
        "Network": f"{network}, one of {', '.join(sorted(meta['networks']))}",
        "Objective": f"{method}, {_inline(objective)}",
        "Images": f"{data['num_samples']:,} without labels, `{data['pattern']}` (fingerprint {data['fingerprint']})",
        "Normalisation": f"pixels in 0..1, mean {list(normalisation.mean)}, std {list(normalisation.std)}, "
        f"{normalisation.img_size[0]} x {normalisation.img_size[1]} pixels",
        "Budget": f"{saved.step:,} steps, {meta['samples']:,} images seen, {meta['seconds'] / 3600:.2f} hours",
        "Device": f"{launch.get('processes', '?')} x {launch['device']}" if "device" in launch else None,
        "Seed": meta["seed"],
        "Versions": ", ".join(f"{key} {value}" for key, value in launch.get("versions", {}).items()) or None,
        "Commit": launch.get("commit"),
        "Exported by": f"selfvil {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, self-supervised-learning, vision-lstm]",
        "---",
        "",
        f"# {name}, pretrained by {method}",
        "",
        "A backbone pretrained on images without labels. It has no classifier: use its features, or fine-tune it.",
        "",
        "## Load it",
        "",
        "```python",
        "import selfvil, timm  # importing selfvil registers the vil_* models",
        'backbone = selfvil.load_backbone("PATH_OF_THIS_FOLDER")  # verifies weights and config.json first',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))",
        "features = backbone.forward_features(view(image)[None])",
        "```",
        "",
        "With timm alone, without that verification:",
        "",
        "```python",
        "import selfvil, timm",
        'backbone = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
        "```",
        "",
        "timm does not compare files with manifest.json: it loads most weights that a copy or a disk has damaged,",
        "without an error. `selfvil verify PATH_OF_THIS_FOLDER` compares every file.",
        "",
        "## How it came about",
        "",
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        "",
        "recipe.yaml holds the whole recipe." if with_recipe else "",
        "",
        *_score_lines(_read_json(folder / "scores.json", list) if folder else []),
        "## Licence",
        "",
        "Left to whoever publishes these weights; mind the terms of the images.",
        "",
    ]
    return "\n".join(lines)


def _score_lines(scores: list[Any]) -> list[str]:
    """A Markdown table of the rows that `selfvil eval ... --json RUN/scores.json` wrote, or nothing."""
    rows = [row for row in scores if isinstance(row, dict)]
    if not rows:
        return []
    table = [_SCORE_COLUMNS, ["---"] * len(_SCORE_COLUMNS)]
    table += [[str(row.get(column, "")) for column in _SCORE_COLUMNS] for row in rows]
    return ["## Scores", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]


def _inline(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items()) or "defaults"


def _run_folder(saved: Checkpoint) -> Path | None:
    """The folder of the run a checkpoint lies in, if it still lies there."""
    folder = saved.folder.resolve().parent.parent
    return folder if (folder / "recipe.yaml").is_file() else None


def _read_json(path: Path, kind: type) -> Any:
    """A side file that only informs: absent or unreadable, it is as if it were empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()
