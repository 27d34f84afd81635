"""Packaged recipes for CPUs run whole native layers, also with registers and dropped tokens."""

import pytest
import torch

from selfvil.build import build_objective
from selfvil.data.loader import Batch
from selfvil.data.views import RandomCropFlip
from selfvil.objectives.base import Progress
from selfvil.ops.cpu import build, fused
from selfvil.ops.mlstm import OVERRIDE
from selfvil.packaged import packaged_recipes
from selfvil.recipe import load
from small import nodes_before

if not build.available():
    pytest.skip("the CPU kernels cannot be built here (no C++ compiler?)", allow_module_level=True)

SMALL = [name for name in packaged_recipes() if name.startswith(("cifar10_", "camvid_", "demo"))]
WITHOUT = {
    "cifar10_autoregressive": "a causal convolution along the sequence",
    "cifar10_distill": "it needs an export",
    "cifar10_finetune": "it needs a run",
}


@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT])
def test_every_block_of_a_step_is_native(name, monkeypatch):
    for switch in (fused.SWITCH, OVERRIDE, build.SWITCH):
        monkeypatch.delenv(switch, raising=False)
    recipe = load(name, ["data.train=unused.tar"])
    objective = build_objective(recipe)
    views = [view for view in objective.views() if isinstance(view, RandomCropFlip)]
    images, numbers = [torch.randn(4, recipe.model.in_chans, v.height, v.width) for v in views], torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(Batch(images, numbers, numbers, numbers % 2), Progress(0, 10, 2.0, seed=0)).loss
    nodes = nodes_before(loss)
    layers = [node for node in nodes if "native_gated_layer" in node.name() or "native_mlstm_layer" in node.name()]
    assert len(layers) >= len(objective.backbone.blocks)
    depthwise = [node for node in nodes if node.name() == "ConvolutionBackward0" and node._saved_groups > 1]
    assert not depthwise
    assert not [node.name() for node in nodes if "mlstm" in node.name() and "layer" not in node.name()]
