"""The attentive probe: equal to attention as it is usually written, and able to use what a mean of tokens hides."""

import pytest
import torch
import torch.nn.functional as F

from selfvil.errors import UserError
from selfvil.evaluate import features as features_module
from selfvil.evaluate import settings
from selfvil.evaluate.attentive import AttentiveHead, attentive_probe, num_heads
from selfvil.evaluate.features import TOKENS, Features
from selfvil.evaluate.linear import linear_probe
from selfvil.evaluate.score import score
from selfvil.weights import Network, Normalisation
from small import network


def test_the_head_is_attention_of_a_query_to_keys_and_values():
    """Keys and values of all tokens, torch's attention, concatenated heads, a linear map: in float64, gradients too."""
    torch.manual_seed(0)
    head = AttentiveHead(12, 5, 3).double()
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(0, 0.7)
    x = torch.randn(4, 7, 12, dtype=torch.float64)

    def plain() -> torch.Tensor:
        keys, values = ((x @ weight.T).view(4, 7, 3, 4).transpose(1, 2) for weight in (head.key, head.value))
        query = head.query[None, :, None].expand(4, -1, -1, -1)
        return head.classifier(F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1))

    assert torch.allclose(head(x), plain(), atol=1e-12)
    weights = list(head.parameters())
    found, expected = (torch.autograd.grad(each.square().sum(), weights) for each in (head(x), plain()))
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(found, expected))


def hidden(n: int, seed: int) -> Features:
    """The class is the direction of one token, marked by its first channel; the others are its negative in sum."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=generator) % 3
    x = 0.3 * torch.randn(n, 6, 8, generator=generator)
    place = torch.randint(6, (n,), generator=generator)
    marked = torch.zeros(n, 8)
    marked[torch.arange(n), 1 + y] = 2.0
    x[torch.arange(n), place] += marked
    x[torch.arange(n), (place + 1) % 6] -= marked
    x[torch.arange(n), place, 0] += 4.0
    return Features(x.half(), y)


def test_attention_finds_what_the_mean_hides():
    train, test = hidden(600, 1), hidden(300, 2)
    correct, rate, held_out = attentive_probe(train, test, epochs=15, batch_size=50, learning_rates=[1e-6, 1e-2])
    means = [Features(part.x.float().mean(dim=1), part.y) for part in (train, test)]
    assert linear_probe(*means).accuracy < 45
    assert correct.double().mean() > 0.9
    assert rate == 1e-2
    assert held_out["0.01"] > held_out["1e-06"]


def test_results_repeat_and_leave_the_random_state():
    train, test = hidden(100, 1), hidden(50, 2)
    state = torch.get_rng_state()
    one, other = (attentive_probe(train, test, epochs=2, batch_size=20) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert one[1:] == other[1:]
    assert torch.equal(torch.get_rng_state(), state)


def test_by_the_command(digit_shards, monkeypatch, tmp_path):
    """Tokens are on disk in float16, and equal those of the network; raw pixels have no score."""
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8))
    monkeypatch.setattr("selfvil.evaluate.score.load_pretrained", lambda *_, **__: Network(network(), normalisation, 0))
    stored, original = [], features_module.on_disk
    monkeypatch.setattr(features_module, "on_disk", lambda shape: stored.append(original(shape)) or stored[-1])
    parts = [digit_shards / f"digits-00000{number}.tar" for number in range(2)]
    chosen = {"attentive": settings("attentive", {"epochs": 2, "batch_size": 16})}
    rows = score("source", *parts, chosen, baselines=True, workers=0, device="cpu")
    assert [(row.network, row.readout) for row in rows] == [("pretrained", TOKENS), ("untrained", TOKENS)]
    assert [len(x) for x in stored] == [120, 80] * 2
    assert stored[0].dtype == torch.float16
    assert not list(tmp_path.iterdir())


def test_too_little_disk_space_is_known_before_features(digit_shards, monkeypatch):
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3, (8, 8))
    monkeypatch.setattr("selfvil.evaluate.score.load_pretrained", lambda *_, **__: Network(network(), normalisation, 0))
    monkeypatch.setattr("selfvil.evaluate.task.extract_all", None)  # calling it would be a TypeError
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda folder: free)
    parts = [digit_shards / f"digits-00000{number}.tar" for number in range(2)]
    with pytest.raises(UserError, match=r"tokens of 200 images take .* set TMPDIR"):
        score("source", *parts, {"attentive": settings("attentive")}, workers=0, device="cpu")
    with pytest.raises(UserError, match=r"attentive\.heads = 7 does not divide"):
        score("source", *parts, {"attentive": settings("attentive", {"heads": 7})}, workers=0, device="cpu")


def test_numbers_of_heads():
    assert [num_heads(width, None) for width in (32, 64, 192, 384, 768, 100)] == [1, 1, 3, 6, 12, 1]
    assert num_heads(192, 12) == 12


def test_what_cannot_be_probed():
    train, test = hidden(60, 1), hidden(30, 2)
    broken = Features(train.x.clone(), train.y)
    broken.x[5, 2, 1] = torch.inf
    for parts, options, message in [
        ((broken, test), {}, "training images hold NaN or infinity"),
        ((train, Features(test.x[:0], test.y[:0])), {}, "no test images"),
        ((Features(train.x[:3], train.y[:3]), test), {}, "held out|no training image has"),
        ((train, test), {"learning_rates": [1e30], "epochs": 2}, "diverged at every learning rate"),
    ]:
        with pytest.raises(UserError, match=message):
            attentive_probe(*parts, **options)
