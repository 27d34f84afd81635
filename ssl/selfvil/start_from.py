"""`model.start_from`: give a new run the weights of an export, a run, a checkpoint or a published file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models import VisionLSTM
from selfvil.models.positions import resample_positions
from selfvil.models.published import our_names
from selfvil.weights import (
    HEADS,
    WEIGHTS,
    check_digest,
    check_single_file,
    fit,
    is_export,
    load_pretrained,
    open_checkpoint,
    verified_config,
)  # fmt: skip


def start_backbone(backbone: nn.Module, source: str | Path) -> None:
    """Give `backbone` pretrained weights, without a classifier.

    source: an export, a run or a checkpoint, of the network it would export; or a single file: a published one of
    Vision-LSTM (.th), or a safetensors file of the same timm model.

    Raises UserError if the source is none of these, damaged, or of another architecture; nothing is changed then.
    """
    is_file = Path(source).is_file()
    weights = _read_file(backbone, Path(source)) if is_file else load_pretrained(source).backbone.state_dict()
    weights = _on_its_grid(backbone, weights)
    fit(backbone, weights, f"model.start_from = {source} is of another architecture than the recipe's")
    backbone.load_state_dict(weights)


def _read_file(backbone: nn.Module, file: Path) -> dict[str, Tensor]:
    """Weights of a single file under the names of `backbone`, its classifier left out."""
    check_single_file(file)
    try:
        # As timm reads the same files for pretrained=True: tensors and plain values, or it refuses (weights_only).
        weights: dict[str, Any] = dict(load_state_dict(str(file), use_ema=False, weights_only=True))
        if isinstance(backbone, VisionLSTM):
            absent = tuple(f"{name}." for name in ("head", "fc_norm") if not backbone.get_submodule(name).state_dict())
            return {name: value for name, value in our_names(weights).items() if not name.startswith(absent)}
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
    if is_export(folder):
        ours, heads = verified_config(folder)["selfvil"], folder / HEADS
        if not heads.is_file() or "prefix" not in ours:
            raise UserError(
                f"model.start_from = {source} holds a backbone without the heads that go with it: export the run "
                f"again with --heads, or set model.start_heads=new to begin with new ones"
            )
        check_digest(heads, ours["heads_sha256"])
        backbone = {ours["prefix"] + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        weights = backbone | load_file(heads)
    else:
        weights = open_checkpoint(folder).tensors("objective")
    brings: tuple[str, ...] = getattr(objective, "brings", ())
    ours = {name: tensor for name, tensor in objective.state_dict().items() if name.startswith(brings)}
    theirs = {name: tensor for name, tensor in weights.items() if not name.startswith(brings)}
    weights = _on_its_grid(objective, theirs) | ours
    where = f"model.start_from = {source} was made by another objective or architecture than the recipe's"
    fit(objective, weights, where, "take its settings, or set model.start_heads=new to take its backbone alone")
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
