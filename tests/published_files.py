"""Names of weights in the published files of Vision-LSTM (NX-AI/vision-lstm, version 2), which number single blocks."""

import re

import torch
from torch import Tensor


def as_in_published_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights with the shapes of a selfvil state dict, under the names of the published files."""
    in_file: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(
            r"^blocks\.(\d+)\.(first|second)\.", lambda m: f"xlstm.blocks.{2 * int(m[1]) + (m[2] == 'second')}.", name
        )
        name = re.sub(r"\.norm\.(?=weight|bias)", ".xlstm_norm.", name)
        name = re.sub(r"\.layer\.(igate|fgate|outnorm)", r".layer.mlstm_cell.\1", name)
        name = name.replace(".layer.", ".xlstm.").replace(".conv.", ".conv1d.").replace(".skip", ".learnable_skip")
        name = re.sub("^norm", "xlstm.post_blocks_norm", name)
        name = re.sub("^head", "head.1", name)
        name = re.sub("^fc_norm", "head.0", name)
        in_file["pos_embed.embed" if name == "pos_embed" else name] = torch.randn_like(value)
    return in_file
