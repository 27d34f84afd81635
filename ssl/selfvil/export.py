"""Write the trained backbone of a run as a folder that timm loads (`selfvil.timm_folder`).

It has a classifier, with the names of its classes, if the objective of the run is supervised.

Besides the files of every such folder, it has:

    recipe.yaml               the run's recipe, if the run's folder is present
    heads/heads.safetensors   with --heads: the rest of the objective, for model.start_from
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from selfvil.checkpoint import Checkpoint, save_tensors
from selfvil.errors import UserError
from selfvil.manifest import sha256
from selfvil.records import RECIPE, SCORE_COLUMNS, read_record, read_scores
from selfvil.run import read_recipe
from selfvil.timm_folder import atomic_folder, card, describe, inline, require_new_folder, write_network
from selfvil.weights import HEADS, Normalisation, choose_network, load_network, open_checkpoint

log = logging.getLogger(__name__)


def export(run: str | Path, out: str | Path, *, network: str | None = None, heads: bool = False) -> Path:
    """Write the trained backbone of `run` to the new folder `out`, and return it.

    run: the folder of a run, whose newest valid checkpoint is taken, or of one checkpoint. network: "student",
    "teacher" ... of an objective that has several; None takes its default. heads: also write all other tensors of the
    objective.

    The folder is written under a temporary name and renamed. Raises UserError if `out` exists and is not empty, or
    cannot be written, and as `open_checkpoint` and `load_network` do.
    """
    out = require_new_folder(out)
    saved = open_checkpoint(run)
    backbone, normalisation, samples_seen = load_network(saved, network)
    network, prefix = choose_network(saved, network)
    arguments, head = dict(saved.meta["model"]["kwargs"]), saved.meta.get("classifier")
    origin: dict[str, Any] = {"network": network, "prefix": prefix, "samples_seen": samples_seen}
    if head is not None:
        arguments["global_pool"] = head["global_pool"]
        origin["labels"] = head["labels"]
    with atomic_folder(out) as partial:
        if heads:
            rest = {name: t for name, t in saved.tensors("objective").items() if not name.startswith(prefix)}
            (partial / HEADS).parent.mkdir()  # in the same folder, timm 1.0.20 would load this file as the weights
            save_tensors(rest, partial / HEADS)
            origin["heads_sha256"] = sha256(partial / HEADS)
        run_folder = _run_folder(saved)
        recipe = None if run_folder is None else _recipe_text(run_folder)
        if recipe is not None:
            (partial / RECIPE).write_text(recipe, encoding="utf-8")
        text = model_card(backbone, saved, network, normalisation, with_recipe=recipe is not None)
        names = () if head is None else head["names"]
        write_network(partial, backbone, arguments, normalisation, origin, text, names)
    return out


def _recipe_text(run: Path) -> str | None:
    """The recipe of a run as YAML; None, with a warning, if it is damaged and no checkpoint has it."""
    try:
        return read_recipe(run).to_yaml()
    except UserError as error:
        log.warning("the export has no recipe.yaml: %s", error)
        return None


# --- the model card --------------------------------------------------------------------------------------------------


def model_card(
    backbone: nn.Module, saved: Checkpoint, network: str, normalisation: Normalisation, with_recipe: bool
) -> str:
    """The Markdown card of a pretrained backbone, with facts from the checkpoint and its run's folder."""
    meta = saved.meta
    name, objective = meta["model"]["name"], dict(meta["objective"])
    method = objective.pop("name")
    folder = _run_folder(saved)
    launches = read_record(folder).launches if folder else []
    launch = launches[-1] if launches else {}
    data = meta["data"]
    size = sum(parameter.numel() for parameter in backbone.parameters())
    facts = {
        "Architecture": f"{name}, {size / 1e6:.2f} M parameters, {inline(meta['model']['kwargs'])}",
        "Network": f"{network}, one of {', '.join(sorted(meta['networks']))}",
        "Objective": f"{method}, {inline(objective)}",
        "Images": f"{data['num_samples']:,} {_labels(meta)}, `{data['pattern']}` (fingerprint {data['fingerprint']})",
        "Normalisation": describe(normalisation),
        "Budget": f"{saved.step:,} steps, {meta['samples']:,} images seen, {meta['seconds'] / 3600:.2f} hours",
        "Device": f"{launch.get('processes', '?')} x {launch['device']}" if "device" in launch else None,
        "Seed": meta["seed"],
        "Versions": ", ".join(f"{key} {value}" for key, value in launch.get("versions", {}).items()) or None,
        "Commit": launch.get("commit"),
    }
    load = [
        'backbone = selfvil.load_backbone("PATH_OF_THIS_FOLDER")  # verifies weights and config.json first',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))",
        "features = backbone.forward_features(view(image)[None])",
    ]
    more = ["recipe.yaml holds the whole recipe.", ""] if with_recipe else []
    more += _score_lines(read_scores(folder) if folder else [])
    if meta.get("classifier") is not None:
        load[2:] = ["name = backbone.pretrained_cfg['label_names'][backbone(view(image)[None]).argmax()]"]
        return card(
            f"{name}, trained with labels", ["image-classification", "vision-lstm"], load, facts,
            "A classifier: a backbone with a linear layer, trained on images with labels.", more,
        )  # fmt: skip
    intro = "A backbone pretrained on images without labels. It has no classifier: use its features, or fine-tune it."
    return card(
        f"{name}, pretrained by {method}", ["image-feature-extraction", "self-supervised-learning", "vision-lstm"],
        load, facts, intro, more,
    )  # fmt: skip


def _labels(meta: Mapping[str, Any]) -> str:
    head = meta.get("classifier")
    return "without labels" if head is None else f"with labels of {len(head['labels'])} classes"


def _score_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of the rows that `selfvil eval ... --json RUN/scores.json` wrote, or nothing."""
    if not rows:
        return []
    table = [SCORE_COLUMNS, ["---"] * len(SCORE_COLUMNS)]
    table += [[str(row.get(column, "")) for column in SCORE_COLUMNS] for row in rows]
    return ["## Scores", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]


def _run_folder(saved: Checkpoint) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if the checkpoint was moved out of it."""
    folder = saved.folder.resolve().parent.parent
    return folder if (folder / RECIPE).is_file() else None
