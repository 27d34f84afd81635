"""The published checkpoints (NX-AI/vision-lstm) brought to the names of `VisionLSTM`."""

import re
from typing import Any

from torch import Tensor, nn

from selfvil.models.positions import resample_positions
from selfvil.models.vil import VisionLSTM

# Names of version 2 in the order of their replacement: first those inside the published files, brought to those of the
# published modules, then these brought to ours.
_PUBLISHED_NAMES = [
    (r"\.xlstm\.", ".layer."),
    (r"xlstm\.", ""),
    (r"\.xlstm_norm\.", ".norm."),
    (r"\.conv1d\.", ".conv."),
    (r"^post_blocks_norm\.", "norm."),
    (r"^head\.0\.", "legacy_norm."),
    (r"^head\.1\.", "head."),
    (r"^pos_embed\.embed$", "pos_embed"),
    (r"^legacy_norm\.", "fc_norm."),
    (r"\.rowwise_from_top_left\.", ".first."),
    (r"\.rowwise_from_bot_right\.", ".second."),
    (r"\.mlstm_cell\.", "."),
    (r"\.learnable_skip$", ".skip"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionLSTM) -> dict[str, Tensor]:
    """Bring a state dict to the names and the grid of `model`.

    Takes our own, that of the published VisionLSTM2 module, and the content of the published version-2 files
    (`{"state_dict": ...}` with other names). Positions are resampled to the grid of `model`; the published norm after
    pooling is left out where `model` has none.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if "pos_embed" not in state_dict:
        state_dict = {_our_name(name): value for name, value in state_dict.items()}
    if isinstance(model.fc_norm, nn.Identity):
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("fc_norm.")}
    if "pos_embed" in state_dict:
        state_dict = {**state_dict, "pos_embed": resample_positions(state_dict["pos_embed"], model.grid_size)}
    return state_dict


def _our_name(name: str) -> str:
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    # The files count blocks, not pairs of them: blocks.3.norm is blocks.1.second.norm.
    return re.sub(
        r"^blocks\.(\d+)\.(?=norm|layer)",
        lambda m: f"blocks.{int(m[1]) // 2}.{('first', 'second')[int(m[1]) % 2]}.",
        name,
    )
