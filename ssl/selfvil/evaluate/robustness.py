"""Accuracy when test images are occluded, shuffled, or of another size; speed and memory at these sizes.

One linear probe is fitted on the features of unchanged training images, and then classifies features of changed test
images: nothing adapts to the change. Occlusion and shuffled cells are those of `perturbations`. At another size the
images are resized, and the network's positions are resampled where it has any.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from selfvil import runtime
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate import knn, linear
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, named_rows
from selfvil.evaluate.perturbations import Perturbed
from selfvil.evaluate.speed import Cost, measure
from selfvil.evaluate.task import Score, Task
from selfvil.files import require_chart
from selfvil.models.adapter import READOUTS, adapt
from selfvil.settings import PathText
from selfvil.weights import Network, load_timm_model

_NEIGHBOURS = 20
_BATCH = 32  # images; each becomes as many views as there are perturbations


class Settings(FeatureSettings):
    """Accuracy on occluded, shuffled and resized test images, and images per second at each size."""

    classifier: str = Field("linear", pattern="^(linear|knn)$")
    """What classifies the features: linear, a linear probe, or knn, 20 nearest neighbours."""
    occlusions: list[Annotated[float, Field(gt=0, lt=1)]] = [0.25, 0.5, 0.75]  # noqa: RUF012
    """Fractions of 8 x 8 cells of a test image that become the mean colour, drawn at random."""
    shuffles: list[Annotated[int, Field(ge=2, le=64)]] = [2, 4, 8]  # noqa: RUF012
    """Cells per side of test images whose cells are shuffled."""
    scales: list[Annotated[float, Field(gt=0, le=16)]] = [0.5, 0.75, 1.5, 2.0]  # noqa: RUF012
    """Sides of the test images over those of pretraining, rounded to whole patches."""
    beside: list[str] = []  # noqa: RUF012
    """Names of timm models whose speed and memory are measured beside; they need no weights."""
    speed: bool = True
    """Also measure images per second and memory at each size."""
    out: PathText | None = None
    """PNG, SVG or PDF file for a chart of the pretrained network's accuracies."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError for labels that do not fit, or a size or a timm model that cannot be built."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    if settings.out is not None:
        require_chart(settings.out)
    linear.require_probe_labels(torch.as_tensor(task.train.labels), None)
    if task.network is not None:
        for size in _sizes(task.network, settings):
            _networks(task.network, settings, size)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [settings.readout]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy on unchanged, occluded, shuffled and resized images; `details` have the cost at each size."""
    parts = task.features(settings.readout)
    began = time.monotonic()
    tests = _perturbed_features(task, settings)
    sizes = [] if task.network is None else _sizes(task.network, settings)
    for size in sizes:
        features = _features_at(task, settings, size)
        if tests is not None and features is not None:
            tests[_name(size)] = features
    if parts is None or tests is None:
        return
    with task.processes.interrupts():
        correct = _classify(task, settings, parts.train, list(tests.values()))
        costs = _costs(task, settings) if settings.speed and task.network is not None else {}
    seconds = parts.seconds + time.monotonic() - began
    scores = {}
    for name, right, features in zip(tests, correct, tests.values()):
        figure = task.top1(f"robustness_{name}", f"{settings.classifier}, {name.replace('_', ' ')}", right, features.y)
        details = {**figure.details, **costs.get(name, {})}
        scores[name] = Score(
            **figure._replace(details=details)._asdict(), readout=task.describe(settings.readout),
            train_images=len(parts.train), test_images=len(features), seconds=seconds,
            settings=settings.model_dump(mode="json"),
        )  # fmt: skip
    if settings.out is not None and task.name == "pretrained":
        draw(scores, task, settings, Path(settings.out))
    yield from scores.values()


# --- features of changed images --------------------------------------------------------------------------------------


def _perturbed_features(task: Task, settings: Settings) -> dict[str, Features] | None:
    """Features of the test images, unchanged and perturbed, in one pass over them; None but on the main process."""
    size = task.raw_size() if task.network is None else task.normalisation.img_size
    view = Perturbed(_view(task, size), settings.occlusions, settings.shuffles)
    row = _row(task, task.network, settings)

    def rows(images: Tensor) -> dict[str, Tensor]:
        return {name: row(images[:, number]) for number, name in enumerate(view.names)}

    return _extract(task, task.network, rows, view, "perturbed images")


def _features_at(task: Task, settings: Settings, size: tuple[int, int]) -> Features | None:
    assert task.network is not None
    network = resize(copy.deepcopy(task.network), size)
    row = _row(task, network, settings)
    height, width = size
    found = _extract(
        task, network, lambda images: {"rows": row(images)}, _view(task, size), f"images of {height} x {width} pixels"
    )
    return None if found is None else found["rows"]


def _row(task: Task, network: Network | None, settings: Settings) -> Any:
    """From images (B, channels, H, W) to features (B, D) under the readout of the settings."""
    if network is None:
        return lambda images: images.flatten(1)
    backbone, readout = network.backbone, task.describe(settings.readout)

    def row(images: Tensor) -> Tensor:
        with runtime.autocast(task.device, task.precision):
            adapter = adapt(backbone)
            return READOUTS[readout](*adapter.split_tokens(adapter.forward_features(images.to(task.device)))).float()

    return row


def _extract(task: Task, network: Network | None, rows: Any, view: Any, title: str) -> dict[str, Features] | None:
    batch_size = task.batch_size or _BATCH
    options = (task.test, view, task.normalisation.channels, batch_size, task.workers, f"{task.name}, {title}")
    if network is None:
        return named_rows(rows, *options, task.processes)
    backbone = network.backbone.to(task.device)
    was_training = backbone.training
    backbone.eval()
    try:
        with task.processes.same_buffers(backbone):
            return named_rows(rows, *options, task.processes)
    finally:
        backbone.train(was_training)


def _view(task: Task, size: tuple[int, int]) -> CenterCrop:
    shown = task.normalisation
    if task.network is None:
        return CenterCrop(size, [0.0] * shown.channels, [1.0] * shown.channels)
    return CenterCrop(size, shown.mean, shown.std)


def _classify(task: Task, settings: Settings, train: Features, tests: list[Features]) -> list[Tensor]:
    """Whether each image is classified correctly, for each of several sets of test images, by one fit."""
    together = Features(
        torch.cat([test.x for test in tests]).to(train.x.device), torch.cat([test.y for test in tests])
    ).to(train.x.device)
    if settings.classifier == "knn":
        k = min(_NEIGHBOURS, len(train))
        correct = knn.classify(train, together, [k])[k]
    else:
        correct = linear.linear_probe(train, together, seed=task.seed).correct
    return list(correct.split([len(test) for test in tests]))


# --- sizes and costs -------------------------------------------------------------------------------------------------


def _sizes(network: Network, settings: Settings) -> list[tuple[int, int]]:
    """Height and width at each scale, in whole patches, without the size of pretraining."""
    steps = _patch(network)
    own = network.normalisation.img_size
    sizes = [
        tuple(max(1, round(scale * side / step)) * step for side, step in zip(own, steps)) for scale in settings.scales
    ]
    return [(height, width) for height, width in dict.fromkeys(sizes) if (height, width) != own]


def resize(network: Network, size: tuple[int, int]) -> Network:
    """`network` for images of another height and width in pixels.

    Its backbone is changed in place: learned positions are resampled. Raises UserError if it cannot take such images.
    """
    backbone: Any = network.backbone
    height, width = size
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(img_size=size)
        with torch.no_grad():
            device = next(backbone.parameters()).device
            blank = torch.zeros(1, network.normalisation.channels, height, width, device=device)
            backbone.eval().forward_features(blank)
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(backbone).__name__} cannot take images of {height} x {width} pixels (scales): {reason}"
        ) from None
    return network._replace(normalisation=replace(network.normalisation, img_size=size))


def _patch(network: Network) -> tuple[int, int]:
    patch = getattr(getattr(network.backbone, "patch_embed", None), "patch_size", 32)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return int(height), int(width)


def _networks(network: Network, settings: Settings, size: tuple[int, int]) -> dict[str, Network]:
    """The network and those beside it at one size, by their names; raises UserError where one cannot be built."""
    found = {"": resize(copy.deepcopy(network), size)}
    for name in settings.beside:
        try:
            found[name] = load_timm_model(name, pretrained=False, in_chans=network.normalisation.channels)
        except UserError as error:
            raise UserError(f"beside: {error}") from None
        found[name] = resize(found[name], size)
    return found


def _costs(task: Task, settings: Settings) -> dict[str, dict[str, Any]]:
    """The cost of a forward pass at each size, by the name of its score; "clean" is the size of pretraining."""
    assert task.network is not None
    own = task.network.normalisation.img_size
    found = {}
    for size in [own, *_sizes(task.network, settings)]:
        networks = _networks(task.network, settings, size)
        costs = measure(networks, batch_size=task.batch_size, device=task.device, precision=task.precision)
        mine = costs.pop("")
        beside = {name: _with_ratio(mine, cost) for name, cost in costs.items()}
        found["clean" if size == own else _name(size)] = {"cost": mine.as_json(), "beside": beside}
    return found


def _with_ratio(mine: Cost, other: Cost) -> dict[str, Any]:
    return {**other.as_json(), "speed_over_it": round(mine.ratio(other), 3)}


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- the chart -------------------------------------------------------------------------------------------------------


def draw(scores: dict[str, Score], task: Task, settings: Settings, out: Path) -> None:
    """Write a chart: accuracy against the occluded fraction, the shuffled cells, and the size of the images."""
    from matplotlib.figure import Figure

    own = task.normalisation.img_size
    sizes = [] if task.network is None else sorted([own, *_sizes(task.network, settings)])
    lines = {
        "occluded, % of the image": [(0.0, "clean")]
        + [(100 * fraction, f"occlusion_{round(100 * fraction)}") for fraction in sorted(settings.occlusions)],
        "shuffled cells per side": [(1.0, "clean")] + [(float(s), f"shuffle_{s}") for s in sorted(settings.shuffles)],
        "height of the images, pixels": [
            (float(size[0]), "clean" if size == own else _name(size)) for size in sizes or [own]
        ],
    }
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for panel, (label, points) in zip(figure.subplots(1, 3, sharey=True), lines.items()):
        shown = [(x, scores[name]) for x, name in points]
        values = [score.value for _, score in shown]
        ends = [score.interval or (score.value, score.value) for _, score in shown]
        bars = [[max(0.0, value - low) for value, (low, _) in zip(values, ends)]]
        bars.append([max(0.0, high - value) for value, (_, high) in zip(values, ends)])
        panel.errorbar([x for x, _ in shown], values, bars, fmt="o-", capsize=3)
        panel.set_xlabel(label)
        panel.set_xticks([x for x, _ in shown])
        panel.grid(True, alpha=0.3)
    figure.axes[0].set_ylabel("top-1 accuracy, %")
    figure.savefig(out, dpi=150)
