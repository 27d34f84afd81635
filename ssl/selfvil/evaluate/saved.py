"""Write a fine-tuned network as a folder that timm loads with its classifier and the names of its classes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfvil.data.classes import class_names
from selfvil.data.index import Shards
from selfvil.evaluate.classifier import HEADS, Classifier
from selfvil.files import write_text
from selfvil.manifest import renew_entry
from selfvil.timm_folder import atomic_folder, card, describe, inline, require_new_folder, write_network
from selfvil.weights import Network, model_arguments

_NOT_SCORED = "not scored yet"


def export_classifier(
    classifier: Classifier,
    out: str | Path,
    *,
    source: str | Path,
    network: Network,
    readout: str,
    train: Shards,
    settings: Mapping[str, Any],
) -> Path:
    """Write a fine-tuned network to the new folder `out`, for `timm.create_model("local-dir:OUT", pretrained=True)`.

    Its config.json has the names of the classes in the order of the outputs (`label_names`): those of the training
    shards' classes.txt, or the labels as text.

    source: what was fine-tuned. network: its backbone, now with a classifier. train: the training images. settings: of
    the fine-tuning. Raises UserError if `out` cannot be written.
    """
    model: Any = classifier.model
    arguments = model_arguments(source) | {"global_pool": HEADS[readout]}
    if hasattr(model, "set_input_size"):
        arguments["img_size"] = list(classifier.normalisation.img_size)
    given = class_names(train)
    names = given.names if given else []
    labels = classifier.classes.tolist()
    label_names = [names[label] if label < len(names) else str(label) for label in labels]
    origin = {
        "network": "fine-tuned",
        "samples_seen": network.samples_seen,
        "fine_tuning": {"source": str(source), "readout": readout, "labels": labels, **settings},
    }
    architecture = model.pretrained_cfg["architecture"]
    size = sum(math.prod(parameter.shape) for parameter in model.parameters())
    facts = {
        "Architecture": f"{architecture}, {size / 1e6:.2f} M parameters, a linear head on {readout}",
        "Fine-tuned from": f"`{source}`",
        "Images": f"{len(train):,} with labels of {len(label_names)} classes",
        "Accuracy": _NOT_SCORED,
        "Normalisation": describe(classifier.normalisation),
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
        write_network(partial, model, arguments, classifier.normalisation, origin, text, label_names)
    return out


def add_score(out: Path, accuracy: float, test: Shards) -> None:
    """Write the top-1 accuracy in percent on `test` into the model card in `out`."""
    path = out / "README.md"
    score = f"{accuracy:.2f} % top-1 on {len(test):,} test images"
    write_text(path, path.read_text(encoding="utf-8").replace(_NOT_SCORED, score))
    renew_entry(out, path.name)
