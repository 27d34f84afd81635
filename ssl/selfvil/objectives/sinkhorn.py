"""Sinkhorn-Knopp: a teacher's targets for many samples, balanced so that every prototype has the same total weight.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV, 2020), section 3.1,
which DINOv2 (Oquab et al., 2023) uses instead of centring. Shapes: M samples of this process, K prototypes.
"""

import torch
from torch import Tensor

from selfvil.objectives.distributed import gather

FEWEST_IMAGES = 16
"""Minimum number of images: with fewer, balanced targets depend more on which images share a batch than on content."""


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets (M, K), float32: each row sums to 1, and each column has nearly the same sum over all samples.

    Samples of all processes are balanced together; all must call this equally often, and M may differ or be 0.

    Args:
        logits: the teacher's logits (M, K), of any floating dtype.
        temperature: divides the logits first.
        iterations: each normalises columns, then rows; three, as published.
    """
    # In log space, where nothing overflows and the published factors 1/K and 1/M cancel between iterations.
    scores = logits.float() / temperature
    for _ in range(iterations):
        scores = scores - _log_sum_over_samples(scores)
        scores = scores.log_softmax(dim=1)
    return scores.exp()


def _log_sum_over_samples(scores: Tensor) -> Tensor:
    local = scores.logsumexp(dim=0)  # -inf if this process has no samples
    return torch.stack(gather(local)).logsumexp(dim=0)
