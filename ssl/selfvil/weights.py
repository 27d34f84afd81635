"""Read pretrained weights: of an export, a run, a checkpoint, a timm model, a single file. No other module does.

Every file that has a digest is compared with it before its content is used. Nothing is unpickled, and no name or
argument that a file holds can make timm download or unpickle.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor, nn

from selfvil import checkpoint
from selfvil.advice import near
from selfvil.checkpoint import Checkpoint
from selfvil.errors import UserError
from selfvil.manifest import MANIFEST, check_files, read_manifest, sha256
from selfvil.models.adapter import (
    BackboneAdapter,
    adapt,
)  # importing selfvil.models registers the vil_* models with timm
from selfvil.records import CHECKPOINTS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEADS = "heads/heads.safetensors"

# Arguments of timm.create_model itself. Some make it download or unpickle: no file may set them.
_FACTORY_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip
_META_KEYS = {"model", "networks", "export", "objective", "data", "seed", "samples", "seconds"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalisation:
    """How a backbone's images were prepared: pixels in 0 to 1, minus `mean`, divided by `std`, at `img_size` (H, W)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: tuple[int, int]

    @property
    def channels(self) -> int:
        return len(self.mean)


class Network(NamedTuple):
    """A backbone, how its images were prepared, and the images of its pretraining (repetitions counted)."""

    backbone: nn.Module
    normalisation: Normalisation
    samples_seen: int


# --- any source ------------------------------------------------------------------------------------------------------


def load_backbone(source: str | Path, *, network: str | None = None, **overrides: Any) -> nn.Module:
    """A pretrained backbone in evaluation mode, after its files were verified.

    This is `timm.create_model("local-dir:SOURCE", pretrained=True, **overrides).eval()` with the verification that timm
    does not do: a flipped bit in the weights or in config.json raises an error here, and gives wrong features there.

    Args:
        source: an export, a run (its newest valid checkpoint), a checkpoint, or the name of a timm model with
            published weights, which timm downloads.
        network: "student", "teacher" ... of a run that has several; None takes its default. An export holds only one.
        overrides: for an export or a timm model, arguments of `timm.create_model` such as num_classes, img_size or
            drop_path_rate.

    Raises:
        UserError: the source is none of these, is damaged, or does not fit the arguments.
    """
    if overrides and not is_export(Path(source)) and not is_timm_model(source):
        raise UserError(f"{source} is no export: only an export can be loaded with {', '.join(overrides)}.")
    return load_pretrained(source, network=network, **overrides).backbone.eval()


def load_pretrained(
    source: str | Path, *, network: str | None = None, untrained: bool = False, seed: int = 0, **overrides: Any
) -> Network:
    """The backbone of an export, a run, a checkpoint or a timm model, and how its images were prepared.

    Args:
        source: an export, a run (its newest valid checkpoint), a checkpoint, or the name of a timm model with
            published weights, which timm downloads.
        network: "student", "teacher" ... of a run that has several; None takes its default. An export holds only one.
        untrained: the same architecture, newly initialised from `seed`. torch's global generator is not used.
        overrides: arguments of `timm.create_model` that change no weight's shape, such as drop_path_rate; for an
            export or a timm model, also num_classes and img_size.

    Raises:
        UserError: the source is none of these, is damaged, or does not fit the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_timm_model(source):
            if network is not None:
                raise UserError(f"{source} is a timm model and holds one network: leave out network = {network!r}.")
            return load_timm_model(str(source), pretrained=not untrained, **overrides)
        source = Path(source)
        if is_export(source):
            if network is not None:
                raise UserError(f"{source} is an export and holds one network: leave out network = {network!r}.")
            return load_export(source, pretrained=not untrained, **overrides)
        saved = open_checkpoint(source)
        if "num_classes" in overrides:
            saved.meta.pop("classifier", None)
        saved.meta["model"]["kwargs"].update(overrides)
        return create_backbone(saved.meta) if untrained else load_network(saved, network)


def model_arguments(source: str | Path) -> dict[str, Any]:
    """Arguments of `timm.create_model` for the backbone of a source of `load_pretrained`. Raises UserError."""
    if is_timm_model(source):
        return {}
    source = Path(source)
    if (source / CONFIG).is_file():
        return dict(_read_config(source)["model_args"])
    return dict(open_checkpoint(source).meta["model"]["kwargs"])


def class_labels(source: str | Path) -> list[int]:
    """The label of each output of the classifier in a source of `load_pretrained`; empty where none are stored.

    Raises UserError as `load_pretrained`.
    """
    if is_timm_model(source):
        return []
    if is_export(Path(source)):
        origin = _read_config(Path(source)).get("selfvil", {})
        return list(origin.get("labels") or origin.get("fine_tuning", {}).get("labels", []))
    return list((open_checkpoint(source).meta.get("classifier") or {}).get("labels", []))


def read_objective(source: str | Path) -> dict[str, Tensor] | None:
    """All tensors of an objective, heads and teacher included, by their names in its `state_dict()`.

    source: a run (its newest valid checkpoint), a checkpoint, or an export. None for an export without heads. Raises
    UserError if the source is none of these, or damaged.
    """
    folder = Path(source)
    if not is_export(folder):
        return open_checkpoint(folder).tensors("objective")
    origin = verified_config(folder)["selfvil"]
    if not {"prefix", "heads_sha256"} <= origin.keys() or not (folder / HEADS).is_file():
        return None
    check_digest(folder / HEADS, origin["heads_sha256"])
    backbone = {origin["prefix"] + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    return backbone | load_file(folder / HEADS)


def require_fit(module: nn.Module, weights: Mapping[str, Tensor], where: str, advice: str = "") -> None:
    """Raise UserError unless `weights` have exactly the names and shapes of `module.state_dict()`.

    where: beginning of the message. advice: its end.
    """
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


# --- runs and their checkpoints --------------------------------------------------------------------------------------


def open_checkpoint(source: str | Path) -> Checkpoint:
    """A verified checkpoint: the folder of one, or of a run, of which the newest undamaged one is taken.

    Raises UserError if there is none, it is damaged, or no run wrote it.
    """
    source = Path(source)
    if not source.is_dir():
        similar = near(str(source), timm.list_models())
        meant = f" (did you mean the timm model {similar[0]}?)" if similar else ""
        raise UserError(
            f"There is no folder {source}{meant}; "
            f"expected an export, a run, one of its checkpoints, or the name of a timm model."
        )
    if (source / CHECKPOINTS).is_dir():
        newest = checkpoint.newest(source / CHECKPOINTS)
        if newest is None:
            raise UserError(f"{source / CHECKPOINTS} holds no usable checkpoint.")
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


def load_network(saved: Checkpoint, network: str | None = None) -> Network:
    """The pretrained backbone in a checkpoint: "student", "teacher" ...; None takes the default of its objective.

    Raises UserError for an unknown network, weights of another architecture, or weights that are not finite.
    """
    network, prefix = choose_network(saved, network)
    untrained = create_backbone(saved.meta)
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.tensors("objective").items()
        if name.startswith(prefix)
    }
    if "classifier" not in saved.meta:
        weights = BackboneAdapter(untrained.backbone).backbone_weights(weights)
    where = f"{saved.folder}: the weights of {network!r} do not fit {saved.meta['model']['name']}"
    require_fit(untrained.backbone, weights, where)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{saved.folder}: {name} of {network!r} holds NaN or infinity; take an earlier checkpoint.")
    untrained.backbone.load_state_dict(weights)
    return untrained._replace(samples_seen=saved.meta["samples"])


def choose_network(saved: Checkpoint, network: str | None) -> tuple[str, str]:
    """Name of a network in a checkpoint, and its prefix in the objective's `state_dict()`. Raises UserError."""
    networks = saved.meta["networks"]
    network = saved.meta["export"] if network is None else network
    if network not in networks:
        raise UserError(f"The run has no network {network!r}; choose one of: {', '.join(sorted(networks))}.")
    return network, networks[network]


def create_backbone(meta: Mapping[str, Any]) -> Network:
    """The backbone that a checkpoint's meta describes, newly initialised from torch's global generator.

    Raises UserError if timm does not know the model or its arguments.
    """
    name, kwargs = meta["model"]["name"], meta["model"]["kwargs"]
    if forbidden := sorted(_FACTORY_ARGUMENTS & kwargs.keys()):
        raise UserError(f"The checkpoint asks timm for {', '.join(forbidden)}, which no run writes: it is not trusted.")
    if not timm.is_model(name):
        raise UserError(f"The checkpoint is of a model {name!r}, which this timm {timm.__version__} does not know.")
    try:
        backbone: Any = timm.create_model(name, **kwargs)
        head = meta.get("classifier") or {"labels": ()}
        if head["labels"]:
            backbone.reset_classifier(len(head["labels"]), head["global_pool"])
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(f"timm {timm.__version__} cannot build {name} with {kwargs}: {error}") from error
    # Checkpoints from before 2026-11-26 have the image size only among the model's arguments.
    size = meta["data"].get("img_size") or kwargs.get("img_size") or backbone.pretrained_cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    normalisation = Normalisation(tuple(meta["data"]["mean"]), tuple(meta["data"]["std"]), (height, width))
    return Network(backbone, normalisation, samples_seen=0)


# --- exports ---------------------------------------------------------------------------------------------------------


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, complete or not."""
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()


def load_export(folder: str | Path, *, pretrained: bool = True, **overrides: Any) -> Network:
    """The backbone of an export, after its config.json and its weights were verified.

    overrides: arguments of `timm.create_model`, such as num_classes or drop_path_rate. pretrained=False gives the same
    architecture newly initialised. Raises UserError if the folder is no export, is damaged, or does not fit them.
    """
    folder = Path(folder)
    config = verified_config(folder)
    try:
        cfg = config["pretrained_cfg"]
        _, height, width = cfg["input_size"]
        normalisation = Normalisation(tuple(cfg["mean"]), tuple(cfg["std"]), (height, width))
        architecture, samples_seen = config["architecture"], config["selfvil"]["samples_seen"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is no config that `selfvil export` wrote: {error!r}.") from error
    # Name the file that was verified: by default, timm 1.0.20 prefers a *.bin in the same folder and unpickles it.
    source = {"source": "", "file": str(folder / WEIGHTS), "custom_load": False}
    try:
        backbone = timm.create_model(
            f"local-dir:{folder}", pretrained=pretrained, pretrained_cfg_overlay=source, **overrides
        )
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"timm {timm.__version__} cannot load {architecture} from {folder}: {error}") from error
    return Network(backbone, normalisation, samples_seen if pretrained else 0)


def verified_config(folder: Path) -> dict[str, Any]:
    """The content of an export's config.json, after config.json and the weights were verified.

    An export from before 2026-11-27 has no manifest: its weights are compared with the digest in config.json, and a
    warning is given for config.json, which has no digest. Raises UserError if the folder is no export or damaged.
    """
    if (folder / MANIFEST).is_file():
        _, files = read_manifest(folder, required=[CONFIG])
        if WEIGHTS not in files:
            raise UserError(f"{folder} holds further formats of an export, without {WEIGHTS}: give the export itself.")
        check_files(folder, {name: files[name] for name in (CONFIG, WEIGHTS)})
        return _read_config(folder)
    config = _read_config(folder)
    try:
        written_as, digest = config["selfvil"]["format"], config["selfvil"]["sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is no config that `selfvil export` wrote: {error!r}.") from error
    if written_as != 1:
        raise UserError(
            f"{folder / MANIFEST} is missing, so nothing in {folder} can be verified: copy the whole export."
        )
    check_digest(folder / WEIGHTS, digest)
    log.warning(
        "%s is an older export without %s: its weights are undamaged, config.json could not be verified. Export "
        "the run again to change that.", folder, MANIFEST,
    )  # fmt: skip
    return config


def check_digest(file: Path, digest: str) -> None:
    """Raise UserError if a file is missing or its SHA-256 differs from `digest`."""
    if not file.is_file():
        raise UserError(f"{file} is missing.")
    if (found := sha256(file)) != digest:
        raise UserError(f"{file} is damaged: its SHA-256 is {found}, expected {digest}.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no complete export.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config that `selfvil export` wrote.")
    return config


# --- timm's own models -----------------------------------------------------------------------------------------------


def is_timm_model(source: str | Path) -> bool:
    """Whether `source` is the name of a timm model; a folder of the same name goes first."""
    return not Path(source).exists() and timm.is_model(str(source))


def load_timm_model(name: str, *, pretrained: bool = True, **overrides: Any) -> Network:
    """The timm model `name` without its classifier, with its published weights and timm's normalisation.

    pretrained=False gives the same architecture newly initialised; overrides: arguments of `timm.create_model`. The
    images of its pretraining are not known: samples_seen is 0. Raises UserError if the model has no published weights,
    these cannot be downloaded, or it cannot be built so.
    """
    if pretrained and not timm.is_model_pretrained(name):
        raise UserError(f"The timm model {name} has no published weights that timm could load: give an export of it.")
    try:
        backbone: Any = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0} | overrides)
    except Exception as error:  # timm, the hub's client and its HTTP library raise different classes
        reason = " ".join(str(error).split())[:200]
        weights = " with its published weights" if pretrained else ""
        raise UserError(f"timm {timm.__version__} could not load {name}{weights}: {reason}") from None
    return Network(backbone, _normalisation_of(backbone, overrides.get("in_chans", 3)), 0)


def _normalisation_of(backbone: Any, channels: int = 3) -> Normalisation:
    """timm's; for other numbers of channels than 3, its mean over the colours for each."""
    known = backbone.pretrained_cfg
    mean, std = tuple(known["mean"]), tuple(known["std"])
    if channels != len(mean):
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    height, width = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or known["input_size"][1:]
    return Normalisation(mean, std, (height, width))


# --- single files ----------------------------------------------------------------------------------------------------


def read_file(file: Path, backbone: nn.Module) -> dict[str, Tensor]:
    """Weights of one file under the names of `backbone`, without a classifier.

    file: a published one of Vision-LSTM (.th), or a safetensors file of the same timm model. Raises UserError if it is
    damaged, or holds anything but tensors and plain values.
    """
    check_single_file(file)
    try:
        # timm reads the same files for pretrained=True. weights_only refuses everything but tensors and plain values.
        weights: dict[str, Any] = dict(load_state_dict(str(file), use_ema=False, weights_only=True))
        return adapt(backbone).backbone_weights(weights)
    except Exception as error:  # torch, pickle and safetensors raise different classes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no file of weights that can be read safely: {reason}") from None


def load_timm_file(name: str, file: str | Path) -> Network:
    """The timm model `name` without its classifier, with the weights in a safetensors file, and timm's normalisation.

    The file must hold all weights of the model with its classifier, as on the Hugging Face hub. Nothing is downloaded.
    Raises UserError if the file is damaged or does not hold exactly these.
    """
    check_single_file(Path(file))
    source = {"source": "", "file": str(file), "custom_load": False}
    try:  # with its classifier: without it, timm ignores missing weights
        backbone: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except Exception as error:  # timm, torch and safetensors raise different classes
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} does not hold the weights of {name}: {reason}") from None
    backbone.reset_classifier(0)
    return Network(backbone, _normalisation_of(backbone), 0)


def check_single_file(file: Path) -> None:
    """Verify a file of weights that is part of an export or a checkpoint. Other files have no digest.

    Raises UserError if it is damaged.
    """
    for folder in (file.parent, file.parent.parent):  # heads/heads.safetensors is one folder below the manifest
        name = file.relative_to(folder).as_posix()
        if (folder / MANIFEST).is_file():
            _, files = read_manifest(folder, facts=["step"] if (folder / checkpoint.META).is_file() else [])
            if name in files:
                check_files(folder, {name: files[name]})
            return
