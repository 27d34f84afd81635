"""DINOv2's linear evaluation: linear heads for learning rates × last 1 or 4 blocks × poolings, all trained at once.

Oquab et al., "DINOv2", 2023 (arXiv 2304.07193), appendix B.3, and `dinov2/eval/linear.py`. A head gets the class token
of the last 1 or 4 blocks, with or without the mean of the last block's patches. SGD with momentum 0.9 and no weight
decay; a cosine schedule; learning rate × batch / 256.

Two differences. DINOv2 crops images at random and reports the head that is best on the validation images; here
features of centre crops are computed once, and the head is chosen on held-out training images, never on test images,
and trained again on all training images. A network without a class token has its designed readout in that place: the
first and the last token of a Vision-LSTM, or its registers, or the mean. A block of a Vision-LSTM is a pair of layers.

Shapes: N images, D columns of `LAST_BLOCKS`, K classes, L learning rates, B images of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import LAST_BLOCKS, NUM_BLOCKS, Features, shared_classes
from selfvil.evaluate.linear import require_probe_labels, stratified_split
from selfvil.evaluate.task import Figure, Score, Task
from selfvil.models.adapter import adapt
from selfvil.settings import Section

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_MOMENTUM = 0.9
_INITIAL_STD = 0.01
_CHUNK = 4_096  # images scored at once


class Settings(Section):
    """Accuracy of a linear head by DINOv2's protocol, the best of a grid on held-out training images."""

    learning_rates: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]],
        BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
        Field(min_length=1),
    ] = list(LEARNING_RATES)  # noqa: RUF012
    """Learning rates to choose from, each times batch_size / 256."""
    epochs: int = Field(10, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(128, ge=1)
    """Images in a step; 128 is the published number for each of 8 GPUs."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images of each class on which the head is chosen."""


class Input(NamedTuple):
    """The input of a head: some columns of `LAST_BLOCKS`. blocks: how many; avgpool: whether with the mean."""

    blocks: int
    avgpool: bool
    columns: slice

    def __str__(self) -> str:
        return f"last {self.blocks} block{'s' if self.blocks > 1 else ''}{', mean of patches' if self.avgpool else ''}"


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer than two classes, or no images to hold out."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), None)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [LAST_BLOCKS]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy of the chosen head; raw pixels are one input."""

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        found = linear_grid(
            train, test, inputs(task, train.x.shape[1]), learning_rates=settings.learning_rates,
            epochs=settings.epochs, batch_size=settings.batch_size, holdout=settings.holdout, seed=task.seed,
        )  # fmt: skip
        chosen = {"input": str(found.input), "learning_rate": found.learning_rate}
        yield task.top1(
            "linear_grid", "linear grid", found.correct, test.y, chosen=chosen, held_out=found.held_out
        )  # fmt: skip

    return task.score_features(LAST_BLOCKS, fit, settings.model_dump(mode="json"))


def inputs(task: Task, width: int) -> list[Input]:
    """The inputs that the grid chooses from, for `LAST_BLOCKS` of `width` columns: 1 or 4 blocks, each without and with
    the mean of patches. Fewer, where the network has fewer blocks, or its designed readout is the mean."""
    if task.network is None:
        return [Input(1, False, slice(0, width))]
    adapter = adapt(task.network.backbone)
    own = adapter.readout_dim(adapter.default_readout)
    end = width - adapter.token_dim
    count = end // own
    poolings = (False,) if adapter.default_readout == "mean" else (False, True)
    return [
        Input(blocks, avgpool, slice(end - blocks * own, width if avgpool else end))
        for blocks in sorted({1, min(NUM_BLOCKS, count)})
        for avgpool in poolings
    ]


class GridResult(NamedTuple):
    """The chosen input and learning rate (before the scaling with the batch); correct: bool (N,) for each test image;
    held_out: percent on the held-out images, by input and learning rate; None for a head that diverged."""

    input: Input
    learning_rate: float
    correct: Tensor
    held_out: dict[str, dict[str, float | None]]


def linear_grid(
    train: Features,
    test: Features,
    inputs: Sequence[Input],
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 10,
    batch_size: int = 128,
    holdout: float = 0.1,
    seed: int = 0,
) -> GridResult:
    """Train all heads on a part of `train`, choose one on the rest, train it on all of `train`, score it on `test`.

    Of equally good heads, the first input and the smallest learning rate win. Computed in float32 on the device of
    `train.x`. Raises UserError for features that do not fit each other, test labels absent from train, fewer than two
    classes, too few images to hold any out, or if no learning rate gives finite weights.
    """
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, None)
    fitted, held = stratified_split(y, holdout, seed)
    rates = sorted(set(learning_rates))

    def trained(rows: Tensor, inputs: Sequence[Input], rates: Sequence[float]) -> list["Heads"]:
        return train_heads(
            train.x, y, rows, [each.columns for each in inputs], rates, len(classes), epochs=epochs,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip

    held_out = [
        heads.correct(train.x, y, held).double().mean(dim=1).where(heads.finite(), -1.0).tolist()
        for heads in trained(fitted, inputs, rates)
    ]
    ranked = [(value, -i, -j) for i, values in enumerate(held_out) for j, value in enumerate(values)]
    value, i, j = max(ranked)
    if value < 0:
        raise UserError("Every head of the linear grid diverged: give smaller learning_rates.")
    best, rate = inputs[-i], rates[-j]
    (final,) = trained(torch.arange(len(y), device=y.device), [best], [rate])
    correct = final.correct(test.x.to(train.x), truth.to(train.x.device), torch.arange(len(truth), device=y.device))
    table = {
        str(each): {f"{rate:g}": None if value < 0 else round(100 * value, 3) for rate, value in zip(rates, values)}
        for each, values in zip(inputs, held_out)
    }
    return GridResult(best, rate, correct[0].cpu(), table)


class Heads(NamedTuple):
    """Linear heads with the same input, one for each of L learning rates: weight (D', L·K), bias (L·K,), their K."""

    columns: slice
    weight: Tensor
    bias: Tensor
    num_classes: int

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) to (B, L, K)."""
        return torch.addmm(self.bias, x[:, self.columns], self.weight).unflatten(1, (-1, self.num_classes))

    def correct(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """bool (L, len(rows)): whether each head classifies these rows correctly."""
        parts = [self.logits(x[part].float()).argmax(dim=2).T.eq(y[part]) for part in rows.split(_CHUNK)]
        return torch.cat(parts, dim=1)

    def finite(self) -> Tensor:
        """bool (L,): whether all weights of a head are finite; they are not if its learning rate was too large."""
        return self.weight.unflatten(1, (-1, self.num_classes)).isfinite().all(dim=2).all(dim=0)


def train_heads(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    columns: Sequence[slice],
    rates: Sequence[float],
    num_classes: int,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[Heads]:
    """Train a head for each input and learning rate on `rows` of x (N, D) and y (N,), with the same batches.

    One matrix product serves all learning rates of an input. Heads are independent: the gradient of the sum of their
    mean losses is the gradient of each. It is written out, (softmax - one-hot)/B, since autograd would keep four copies
    of the logits.
    """
    device = x.device
    generator = torch.Generator().manual_seed(seed)
    heads, momenta = [], []
    for each in columns:
        width = len(range(*each.indices(x.shape[1])))
        # Every learning rate starts from the same weights, so that only the rate differs.
        weight = torch.empty(width, num_classes).normal_(0, _INITIAL_STD, generator=generator)
        heads.append(Heads(each, weight.repeat(1, len(rates)).to(device),
                           torch.zeros(len(rates) * num_classes, device=device), num_classes))  # fmt: skip
        momenta.append((torch.zeros_like(heads[-1].weight), torch.zeros_like(heads[-1].bias)))
    batch_size = min(batch_size, len(rows))
    base = torch.tensor(rates, device=device).repeat_interleave(num_classes) * (batch_size / 256)
    steps_per_epoch = len(rows) // batch_size
    steps = epochs * steps_per_epoch
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        for number in range(steps_per_epoch):
            chosen = order[number * batch_size : (number + 1) * batch_size]
            batch, targets = x[chosen].float(), y[chosen]
            rate = base * (0.5 * (1 + math.cos(math.pi * (epoch * steps_per_epoch + number) / steps)))
            wanted = F.one_hot(targets, num_classes).to(batch)[:, None]
            for head, (weight_momentum, bias_momentum) in zip(heads, momenta):
                slope = head.logits(batch).softmax(dim=2).sub_(wanted).div_(batch_size).flatten(1)
                weight_momentum.mul_(_MOMENTUM).addmm_(batch[:, head.columns].T, slope)
                bias_momentum.mul_(_MOMENTUM).add_(slope.sum(dim=0))
                head.weight.addcmul_(weight_momentum, rate, value=-1)
                head.bias.addcmul_(bias_momentum, rate, value=-1)
    return heads
