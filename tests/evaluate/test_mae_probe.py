"""The linear probe of MAE against its update written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from selfvil.errors import UserError
from selfvil.evaluate import settings
from selfvil.evaluate.features import Features
from selfvil.evaluate.mae_probe import batch_of, mae_probe


def clusters(n: int, seed: int, noise: float = 2.0) -> Features:
    centres = torch.randn(4, 10, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=generator) % 4
    return Features(centres[y] + noise * torch.randn(n, 10, generator=generator), y)


def plain_lars(train: Features, test: Features, epochs: int, base_lr: float, batch: int, seed: int) -> torch.Tensor:
    """MAE's protocol, one line for each step of the published description."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(4, 10).normal_(0, 0.01, generator=generator).double()
    bias, weight_momentum, bias_momentum = torch.zeros(4).double(), torch.zeros(4, 10).double(), torch.zeros(4).double()
    mean, variance = torch.zeros(10).double(), torch.ones(10).double()
    steps = len(train) // batch
    total = epochs * steps
    warmup = round(10 / 90 * total)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator)
        for number in range(steps):
            step = epoch * steps + number
            rate = base_lr * batch / 256
            rate *= step / max(1, warmup - 1) if step < warmup else 0.5 * (
                1 + math.cos(math.pi * (step - warmup) / (total - warmup)))  # fmt: skip
            rows = order[number * batch : (number + 1) * batch]
            x, y = train.x[rows].double(), train.y[rows]
            mean = 0.9 * mean + 0.1 * x.mean(0)
            variance = 0.9 * variance + 0.1 * x.var(0, correction=1)
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
            slope = ((x @ weight.T + bias).softmax(1) - F.one_hot(y, 4)) / batch
            gradient = slope.T @ x
            trust = 0.001 * weight.norm() / gradient.norm()  # of matrices; there is no weight decay
            weight_momentum = 0.9 * weight_momentum + trust * gradient
            bias_momentum = 0.9 * bias_momentum + slope.sum(0)
            weight, bias = weight - rate * weight_momentum, bias - rate * bias_momentum
    x = (test.x.double() - mean) / (variance + 1e-6).sqrt()
    return (x @ weight.T + bias).argmax(1) == test.y


def test_equals_the_update_written_out():
    train, test = clusters(300, 1), clusters(500, 2)
    found = mae_probe(train, test, epochs=9, base_lr=50.0, batch_size=50, seed=3)
    expected = plain_lars(train, test, 9, 50.0, 50, 3)
    assert (found == expected).double().mean() > 0.995  # float32 and float64 differ at the boundary
    assert 0.4 < expected.double().mean() < 0.95  # the task is neither trivial nor impossible
    assert not torch.equal(found, mae_probe(train, test, epochs=9, base_lr=50.0, batch_size=50, seed=4))


def test_units_and_offsets_of_features_do_not_matter():
    """Batch normalisation removes both."""
    train, test = clusters(300, 1), clusters(200, 2)
    scale, shift = torch.logspace(-2, 2, 10), torch.linspace(-9, 9, 10)
    moved = [Features(part.x * scale + shift, part.y) for part in (train, test)]
    one, other = (mae_probe(*parts, epochs=9, base_lr=50.0) for parts in ((train, test), moved))
    assert (one == other).double().mean() > 0.99


def test_batches_give_the_steps_of_imagenet():
    assert batch_of(1_281_167, None) == 16_425
    assert batch_of(50_000, None) == 641
    assert batch_of(1_000, None) == 32
    assert batch_of(20, None) == 20
    assert batch_of(50_000, 100) == 100


def test_what_cannot_be_probed():
    train, test = clusters(40, 1), clusters(20, 2)
    for parts, message in [
        ((Features(train.x, torch.zeros(40).long()), Features(test.x, torch.zeros(20).long())), "at least two classes"),
        ((Features(torch.full_like(train.x, float("nan")), train.y), test), "hold NaN"),
        ((train, Features(test.x[:0], test.y[:0])), "no test images"),
    ]:
        with pytest.raises(UserError, match=message):
            mae_probe(*parts)
    with pytest.raises(UserError, match=r"mae_probe\.base_lr"):
        settings("mae_probe", {"base_lr": 0})
