"""`selfvil export`: write the trained backbone of a run as a folder that timm loads, and in further formats.

It has a classifier, with the names of its classes, if the objective of the run is supervised.

Besides the files of `selfvil.timm_folder`, the folder has:

    recipe.yaml               the run's recipe, if the run's folder is present
    heads/heads.safetensors   with --heads: the rest of the objective, for model.start_from
    model.onnx                with --onnx
    model.int8.onnx           with --int8
    model.pt2                 with --torch-export
    published/vision_lstm.safetensors   with --published

Of an existing export, only the further formats are written, with a card, config.json and manifest of their own.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfvil.checkpoint import Checkpoint, save_tensors
from selfvil.errors import UserError
from selfvil.exporting.card import files_card, run_card
from selfvil.exporting.formats import INT8, open_labelled, require_formats, require_possible, write_formats
from selfvil.manifest import sha256, write_manifest
from selfvil.records import RECIPE
from selfvil.run import read_recipe
from selfvil.timm_folder import atomic_folder, require_new_folder, write_network
from selfvil.weights import (
    CONFIG,
    HEADS,
    choose_network,
    is_export,
    load_export,
    load_network,
    open_checkpoint,
    verified_config,
)

log = logging.getLogger(__name__)

LICENCE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


def export(
    run: str | Path,
    out: str | Path,
    *,
    network: str | None = None,
    heads: bool = False,
    formats: Sequence[str] = (),
    images: str | None = None,
    train: str | None = None,
    test: str | None = None,
    workers: int = 2,
    licence: str | None = None,
) -> Path:
    """Write the trained backbone of `run` to the new folder `out`, and return it.

    Args:
        run: the folder of a run, whose newest valid checkpoint is taken, or of one checkpoint. Of an existing export,
            only the files of `formats` are written.
        network: "student", "teacher" ... of an objective that has several; None takes its default.
        heads: also write all other tensors of the objective.
        formats: further formats, of `selfvil.exporting.formats.FORMATS`; each file is compared with the network.
        images: shards on which int8 is compared with float32; None: those of `test`, or of pretraining.
        train, test: labelled shards, on which the k-NN accuracy of both is measured.
        workers: processes that decode images.
        licence: an identifier of the Hugging Face hub for the card, such as apache-2.0.

    The folder is written under a temporary name and renamed. Raises UserError if `out` exists and is not empty, or
    cannot be written, if a format cannot hold the network or returns other values, and as `open_checkpoint` and
    `load_network` do; nothing is left then.
    """
    out = require_new_folder(out)
    require_licence(licence)
    require_formats(formats)
    if INT8 not in formats and (images is not None or train is not None or test is not None):
        raise UserError("--images, --train and --test measure the cost of --int8: add --int8, or leave them out.")
    if is_export(Path(run)):
        return _export_again(Path(run), out, network, heads, formats, images, train, test, workers, licence)
    saved = open_checkpoint(run)
    backbone, normalisation, samples_seen = load_network(saved, network)
    network, prefix = choose_network(saved, network)
    backbone.eval().requires_grad_(False)
    require_possible(backbone, formats)
    labelled = open_labelled(images, train, test, saved.meta["data"]["pattern"]) if INT8 in formats else None
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
        files = write_formats(partial, backbone, normalisation, formats, labelled, workers)
        text = run_card(
            backbone, saved, network, normalisation, files,
            run=run_folder, with_recipe=recipe is not None, with_heads=heads, licence=licence,
        )  # fmt: skip
        extra = {"formats": files} if files else {}
        names = () if head is None else head["names"]
        write_network(partial, backbone, arguments, normalisation, origin | extra, text, names)
    return out


def _export_again(
    source: Path, out: Path, network: str | None, heads: bool, formats: Sequence[str],
    images: str | None, train: str | None, test: str | None, workers: int, licence: str | None,
) -> Path:  # fmt: skip
    """Write further formats of an existing export."""
    if network is not None or heads:
        raise UserError(f"{source} is an export: --network and --heads need the folder of its run.")
    if not formats:
        raise UserError(f"{source} is an export already: choose formats, such as --onnx, or give the folder of a run.")
    backbone, normalisation, _ = load_export(source)
    config = verified_config(source)
    backbone.eval().requires_grad_(False)
    require_possible(backbone, formats)
    labelled = open_labelled(images, train, test, None) if INT8 in formats else None
    with atomic_folder(out) as partial:
        files = write_formats(partial, backbone, normalisation, formats, labelled, workers)
        text = files_card(config, normalisation, files, licence)
        config = config | {"selfvil": config["selfvil"] | {"formats": files}}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(text, encoding="utf-8")
        write_manifest(partial)
    return out


def require_licence(licence: str | None) -> None:
    """Raise UserError for what cannot be an identifier of a licence."""
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(
            f"--licence {licence!r} is no identifier of the Hugging Face hub; expected one such as apache-2.0, mit, "
            "cc-by-4.0, cc-by-nc-4.0 or other."
        )


def _recipe_text(run: Path) -> str | None:
    """The recipe of a run as YAML; None, with a warning, if it is damaged and no checkpoint has it."""
    try:
        return read_recipe(run).to_yaml()
    except UserError as error:
        log.warning("the export has no recipe.yaml: %s", error)
        return None


def _run_folder(saved: Checkpoint) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if the checkpoint was moved out of it."""
    folder = saved.folder.resolve().parent.parent
    return folder if (folder / RECIPE).is_file() else None
