"""Costs of networks: counted values are exact; times are positive, and never compared with a limit."""

import timm
import torch

from selfvil.evaluate.speed import Cost, measure
from selfvil.weights import load_timm_model


def test_costs_are_counted():
    networks = {
        name: load_timm_model(name, pretrained=False, img_size=32)
        for name in ("vil_nano_patch4_32", "vit_tiny_patch16_224")
    }
    costs = measure(networks, batch_size=2, rounds=3, seconds=0.0)
    for name, cost in costs.items():
        assert cost.parameters == sum(
            p.numel() for p in timm.create_model(name, num_classes=0, img_size=32).parameters()
        )
        assert cost.img_size == (32, 32)
        assert len(cost.rounds) == 3
        assert min(cost.rounds) > 0
        assert cost.memory > 2 * 3 * 32 * 32  # at least an activation as large as the patches
        assert cost.as_json()["batch_size"] == 2
    vit = costs["vit_tiny_patch16_224"]
    # 12 layers of 12 · dim² and attention over 5 tokens, and the patches
    tokens, dim = 5, 192
    assert vit.multiply_adds == 12 * (12 * dim * dim * tokens + 2 * tokens * tokens * dim) + 4 * 768 * dim
    assert costs["vil_nano_patch4_32"].ratio(costs["vil_nano_patch4_32"]) == 1


def test_a_ratio_is_the_median_within_rounds():
    def cost(*rounds: float) -> Cost:
        return Cost(1, 1, 1, 1, (1, 1), rounds)

    assert cost(2.0, 6.0, 100.0).ratio(cost(1.0, 2.0, 50.0)) == 2
    assert cost(1.0, 3.0, 2.0).images_per_second == 2


def test_a_network_keeps_its_place_and_its_weights():
    network = load_timm_model("vil_nano_patch4_32", pretrained=False)
    before = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    measure({"it": network}, batch_size=1, rounds=2, seconds=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.backbone.state_dict().items())
