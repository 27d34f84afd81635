"""The published checkpoints (NX-AI/vision-lstm), of both versions, brought to the names of `VisionLSTM`."""

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

# In the order of their replacement: first the names inside the published files, then those of the published modules.
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
# The module of version 1 calls the norm after the blocks legacy, that of version 2 the norm after pooling.
_VERSION_1_NORMS = {"norm.": "fc_norm.", "legacy_norm.": "norm."}


def our_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of `VisionLSTM`, from its own names or the published ones of either version."""
    state_dict = state_dict.get("state_dict", state_dict)
    if "pos_embed.embed" not in state_dict:
        return dict(state_dict)
    version_1 = "blocks.0.norm.weight" in state_dict
    return {_our_name(name, version_1): value for name, value in state_dict.items()}


def is_published(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of the published files or modules, or is wrapped as the files are."""
    return "pos_embed.embed" in state_dict or isinstance(state_dict.get("state_dict"), Mapping)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: "VisionLSTM", interpolation: str | None = None
) -> dict[str, Tensor]:
    """Bring a state dict to the names, the grid and the patch size of `model`.

    Takes our own, that of the published VisionLSTM and VisionLSTM2 modules, and the content of the published files of
    both versions (`{"state_dict": ...}` with other names). Positions and patch embedding are resampled where grid and
    patch size differ. A norm after pooling in the file is added to a model that was made with fc_norm=None; where the
    model cannot have it, it is left out with a warning. The file's classifier is left out where the model has none.

    Args:
        state_dict: names and tensors.
        model: the network that is to load them.
        interpolation: how positions are resampled, see `resample_positions`; None asks the model.

    Raises:
        UserError: the file is of another network than `model`, the classifier aside. timm would load what fits and
            leave the rest random wherever the number of classes differs.
    """
    state_dict = our_names(state_dict)
    _fit_norm(state_dict, model)
    if isinstance(model.head, nn.Identity):
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("head.")}
    elif "head.weight" in state_dict and len(state_dict["head.weight"]) == model.num_classes:
        # timm leaves out the classifier unless the configuration has the same number of classes; the file decides.
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
    """Bring the norm after pooling of the file and the model together, in place."""
    if "fc_norm.weight" not in state_dict:
        return
    width = len(state_dict["fc_norm.weight"])
    if width == model.head_hidden_size:
        model.add_fc_norm()
    own = model.fc_norm.state_dict(prefix="fc_norm.")
    if own and width == len(own["fc_norm.weight"]):
        return
    if model.global_pool:  # without pooling there is nothing to normalise
        log.warning(
            "The weights have a norm of %d pooled features, which is left out: this network has %d (global_pool = %r, "
            "fc_norm = %s), so its pooled features are not those that the weights were trained for.",
            width, model.head_hidden_size, model.global_pool, bool(own),
        )  # fmt: skip
    for name in [name for name in state_dict if name.startswith("fc_norm.")]:
        del state_dict[name]
    state_dict.update(own)


def _check_fit(state_dict: dict[str, Any], model: "VisionLSTM") -> None:
    """Raise UserError for names or shapes that differ, the classifier and the number of channels aside."""
    expected = model.state_dict()
    aside = ("head.", "fc_norm.")
    missing = sorted(name for name in expected.keys() - state_dict.keys() if not name.startswith(aside))
    unknown = sorted(name for name in state_dict.keys() - expected.keys() if not name.startswith(aside))
    shapes = [
        f"{name} has shape {list(value.shape)}, expected {list(expected[name].shape)}"
        for name, value in state_dict.items()
        if name in expected
        and name != "patch_embed.proj.weight"
        and not name.startswith(aside)
        and value.shape != expected[name].shape
    ]
    if not (missing or unknown or shapes):
        return
    faults = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
    faults += [f"{len(unknown)} are unknown, the first is {unknown[0]}"] if unknown else []
    faults += shapes[:1]
    hints = _arguments_of(state_dict)
    raise UserError(
        f"The weights are of another Vision-LSTM than this one: {'; '.join(faults)}. They were made with "
        f"{', '.join(hints) or 'other arguments'}: build the network with the arguments of its weights."
    )


def _arguments_of(state_dict: dict[str, Any]) -> list[str]:
    """The arguments of `VisionLSTM` that a state dict under our names shows."""
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
    # Files, and the module of version 1, count blocks, not pairs: blocks.3.norm is blocks.1.second.norm.
    return re.sub(
        r"^blocks\.(\d+)\.(?=norm|layer)",
        lambda m: f"blocks.{int(m[1]) // 2}.{('first', 'second')[int(m[1]) % 2]}.",
        name,
    )
