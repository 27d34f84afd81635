"""`selfvil export --published`: weights under the names of the published modules (NX-AI/vision-lstm).

    model = VisionLSTM2(**arguments)                    # or VisionLSTM, version 1
    model.head = None                                   # of a backbone without a classifier
    model.load_state_dict(safetensors.torch.load_file("published/vision_lstm.safetensors"))

`selfvil.models.published` reads the same names.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfvil.checkpoint import save_tensors
from selfvil.errors import UserError
from selfvil.models.layers import ViLLayer
from selfvil.models.published import our_names
from selfvil.models.vision_lstm import VisionLSTM

FILE = "published/vision_lstm.safetensors"
"""In a folder of its own: beside model.safetensors, timm 1.0.20 could load it in place of that."""

_POOLINGS = {
    "bilateral_concat": "bilateral_flatten",
    "bilateral_avg": "bilateral_avg",
    "bilateral_patch": "bilateral_avg",
}
"""Our name of a pooling -> the published one."""
_PUBLISHED_NAMES = [
    (r"\.first\.", ".rowwise_from_top_left."),
    (r"\.second\.", ".rowwise_from_bot_right."),
    (r"\.(igate|fgate|outnorm)\.", r".mlstm_cell.\1."),
    (r"\.skip$", ".learnable_skip"),
    (r"^fc_norm\.", "legacy_norm."),
    (r"^pos_embed$", "pos_embed.embed"),
]
_BLOCK = re.compile(r"^blocks\.(\d+)\.(first|second)\.")


class Published(NamedTuple):
    """The published class and its arguments for a network. without_head: its classifier is removed before loading."""

    constructor: str
    arguments: dict[str, Any]
    without_head: bool


def describe(backbone: nn.Module) -> Published:
    """The published module that computes what `backbone` does.

    Raises UserError for a network that the published code cannot hold.
    """
    if not isinstance(backbone, VisionLSTM):
        raise _impossible(f"it holds Vision-LSTM only, not {type(backbone).__name__}")
    if backbone.block != "gated":
        raise _impossible(f'it has no block = "{backbone.block}", only the gated one')
    layers = [module for module in backbone.modules() if isinstance(module, ViLLayer)]
    alternating = all(layer.reverse == (number % 2 == 1) for number, layer in enumerate(layers))
    if not alternating or backbone.scans_columns or any(layer.directions > 1 for layer in layers):
        raise _impossible('it has the traversal "alternating" only')
    if backbone.num_prefix_tokens:
        raise _impossible("it has neither registers nor a class token")
    if backbone.global_pool not in _POOLINGS:
        raise _impossible(f"it has no global_pool = {backbone.global_pool!r}, only {', '.join(_POOLINGS)}")
    if any(name.endswith(".ls.gamma") for name in backbone.state_dict()):
        raise _impossible("it has no LayerScale (init_values)")
    conv = layers[0].conv
    if conv is None:
        raise _impossible("each of its blocks has a convolution (conv = 2d or causal1d)")
    bias, norm_eps = layers[0].proj_up.bias is not None, getattr(backbone.norm, "eps", None)
    fc_norm = None if isinstance(backbone.fc_norm, nn.Identity) else backbone.fc_norm.eps
    embed: Any = backbone.patch_embed
    patch = tuple(embed.patch_size)
    arguments = {
        "dim": backbone.embed_dim,
        "input_shape": [backbone.in_chans, *(rows * side for rows, side in zip(backbone.grid_size, patch))],
        "patch_size": list(patch),
        "output_shape": [backbone.num_classes or 1],
        "pooling": _POOLINGS[backbone.global_pool],
    }
    if embed.overlap:
        arguments["stride"] = embed.proj.stride[0]
        if isinstance(conv, nn.Conv2d):
            raise _impossible("it cannot run a convolution on the grid of overlapping patches (stride)")
    without_head = not backbone.num_classes
    if isinstance(conv, nn.Conv2d) and norm_eps == 1e-6 and fc_norm in (None, 1e-5) and len(layers) % 2 == 0:
        switches = {"proj_bias": bias, "norm_bias": bias, "legacy_norm": fc_norm is not None}
        return Published("VisionLSTM2", arguments | {"depth": len(layers) // 2} | switches, without_head)
    version_1 = isinstance(conv, nn.Conv1d) and not bias and norm_eps == 1e-5 and fc_norm == 1e-6
    if version_1 and arguments["pooling"] == "bilateral_avg":
        return Published("VisionLSTM", arguments | {"depth": len(layers), "legacy_norm": True}, without_head)
    raise _impossible(
        "of its two versions, neither has these norms (norm_eps, fc_norm, fc_norm_eps), convolution, bias and depth "
        "together"
    )


def _impossible(reason: str) -> UserError:
    return UserError(f"--published: the published code (NX-AI/vision-lstm) cannot load this network: {reason}.")


def write(backbone: VisionLSTM, file: Path) -> None:
    """Write the weights of a network under the published names, and compare them with the network when read again.

    Raises UserError, as `describe`, or if other weights would be read.
    """
    weights = published_weights(backbone)
    file.parent.mkdir(exist_ok=True)
    save_tensors({name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}, file)
    read = our_names(load_file(file))
    expected = _weights(backbone)
    different = [n for n in expected if n not in read or not torch.equal(read[n], expected[n])]
    if different or len(read) != len(expected):
        raise UserError(f"{FILE} would load other weights than were written, such as {(different or [*read])[0]}.")


def published_weights(backbone: VisionLSTM) -> dict[str, Tensor]:
    """The weights of a network under the names of the published module. Raises UserError, as `describe`."""
    version_1 = describe(backbone).constructor == "VisionLSTM"
    return {_published_name(name, version_1): tensor for name, tensor in _weights(backbone).items()}


def _weights(backbone: VisionLSTM) -> dict[str, Tensor]:
    """All weights, and fixed positions too: the published module has learned ones only."""
    return {name: tensor.cpu() for name, tensor in [*backbone.state_dict().items(), ("pos_embed", backbone.pos_embed)]}


def _published_name(name: str, version_1: bool) -> str:
    if version_1:  # it numbers blocks, not pairs, and its `norm` is the one after pooling
        name = _BLOCK.sub(lambda m: f"blocks.{2 * int(m[1]) + (m[2] == 'second')}.", name)
        name = name.replace(".layer.conv.", ".layer.conv1d.conv.")
        if name.startswith(("norm.", "fc_norm.")):
            return f"legacy_{name}" if name.startswith("norm.") else name.removeprefix("fc_")
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def code(published: Published, folder: str) -> Sequence[str]:
    """Lines of Python that load the file in an export with the published code."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in published.arguments.items())
    return [
        "from safetensors.torch import load_file",
        f"from vision_lstm import {published.constructor}  # a checkout of github.com/NX-AI/vision-lstm, needs einops",
        f'folder = "{folder}"',
        f"model = {published.constructor}({arguments})",
        *(["model.head = None  # the file holds no classifier: the output is the pooled features"]
          if published.without_head else []),
        f'model.load_state_dict(load_file(f"{{folder}}/{FILE}"))',
    ]  # fmt: skip


def size(backbone: nn.Module) -> int:
    """Number of parameters."""
    return sum(math.prod(parameter.shape) for parameter in backbone.parameters())
