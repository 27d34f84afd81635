"""The comparator of benchmarks/vim.py is Vision Mamba's block."""

import importlib.util
import sys

import pytest
import torch

from runs import REPOSITORY


@pytest.fixture(scope="module")
def vim():
    folder = REPOSITORY / "benchmarks"
    sys.path.insert(0, str(folder))  # for its neighbour about.py
    try:
        spec = importlib.util.spec_from_file_location("vim_script", folder / "vim.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_the_scan_is_the_sum_over_all_earlier_tokens(vim):
    """Unrolled: each channel's output is a sum of its inputs, weighted by the product of the decays between."""
    torch.manual_seed(0)
    x, b, c = (torch.randn(2, 7, width, dtype=torch.float64) for width in (3, 4, 4))
    step, a, skip = torch.rand(2, 7, 3, dtype=torch.float64), -torch.rand(3, 4, dtype=torch.float64), torch.randn(3)
    found = vim.selective_scan(x, step, a, b, c, skip.double())
    for image in range(2):
        for channel in range(3):
            for t in range(7):
                total = float(skip[channel]) * x[image, t, channel]
                for s in range(t + 1):
                    between = step[image, s + 1 : t + 1, channel].sum()
                    weight = (c[image, t] * b[image, s] * (between * a[channel]).exp()).sum()
                    total = total + weight * step[image, s, channel] * x[image, s, channel]
                torch.testing.assert_close(found[image, t, channel], total)


def test_a_block_depends_on_both_directions_and_has_the_papers_size(vim):
    torch.manual_seed(0)
    block = vim.VimBlock(16)
    x = torch.randn(1, 9, 16)
    changed = x.clone()
    changed[:, 4] += 1
    difference = (block(changed) - block(x)).abs().amax(dim=-1)[0]
    assert (difference > 1e-6).all()
    total = 24 * sum(p.numel() for p in vim.VimBlock(192).parameters())
    assert 6.4e6 < total < 7.2e6  # Vim-T has 7 million parameters
    causal = block.forwards(torch.nn.functional.pad(x, (0, 16)))
    later = torch.nn.functional.pad(changed, (0, 16))
    torch.testing.assert_close(block.forwards(later)[:, :4], causal[:, :4])


def test_times_are_of_every_network(vim):
    rows = vim.measure(16, 1)
    assert [row["network"] for row in rows] == list(vim.networks())
    assert all(row["milliseconds"] > 0 and 4e6 < row["parameters"] < 8e6 for row in rows)
