"""Vital signs: numbers that change before a loss or a score shows a problem. `collapse.py` judges them.

Shapes: N images, V views of each, D features, B images of a batch.
"""

import math
import statistics
import time
from collections.abc import Collection, Mapping

import torch
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from selfvil.diagnostics.gates import gate_vitals, record_forget_gates
from selfvil.evaluate.features import choose_readout
from selfvil.models.adapter import adapt
from selfvil.objectives.base import Batch, Objective, StepOutput

MOST_IMAGES = 96
"""Images of a batch that are measured: enough to detect a collapse at small cost."""

SETTLED = 10
"""Steps of a launch after which `teacher_follows` is measured: before, the distances are too small."""

_SAMPLE = 4096  # weights of each tensor from which distances are estimated


# --- features --------------------------------------------------------------------------------------------------------


def feature_vitals(features: Tensor) -> dict[str, float]:
    """Of features (N, D): `feature_std`; `rankme`; `rank_share`, rankme over its maximum; `alpha_req` if defined."""
    x = features.detach().double().cpu()
    rank = rankme(x)
    values = {"feature_std": feature_std(x), "rankme": rank, "rank_share": rank / min(x.shape)}
    alpha = alpha_req(x)
    return values if alpha is None else values | {"alpha_req": alpha}


def feature_std(x: Tensor) -> float:
    """Standard deviation of features (N, D) on the unit sphere, times √D: 1 if they are isotropic, 0 if constant.

    Chen and He, "Exploring Simple Siamese Representation Learning" (2021), figure 2.
    """
    return float(std_of_l2_normalized(x)) * math.sqrt(x.shape[1])


def rankme(x: Tensor) -> float:
    """Effective number of dimensions of features (N, D), from 1 to min(N, D).

    Garrido et al., "RankMe" (2023), equation 1: the exponential of the entropy of the singular values.
    """
    return _effective_number(torch.linalg.svdvals(x.double()))


def alpha_req(x: Tensor) -> float | None:
    """Power α of the decay i^-α of the eigenvalues of the covariance of features (N, D); None with fewer than three.

    Agrawal et al., "α-ReQ" (2022); near 1 is best. A linear fit on log-log axes, with weights 1/i, since most
    points belong to small eigenvalues.
    """
    eigenvalues = torch.linalg.svdvals(x.double() - x.double().mean(dim=0)).square()
    eigenvalues = eigenvalues[: min(len(x) - 1, x.shape[1])]
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * eigenvalues.max()]
    if len(eigenvalues) < 3:
        return None
    index = torch.arange(1, len(eigenvalues) + 1, dtype=torch.float64)
    log_index, log_value, weight = index.log(), eigenvalues.log(), 1 / index
    weight = weight / weight.sum()
    centred = log_index - (weight * log_index).sum()
    return -float((weight * centred * log_value).sum() / (weight * centred.square()).sum())


def lidar(x: Tensor, delta: float = 1e-4) -> float:
    """Effective number of dimensions in which images differ more than views of one image; x is (N, V, D), V >= 2.

    Thilak et al., "LiDAR" (2023), equations 2 to 5: the exponential of the entropy of the eigenvalues of
    Σw^-½ Σb Σw^-½, with Σb the scatter of the images' means, and Σw that of views about them, plus `delta`. An N × N
    product has the same non-zero eigenvalues, so no D × D matrix is inverted.
    """
    x = x.double()
    num_images, num_views, _ = x.shape
    means = x.mean(dim=1)
    between = (means - means.mean(dim=0)) / math.sqrt(num_images)
    within = (x - means[:, None]).flatten(0, 1) / math.sqrt(num_images * num_views)
    # (Σw + δ)^-1 = (1 - Wᵀ (δ + W Wᵀ)^-1 W) / δ, by Woodbury.
    crossed = within @ between.mT
    inner = within @ within.mT + delta * torch.eye(len(within), dtype=x.dtype, device=x.device)
    product = (between @ between.mT - crossed.mT @ torch.linalg.solve(inner, crossed)) / delta
    return _effective_number(torch.linalg.eigvalsh(product).clamp_min(0))


def _effective_number(sizes: Tensor) -> float:
    share = sizes / sizes.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


def lidar_vitals(views: Tensor) -> dict[str, float]:
    """`lidar` of features (N, V, D), and `lidar_share`, lidar over its maximum."""
    rank = lidar(views.cpu())
    return {"lidar": rank, "lidar_share": rank / min(len(views), views.shape[2])}


# --- a run -----------------------------------------------------------------------------------------------------------


class Vitals:
    """Measures the vital signs of an objective in training.

    At a step that is measured, the loop calls `before_step` before the optimizer changes the weights, while gradients
    are available, and `after_step` after the update of the teacher. The run does not change: no random numbers are
    drawn, and no buffer is updated.
    """

    def __init__(self, objective: Objective, first_step: int = 0) -> None:
        self.objective = objective
        self._first_step = first_step
        self.readout = choose_readout(objective.backbone)
        self.teacher = (
            objective.get_submodule(objective.networks["teacher"].removesuffix("."))
            if "teacher" in objective.networks
            else None
        )
        self._start = _sample(objective.backbone)
        self._teachers_start = None if self.teacher is None else _sample(self.teacher)
        self._before = self._start
        self._typical = typical_weight(objective.backbone)
        self._gradients: dict[str, float] = {}
        self._classifier = {name for name, tag in objective.tags().items() if tag == "head"}

    def before_step(self, norms: Mapping[str, Tensor]) -> None:
        """norms: of the gradients of the parameters, by name."""
        self._before = _sample(self.objective.backbone)
        self._gradients = gradient_norms(norms, self._classifier)

    @torch.no_grad()
    def after_step(self, step: int, lr: float, batch: Batch, output: StepOutput) -> dict[str, float]:
        """All vital signs after `step` steps. lr: of the last step. batch, output: of its last micro-batch."""
        began, was_training = time.monotonic(), self.objective.training
        self.objective.eval()
        try:
            values = self._gradients | self._weights(step, lr) | self._of_images(batch)
            trivial = self.objective.trivial_loss(batch)
        finally:
            self.objective.train(was_training)
        if trivial is not None:
            values["explained"] = 1 - float(output.loss.detach() / trivial)
        values["seconds"] = time.monotonic() - began
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _weights(self, step: int, lr: float) -> dict[str, float]:
        """Speed of the weights, and distances of the teacher.

        `typical_weight`: of the backbone at the launch. `relative_lr`: the learning rate (about the largest change of a
        weight by AdamW) over `typical_weight`. `speed`: norm of the last step over the norm of the weights.
        `teacher_lag`: distance from the student to the teacher in steps, at most the steps of the run so far; the
        length of a step is that of the last one or the mean since the launch, whichever is larger. `teacher_follows`:
        distance the teacher has moved since the launch, over that of the student.
        """
        now, steps = _sample(self.objective.backbone), step - self._first_step
        length, moved = float((now - self._before).norm()), float((now - self._start).norm())
        values = {
            "typical_weight": self._typical,
            "relative_lr": lr / self._typical,
            "speed": length / float(self._before.norm()),
        }
        if self.teacher is not None and self._teachers_start is not None and length > 0:
            teacher = _sample(self.teacher)
            distance = float((teacher - now).norm())
            values["teacher_lag"] = min(distance / max(length, moved / steps), float(step))
            if steps >= SETTLED:
                values["teacher_follows"] = float((teacher - self._teachers_start).norm()) / moved
        return values

    def _of_images(self, batch: Batch) -> dict[str, float]:
        """Features and gates of the exported network, in float32: rounding to bf16 would add to the rank."""
        backbone = self.objective.exported()
        same = [view for view in batch.views if view.shape == batch.views[0].shape][:2]
        images = [view[: MOST_IMAGES // len(same)] for view in same]
        with torch.autocast(images[0].device.type, enabled=False), record_forget_gates(backbone) as gates:
            features = adapt(backbone).read_out(torch.cat(images), self.readout).float()
        if not features.isfinite().all():  # a divergence, which the loop reports
            return {}
        views = features.unflatten(0, (len(images), -1)).transpose(0, 1)
        values = {"images": float(len(views))} | feature_vitals(views[:, 0]) | gate_vitals(gates)
        return values if len(images) == 1 else values | lidar_vitals(views)


def gradient_norms(norms: Mapping[str, Tensor], classifier: Collection[str] = ()) -> dict[str, float]:
    """Gradient norms of the patch embedding, of the rest of the backbone and of the heads (everything else), and
    `grad_reach`, the first over the last.

    norms: of the objective's parameters, by name. classifier: those of the backbone that are a head.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, norm in norms.items():
        backbone = name.startswith("backbone.") and name not in classifier
        group = "patch_embed" if name.startswith("backbone.patch_embed.") else "blocks" if backbone else "heads"
        groups.setdefault(group, []).append(norm)
    values = {f"grad_norm/{group}": float(torch.stack(part).norm()) for group, part in groups.items()}
    if values.get("grad_norm/heads", 0) > 0 and "grad_norm/patch_embed" in values:
        values["grad_reach"] = values["grad_norm/patch_embed"] / values["grad_norm/heads"]
    return values


def typical_weight(module: nn.Module) -> float:
    """The median over all matrices of the root mean square of their weights."""
    matrices = [parameter.detach() for parameter in module.parameters() if parameter.ndim >= 2]
    return statistics.median(float(matrix.norm()) / math.sqrt(matrix.numel()) for matrix in matrices)


def _sample(module: nn.Module) -> Tensor:
    """The first weights of each matrix in one float32 vector. Vectors are left out, since many are 0 at the start."""
    parts = [parameter.detach().flatten()[:_SAMPLE].float() for parameter in module.parameters() if parameter.ndim >= 2]
    return torch.cat(parts)
