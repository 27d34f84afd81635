"""`model.start_from`: initialise a new run with pretrained weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.adapter import adapt
from selfvil.weights import load_pretrained, read_file, read_objective, require_fit


def start_backbone(backbone: nn.Module, source: str | Path) -> None:
    """Load pretrained weights into `backbone`, without a classifier.

    source: an export, a run or a checkpoint (its default network), or a single file: a published one of Vision-LSTM
    (.th), or a safetensors file of the same timm model. Weights for RGB images are adapted to other channels by timm's
    rule: repeated and scaled, so that equal channels give the same tokens, and summed for one channel.

    Raises UserError, and changes nothing, if the source is none of these, damaged, or of another architecture.
    """
    if Path(source).is_file():
        try:
            weights = read_file(Path(source), backbone)
        except UserError as error:
            raise UserError(f"model.start_from: {error}") from None
    else:
        weights = load_pretrained(source, num_classes=0).backbone.state_dict()
    weights = _adapt_channels(backbone, _resample_positions(backbone, weights))
    require_fit(backbone, weights, f"model.start_from = {source} is of another architecture than the recipe's")
    backbone.load_state_dict(weights)


def start_objective(objective: nn.Module, source: str | Path) -> None:
    """Load all weights of an objective, heads and teacher included, from a run, a checkpoint or an export with heads.

    Weights under the prefixes in `objective.not_restored` keep their values, whether the source has them or not.

    Raises UserError if the source is none of these, lacks the heads, or was made with other settings.
    """
    if Path(source).is_file():
        raise UserError(
            f"model.start_from = {source} holds a backbone without the heads of an objective: set "
            f"model.start_heads=new to begin with new ones (optim.heads_first freezes the backbone at first)"
        )
    weights = read_objective(source)
    if weights is None:
        raise UserError(
            f"model.start_from = {source} holds a backbone without the heads that go with it: export the run "
            f"again with --heads, or set model.start_heads=new to begin with new ones"
        )
    not_restored: tuple[str, ...] = getattr(objective, "not_restored", ())
    kept = {name: tensor for name, tensor in objective.state_dict().items() if name.startswith(not_restored)}
    restored = {name: tensor for name, tensor in weights.items() if not name.startswith(not_restored)}
    weights = _resample_positions(objective, restored) | kept
    where = f"model.start_from = {source} was made by another objective or architecture than the recipe's"
    require_fit(objective, weights, where, "take its settings, or set model.start_heads=new to take its backbone alone")
    objective.load_state_dict(weights)


def _adapt_channels(backbone: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the first convolution adapted from 3 channels to those of `backbone`."""
    names = getattr(backbone, "pretrained_cfg", {}).get("first_conv") or ()
    adapted, expected = dict(weights), backbone.state_dict()
    for name in (f"{each}.weight" for each in ((names,) if isinstance(names, str) else names)):
        if name in weights and name in expected and weights[name].ndim == 4 and weights[name].shape[1] == 3:
            adapted[name] = adapt_input_conv(expected[name].shape[1], weights[name])
    return adapted


def _resample_positions(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the position embedding of each backbone in `module` resampled to that backbone's grid."""
    resampled = dict(weights)
    for prefix, part in module.named_modules():
        name = f"{prefix}.pos_embed" if prefix else "pos_embed"
        if name in weights:
            resampled[name] = adapt(part).resample_pos_embed(weights[name])
    return resampled
