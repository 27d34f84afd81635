"""From a run to a backbone that others can load: `timm.create_model("local-dir:OUT", pretrained=True)`.

    OUT/
        model.safetensors         the backbone, without a classifier
        config.json               what timm reads: architecture, arguments, normalisation; and the weights' SHA-256
        README.md                 model card: what it is, how it came about, how to load it
        recipe.yaml               the run's recipe, where the run's folder is at hand
        heads/heads.safetensors   when asked for: the rest of the objective, to continue from

Nothing is unpickled, and no name or argument from a file reaches timm that could make it do so.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil import checkpoint
from selfvil.checkpoint import Checkpoint
from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.positions import resample_positions
from selfvil.models.published import checkpoint_filter_fn
from selfvil.version import __version__

FORMAT = 1
WEIGHTS = "model.safetensors"
HEADS = "heads/heads.safetensors"

# Arguments of timm.create_model itself. Some make it download or unpickle: a file must not be able to ask for that.
_FACTORY_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip
_SCORE_COLUMNS = ["network", "protocol", "value", "deviation", "readout", "train_images", "test_images"]
_META_KEYS = {"model", "networks", "export", "objective", "data", "seed", "samples", "seconds"}


@dataclass(frozen=True)
class Normalisation:
    """How images were presented: pixels on a scale of 0 to 1, less `mean`, divided by `std`, at `img_size` (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: tuple[int, int]

    @property
    def channels(self) -> int:
        return len(self.mean)


class Network(NamedTuple):
    """A backbone, how its images were presented, and how many it saw in pretraining (repetitions counted)."""

    backbone: nn.Module
    normalisation: Normalisation
    samples_seen: int


# --- reading ---------------------------------------------------------------------------------------------------------


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The checkpoint that `source` stands for: a checkpoint folder, or a run folder, whose newest valid one is taken.

    Raises UserError where there is none, it is damaged, or it was not written by a run.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"There is no folder {source}; expected the folder of a run or of one of its checkpoints.")
    if (source / "checkpoints").is_dir():
        newest = checkpoint.newest(source / "checkpoints")
        if newest is None:
            raise UserError(f"{source / 'checkpoints'} holds no usable checkpoint.")
        found = newest
    elif (source / checkpoint.MANIFEST).is_file():
        found = checkpoint.load(source)
    else:
        raise UserError(
            f"{source} is neither the folder of a run (no checkpoints/) nor a checkpoint (no manifest.json)."
        )
    if found.meta.get("format") != 1 or _META_KEYS - found.meta.keys():
        raise UserError(f"{found.folder / checkpoint.META} does not describe a run that this selfvil can read.")
    return found


def create_backbone(meta: Mapping[str, Any]) -> Network:
    """A freshly initialised backbone (from torch's global generator) as a checkpoint's meta describes it.

    Raises UserError if timm does not know the model or its arguments.
    """
    name, kwargs = meta["model"]["name"], meta["model"]["kwargs"]
    if forbidden := sorted(_FACTORY_ARGUMENTS & kwargs.keys()):
        raise UserError(f"The checkpoint asks timm for {', '.join(forbidden)}, which no run writes: it is not trusted.")
    if not timm.is_model(name):
        raise UserError(f"The checkpoint is of a model {name!r}, which this timm {timm.__version__} does not know.")
    try:
        backbone: Any = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm {timm.__version__} cannot build {name} with {kwargs}: {error}") from error
    # Runs of before 2026-11-26 say it among the model's arguments alone.
    size = meta["data"].get("img_size") or kwargs.get("img_size") or backbone.pretrained_cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    normalisation = Normalisation(tuple(meta["data"]["mean"]), tuple(meta["data"]["std"]), (height, width))
    return Network(backbone, normalisation, samples_seen=0)


def load_network(saved: Checkpoint, network: str | None = None) -> Network:
    """The pretrained backbone inside a checkpoint: `network` is "student", "teacher" ...; None takes the run's choice.

    Raises UserError for an unknown network, weights of another architecture, or weights that are not finite.
    """
    network, prefix = _choose(saved, network)
    untrained = create_backbone(saved.meta)
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.tensors("objective").items()
        if name.startswith(prefix)
    }
    where = f"{saved.folder}: the weights of {network!r} do not fit {saved.meta['model']['name']}"
    _fit(untrained.backbone, weights, where)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{saved.folder}: {name} of {network!r} holds NaN or infinity; take an earlier checkpoint.")
    untrained.backbone.load_state_dict(weights)
    return untrained._replace(samples_seen=saved.meta["samples"])


def load_export(folder: str | Path, *, pretrained: bool = True, **overrides: Any) -> Network:
    """The backbone and normalisation of an export, its weights checked against their SHA-256.

    overrides: arguments of `timm.create_model`, such as num_classes or drop_path_rate. pretrained=False gives the same
    architecture freshly initialised. Raises UserError if the folder is no export, damaged, or does not fit them.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        cfg = config["pretrained_cfg"]
        _, height, width = cfg["input_size"]
        normalisation = Normalisation(tuple(cfg["mean"]), tuple(cfg["std"]), (height, width))
        architecture, ours = config["architecture"], config["selfvil"]
        digest, samples_seen = ours["sha256"], ours["samples_seen"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is no config that `selfvil export` wrote: {error!r}.") from error
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing.")
    if (found := _sha256(weights)) != digest:
        raise UserError(f"{weights} is damaged: its SHA-256 is {found}, expected {digest}.")
    # The very file that was checked: left to itself, timm 1.0.20 would rather unpickle a *.bin that lies beside it.
    source = {"source": "", "file": str(weights), "custom_load": False}
    try:
        backbone = timm.create_model(
            f"local-dir:{folder}", pretrained=pretrained, pretrained_cfg_overlay=source, **overrides
        )
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"timm {timm.__version__} cannot load {architecture} from {folder}: {error}") from error
    return Network(backbone, normalisation, samples_seen if pretrained else 0)


def load_pretrained(source: str | Path) -> Network:
    """The pretrained backbone of an export, a run or a checkpoint: of the two latter, the network it would export.

    Raises UserError if the source is none of these, or damaged.
    """
    is_export = (Path(source) / "config.json").is_file()
    return load_export(source) if is_export else load_network(open_checkpoint(source))


def start_backbone(backbone: nn.Module, source: str | Path) -> None:
    """Give `backbone` pretrained weights, without a classifier.

    source: an export, a run or a checkpoint, of the network it would export; or a single file: a published one of
    Vision-LSTM (.th), or a safetensors file of the same timm model.

    Raises UserError if the source is none of these, damaged, or of another architecture; nothing is changed then.
    """
    is_file = Path(source).is_file()
    weights = _read_file(backbone, Path(source)) if is_file else load_pretrained(source).backbone.state_dict()
    weights = _on_its_grid(backbone, weights)
    _fit(backbone, weights, f"model.start_from = {source} is of another architecture than the recipe's")
    backbone.load_state_dict(weights)


def _read_file(backbone: nn.Module, file: Path) -> dict[str, Tensor]:
    """Weights of a single file under the names of `backbone`, its classifier left out, positions on its grid."""
    try:
        # As timm reads the same files for pretrained=True: tensors and plain values, or it refuses (weights_only).
        weights: dict[str, Any] = dict(load_state_dict(str(file), use_ema=False, weights_only=True))
        if isinstance(backbone, VisionLSTM):
            return checkpoint_filter_fn(weights, backbone)
    except Exception as error:  # torch, pickle and safetensors have each their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.start_from = {file} is no file of weights that can be read safely: {reason}") from None
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier", "head")
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {name: value for name, value in weights.items() if not name.startswith(tuple(f"{head}." for head in heads))}


def start_objective(objective: nn.Module, source: str | Path) -> None:
    """Give an objective all its weights, heads and teacher too, from a run, a checkpoint or an export with heads.

    What the objective `brings` itself stays as it is, whether the source has such weights or not.

    Raises UserError if the source is none of these, lacks the heads, or was made by other settings.
    """
    folder = Path(source)
    if folder.is_file():
        raise UserError(
            f"model.start_from = {source} holds a backbone without the heads of an objective: set "
            f"model.start_heads=new to begin with new ones (optim.heads_first lets the backbone wait for them)"
        )
    if (folder / "config.json").is_file():
        load_export(folder)  # checks the weights
        ours, heads = _read_config(folder)["selfvil"], folder / HEADS
        if not heads.is_file() or "prefix" not in ours:
            raise UserError(
                f"model.start_from = {source} holds a backbone without the heads that go with it: export the run "
                f"again with --heads, or set model.start_heads=new to begin with new ones"
            )
        if (found := _sha256(heads)) != ours["heads_sha256"]:
            raise UserError(f"{heads} is damaged: its SHA-256 is {found}, expected {ours['heads_sha256']}.")
        backbone = {ours["prefix"] + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        weights = backbone | load_file(heads)
    else:
        weights = open_checkpoint(folder).tensors("objective")
    brings: tuple[str, ...] = getattr(objective, "brings", ())
    ours = {name: tensor for name, tensor in objective.state_dict().items() if name.startswith(brings)}
    theirs = {name: tensor for name, tensor in weights.items() if not name.startswith(brings)}
    weights = _on_its_grid(objective, theirs) | ours
    where = f"model.start_from = {source} was made by another objective or architecture than the recipe's"
    _fit(objective, weights, where, "take its settings, or set model.start_heads=new to take its backbone alone")
    objective.load_state_dict(weights)


def _on_its_grid(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the positions of each backbone in `module` resampled, if its images are of another size."""
    fitted = dict(weights)
    for prefix, part in module.named_modules():
        name = f"{prefix}.pos_embed" if prefix else "pos_embed"
        if name not in weights:
            continue
        if isinstance(part, VisionLSTM) and weights[name].ndim == 4:
            fitted[name] = resample_positions(weights[name], part.grid_size, part.pos_interpolation)
        elif isinstance(part, VisionTransformer):
            prefix_tokens = 0 if part.no_embed_class else part.num_prefix_tokens
            if math.isqrt(patches := weights[name].shape[1] - prefix_tokens) ** 2 == patches:  # timm knows of no other
                grid = list(part.patch_embed.grid_size)
                fitted[name] = resample_abs_pos_embed(weights[name], grid, num_prefix_tokens=prefix_tokens)
    return fitted


def _fit(module: nn.Module, weights: Mapping[str, Tensor], where: str, advice: str = "") -> None:
    """Raise UserError unless `weights` are just what `module` holds."""
    expected = module.state_dict()
    advice = f"; {advice}" if advice else "."
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(f"{where}: {len(missing)} are missing, the first is {missing[0]}{advice}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise UserError(f"{where}: {len(unknown)} are unknown to it, the first is {unknown[0]}{advice}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            found, wanted = list(tensor.shape), list(expected[name].shape)
            raise UserError(f"{where}: {name} has shape {found}, expected {wanted}{advice}")


def _choose(saved: Checkpoint, network: str | None) -> tuple[str, str]:
    networks = saved.meta["networks"]
    network = saved.meta["export"] if network is None else network
    if network not in networks:
        raise UserError(f"The run has no network {network!r}; choose one of: {', '.join(sorted(networks))}.")
    return network, networks[network]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no export: it holds no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config that `selfvil export` wrote.")
    return config


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def export(run: str | Path, out: str | Path, *, network: str | None = None, heads: bool = False) -> Path:
    """Write the pretrained backbone of `run` to the new folder `out`, and return it.

    run: a run folder (its newest valid checkpoint is taken) or one checkpoint folder. network: which one, where the
    objective has several; None takes the run's choice. heads: also write everything else of the objective.

    Written aside and renamed. Raises UserError if `out` is not empty, or as `open_checkpoint` and `load_network`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: choose a new one, nothing was overwritten.")
    saved = open_checkpoint(run)
    backbone, normalisation, samples_seen = load_network(saved, network)
    network, prefix = _choose(saved, network)
    out = out.resolve()
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}, aside / WEIGHTS)
        ours = {
            "format": FORMAT,
            "version": __version__,
            "network": network,
            "prefix": prefix,
            "samples_seen": samples_seen,
            "sha256": _sha256(aside / WEIGHTS),
        }
        if heads:
            rest = {name: t for name, t in saved.tensors("objective").items() if not name.startswith(prefix)}
            (aside / HEADS).parent.mkdir()  # beside the backbone, timm 1.0.20 would take this file for the weights
            save_file(rest, aside / HEADS)
            ours["heads_sha256"] = _sha256(aside / HEADS)
        config = _timm_config(backbone, saved, normalisation) | {"selfvil": ours}
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        folder = _run_folder(saved)
        if folder is not None:
            shutil.copyfile(folder / "recipe.yaml", aside / "recipe.yaml")
        (aside / "README.md").write_text(model_card(backbone, saved, network, normalisation), encoding="utf-8")
        load_export(aside)  # what is handed on has been loaded once
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"Could not write the export {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _timm_config(backbone: Any, saved: Checkpoint, normalisation: Normalisation) -> dict[str, Any]:
    """What timm's "local-dir:" reads: how to build the model, and how its images were presented."""
    arguments = dict(saved.meta["model"]["kwargs"])
    if isinstance(backbone, VisionLSTM):
        # timm's entry point gives the published weights a norm that a network of ours may not have.
        arguments["fc_norm"] = not isinstance(backbone.fc_norm, nn.Identity)
    known = backbone.pretrained_cfg
    return {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": arguments | {"num_classes": 0},
        "pretrained_cfg": {
            "num_classes": 0,
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
    }


# --- the model card --------------------------------------------------------------------------------------------------


def model_card(backbone: nn.Module, saved: Checkpoint, network: str, normalisation: Normalisation) -> str:
    """Markdown: what the backbone is, where it comes from and how to load it, as far as the run tells."""
    meta = saved.meta
    name, objective = meta["model"]["name"], dict(meta["objective"])
    method = objective.pop("name")
    folder = _run_folder(saved)
    launches = _read_json(folder / "run.json", dict).get("launches", []) if folder else []
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
        'backbone = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
        "view = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))",
        "features = backbone.forward_features(view(image)[None])",
        "```",
        "",
        "## How it came about",
        "",
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        "",
        "recipe.yaml holds the whole recipe." if folder else "",
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
