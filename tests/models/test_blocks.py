"""Scan orders: against the published training code, against each other, and with dropped patches."""

import os
import re
import sys
import types

import pytest
import torch

from selfvil.models import VisionLSTM
from selfvil.models.blocks import TRAVERSALS, ViLBlockPair
from selfvil.models.convolution import CONVS
from selfvil.models.layers import GatedScan
from selfvil.models.layout import TokenLayout, gather_tokens
from selfvil.models.masking import keep_from_noise

GRID = (3, 5)
ALL, TRANSPOSED = TokenLayout(GRID), TokenLayout(GRID[::-1])


def randomised(module):
    """float64, with no parameter left at zero or one."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return module


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def training_code():
    """The published training code's `create_block_stack`, with stand-ins for the two layers it takes from elsewhere."""
    folder = os.environ.get("SELFVIL_PUBLISHED_VIL")
    if not folder or not os.path.isdir(os.path.join(folder, "src", "vislstm")):
        pytest.skip("SELFVIL_PUBLISHED_VIL does not name a checkout of NX-AI/vision-lstm")
    pytest.importorskip("einops")
    paths = [folder, os.path.join(folder, "src")]
    sys.path[:0] = paths
    try:
        from vision_lstm.vision_lstm_util import DropPath

        layers = types.ModuleType("kappamodules.layers")
        layers.DropPath, layers.LayerScale = DropPath, None
        sys.modules["kappamodules"], sys.modules["kappamodules.layers"] = types.ModuleType("kappamodules"), layers
        from vislstm.modules.xlstm import create_block_stack
    finally:
        del sys.path[:2], sys.modules["kappamodules"], sys.modules["kappamodules.layers"]
    return create_block_stack


def our_name(name):
    name = re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{('first', 'second')[int(m[1]) % 2]}.", name)
    name = name.replace("xlstm_norm", "norm").replace("xlstm.", "layer.").replace("learnable_skip", "skip")
    for index, suffix in enumerate(("_rev", "_du", "_ud")):
        name = re.sub(rf"layer\.(\w+?){suffix}\b", rf"layer.further.{index}.\1", name)
    name = name.replace("conv1d.conv.", "conv.").replace("conv1d.", "conv.").replace("mlstm_cell.", "")
    return name.replace("post_blocks_norm", "norm")


@pytest.mark.parametrize("conv", ["causal1d", "2d"])
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_traversals_are_the_published_ones(training_code, traversal, conv):
    if conv == "2d" and "quad" in traversal and traversal != "quad_alternating":
        pytest.skip("the published quad layer has no 2-D convolution")
    two, four = traversal.startswith("bidirectional"), traversal in ("quad", "quad_shared")
    theirs = training_code(
        dim=32, depth=5, context_length=16, bidirectional=two, quaddirectional=four,
        sharedirs=traversal.endswith("shared"), use_conv2d=conv == "2d", conv1d_kernel_size=3 if conv == "2d" else 4,
        alternation={"alternating": "bidirectional", "quad_alternating": "quaddirectional"}.get(traversal),
        share_conv=True,
    )  # fmt: skip
    randomised(theirs)
    ours = VisionLSTM(
        16, 4, embed_dim=32, depth=2.5, num_classes=0, traversal=traversal, conv=conv, bias=False, norm_eps=1e-5
    ).double()
    torch.nn.init.zeros_(ours.pos_embed)
    rest = ours.load_state_dict({our_name(name): value for name, value in theirs.state_dict().items()}, strict=False)
    assert not rest.unexpected_keys
    assert set(rest.missing_keys) == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}

    x, dy = torch.randn(2, 2, 16, 32, dtype=torch.float64)
    x.requires_grad_()
    expected, got = theirs(x), ours.forward_tokens(x, (4, 4))
    assert relative_error(got, expected) < 1e-10
    names = {our_name(name): p for name, p in theirs.named_parameters()}
    parameters = dict(ours.named_parameters())
    want = torch.autograd.grad(expected, [x, *names.values()], dy)
    have = torch.autograd.grad(got, [x, *(parameters[name] for name in names)], dy)
    for a, b in zip(have, want, strict=True):
        assert relative_error(a, b) < 1e-10


def transposed(x, grid=GRID):
    return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("conv", CONVS)
def test_a_pair_of_columns_is_a_pair_of_rows_of_the_transposed_image(conv):
    rows = randomised(ViLBlockPair(16, traversal="quad_alternating", conv=conv))
    columns = ViLBlockPair(16, index=1, traversal="quad_alternating", conv=conv).double()
    columns.load_state_dict(rows.state_dict())
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    torch.testing.assert_close(transposed(columns(x, ALL)), rows(transposed(x), TRANSPOSED))
    assert not torch.allclose(columns(x, ALL), rows(x, ALL))

    keep = keep_from_noise(torch.rand(2, 15), 6)  # and with dropped patches: the kept ones in column order
    is_kept = torch.zeros(2, 15, dtype=torch.int64).scatter_(1, keep, 1)
    keep_columns = transposed(is_kept.unsqueeze(-1)).squeeze(-1).nonzero()[:, 1].view(2, 6)
    got = torch.zeros(2, 15, 16, dtype=torch.float64)
    kept = columns(gather_tokens(x, keep), TokenLayout.of(x, GRID, keep))
    got.scatter_(1, keep.unsqueeze(-1).expand(-1, -1, 16), kept)
    expected = rows(gather_tokens(transposed(x), keep_columns), TokenLayout.of(x, GRID[::-1], keep_columns))
    torch.testing.assert_close(gather_tokens(transposed(got), keep_columns), expected)


@pytest.mark.parametrize("conv", CONVS)
def test_shared_scans_are_equivariant(conv):
    """Scans of both directions with one set of parameters commute with a flip; with columns too, with transposition."""
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    both = randomised(ViLBlockPair(16, traversal="bidirectional_shared", conv=conv))
    torch.testing.assert_close(both(x.flip(1), ALL).flip(1), both(x, ALL))
    quad = randomised(ViLBlockPair(16, traversal="quad_shared", conv=conv))
    torch.testing.assert_close(quad(x.flip(1), ALL).flip(1), quad(x, ALL))
    torch.testing.assert_close(transposed(quad(transposed(x), TRANSPOSED), GRID[::-1]), quad(x, ALL))


def test_shared_scans_add_no_parameters():
    sizes = {name: sum(p.numel() for p in ViLBlockPair(16, traversal=name).parameters()) for name in TRAVERSALS}
    alone = sizes["alternating"]
    scan = 2 * sum(p.numel() for p in GatedScan(32).parameters())
    assert sizes == {
        "alternating": alone, "unidirectional": alone, "quad_alternating": alone,
        "bidirectional": alone + scan, "bidirectional_shared": alone,
        "quad": alone + 3 * scan, "quad_shared": alone,
    }  # fmt: skip


@pytest.mark.parametrize("conv", ["causal1d", None])
def test_unidirectional_tokens_do_not_depend_on_later_ones(conv):
    pair = randomised(ViLBlockPair(16, traversal="unidirectional", conv=conv))
    x = torch.randn(1, 15, 16, dtype=torch.float64)
    changed = torch.cat([x[:, :9], torch.randn(1, 6, 16)], dim=1)
    torch.testing.assert_close(pair(x, ALL)[:, :9], pair(changed, ALL)[:, :9])
    assert not torch.allclose(pair(x, ALL)[:, 9:], pair(changed, ALL)[:, 9:])


@pytest.mark.parametrize("num_registers", [0, 1, 4])
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_keeping_every_token_is_the_dense_pass(traversal, conv, num_registers):
    model = VisionLSTM(
        (12, 20), 4, embed_dim=16, depth=2, num_classes=0, traversal=traversal, conv=conv, num_registers=num_registers
    )
    randomised(model)
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    dense = model.forward_tokens(x, GRID)
    torch.testing.assert_close(model.forward_tokens(x, GRID, torch.arange(15).expand(2, -1)), dense)
    keep = keep_from_noise(torch.rand(2, 15), 6)
    some = model.forward_tokens(x, GRID, keep)
    assert some.shape == (2, 6, 16)
    # The encoding of an image does not depend on the other image.
    torch.testing.assert_close(model.forward_tokens(x[1:], GRID, keep[1:]), some[1:])


@pytest.mark.slow
@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_every_traversal_compiles_to_one_graph(traversal, num_registers):
    model = VisionLSTM(
        16, 4, embed_dim=16, depth=2, num_classes=3, traversal=traversal, num_registers=num_registers
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    inputs = list(model.parameters())
    expected = torch.autograd.grad(model(images).square().sum(), inputs)
    torch.compiler.reset()  # torch.compile limits how many networks of a class one process compiles
    got = torch.autograd.grad(torch.compile(model, fullgraph=True)(images).square().sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
