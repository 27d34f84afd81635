"""Folders of fine-tuning: the network that it begins with, and the one with a classifier that it ends with."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfvil.data.base import Images
from selfvil.data.classes import class_names
from selfvil.errors import UserError
from selfvil.evaluate.task import Task
from selfvil.files import write_text
from selfvil.manifest import renew_entry
from selfvil.models.adapter import CLASSIFIERS
from selfvil.timm_folder import atomic_folder, card, describe, inline, require_new_folder, write_network
from selfvil.weights import CONFIG, Network, load_export, model_arguments

_NOT_SCORED = "not scored yet"


def write_start(folder: Path, task: Task) -> None:
    """Write the task's network, without a classifier, as the export that its fine-tuning begins with.

    A folder that exists, of an interrupted fine-tuning, is kept. Raises UserError if it holds other weights, or cannot
    be written.
    """
    network = task.create()
    backbone: Any = network.backbone
    backbone.reset_classifier(0)
    if (folder / CONFIG).exists():
        weights, before = backbone.state_dict(), load_export(folder, num_classes=0).backbone.state_dict()
        if weights.keys() != before.keys() or any(not torch.equal(weights[name], before[name]) for name in weights):
            raise UserError(
                f"run = {folder.parent} holds the fine-tuning of another network than {task.source}: choose a new "
                "folder"
            )
        return
    arguments = model_arguments(task.source)
    text = card(f"What {folder.parent.name} was fine-tuned from", [], [], {"Source": f"`{task.source}`"})
    require_new_folder(folder)
    with atomic_folder(folder) as partial:
        origin = {"network": task.name, "samples_seen": network.samples_seen}
        write_network(partial, backbone, arguments, network.normalisation, origin, text)


def export_classifier(
    network: Network,
    labels: Sequence[int],
    out: Path,
    start: Path,
    task: Task,
    readout: str,
    settings: Mapping[str, Any],
) -> Path:
    """Write a fine-tuned network to the new folder `out`, for `timm.create_model("local-dir:OUT", pretrained=True)`.

    Its config.json has the names of the classes in the order of the outputs (`label_names`): those of the training
    shards' classes.txt, or the labels as text.

    labels: of its outputs. start: the folder of `write_start`. readout: that of its head. settings: of the fine-tuning.
    Raises UserError if `out` cannot be written.
    """
    model: Any = network.backbone
    arguments = model_arguments(start) | {"global_pool": CLASSIFIERS[readout]}
    if hasattr(model, "set_input_size"):
        arguments["img_size"] = list(network.normalisation.img_size)
    if settings.get("stride") is not None:
        arguments["stride"] = settings["stride"]
    given = class_names(task.train)
    names = given.names if given else []
    label_names = [names[label] if label < len(names) else str(label) for label in labels]
    before = task.network.samples_seen if task.network is not None else 0
    origin = {
        "network": "fine-tuned",
        "samples_seen": before,
        "labels": list(labels),
        "fine_tuning": {"source": str(task.source), "readout": readout, "labels": list(labels), **settings},
    }
    architecture = model.pretrained_cfg["architecture"]
    size = sum(math.prod(parameter.shape) for parameter in model.parameters())
    facts = {
        "Architecture": f"{architecture}, {size / 1e6:.2f} M parameters, a linear head on {readout}",
        "Fine-tuned from": f"`{task.source}`",
        "Images": f"{len(task.train):,} with labels of {len(label_names)} classes",
        "Accuracy": _NOT_SCORED,
        "Normalisation": describe(network.normalisation),
        "Settings": inline(settings),
    }
    load = [
        'model = selfvil.load_backbone("PATH_OF_THIS_FOLDER")  # with its classifier; verifies the files first',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "name = model.pretrained_cfg['label_names'][model(view(image)[None]).argmax()]",
    ]
    text = card(f"{architecture}, fine-tuned", ["image-classification", "vision-lstm"], load, facts)
    out = require_new_folder(out)
    with atomic_folder(out) as partial:
        write_network(partial, model, arguments, network.normalisation, origin, text, label_names)
    return out


def add_score(out: Path, accuracy: float, test: Images) -> None:
    """Write the top-1 accuracy in percent on `test` into the model card in `out`."""
    path = out / "README.md"
    score = f"{accuracy:.2f} % top-1 on {len(test):,} test images"
    write_text(path, path.read_text(encoding="utf-8").replace(_NOT_SCORED, score))
    renew_entry(out, path.name)
