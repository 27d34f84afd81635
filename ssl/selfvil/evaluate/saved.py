"""A fine-tuned network as a folder that timm loads with its classifier and the names of its classes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from selfvil.data.classes import class_names
from selfvil.data.index import Shards
from selfvil.evaluate.classifier import HEADS, Classifier
from selfvil.export import need_new_folder, write_network, written_aside
from selfvil.files import write_text
from selfvil.manifest import renew_entry
from selfvil.version import __version__
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

    source: what was fine-tuned; network: its backbone, now with a classifier. train: the images it learned from.
    settings: of the fine-tuning. Raises UserError if `out` cannot be written.
    """
    model: Any = classifier.model
    arguments = model_arguments(source) | {"global_pool": HEADS[readout]}
    if hasattr(model, "set_input_size"):
        arguments["img_size"] = list(classifier.look.img_size)
    given = class_names(train)
    names = given.names if given else []
    labels = classifier.classes.tolist()
    label_names = [names[label] if label < len(names) else str(label) for label in labels]
    ours = {
        "network": "fine-tuned",
        "samples_seen": network.samples_seen,
        "fine_tuning": {"source": str(source), "readout": readout, "labels": labels, **settings},
    }
    out = need_new_folder(out)
    with written_aside(out) as aside:
        card = _card(classifier, source, readout, train, settings, label_names)
        write_network(aside, model, arguments, classifier.look, ours, card, label_names)
    return out


def add_score(out: Path, accuracy: float, test: Shards) -> None:
    """Enter a top-1 accuracy in percent on `test` into the model card in `out`."""
    card = out / "README.md"
    score = f"{accuracy:.2f} % top-1 on {len(test):,} test images"
    write_text(card, card.read_text(encoding="utf-8").replace(_NOT_SCORED, score))
    renew_entry(out, card.name)


def _card(
    classifier: Classifier,
    source: str | Path,
    readout: str,
    train: Shards,
    settings: Mapping[str, Any],
    label_names: list[str],
) -> str:
    architecture = classifier.model.pretrained_cfg["architecture"]  # type: ignore[index]  # timm's
    height, width = classifier.look.img_size
    size = sum(math.prod(parameter.shape) for parameter in classifier.model.parameters())
    facts = {
        "Architecture": f"{architecture}, {size / 1e6:.2f} M parameters, a linear head on {readout}",
        "Fine-tuned from": f"`{source}`",
        "Images": f"{len(train):,} with labels of {len(label_names)} classes",
        "Accuracy": _NOT_SCORED,
        "Normalisation": f"pixels in 0..1, mean {list(classifier.look.mean)}, std {list(classifier.look.std)}, "
        f"{height} x {width} pixels",
        "Settings": ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items()),
        "Made by": f"selfvil {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, vision-lstm]",
        "---",
        "",
        f"# {architecture}, fine-tuned",
        "",
        "## Load it",
        "",
        "```python",
        "import selfvil, timm  # importing selfvil registers the vil_* models",
        'model = selfvil.load_backbone("PATH_OF_THIS_FOLDER")  # with its head; verifies the files first',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "name = model.pretrained_cfg['label_names'][model(view(image)[None]).argmax()]",
        "```",
        "",
        'timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True) loads it without that verification.',
        "",
        "## How it came about",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        "## Licence",
        "",
        "Left to whoever publishes these weights; mind the terms of the images.",
        "",
    ]
    return "\n".join(lines)
