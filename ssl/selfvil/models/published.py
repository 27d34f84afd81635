"""Conversion of the published checkpoints (NX-AI/vision-lstm), of both versions, to the names of `VisionLSTM`."""

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from timm.layers import resample_patch_embed
from torch import Tensor, nn

from selfvil.errors import UserError
from selfvil.models.positions import resample_positions

if TYPE_CHECKING:
    from selfvil.models.vision_lstm import VisionLSTM

log = logging.getLogger(__name__)

# Applied in this order: first names in the published files, then names in the published modules.
_PUBLISHED_NAMES = [
    (r"\.xlstm\.", ".layer."),
    (r"xlstm\.", ""),
    (r"\.xlstm_norm\.", ".norm."),
    (r"^post_blocks_norm\.", "norm."),
    (r"^head\.0\.", "fc_norm."),
    (r"^head\.1\.", "head."),
    (r"^pos_embed\.embed$", "pos_embed"),
    (r"^legacy_norm\.", "fc_norm."),
    (r"\.rowwise_from_top_left\.", ".first."),
    (r"\.rowwise_from_bot_right\.", ".second."),
    (r"\.conv1d\.", ".conv."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.mlstm_cell\.", "."),
    (r"\.learnable_skip$", ".skip"),
]
# In version 1 the module's `legacy_norm` is the norm after the blocks, in version 2 the norm after pooling.
_VERSION_1_NORMS = {"norm.": "fc_norm.", "legacy_norm.": "norm."}


def our_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of a state dict of `VisionLSTM` or of either published version to those of `VisionLSTM`."""
    state_dict = state_dict.get("state_dict", state_dict)
    if "pos_embed.embed" not in state_dict:
        return dict(state_dict)
    version_1 = "blocks.0.norm.weight" in state_dict
    return {_our_name(name, version_1): value for name, value in state_dict.items()}


def is_published(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of the published files or modules, or the files' outer "state_dict" key."""
    return "pos_embed.embed" in state_dict or isinstance(state_dict.get("state_dict"), Mapping)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: "VisionLSTM", interpolation: str | None = None
) -> dict[str, Tensor]:
    """Convert a state dict to the names, the grid and the patch size of `model`.

    Accepts state dicts of `VisionLSTM`, of the published VisionLSTM and VisionLSTM2 modules, and the content of the
    published files of both versions (`{"state_dict": ...}` with other names). Positions and patch embedding are
    resampled if the grid or the patch size differs. A norm after pooling in the file is added to a model that was made
    with fc_norm=None; if the model cannot have it, it is dropped with a warning. The file's classifier is dropped if
    the model has none.

    Args:
        state_dict: names and tensors.
        model: the network for the weights.
        interpolation: how positions are resampled, see `resample_positions`; None takes that of the model.

    Raises:
        UserError: the file belongs to another network than `model`, apart from the classifier. timm would load what
            fits, and leave the rest random whenever the number of classes differs.
    """
    state_dict = our_names(state_dict)
    _fit_norm(state_dict, model)
    if isinstance(model.head, nn.Identity):
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("head.")}
    elif "head.weight" in state_dict and len(state_dict["head.weight"]) == model.num_classes:
        # timm drops the classifier unless the configuration has the same number of classes. Take the file's number.
        getattr(model, "pretrained_cfg", {})["num_classes"] = model.num_classes
    if "pos_embed" in state_dict:
        state_dict["pos_embed"] = resample_positions(
            state_dict["pos_embed"], model.grid_size, interpolation or model.pos_interpolation
        )
    patches, size = state_dict.get("patch_embed.proj.weight"), list(model.patch_embed.patch_size)
    if patches is not None and list(patches.shape[-2:]) != size:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patches, size)
    _check_fit(state_dict, model)
    return state_dict


def _fit_norm(state_dict: dict[str, Any], model: "VisionLSTM") -> None:
    """Match the norm after pooling in the file and in the model, in place."""
    if "fc_norm.weight" not in state_dict:
        return
    width = len(state_dict["fc_norm.weight"])
    if width == model.head_hidden_size:
        model.add_fc_norm()
    own = model.fc_norm.state_dict(prefix="fc_norm.")
    if own and width == len(own["fc_norm.weight"]):
        return
    if model.global_pool:  # without pooling, nothing is normalised
        log.warning(
            "The norm of %d pooled features in the weights is dropped: this network has %d (global_pool = %r, "
            "fc_norm = %s), so its pooled features differ from those of training.",
            width, model.head_hidden_size, model.global_pool, bool(own),
        )  # fmt: skip
    for name in [name for name in state_dict if name.startswith("fc_norm.")]:
        del state_dict[name]
    state_dict.update(own)


def _check_fit(state_dict: dict[str, Any], model: "VisionLSTM") -> None:
    """Raise UserError for names or shapes that differ, except in the classifier and the number of channels."""
    expected = model.state_dict()
    ignored = ("head.", "fc_norm.")
    missing = sorted(name for name in expected.keys() - state_dict.keys() if not name.startswith(ignored))
    unknown = sorted(name for name in state_dict.keys() - expected.keys() if not name.startswith(ignored))
    shapes = [
        f"{name} has shape {list(value.shape)}, expected {list(expected[name].shape)}"
        for name, value in state_dict.items()
        if name in expected
        and name != "patch_embed.proj.weight"
        and not name.startswith(ignored)
        and value.shape != expected[name].shape
    ]
    if not (missing or unknown or shapes):
        return
    faults = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
    faults += [f"{len(unknown)} are unknown, the first is {unknown[0]}"] if unknown else []
    faults += shapes[:1]
    hints = _arguments_of(state_dict)
    raise UserError(
        f"The weights belong to another Vision-LSTM than this one: {'; '.join(faults)}. They come from a network with "
        f"{', '.join(hints) or 'other arguments'}: build the network with the same arguments."
    )


def _arguments_of(state_dict: dict[str, Any]) -> list[str]:
    """The arguments of `VisionLSTM` that can be inferred from a state dict with its names."""
    hints = []
    if "pos_embed" in state_dict:
        hints.append(f"embed_dim={state_dict['pos_embed'].shape[-1]}")
    blocks = {name.split(".")[1] + name.split(".")[2] for name in state_dict if name.startswith("blocks.")}
    hints += [f"depth={len(blocks) / 2:g}"] if blocks else []
    hints.append(f'block="{"mlp" if any(".mlp." in name for name in state_dict) else "gated"}"')
    conv = next((value for name, value in state_dict.items() if name.endswith(".conv.weight")), None)
    if conv is not None:
        hints.append('conv="2d"' if conv.ndim == 4 else 'conv="causal1d" (version 1, the names vil_v1_*)')
    if "reg_token" in state_dict:
        hints.append(f"num_registers={state_dict['reg_token'].shape[1]}")
    if "cls_token" in state_dict:
        hints.append('global_pool="middle_cls" or "token"')
    if any(name.endswith((".ls.gamma", ".ls1.gamma")) for name in state_dict):
        hints.append("init_values (LayerScale)")
    if any(".further." in name or ".readings.1." in name for name in state_dict):
        hints.append("traversal with several directions")
    return hints


def _our_name(name: str, version_1: bool) -> str:
    if version_1 and name.startswith(tuple(_VERSION_1_NORMS)):
        module, _, rest = name.partition(".")
        return f"{_VERSION_1_NORMS[module + '.']}{rest}"
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    # The files and the module of version 1 number blocks, not pairs: blocks.3.norm is blocks.1.second.norm.
    return re.sub(
        r"^blocks\.(\d+)\.(?=norm|layer)",
        lambda m: f"blocks.{int(m[1]) // 2}.{('first', 'second')[int(m[1]) % 2]}.",
        name,
    )
