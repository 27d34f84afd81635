"""Masks hide exactly as many patches as requested, and kept tokens return to their positions."""

import pytest
import torch

from selfvil.models.masking import (
    MASKS,
    keep_from_noise,
    kept_ids,
    sample_mask,
)

NUM_TOKENS = 24


def random_keep(num_keep):
    return keep_from_noise(torch.rand(3, NUM_TOKENS), num_keep)


def test_tokens_with_the_smallest_noise_are_kept_in_ascending_order():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5]])
    assert keep_from_noise(noise, 2).tolist() == [[1, 3], [0, 1]]
    assert keep_from_noise(noise, 4).tolist() == [[0, 1, 2, 3]] * 2
    keep = random_keep(7)
    assert keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [(6, 4), (1, 24), (14, 14), (1, 2)])
def test_masks_hide_exactly_the_requested_number(kind, grid):
    num = grid[0] * grid[1]
    noise = torch.rand(40, num)
    for hidden in {1, num // 2, num - 1}:
        masked = sample_mask(kind, noise, grid, hidden)
        assert masked.dtype == torch.bool
        assert (masked.sum(dim=1) == hidden).all()
        keep = kept_ids(masked, num - hidden)
        assert torch.equal(torch.ones_like(masked).scatter(1, keep, False), masked)
        assert (keep.diff(dim=1) > 0).all()
    each = torch.arange(40) % num
    assert torch.equal(sample_mask(kind, noise, grid, each).sum(dim=1), each)


def test_the_random_mask_keeps_the_smallest_noise():
    noise = torch.rand(9, 24).round(decimals=1)  # with ties
    assert torch.equal(kept_ids(sample_mask("random", noise, (6, 4), 17), 7), keep_from_noise(noise, 7))


def test_row_masks_hide_whole_rows():
    rows = sample_mask("row", torch.rand(50, 24), (6, 4), 12).view(50, 6, 4)
    assert (rows.all(dim=2) | ~rows.any(dim=2)).all()
    assert rows.any(dim=2).sum(dim=1).unique().tolist() == [3]


def test_block_masks_are_connected_and_cover_all_positions():
    """A hidden patch has more hidden neighbours than in a random mask, and every position is hidden in some mask."""
    grid, noise = (14, 14), torch.rand(500, 196)
    shares = {}
    for kind in ("random", "block"):
        masked = sample_mask(kind, noise, grid, 98).view(-1, *grid).float()
        shares[kind] = float((masked[:, 1:] * masked[:, :-1]).sum() / masked[:, 1:].sum())
        assert masked.mean(dim=0).min() > 0.02
        assert masked.mean(dim=0).max() < 0.95
    assert shares["random"] == pytest.approx(0.5, abs=0.02)
    assert shares["block"] > 0.75
