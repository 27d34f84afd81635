"""The published checkpoints (NX-AI/vision-lstm), of both versions, brought to the names of `VisionLSTM`."""

import re
from typing import Any

from torch import Tensor, nn

from selfvil.models.positions import resample_positions
from selfvil.models.vision_lstm import VisionLSTM

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


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: VisionLSTM, interpolation: str | None = None
) -> dict[str, Tensor]:
    """Bring a state dict to the names and the grid of `model`.

    Takes our own, that of the published VisionLSTM and VisionLSTM2 modules, and the content of the published files of
    both versions (`{"state_dict": ...}` with other names). Positions are resampled to the grid of `model`. Where
    `model` has no classifier or no norm after pooling, those of the file are left out; where its norm has another
    width, as that of features has, it stays as it is.

    Args:
        state_dict: names and tensors.
        model: the network that is to load them.
        interpolation: how positions are resampled, see `resample_positions`; None asks the model.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if "pos_embed.embed" in state_dict:
        version_1 = "blocks.0.norm.weight" in state_dict
        state_dict = {_our_name(name, version_1): value for name, value in state_dict.items()}
    norm = model.fc_norm.state_dict(prefix="fc_norm.")
    if any(name in norm and norm[name].shape != value.shape for name, value in state_dict.items()):
        state_dict = {**state_dict, **norm}
    absent = {name for name in ("fc_norm", "head") if isinstance(getattr(model, name), nn.Identity)}
    state_dict = {name: value for name, value in state_dict.items() if name.split(".")[0] not in absent}
    if "pos_embed" in state_dict:
        resampled = resample_positions(
            state_dict["pos_embed"], model.grid_size, interpolation or model.pos_interpolation
        )
        state_dict = {**state_dict, "pos_embed": resampled}
    return state_dict


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
