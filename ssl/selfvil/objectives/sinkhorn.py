"""Sinkhorn-Knopp: a teacher's answers to many samples, balanced so that every prototype answers equally many.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV, 2020), section 3.1,
as DINOv2 (Oquab et al., 2023) puts it in the place of centring. Shapes: M samples of this process, K prototypes.
"""

import torch
from torch import Tensor

from selfvil.objectives.processes import gather

FEWEST_IMAGES = 16
"""Images below which we refuse to balance: with a handful, equal shares say which crops met, not what they show."""


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Answers (M, K) float32, each of sum 1, while each prototype has nearly the same sum over samples.

    Samples of all processes are balanced together; all must call this equally often, and M may differ or be 0.

    Args:
        logits: of the teacher, (M, K), of any floating dtype.
        temperature: they are divided by it first.
        iterations: of scaling prototypes, then samples; three, as published.
    """
    # In logarithms, where nothing overflows, and where the published factors 1/K and 1/M cancel from step to step.
    scores = logits.float() / temperature
    for _ in range(iterations):
        scores = scores - _log_sum_over_samples(scores)
        scores = scores.log_softmax(dim=1)
    return scores.exp()


def _log_sum_over_samples(scores: Tensor) -> Tensor:
    ours = scores.logsumexp(dim=0)  # -inf where this process has no samples
    return torch.stack(gather(ours)).logsumexp(dim=0)
