"""Projection heads."""

import pytest
import torch
from torch import nn

from selfvil.objectives.heads import BatchNorm, ProjectionHead


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_logits_are_cosines_times_lengths(norm_last_layer):
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, norm_last_layer=norm_last_layer)
    with torch.no_grad():
        head.last_layer_length.uniform_(0.5, 2)
    x = torch.randn(3, 6)
    expected = torch.nn.functional.cosine_similarity(head.mlp(x)[:, None], head.last_layer[None], dim=-1)
    torch.testing.assert_close(head(x), expected * head.last_layer_length.T)
    head(x).sum().backward()
    assert (head.last_layer_length.grad is None) == norm_last_layer


def test_batch_norm_equals_that_of_torch():
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm1d(5).double()
    x = (3 + 2 * torch.randn(7, 5).double()).requires_grad_()
    for module in (ours, theirs):
        module.weight.data, module.bias.data = torch.arange(5.0).double(), torch.arange(5.0).double() - 2
    torch.testing.assert_close(ours(x), theirs(x))
    gradients = [torch.autograd.grad(module(x).pow(3).sum(), [x, *module.parameters()]) for module in (ours, theirs)]
    torch.testing.assert_close(*gradients)
