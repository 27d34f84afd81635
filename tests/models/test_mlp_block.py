"""The block with an MLP: against its equations token by token, and in a network."""

import re

import pytest
import timm
import torch
from torch import nn

from models.mlp_block_reference import block as reference
from selfvil.models import VisionLSTM
from selfvil.models.layout import TokenLayout, insertion_points
from selfvil.models.mlp_block import MLPBlock, default_heads

GRID, DIM = (3, 4), 24
TRAVERSALS = {
    "forwards": {},
    "backwards": {"reverse": True},
    "both": {"directions": 2},
    "both, shared": {"directions": 2, "shared": True, "reverse": True},
    "quad": {"directions": 4},
    "quad, shared": {"directions": 4, "shared": True},
}


def randomised(module: nn.Module) -> nn.Module:
    """float64, with no parameter left at zero or one."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return module


def equals_its_equations(options, keep=None, num_extra=0, gap_aware=False, compact=False):
    block = randomised(MLPBlock(DIM, num_heads=2, **options))
    patches = list(range(12)) if keep is None else keep
    ids = torch.tensor([patches, patches])
    x = torch.randn(2, len(patches) + num_extra, DIM, dtype=torch.float64, requires_grad=True)
    layout = TokenLayout.of(
        x, GRID, None if keep is None else ids, num_extra=num_extra, gap_aware=gap_aware, compact_conv=compact
    )
    got = block(x, layout)

    on_grid = [None] * x.shape[1]
    for n, patch in enumerate(patches):
        at = n if layout.sequence_index is None else int(layout.sequence_index.ids[0, n])
        on_grid[at] = divmod(patch, GRID[1])
    settings = {
        "heads": 2,
        "directions": 1,
        "shared": False,
        "reverse": False,
        "conv": "2d",
        "mlp": "gelu",
        "output_gate": "sigmoid",
        "cap": 15.0,
        "gap_aware": gap_aware,
        "compact": compact and keep is not None,
    }
    names = {"gate_cap": "cap"}
    settings |= {names.get(key, key): value for key, value in options.items() if names.get(key, key) in settings}
    settings["conv"] = None if settings["conv"] == "none" else settings["conv"]
    full_index = list(range(x.shape[1])) if layout.full_index is None else layout.full_index.ids[0].tolist()
    parameters = dict(block.named_parameters())
    expected = torch.stack([reference(parameters, row, on_grid, full_index, GRID, **settings) for row in x])

    weight = torch.randn_like(got)
    inputs = [x, *parameters.values()]
    have, want = (torch.autograd.grad(y, inputs, weight) for y in (got, expected))
    for name, a, b in zip(["y", "x", *parameters], [got, *have], [expected, *want], strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-3)
        assert error < 1e-10, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kept", ["all", "some", "some, with extra tokens"])
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_scans_equal_the_equations(traversal, kept):
    keep = None if kept == "all" else [0, 2, 3, 5, 9, 10]
    equals_its_equations(TRAVERSALS[traversal], keep, 3 if "extra" in kept else 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("conv", ["2d", "causal1d", "none"])
@pytest.mark.parametrize("how", ["plain", "compact", "gap-aware"])
def test_dropped_patches(how, conv, reverse):
    keep, options = [1, 2, 6, 7, 8, 11], {"conv": conv, "reverse": reverse}
    equals_its_equations(options, keep, 0, gap_aware=how == "gap-aware", compact=how == "compact")


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("traversal", ["backwards", "both", "quad"])
def test_gap_aware_scans_with_extra_tokens(traversal, extra):
    equals_its_equations(TRAVERSALS[traversal], [0, 3, 4, 10], extra, gap_aware=True)


@pytest.mark.parametrize(
    "options",
    [{"mlp": "swiglu"}, {"output_gate": "silu"}, {"gate_cap": None}, {"gate_cap": 2.0}, {"qk_ratio": 1.0},
     {"qk_ratio": 1.5}, {"mlp_ratio": 1.5}, {"init_values": 0.3}, {"input_bias": 3.0}],
    ids=str,
)  # fmt: skip
def test_options(options):
    equals_its_equations(options)


def test_extra_tokens_are_inserted_where_the_reference_assumes():
    assert insertion_points(12, 3, torch.device("cpu")).tolist() == [2, 6, 10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mlp": "relu"}, "mlp = 'relu' does not exist; choose one of: gelu, swiglu"),
        ({"output_gate": "tanh"}, "output_gate = 'tanh' does not exist"),
        ({"num_heads": 5}, "num_heads = 5 does not divide the width of the tokens, 24"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"qk_ratio": 0.0}, "qk_ratio must be above 0"),
        ({"gate_cap": -1.0}, "gate_cap must be above 0"),
        ({"conv": "3d"}, "conv = '3d' does not exist"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        MLPBlock(DIM, **options)


def test_an_unknown_block_and_options_of_another_are_refused():
    with pytest.raises(ValueError, match=r"block = 'dense' does not exist; choose one of: gated, mlp"):
        VisionLSTM(16, 4, embed_dim=DIM, depth=1, block="dense")
    with pytest.raises(TypeError, match="mlp_ratio"):
        VisionLSTM(16, 4, embed_dim=DIM, depth=1, mlp_ratio=3)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameter_counts_are_those_of_vision_transformers(size):
    ours, theirs = (
        sum(p.numel() for p in timm.create_model(f"{kind}_{size}_patch16_224", device="meta").parameters())
        for kind in ("vil_mlp", "vit")
    )
    assert abs(ours / theirs - 1) < 0.05


@pytest.mark.parametrize("attribute", ["gap_aware", "compact_conv"])
def test_attributes_of_the_network_apply_to_the_next_forward_pass(attribute):
    torch.manual_seed(0)
    model = randomised(VisionLSTM(16, 4, embed_dim=DIM, depth=1, block="mlp", num_classes=0))
    x, keep = torch.randn(1, 16, DIM, dtype=torch.float64), torch.tensor([[1, 4, 6, 11, 12]])
    before = model.forward_tokens(x, (4, 4), keep)
    setattr(model, attribute, True)
    assert not torch.allclose(model.forward_tokens(x, (4, 4), keep), before)
    setattr(model, attribute, False)
    torch.testing.assert_close(model.forward_tokens(x, (4, 4), keep), before, rtol=0, atol=0)


def test_gradient_checkpointing_changes_no_bit():
    torch.manual_seed(0)
    model = VisionLSTM(16, 4, embed_dim=DIM, depth=2, block="mlp", num_classes=3)
    images = torch.randn(2, 3, 16, 16)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_default_width_of_heads_is_near_64():
    assert [default_heads(dim) for dim in (16, 32, 96, 128, 192, 384, 768, 1024)] == [1, 1, 2, 2, 3, 6, 12, 16]
    assert default_heads(7) == 1


def test_compiles_to_one_graph():
    model = VisionLSTM(16, 4, embed_dim=DIM, depth=1, block="mlp", num_classes=0)
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 16, 16))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_gates_are_float32_under_autocast():
    block = MLPBlock(DIM, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, i, f = block.layer.readings[0].project(torch.randn(2, 5, DIM))
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    assert {x.dtype for x in (i, f)} == {torch.float32}
    assert q.shape == k.shape == (2, 2, 5, 6)
    assert v.shape == (2, 2, 5, 12)
