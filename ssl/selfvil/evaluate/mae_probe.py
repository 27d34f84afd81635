"""The linear probe of MAE: batch normalisation without affine parameters, a linear head, LARS.

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021 (arXiv 2111.06377), appendix A.2, and
`main_linprobe.py`: 90 epochs of 16,384 images, learning rate 0.1 · batch / 256, 10 epochs of warm-up, a cosine to 0,
momentum 0.9, no weight decay, trust coefficient 0.001.

Two differences. MAE crops images at random in every epoch; here features of centre crops are computed once, as in the
other evaluations. And 16,384 images are 78 steps of an ImageNet epoch: by default, other data sets get batches that
give 78 steps too, with the published rule for the learning rate. Nothing is chosen, so no images are held out. The
published feature is the class token: `readout=cls`.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.optim import Lars
from torch import Tensor, nn

from selfvil import optim
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.features import Features, FeatureSettings, shared_classes
from selfvil.evaluate.linear import require_probe_labels
from selfvil.evaluate.task import Figure, Score, Task

_STEPS_PER_EPOCH = 78  # 1,281,167 images of ImageNet-1K in batches of 16,384
_SMALLEST_BATCH = 32  # normalisation by the statistics of fewer images would add noise
_EPS = 1e-6
_INITIAL_STD = 0.01
_CHUNK = 4_096  # images scored at once


class Settings(FeatureSettings):
    """Accuracy of a linear head by MAE's protocol: affine-free batch normalisation and LARS."""

    epochs: int = Field(90, ge=1)
    """Passes over the training images."""
    base_lr: float = Field(0.1, gt=0, le=1e6)
    """Learning rate for 256 images; it is multiplied by batch_size / 256."""
    warmup: int = Field(10, ge=0)
    """Epochs of linear warm-up, of a run of 90; a shorter run has the same share."""
    batch_size: int | None = Field(None, ge=2)
    """Images in a step; null: as many as give 78 steps an epoch, at least 32: 16,384 for ImageNet."""
    probe_seeds: int = Field(1, ge=1)
    """Number of probes, whose mean and deviation are reported; each has other batches and initial weights."""


def check(task: Task, settings: Settings) -> list[str]:
    """Raises UserError if there are fewer than two classes or images."""
    warnings = check_classes(task.train, task.test, task.allow_shared)
    require_probe_labels(torch.as_tensor(task.train.labels), 1)
    return warnings


def needs(task: Task, settings: Settings) -> list[str | None]:
    return [settings.readout]


def evaluate(task: Task, settings: Settings) -> Iterator[Score]:
    """Top-1 accuracy after the last step."""

    def fit(train: Features, test: Features) -> Iterator[Figure]:
        correct = [
            mae_probe(
                train, test, epochs=settings.epochs, base_lr=settings.base_lr, warmup=settings.warmup,
                batch_size=settings.batch_size, seed=seed,
            )
            for seed in range(task.seed, task.seed + settings.probe_seeds)
        ]  # fmt: skip
        used = batch_of(len(train), settings.batch_size)
        yield task.top1("mae_probe", "linear probe of MAE", torch.stack(correct), test.y, batch_size=used)

    return task.score_features(settings.readout, fit, settings.model_dump(mode="json"))


def batch_of(num_train: int, batch_size: int | None) -> int:
    """Images in a step: `batch_size`, or as many as give ImageNet's number of steps; at most all."""
    return min(num_train, batch_size or max(_SMALLEST_BATCH, num_train // _STEPS_PER_EPOCH))


def mae_probe(
    train: Features,
    test: Features,
    *,
    epochs: int = 90,
    base_lr: float = 0.1,
    warmup: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Whether each image of `test` is classified correctly, bool (N,), by a head that was trained on `train`.

    The last, incomplete batch of an epoch is left out. Computed in float32 on the device of `train.x`. Raises UserError
    for features that do not fit each other, test labels absent from train, fewer than two classes or images, or if
    training diverges.
    """
    classes, y, truth = shared_classes(train, test)
    require_probe_labels(train.y, 1)
    if len(train) < 2:
        raise UserError("Batch normalisation needs at least two training images.")
    x, device = train.x, train.x.device
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(x.shape[1], eps=_EPS, affine=False).to(device)
    weight = nn.Parameter(
        torch.empty(len(classes), x.shape[1]).normal_(0, _INITIAL_STD, generator=generator).to(device)
    )
    bias = nn.Parameter(torch.zeros(len(classes), device=device))
    groups = [{"params": [weight], "always_adapt": True}, {"params": [bias]}]  # LARS scales matrices alone
    optimizer = Lars(groups, momentum=0.9, trust_coeff=0.001)
    batch = batch_of(len(x), batch_size)
    steps = len(x) // batch
    total, peak = epochs * steps, base_lr * batch / 256
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(device)
        for number in range(steps):
            chosen = order[number * batch : (number + 1) * batch]
            for group in optimizer.param_groups:
                group["lr"] = optim.cosine(epoch * steps + number, total, peak, 0.0, round(warmup / 90 * total))
            loss = F.cross_entropy(F.linear(norm(x[chosen].float()), weight, bias), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if not math.isfinite(float(weight.detach().sum())):
        raise UserError(f"The linear probe of MAE diverged: lower base_lr ({base_lr:g}).")
    norm.eval()
    with torch.no_grad():
        parts = test.x.to(x).split(_CHUNK)
        predicted = torch.cat([F.linear(norm(part.float()), weight, bias).argmax(dim=1) for part in parts])
    return (predicted == truth.to(device)).cpu()
