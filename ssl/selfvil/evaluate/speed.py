"""What the forward pass of a network costs: images per second, memory, parameters, multiply-adds.

Networks that are compared are timed in the same rounds, one after the other, so that other work on the machine affects
all of them equally. A ratio of speeds is the median of the ratios within the rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfvil import footprint, runtime
from selfvil.evaluate.features import Precision
from selfvil.weights import Network

_ROUNDS = 7
_ROUND_SECONDS = 0.3  # at least; a round is a whole number of batches


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass of one network.

    images_per_second: the median over rounds, in each of `rounds`. memory: bytes, the peak of what torch allocates for
    one batch, without the weights. multiply_adds: of one image; those of matrix products, convolutions and mLSTM.
    """

    parameters: int
    multiply_adds: int
    memory: int
    batch_size: int
    img_size: tuple[int, int]
    rounds: tuple[float, ...] = field(repr=False)

    @property
    def images_per_second(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Cost") -> float:
        """How many times as fast as `other`, which was timed in the same rounds."""
        return statistics.median(mine / others for mine, others in zip(self.rounds, other.rounds))

    def as_json(self) -> dict[str, Any]:
        """Plain values; speeds have four digits."""
        first, _, third = statistics.quantiles(self.rounds, n=4)
        return {
            "images_per_second": float(f"{self.images_per_second:.4g}"),
            "quartiles": [float(f"{first:.4g}"), float(f"{third:.4g}")],
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "memory": self.memory,
            "batch_size": self.batch_size,
            "img_size": list(self.img_size),
        }


def measure(
    networks: Mapping[str, Network],
    *,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    rounds: int = _ROUNDS,
    seconds: float = _ROUND_SECONDS,
) -> dict[str, Cost]:
    """The cost of each network on random images of its own size, in evaluation mode and without gradients.

    batch_size: None takes 8 on a CPU and 64 elsewhere. rounds: at least 2. seconds: length of a round of each network.
    """
    device = torch.device(device)
    batch_size = batch_size or (8 if device.type == "cpu" else 64)
    passes = {name: _forward_pass(network, batch_size, device, precision) for name, network in networks.items()}
    repeats = {name: _repeats(run, device, seconds) for name, run in passes.items()}
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            elapsed = _time(run, repeats[name], device)
            speeds[name].append(repeats[name] * batch_size / elapsed)
    return {
        name: Cost(
            parameters=sum(parameter.numel() for parameter in network.backbone.parameters()),
            multiply_adds=_multiply_adds(network),
            memory=_peak(passes[name], device),
            batch_size=batch_size,
            img_size=network.normalisation.img_size,
            rounds=tuple(speeds[name]),
        )
        for name, network in networks.items()
    }


def _forward_pass(network: Network, batch_size: int, device: torch.device, precision: Precision) -> Callable[[], Any]:
    images = _images(network, batch_size).to(device)
    backbone: Any = network.backbone.to(device).eval()

    def run() -> Tensor:
        with torch.no_grad(), runtime.autocast(device, precision):
            return backbone.forward_features(images)

    return run


def _images(network: Network, count: int) -> Tensor:
    shown = network.normalisation
    return torch.randn(count, shown.channels, *shown.img_size, generator=torch.Generator().manual_seed(0))


def _repeats(run: Callable[[], Any], device: torch.device, seconds: float) -> int:
    _time(run, 1, device)  # the first pass allocates memory and chooses algorithms
    return max(1, round(seconds / _time(run, 1, device)))


def _time(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    levels, _ = footprint.allocated(run, device)
    return max(levels)


def _multiply_adds(network: Network) -> int:
    """Of one image; counted on the CPU, where every operator has a formula."""
    backbone: Any = network.backbone
    device = next(backbone.parameters()).device
    image = _images(network, 1)
    backbone.cpu()
    try:
        with torch.no_grad():
            return footprint.multiply_adds(lambda: backbone.forward_features(image))
    finally:
        backbone.to(device)
