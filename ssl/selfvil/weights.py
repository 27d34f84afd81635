"""Pretrained weights, read and verified: of an export, of a run or of one of its checkpoints.

Nothing is unpickled, and no name or argument from a file reaches timm that could make it do so.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from selfvil import checkpoint
from selfvil import models as models  # registers the vil_* models with timm
from selfvil.checkpoint import Checkpoint
from selfvil.errors import UserError
from selfvil.manifest import MANIFEST, check_files, read_manifest, sha256

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEADS = "heads/heads.safetensors"

# Arguments of timm.create_model itself. Some make it download or unpickle: a file must not be able to ask for that.
_FACTORY_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip
_META_KEYS = {"model", "networks", "export", "objective", "data", "seed", "samples", "seconds"}

log = logging.getLogger(__name__)


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
    network, prefix = choose_network(saved, network)
    untrained = create_backbone(saved.meta)
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.tensors("objective").items()
        if name.startswith(prefix)
    }
    where = f"{saved.folder}: the weights of {network!r} do not fit {saved.meta['model']['name']}"
    fit(untrained.backbone, weights, where)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{saved.folder}: {name} of {network!r} holds NaN or infinity; take an earlier checkpoint.")
    untrained.backbone.load_state_dict(weights)
    return untrained._replace(samples_seen=saved.meta["samples"])


def load_export(folder: str | Path, *, pretrained: bool = True, **overrides: Any) -> Network:
    """The backbone and normalisation of an export whose config.json and weights were verified first.

    overrides: arguments of `timm.create_model`, such as num_classes or drop_path_rate. pretrained=False gives the same
    architecture freshly initialised. Raises UserError if the folder is no export, damaged, or does not fit them.
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
    # The very file that was checked: left to itself, timm 1.0.20 would rather unpickle a *.bin that lies beside it.
    source = {"source": "", "file": str(folder / WEIGHTS), "custom_load": False}
    try:
        backbone = timm.create_model(
            f"local-dir:{folder}", pretrained=pretrained, pretrained_cfg_overlay=source, **overrides
        )
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"timm {timm.__version__} cannot load {architecture} from {folder}: {error}") from error
    return Network(backbone, normalisation, samples_seen if pretrained else 0)


def verified_config(folder: Path) -> dict[str, Any]:
    """The content of an export's config.json, once it and the weights are known to be as they were written.

    An export from before 2026-11-27 has no manifest: its weights are compared with the digest in config.json, and a
    warning says that config.json itself cannot be verified. Raises UserError if the folder is no export or damaged.
    """
    if (folder / MANIFEST).is_file():
        _, files = read_manifest(folder, required=[CONFIG, WEIGHTS])
        check_files(folder, {name: files[name] for name in (CONFIG, WEIGHTS)})
        return read_config(folder)
    config = read_config(folder)
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
        "%s is an older export without %s: its weights are as they were written, config.json could not be verified. "
        "Export the run again to change that.", folder, MANIFEST,
    )  # fmt: skip
    return config


def check_digest(file: Path, digest: str) -> None:
    """Raise UserError if a file is missing or its SHA-256 is another."""
    if not file.is_file():
        raise UserError(f"{file} is missing.")
    if (found := sha256(file)) != digest:
        raise UserError(f"{file} is damaged: its SHA-256 is {found}, expected {digest}.")


def check_single_file(file: Path) -> None:
    """Verify a file of weights that lies in an export or a checkpoint; elsewhere nothing is known about it.

    Raises UserError if it is damaged.
    """
    for folder in (file.parent, file.parent.parent):  # heads/heads.safetensors lies one folder below the manifest
        name = file.relative_to(folder).as_posix()
        if (folder / MANIFEST).is_file():
            _, files = read_manifest(folder, facts=["step"] if (folder / checkpoint.META).is_file() else [])
            if name in files:
                check_files(folder, {name: files[name]})
            return


def load_pretrained(source: str | Path) -> Network:
    """The pretrained backbone of an export, a run or a checkpoint, without a classifier: of the two latter, the network
    it would export.

    Raises UserError if the source is none of these, or damaged.
    """
    if is_export(Path(source)):
        return load_export(source, num_classes=0)
    return load_network(open_checkpoint(source))


def load_backbone(source: str | Path, *, network: str | None = None, **overrides: Any) -> nn.Module:
    """A pretrained backbone, in evaluation mode, whose files were all found to be as they were written.

    This is `timm.create_model("local-dir:SOURCE", pretrained=True, **overrides).eval()` with the verification that timm
    does not do: a flipped bit in weights or in config.json is an error here, and wrong features there.

    Args:
        source: an export, a run (its newest valid checkpoint) or a checkpoint.
        network: "student", "teacher" ... of a run that has several; None takes its choice. An export holds only one.
        overrides: for an export, arguments of `timm.create_model` such as num_classes, img_size or drop_path_rate.

    Raises:
        UserError: the source is none of these, is damaged, or does not fit the arguments.
    """
    if is_export(Path(source)):
        if network is not None:
            raise UserError(f"{source} is an export and holds one network: leave out network = {network!r}.")
        return load_export(source, **overrides).backbone.eval()
    if overrides:
        raise UserError(f"{source} is no export: only an export can be loaded with {', '.join(overrides)}.")
    return load_network(open_checkpoint(source), network).backbone.eval()


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, or what is left of one."""
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()


def model_arguments(source: str | Path) -> dict[str, Any]:
    """Arguments of `timm.create_model` by which the backbone of an export, a run or a checkpoint is made."""
    source = Path(source)
    if (source / CONFIG).is_file():
        return dict(read_config(source)["model_args"])
    return dict(open_checkpoint(source).meta["model"]["kwargs"])


def fit(module: nn.Module, weights: Mapping[str, Tensor], where: str, advice: str = "") -> None:
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


def choose_network(saved: Checkpoint, network: str | None) -> tuple[str, str]:
    networks = saved.meta["networks"]
    network = saved.meta["export"] if network is None else network
    if network not in networks:
        raise UserError(f"The run has no network {network!r}; choose one of: {', '.join(sorted(networks))}.")
    return network, networks[network]


def read_config(folder: Path) -> dict[str, Any]:
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
