"""One layer against a slow implementation of its paper: flipped sequences, and loops over neighbours."""

import math

import pytest
import torch
import torch.nn.functional as F

from selfvil.models.blocks import ViLBlock, ViLBlockPair
from selfvil.models.layers import HeadNorm, ResidualLayerNorm, ViLLayer
from selfvil.models.layout import TokenLayout
from selfvil.ops.reference import mlstm_reference

GRID = (3, 5)
ALL = TokenLayout(GRID)
DIM = 24


def randomised(module):
    """float64, with no parameter left at zero or one."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return module


def slow_layer(layer, x, grid, keep):
    """The layer in the order of the paper. As published, a reversed scan flips the sequence before and after."""
    if layer.reverse:
        layer.reverse = False
        keep = (grid[0] * grid[1] - 1 - keep).flip(1)
        y = slow_layer(layer, x.flip(1), grid, keep).flip(1)
        layer.reverse = True
        return y

    x, gate = layer.proj_up(x).chunk(2, dim=-1)
    conv = torch.stack([slow_convolution(layer.conv, tokens, grid, ids) for tokens, ids in zip(x, keep.tolist())])
    conv = F.silu(conv)
    q, k, v = (slow_projection(p, y) for p, y in ((layer.q_proj, conv), (layer.k_proj, conv), (layer.v_proj, x)))
    qkv = torch.cat([q, k, v], dim=-1)
    i, f = (gate_layer(qkv).transpose(1, 2) for gate_layer in (layer.igate, layer.fgate))
    q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
    h = mlstm_reference(q, k, v, i, F.logsigmoid(f)).transpose(1, 2)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = h.flatten(2) * (1 + layer.outnorm.weight) + layer.outnorm.bias + layer.skip * conv
    return layer.proj_down(h * F.silu(gate))


def slow_convolution(conv, tokens, grid, ids):
    """(K, E): each kept token, from those of its 3 × 3 neighbours that were kept."""
    row_of = {token: row for row, token in enumerate(ids)}
    out = []
    for token in ids:
        total = conv.bias
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                y, x = token // grid[1] + dy, token % grid[1] + dx
                if 0 <= y < grid[0] and 0 <= x < grid[1] and y * grid[1] + x in row_of:
                    total = total + conv.weight[:, 0, dy + 1, dx + 1] * tokens[row_of[y * grid[1] + x]]
        out.append(total)
    return torch.stack(out)


def slow_projection(projection, x):
    return torch.einsum("...gi,goi->...go", x.unflatten(-1, (-1, 4)), projection.weight).flatten(-2) + projection.bias


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_keep", [1, 7, 15, None])
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_layer_and_all_gradients_equal_the_paper(dim, num_keep, reverse):
    layer = randomised(ViLLayer(dim, reverse=reverse))
    keep = torch.rand(2, 15).argsort(1)[:, : num_keep or 15].sort(1).values
    x, dy = torch.randn(2, 2, keep.shape[1], dim, dtype=torch.float64)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]

    expected = slow_layer(layer, x, GRID, keep)
    got = layer(x, TokenLayout.of(x, GRID, None if num_keep is None else keep))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_pair_scans_forwards_then_backwards():
    pair = randomised(ViLBlockPair(DIM))
    x = torch.randn(1, 15, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] = torch.randn(DIM)
    # In the first block the last token, which no convolution connects to the first, depends on it ...
    assert not torch.allclose(pair.first(x, ALL)[:, -1], pair.first(changed, ALL)[:, -1])
    # ... and in the second block the first token depends on the last.
    assert torch.allclose(pair.second(x, ALL)[:, -1], pair.second(changed, ALL)[:, -1], atol=1e-12)
    changed = x.clone()
    changed[:, -1] = torch.randn(DIM)
    assert torch.allclose(pair.first(x, ALL)[:, 0], pair.first(changed, ALL)[:, 0], atol=1e-12)
    assert not torch.allclose(pair.second(x, ALL)[:, 0], pair.second(changed, ALL)[:, 0])


def test_norms_store_the_difference_of_the_weight_from_one():
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ResidualLayerNorm(12)(x), F.layer_norm(x, (12,)))
    heads = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(HeadNorm(12)(heads), F.layer_norm(heads, (3,)).transpose(1, 2).reshape(2, 5, 12))


def test_initialisation_is_as_published():
    dim = 96
    layer, scaled = ViLLayer(dim), ViLLayer(dim, num_blocks=24)
    small = math.sqrt(2 / (5 * dim))
    for weight in (layer.proj_up.weight, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight):
        assert weight.std().item() == pytest.approx(small, rel=0.1)
    assert layer.proj_down.weight.std().item() == pytest.approx(2 / math.sqrt(dim), rel=0.1)
    assert scaled.proj_down.weight.std().item() == pytest.approx(2 / 24 / math.sqrt(dim), rel=0.1)
    assert not layer.igate.weight.any()
    assert not layer.fgate.weight.any()
    assert layer.fgate.bias.tolist() == [3, 4, 5, 6]
    assert (layer.skip == 1).all()


def test_layer_scale_of_zero_and_drop_path_skip_the_block():
    x = torch.randn(4, 15, DIM)
    assert torch.equal(ViLBlock(DIM, init_values=0.0)(x, ALL), x)
    block = ViLBlock(DIM, drop_path=0.5)
    unchanged = (block(x, ALL) == x).flatten(1).all(1)
    for _ in range(20):
        unchanged |= (block(x, ALL) == x).flatten(1).all(1)
    assert unchanged.all()
    assert not (block.eval()(x, ALL) == x).flatten(1).all(1).any()


def test_a_width_that_is_no_multiple_of_8_is_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of 8, got 20"):
        ViLLayer(20)
