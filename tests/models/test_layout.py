"""Token layouts: registers among patches, column order and convolutions, with and without dropped patches."""

import pytest
import torch
from torch import nn

from selfvil.models import VisionLSTM
from selfvil.models.convolution import convolve
from selfvil.models.layout import TokenLayout, compact_grid, gather_tokens, insertion_points, scatter_tokens
from selfvil.models.masking import keep_from_noise

GRID = (3, 5)


@pytest.mark.parametrize("fill_shape", [(), (5,), (1, 1, 5), (1, 24, 5), (3, 24, 5)])
def test_scatter_is_the_inverse_of_gather_and_has_gradients_for_tokens_and_fill(fill_shape):
    keep = keep_from_noise(torch.rand(3, 24), 6)
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(fill_shape, dtype=torch.float64, requires_grad=True)
    full = scatter_tokens(x, keep, fill, 24)
    assert torch.equal(gather_tokens(full, keep), x)

    expected = fill.expand(3, 24, 5).clone()
    for image, ids in enumerate(keep.tolist()):
        for row, token in enumerate(ids):
            expected[image, token] = x[image, row]
    assert torch.equal(full, expected)
    weight = torch.randn_like(full)
    for a, b in zip(torch.autograd.grad(full, (x, fill), weight), torch.autograd.grad(expected, (x, fill), weight)):
        torch.testing.assert_close(a, b)


def test_scatter_returns_the_dtype_of_the_tokens():
    assert (
        scatter_tokens(torch.ones(1, 1, 2).bfloat16(), torch.tensor([[0]]), torch.zeros(2), 3).dtype == torch.bfloat16
    )


def test_registers_are_inserted_at_even_distances():
    assert insertion_points(196, 1, torch.device("cpu")).tolist() == [98]
    assert insertion_points(15, 4, torch.device("cpu")).tolist() == [1, 5, 9, 13]
    assert insertion_points(2, 4, torch.device("cpu")).tolist() == [0, 0, 1, 1]

    keep = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 12, 13, 14]])
    patches, extra = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    layout = TokenLayout.of(patches, GRID, keep, num_extra=4, gap_aware=True)
    # The registers precede patches 1, 5, 9 and 13 of the full grid, whether these are kept or not.
    assert layout.sequence_index.ids.tolist() == [[0, 2, 3, 4, 5, 1, 6, 7, 8], [2, 3, 5, 7, 8, 0, 1, 4, 6]]
    assert layout.scan_positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 11, 16], [1, 6, 7, 8, 11, 15, 16, 17, 18]]
    x = layout.insert_extra(patches, extra)
    assert torch.equal(x[0, 1], extra[0, 0])
    assert torch.equal(x[1, 7], patches[1, 3])
    for got, expected in zip(layout.separate_extra(x), (patches, extra), strict=True):
        assert torch.equal(got, expected)


def test_a_convolution_on_the_grid_applies_its_centre_to_registers():
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16).double()
    keep = keep_from_noise(torch.rand(2, 15), 6)
    patches, extra = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    layout = TokenLayout.of(patches, GRID, keep, num_extra=4)
    for reverse in (False, True):
        got = layout.separate_extra(convolve(conv, layout.insert_extra(patches, extra), layout, reverse=reverse))
        without = convolve(conv, patches, TokenLayout.of(patches, GRID, keep), reverse=reverse)
        torch.testing.assert_close(got[0], without)
        torch.testing.assert_close(got[1], extra * conv.weight[:, 0, 1, 1] + conv.bias)


@pytest.mark.parametrize("num_keep", [None, 1, 6])
@pytest.mark.parametrize("num_extra", [0, 3])
def test_to_columns_and_back_to_rows(num_extra, num_keep):
    all_patches, extra = torch.arange(2 * 15.0).view(2, 15, 1), -1 - torch.arange(2 * 3.0).view(2, 3, 1)
    keep = None if num_keep is None else keep_from_noise(torch.rand(2, 15), num_keep)
    patches = all_patches if keep is None else gather_tokens(all_patches, keep)
    layout = TokenLayout.of(patches, GRID, keep, num_extra=num_extra)
    x = layout.insert_extra(patches, extra) if num_extra else patches
    by_columns = layout.to_columns(x)
    assert torch.equal(layout.to_rows(by_columns), x)
    assert layout.columns.grid == (5, 3)
    got, got_extra = layout.columns.separate_extra(by_columns)
    assert got_extra is None if not num_extra else torch.equal(got_extra, extra)
    transposed = all_patches.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)
    assert torch.equal(got, transposed if keep is None else gather_tokens(transposed, layout.columns.kept.ids))


def test_a_layout_without_dropped_patches_ignores_gaps_and_compact_convolutions():
    layout = TokenLayout.of(torch.zeros(2, 15, 1), GRID, num_extra=2, gap_aware=True, compact_conv=True)
    assert layout.scan_positions is None
    assert layout.compact_grid is None
    assert TokenLayout.of(torch.zeros(2, 15, 1), GRID, gap_aware=True, compact_conv=True) == TokenLayout(GRID)


def test_a_layout_made_without_columns_has_none():
    keep = torch.tensor([[0, 1]])
    layout = TokenLayout.of(torch.zeros(1, 2, 1), GRID, keep, columns=False)
    with pytest.raises(AssertionError, match="columns=False"):
        layout.to_columns(torch.zeros(1, 2, 1))


@pytest.mark.parametrize(
    ("count", "grid", "expected"),
    [(16, (8, 8), (4, 4)), (6, (4, 6), (2, 3)), (6, (6, 4), (3, 2)), (49, (14, 14), (7, 7)), (7, (4, 7), (1, 7)),
     (5, (9, 3), (5, 1)), (1, (4, 4), (1, 1)), (24, (4, 6), (4, 6))],
)  # fmt: skip
def test_the_aspect_ratio_of_a_compact_grid_is_near_that_of_the_full_one(count, grid, expected):
    assert compact_grid(count, grid) == expected


@pytest.mark.parametrize("settings", [{}, {"conv": "causal1d"}, {"num_registers": 2}, {"traversal": "quad"}])
def test_a_compact_convolution_treats_the_kept_patches_as_a_small_image(settings):
    """Kept patches with positions give the same result as a small image in a network whose positions are zero."""
    model = VisionLSTM((16, 24), 4, embed_dim=32, depth=2, num_classes=0, **settings).double().eval()
    x, keep = torch.randn(2, 24, 32, dtype=torch.double), torch.tensor([[0, 2, 3, 9, 17, 22], [1, 4, 5, 6, 20, 23]])
    if settings.get("traversal") == "quad":  # columns of the small grid must be columns of the full one
        keep = torch.tensor([[0, 1, 2, 12, 13, 14], [7, 9, 11, 19, 21, 23]])
    sparse = model.forward_tokens(x, (4, 6), keep)
    model.compact_conv = True
    compact = model.forward_tokens(x, (4, 6), keep)
    assert not torch.allclose(compact, sparse, atol=1e-6)
    placed = gather_tokens(x + model.pos_embed.flatten(1, 2), keep)
    everything = torch.arange(24).expand(2, -1)
    whole = model.forward_tokens(x, (4, 6), everything)
    torch.testing.assert_close(whole, model.forward_tokens(x, (4, 6)), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.pos_embed.zero_()
    if not settings.get("num_registers"):  # the insertion points of registers depend on the full grid
        torch.testing.assert_close(model.forward_tokens(placed, (2, 3)), compact, rtol=1e-9, atol=1e-9)
