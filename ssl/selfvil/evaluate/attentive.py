"""Attentive probe: a learned query attends to the patch tokens of a frozen backbone, and a linear head follows.

The head is that of AIM (El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", 2024, arXiv
2401.08541): affine-free batch normalisation of the tokens, one query, keys and values without biases, no residual, no
MLP. Training follows V-JEPA (Bardes et al., 2024, arXiv 2404.08471, `configs/evals/vitl16_in1k.yaml`): AdamW, 20
epochs, learning rate 0.001, weight decay 0.001, a cosine to 0 without warm-up. Several learning rates are tried on
held-out training images, and the best one is trained again on all training images. Tokens are those of centre crops,
computed once, where both papers crop images at random.

Keys and values are never computed for all tokens. The score of a token x is q·(W_k x) = (W_kᵀ q)·x, and values are
mixed after the attention, W_v Σ a x: the same function at a cost that is linear in the width.

Tokens are float16 in a temporary file: 60,000 CIFAR-10 images with 64 tokens of 192 channels take 1.5 GB there, and
memory holds a batch. Shapes: B images, T tokens, C channels, H heads of width C/H, K classes.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from selfvil import optim
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import TOKENS, Features, require_disk, shared_classes
from selfvil.evaluate.linear import require_probe_labels, stratified_split
from selfvil.evaluate.task import Figure, Score, Task
from selfvil.models.adapter import adapt
from selfvil.settings import Section

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
_HEAD_WIDTH = 64
_INITIAL_STD = 0.02
_CHUNK = 1_024  # images scored at once


class Settings(Section):
    """Accuracy of an attentive probe: a learned query attends to the patch tokens. Raw pixels have no score."""

    learning_rates: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]],
        BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
        Field(min_length=1),
    ] = list(LEARNING_RATES)  # noqa: RUF012
    """Learning rates to choose from on held-out images, around the published 0.001."""
    epochs: int = Field(20, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(256, ge=2)
    """Images in a step; published: 1,024, for the 1.3 million images of ImageNet."""
    weight_decay: float = Field(0.001, ge=0)
    """Weight decay of AdamW, on all weights but biases."""
    heads: int | None = Field(None, ge=1)
    """Attention heads, which must divide the width of a token; null: of 64 channels each, where that is possible."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images of each class on which the learning rate is chosen."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError for too few classes or images, heads that do not divide the width, or too little disk space."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), None)
    if task.network is not None:
        backbone, normalisation = task.network.backbone, task.network.normalisation
        num_heads(adapt(backbone).token_dim, settings.heads)
        device, training = next(backbone.parameters()).device, backbone.training
        with torch.no_grad():
            image = torch.zeros(1, normalisation.channels, *normalisation.img_size, device=device)
            adapter = adapt(backbone.eval())
            patches = adapter.split_tokens(adapter.forward_features(image))[1]
        backbone.train(training)
        require_disk((len(task.train) + len(task.test), *patches.shape[1:]))
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [] if task.network is None else [TOKENS]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy after the last step, with the chosen learning rate."""
    if task.network is None:
        return

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        correct, chosen, held_out = attentive_probe(
            train, test, learning_rates=settings.learning_rates, epochs=settings.epochs,
            batch_size=settings.batch_size, weight_decay=settings.weight_decay, heads=settings.heads,
            holdout=settings.holdout, seed=task.seed, device=task.device,
        )  # fmt: skip
        details = {"chosen": {"learning_rate": chosen}, "held_out": held_out}
        yield task.top1("attentive", "attentive probe", correct, test.y, **details)

    yield from task.score_features(TOKENS, fit, settings.model_dump(mode="json"))


def num_heads(width: int, heads: int | None) -> int:
    """`heads`, or the largest number of heads of at least 64 channels. Raises UserError unless it divides `width`."""
    if heads is None:
        return max(count for count in range(1, max(1, width // _HEAD_WIDTH) + 1) if width % count == 0)
    if width % heads:
        raise UserError(f"attentive.heads = {heads} does not divide the {width} channels of a token of this network.")
    return heads


class AttentiveHead(nn.Module):
    """Tokens (B, T, C) to scores (B, K)."""

    def __init__(self, width: int, num_classes: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(heads, width // heads))
        self.key, self.value = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
        self.classifier = nn.Linear(width, num_classes)
        for weight in (self.query, self.key, self.value, self.classifier.weight):
            nn.init.normal_(weight, 0, _INITIAL_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (weight.unflatten(0, (self.heads, -1)) for weight in (self.key, self.value))  # (H, C/H, C)
        probes = torch.einsum("hd,hdc->hc", self.query, key) / math.sqrt(self.query.shape[1])
        attention = (x @ probes.T).softmax(dim=1)
        pooled = attention.mT @ x
        return self.classifier(torch.einsum("bhc,hdc->bhd", pooled, value).flatten(1))


def attentive_probe(
    train: Features,
    test: Features,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 20,
    batch_size: int = 256,
    weight_decay: float = 0.001,
    heads: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float, dict[str, float | None]]:
    """Fit on the tokens of `train`, score on `test`.

    Batches move to `device`; the tokens stay where they are. Returns whether each test image is classified correctly,
    bool (N,); the chosen learning rate; and percent on the held-out images by learning rate, None where it diverged.

    Raises UserError for tokens that do not fit each other, test labels absent from train, fewer than two classes, too
    few images to hold any out, heads that do not divide C, or if every learning rate diverges.
    """
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, None)
    width = train.x.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = AttentiveHead(width, len(classes), num_heads(width, heads)).to(device)

    def trained(rows: Tensor, rates: Sequence[float]) -> "_Probe":
        probe = _Probe(initial, rates, weight_decay, device)
        probe.train(train.x, y, rows, epochs=epochs, batch_size=batch_size, seed=seed)
        return probe

    fitted, held = stratified_split(y, holdout, seed)
    rates = sorted(set(learning_rates))
    held_out = trained(fitted, rates).accuracies(train.x, y, held)
    best = max(range(len(rates)), key=lambda i: (held_out[i], -i))
    if held_out[best] < 0:
        raise UserError("The attentive probe diverged at every learning rate: give smaller learning_rates.")
    final = trained(torch.arange(len(y)), [rates[best]])
    correct = final.correct(test.x, truth, torch.arange(len(truth)))[0]
    table = {f"{rate:g}": None if value < 0 else round(value, 3) for rate, value in zip(rates, held_out)}
    return correct, rates[best], table


class _Probe:
    """Heads with the same initial weights, one for each learning rate, on the same normalised tokens."""

    def __init__(self, initial: AttentiveHead, rates: Sequence[float], weight_decay: float, device: Any) -> None:
        self.device, self.rates = device, rates
        self.norm = nn.BatchNorm1d(initial.key.shape[1], affine=False).to(device)
        self.heads = [copy.deepcopy(initial) for _ in rates]
        self.optimizers = [
            torch.optim.AdamW([
                {"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in head.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ])
            for head in self.heads
        ]  # fmt: skip

    def _tokens(self, x: Tensor, rows: Tensor) -> Tensor:
        """Normalised float32 tokens (B, T, C) of the images `rows`."""
        tokens = x[rows].to(self.device).float()
        return self.norm(tokens.flatten(0, 1)).view_as(tokens)

    def train(self, x: Tensor, y: Tensor, rows: Tensor, *, epochs: int, batch_size: int, seed: int) -> None:
        self.norm.train()
        generator = torch.Generator().manual_seed(seed)
        batch_size = min(batch_size, len(rows))
        steps = len(rows) // batch_size
        for epoch in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for number in range(steps):
                chosen = (
                    order[number * batch_size : (number + 1) * batch_size].sort().values
                )  # sorted: faster from disk
                tokens, targets = self._tokens(x, chosen), y[chosen].to(self.device)
                for rate, head, optimizer in zip(self.rates, self.heads, self.optimizers):
                    for group in optimizer.param_groups:
                        group["lr"] = optim.cosine(epoch * steps + number, epochs * steps, rate, 0.0)
                    optimizer.zero_grad()
                    F.cross_entropy(head(tokens), targets).backward()
                    optimizer.step()

    @torch.no_grad()
    def correct(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """bool (L, len(rows)): whether the head of each learning rate classifies these images correctly."""
        self.norm.eval()
        parts = []
        for chosen in rows.split(_CHUNK):
            tokens = self._tokens(x, chosen)
            parts.append(torch.stack([head(tokens).argmax(dim=1).cpu() == y[chosen] for head in self.heads]))
        return torch.cat(parts, dim=1)

    def accuracies(self, x: Tensor, y: Tensor, rows: Tensor) -> list[float]:
        """In percent, for each learning rate; -1 for one whose weights are not finite."""
        values = (100 * self.correct(x, y, rows).double().mean(dim=1)).tolist()
        finite = [all(bool(p.isfinite().all()) for p in head.parameters()) for head in self.heads]
        return [value if fine else -1.0 for value, fine in zip(values, finite)]
