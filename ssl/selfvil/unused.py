"""Parameters that an objective's loss does not depend on, such as the norm in ConvNeXt's classifier.

DDP expects a gradient for every trained parameter and ends with an error when one has none. Its option
`find_unused_parameters` would search the graph at every step. Which parameters are used never changes during a run, so
they are found once, in a forward and backward pass over two blank images.
"""

from contextlib import AbstractContextManager

import torch

from selfvil.data.views import preserved_randomness
from selfvil.errors import UserError
from selfvil.memory import blank_batch
from selfvil.objectives.base import Objective, Progress


def freeze_unused(objective: Objective, channels: int, device: torch.device, autocast: AbstractContextManager) -> int:
    """Set requires_grad to False for the parameters without a gradient, and return how many numbers they hold.

    They keep their values: the optimizer has no state for them and weight decay does not change them. Every process of
    a launch must call this, since an objective's forward pass may contain collectives.

    Args:
        objective: on `device`, before DDP or DeepSpeed wraps it. Its weights, buffers and mode are left unchanged.
        channels: of an image.
        autocast: a fresh context of the run's precision.

    Raises:
        UserError: the loss depends on no parameter at all.
    """
    batch = blank_batch(objective.views(), 2, channels).to(device)
    progress = Progress(step=0, total_steps=1, steps_per_epoch=1.0, seed=0)
    training = objective.training
    objective.eval()  # running statistics and centres must not change
    try:
        with preserved_randomness():
            with autocast:
                loss = objective(batch, progress).loss
            trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else ()
    finally:
        objective.train(training)
    if not gradients or all(gradient is None for gradient in gradients):
        raise UserError(f"the loss of {type(objective).__name__} depends on no parameter of its networks")
    unused = [parameter for parameter, gradient in zip(trained, gradients) if gradient is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in unused)
