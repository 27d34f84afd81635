"""A folder that `selfvil.load_backbone` and timm load: weights, the architecture, and a model card.

    FOLDER/
        model.safetensors         the weights
        config.json               for timm: architecture, arguments, normalisation
        manifest.json             size and SHA-256 of every other file; timm does not read it
        README.md                 model card: what the network is, how it was trained, how to load it

`selfvil.export` writes one of a pretrained backbone, and fine-tuning one of a classifier; `selfvil.weights` reads both.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from selfvil.checkpoint import save_tensors
from selfvil.errors import UserError
from selfvil.manifest import sha256, write_manifest
from selfvil.models.adapter import adapt
from selfvil.version import __version__
from selfvil.weights import CONFIG, WEIGHTS, Normalisation, load_export

FORMAT = 2
"""2: a manifest covers all files. 1: config.json has the digest of the weights; config.json itself has none."""


def require_new_folder(out: str | Path) -> Path:
    """The absolute path of `out`. Raises UserError unless it is a new or empty folder that can be written."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: choose a new one, nothing was overwritten.")
    try:
        partial = _partial(out)
        partial.mkdir(parents=True)
        partial.rmdir()
    except OSError as error:
        raise UserError(f"Could not write the export {out}: {error}") from error
    return out


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to write into; it is renamed to `out` if nothing fails. Raises UserError for an OSError."""
    partial = _partial(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"Could not write the export {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial-{os.getpid()}")


def write_network(
    folder: Path,
    backbone: nn.Module,
    arguments: Mapping[str, Any],
    normalisation: Normalisation,
    origin: Mapping[str, Any],
    card: str,
    label_names: Sequence[str] = (),
) -> None:
    """Write weights, config.json, model card and a manifest of all files in `folder`; then verify that it loads.

    arguments: of `timm.create_model`, as the backbone was built. origin: entries of config.json under "selfvil".
    label_names: names of the classifier's outputs, if it has one. Raises UserError if other weights would be loaded.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_tensors(weights, folder / WEIGHTS)
    written: dict[str, Any] = {"format": FORMAT, "version": __version__, "sha256": sha256(folder / WEIGHTS)}
    config = _timm_config(backbone, arguments, normalisation, label_names) | {"selfvil": written | dict(origin)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(folder)
    loaded = load_export(folder).backbone.state_dict()
    if different := [name for name in weights if name not in loaded or not torch.equal(weights[name], loaded[name])]:
        raise UserError(f"The export would load other weights than were written, such as {different[0]}.")


def _timm_config(
    backbone: Any, arguments: Mapping[str, Any], normalisation: Normalisation, label_names: Sequence[str]
) -> dict[str, Any]:
    """The config.json that timm's "local-dir:" reads: how to build the model, and how its images were prepared."""
    arguments = dict(arguments) | adapt(backbone).extra_arguments()
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


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Of images of Pillow, by their channels."""

# --- the model card --------------------------------------------------------------------------------------------------

FOLDER = "PATH_OF_THIS_FOLDER"
"""In the code of a card, where the folder is; `selfvil push` replaces it."""


def card(
    title: str,
    tags: Sequence[str],
    load: Sequence[str],
    facts: Mapping[str, Any],
    intro: str = "",
    more: Sequence[str] = (),
    licence: str | None = None,
    photo: bool = True,
) -> str:
    """A model card in Markdown.

    load: lines of Python that load the network and apply it to the image `image`. facts: how the network was trained;
    entries that are None are left out. more: lines after the facts. licence: an identifier of the Hugging Face hub,
    such as apache-2.0. photo: `image` is a photograph; else `load` makes it.
    """
    lines = [
        *header("timm", tags, licence),
        f"# {title}",
        "",
        *([intro, ""] if intro else []),
        "## Load it",
        "",
        "```python",
        "import selfvil, timm  # importing selfvil registers the vil_* models",
        *(["from PIL import Image"] if photo else []),
        *(['image = Image.open("photo.jpg")'] if photo else []),
        *load,
        "```",
        "",
        "With timm alone, without verification:",
        "",
        "```python",
        "import selfvil, timm",
        f'network = timm.create_model("local-dir:{FOLDER}", pretrained=True).eval()',
        "```",
        "",
        "timm does not compare files with manifest.json: it loads most weights that a copy or a disk has damaged,",
        f"without an error. `selfvil verify {FOLDER}` compares every file.",
        "",
        "## How it was made",
        "",
        *fact_lines(facts),
        *more,
        *licence_lines(licence),
    ]
    return "\n".join(lines)


def header(library: str, tags: Sequence[str], licence: str | None) -> list[str]:
    """The metadata at the top of a card, which the Hugging Face hub reads."""
    license = [] if licence is None else [f"license: {licence}"]
    return ["---", f"library_name: {library}", *license, f"tags: [{', '.join(tags)}]", "---", ""]


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """A list of facts without those that are None, and the versions of this package, torch and timm."""
    facts = {**facts, "Written by": f"selfvil {__version__}, torch {torch.__version__}, timm {timm.__version__}"}
    return [*(f"- {key}: {value}" for key, value in facts.items() if value is not None), ""]


def licence_lines(licence: str | None) -> list[str]:
    """The last section of a card."""
    left = "Left to whoever publishes these weights; respect the terms of the images."
    given = f"{licence}. The terms of the images that it was trained on may restrict its use further."
    return ["## Licence", "", left if licence is None else given, ""]


def view_lines(shown: Normalisation, network: str) -> list[str]:
    """Python that makes `view` and, unless `image` is an RGB photograph, `image`. network: the name of its variable."""
    if shown.channels in MODES:
        convert = [] if shown.channels == 3 else [f'image = image.convert("{MODES[shown.channels]}")']
        return [f"view = timm.data.create_transform(**timm.data.resolve_model_data_config({network}))", *convert]
    return [
        "from selfvil.data.arrays import decode_pixels",
        "from selfvil.data.views import CenterCrop",
        f"config = {network}.pretrained_cfg",
        'view = CenterCrop(config["input_size"][1:], config["mean"], config["std"])',
        f'image = decode_pixels(open("tile.tif", "rb").read(), {shown.channels})  # or .npy',
    ]


def describe(normalisation: Normalisation) -> str:
    """A normalisation in words, for a card."""
    height, width = normalisation.img_size
    mean, std = list(normalisation.mean), list(normalisation.std)
    scale = "pixels in 0..1" if min(mean) >= 0 and max(mean) <= 1 else "pixels in their own unit"
    return f"{scale}, mean {mean}, std {std}, {height} x {width} pixels"


def inline(settings: Mapping[str, Any]) -> str:
    """Settings on one line, for a card."""
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items()) or "defaults"
