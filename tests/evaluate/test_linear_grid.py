"""The linear grid against torch's own modules and SGD, one head at a time."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from selfvil.errors import UserError
from selfvil.evaluate import linear_grid as module
from selfvil.evaluate import settings
from selfvil.evaluate.features import LAST_BLOCKS, Features
from selfvil.evaluate.linear_grid import Input, inputs, linear_grid, train_heads
from selfvil.evaluate.score import score
from selfvil.evaluate.task import Task
from selfvil.models.adapter import READOUTS, adapt
from selfvil.weights import Network, Normalisation
from small import network

WIDE = Input(1, True, slice(0, 10))


def clusters(n: int, seed: int, noise: float = 1.5) -> Features:
    centres = torch.randn(4, 10, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=generator) % 4
    return Features(centres[y] + noise * torch.randn(n, 10, generator=generator), y)


def test_every_head_is_that_of_sgd_alone():
    """The same batches through nn.Linear, cross-entropy, autograd and torch.optim.SGD with a cosine schedule."""
    data, rows = clusters(100, 1), torch.arange(5, 95)
    columns, rates = [slice(6, 10), slice(0, 10)], [0.01, 0.3, 2.0]
    found = train_heads(data.x, data.y, rows, columns, rates, 4, epochs=3, batch_size=20, seed=5)

    generator = torch.Generator().manual_seed(5)
    starts = [torch.empty(len(range(*each.indices(10))), 4).normal_(0, 0.01, generator=generator) for each in columns]
    orders = [rows[torch.randperm(90, generator=generator)][:80] for _ in range(3)]
    for heads, each, start in zip(found, columns, starts):
        for number, rate in enumerate(rates):
            head = nn.Linear(start.shape[0], 4)
            with torch.no_grad():
                head.weight.copy_(start.T)
                head.bias.zero_()
            optimizer = torch.optim.SGD(head.parameters(), lr=rate * 20 / 256, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            for order in orders:
                for chosen in order.split(20):
                    optimizer.zero_grad()
                    F.cross_entropy(head(data.x[chosen][:, each]), data.y[chosen]).backward()
                    optimizer.step()
                    schedule.step()
            weight = heads.weight.unflatten(1, (3, 4))[:, number].T
            assert torch.allclose(weight, head.weight, atol=1e-5)
            assert torch.allclose(heads.bias.view(3, 4)[number], head.bias, atol=1e-5)
            expected = head(data.x[:, each]).argmax(dim=1) == data.y
            assert torch.equal(heads.correct(data.x, data.y, torch.arange(100))[number], expected)


def test_the_input_that_holds_the_classes_is_chosen():
    """Classes are in the columns of four blocks alone, so neither one block nor a small learning rate is chosen."""
    train, test = clusters(400, 1, noise=0.8), clusters(200, 2, noise=0.8)
    noise = [torch.randn(len(part), 5, generator=torch.Generator().manual_seed(3)) for part in (train, test)]
    wide = [Features(torch.cat([part.x, extra], 1), part.y) for part, extra in zip((train, test), noise)]
    choices = [Input(1, False, slice(10, 15)), Input(4, False, slice(0, 15))]
    found = linear_grid(*wide, choices, batch_size=32, seed=1)
    assert found.input == choices[1]
    assert found.learning_rate >= 0.01
    assert found.correct.double().mean() > 0.8
    assert max(found.held_out["last 1 block"].values()) < 50
    again = linear_grid(*wide, choices, batch_size=32, seed=1)
    assert torch.equal(again.correct, found.correct)
    assert again.held_out == found.held_out


def test_test_images_choose_nothing():
    """The choice is the same whatever the test images are."""
    train, test = clusters(200, 1), clusters(80, 2)
    wrong = Features(test.x, (test.y + 1) % 4)
    choices = [WIDE, Input(1, False, slice(0, 4))]
    one, other = (linear_grid(train, each, choices, batch_size=16, epochs=2) for each in (test, wrong))
    assert (one.input, one.learning_rate, one.held_out) == (other.input, other.learning_rate, other.held_out)


def test_the_scored_head_is_trained_on_all_training_images(monkeypatch):
    train, test = clusters(100, 1), clusters(40, 2)
    counts, original = [], module.train_heads
    monkeypatch.setattr(module, "train_heads", lambda x, y, rows, *a, **o: counts.append(len(rows)) or original(
        x, y, rows, *a, **o))  # fmt: skip
    linear_grid(train, test, [WIDE], epochs=1, batch_size=10)
    assert counts == [92, 100]  # of 25 images of a class, 2 are held out


def test_a_learning_rate_that_diverges_is_not_chosen():
    train, test = clusters(200, 1), clusters(80, 2)
    huge = Features(train.x * 1e18, train.y)
    found = linear_grid(huge, test, [WIDE], learning_rates=[1e-20, 1e38], batch_size=16, epochs=2)
    assert found.learning_rate == 1e-20
    assert found.held_out["last 1 block, mean of patches"]["1e+38"] is None
    with pytest.raises(UserError, match="diverged: give smaller learning_rates"):
        linear_grid(huge, test, [WIDE], learning_rates=[1e38], batch_size=16, epochs=2)


@pytest.mark.parametrize(
    ("name", "options", "choices"),
    [
        ("vil_nano_patch4_32", {"depth": 5}, {(1, False): 64, (1, True): 96, (4, False): 256, (4, True): 288}),
        ("vil_nano_patch4_32", {"depth": 2}, {(1, False): 64, (1, True): 96, (2, False): 128, (2, True): 160}),
        ("vit_tiny_patch16_224", {"depth": 2, "patch_size": 4, "num_heads": 2, "class_token": False,
                                  "global_pool": "avg"}, {(1, False): 32, (2, False): 64}),
        ("vit_tiny_patch16_224", {"depth": 5, "patch_size": 4, "num_heads": 2},
         {(1, False): 32, (1, True): 64, (4, False): 128, (4, True): 160}),
    ],
    ids=["vil", "few blocks", "mean", "vit"],
)  # fmt: skip
def test_inputs_are_those_of_the_last_blocks(name, options, choices):
    """Columns hold the readout of each block after the final norm, and the mean: DINOv2's create_linear_input."""
    backbone = timm.create_model(name, img_size=16, embed_dim=32, num_classes=0, **options).eval()
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.normal_(0, 0.2)
    images = torch.randn(3, 3, 16, 16)
    task = Task(
        "pretrained", Network(backbone, Normalisation((0.5,) * 3, (0.5,) * 3, (16, 16)), 0), None, None, None, None
    )
    adapter = adapt(backbone)
    with torch.no_grad():
        blocks = adapter.last_blocks(images, 4)
        own = READOUTS[adapter.default_readout]
        x = torch.cat([*(own(*block) for block in blocks), blocks[-1][1].mean(dim=1)], dim=1)
        layers = backbone.get_intermediate_layers(
            images, n=min(4, options["depth"]), norm=True, return_prefix_tokens=True
        )
        assert torch.equal(
            torch.cat(list(blocks[-1]), 1), torch.cat(adapter.split_tokens(backbone.forward_features(images)), 1)
        )
    found = {(each.blocks, each.avgpool): each for each in inputs(task, x.shape[1])}
    assert {key: x[:, each.columns].shape[1] for key, each in found.items()} == choices
    for (count, avgpool), each in found.items():
        pairs = [layer if isinstance(layer, tuple) else (layer, layer[:, :0]) for layer in layers[-count:]]
        patches = [pair[0].flatten(1, -2) if name.startswith("vil") else pair[0] for pair in pairs]
        expected = [own(prefix, patch) for (_, prefix), patch in zip(pairs, patches)]
        expected += [patches[-1].mean(dim=1)] if avgpool else []
        assert torch.allclose(x[:, each.columns], torch.cat(expected, dim=1), atol=1e-5)


def test_by_the_command_with_other_evaluations_in_the_same_pass(digit_shards, monkeypatch):
    """Readouts are equal bit for bit whether the last blocks are computed in the same pass or not."""
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8))
    monkeypatch.setattr("selfvil.evaluate.score.load_pretrained", lambda *_, **__: Network(network(), normalisation, 0))
    parts = [digit_shards / f"digits-00000{number}.tar" for number in range(2)]
    grid = {"linear_grid": settings("linear_grid", {"epochs": 2, "batch_size": 16})}
    knn = {"knn": settings("knn", {"k": 5})}
    torch.manual_seed(1)
    rows = score("source", *parts, knn | grid, baselines=True, workers=0, device="cpu")
    assert [row.metric for row in rows] == ["knn_5", "linear_grid"] * 3
    assert {row.readout for row in rows if row.metric == "linear_grid"} == {LAST_BLOCKS, "8 x 8 pixels"}
    assert rows[1].details["chosen"]["input"].startswith("last ")
    assert math.isfinite(rows[1].value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rates": []}, r"linear_grid\.learning_rates"),
        ({"learning_rates": [0]}, r"linear_grid\.learning_rates"),
        ({"epochs": 0}, r"linear_grid\.epochs"),
        ({"epoch": 3}, r"unknown key linear_grid\.epoch = 3 \(did you mean linear_grid\.epochs\?\)"),
        ({"holdout": 1}, r"linear_grid\.holdout"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError, match=message):
        settings("linear_grid", values)
    for value in (0.1, "1e-1", ["1e-1"]):  # YAML takes 1e-1 for text
        assert settings("linear_grid", {"learning_rates": value}).learning_rates == [0.1]
