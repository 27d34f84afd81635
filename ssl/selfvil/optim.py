"""Parameter groups, schedules and clipping: everything about the optimizer that is not the optimizer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from selfvil.errors import UserError

NAME_SEPARATOR = "|"  # between a parameter's name and its optimizer state in a checkpoint; no module name holds it


BACKBONE = "backbone"
"""The tag of the parameters of an objective's backbone to which the objective gives no tag."""


# --- parameter groups ------------------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module,
    no_weight_decay: Iterable[str] = (),
    tags: Mapping[str, str] | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """AdamW groups of the trainable parameters: decayed or not, by tag and by rate; each group lists its `names`.

    Tensors of fewer than two dimensions (norms, biases, LayerScale, skips, gate biases) and those in `no_weight_decay`
    (positions, tokens) are not decayed: weight decay pulls towards 0, which is not a neutral value for them. `tags`
    gives parameters, by name, a tag by which `set_rates` scales their learning rate; `lr_scales` gives them a constant
    factor on it.
    """
    exempt, tags, lr_scales = set(no_weight_decay), tags or {}, lr_scales or {}
    groups: dict[tuple[bool, str, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay, tag, scale = parameter.ndim >= 2 and name not in exempt, tags.get(name, ""), lr_scales.get(name, 1.0)
            empty: dict = {"params": [], "names": [], "decay": decay, "tag": tag, "lr_scale": scale}
            group = groups.setdefault((decay, tag, scale), empty)
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def layer_lr_scales(model: nn.Module, layer_decay: float = 1.0, patch_embed: float = 1.0) -> dict[str, float]:
    """Factor on the learning rate of each trainable parameter of a timm model, by name.

    A layer's learning rate is `layer_decay` times that of the layer above it (Bao et al., "BEiT", 2021). Layers are
    timm's: a pair of blocks of a Vision-LSTM is one layer, and the classifier is the last, where there is one. The rate
    of the patch embedding is multiplied by `patch_embed` as well (0.2 in Oquab et al., "DINOv2", 2023).
    """
    layers = param_groups_layer_decay(model, layer_decay=layer_decay)
    scales = {id(parameter): layer["lr_scale"] for layer in layers for parameter in layer["params"]}
    return {
        name: scales[id(parameter)] * (patch_embed if name.startswith("patch_embed.") else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over `groups`, in its fused form; rates are set before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> None:
    """Set the learning rate of all groups, scaled by group and tag, and the weight decay of those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] * (lr_scales or {}).get(group["tag"], 1.0)
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


# --- schedules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` counts optimizer steps from 0; `steps_per_epoch` may be fractional."""

    step: int
    total_steps: int
    steps_per_epoch: float
    seed: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step / self.steps_per_epoch


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """Value at `step` of a half cosine from `start` to `end` after a linear rise from 0 over `warmup` steps.

    The published DINO schedule: the rise is `linspace(0, start, warmup)`, so the last step of the warm-up already has
    `start`, and the last step of the run is one step before `end`.
    """
    if step < warmup:
        return start * step / max(1, warmup - 1)
    phase = (step - warmup) / max(1, total - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * phase))


def warmup_stable_decay(step: int, total: int, start: float, end: float, warmup: int, decay: int) -> float:
    """Value at `step` of a rise over `warmup` steps as in `cosine`, `start`, and a fall to `end` over the last `decay`.

    The fall is 1 - sqrt(share of the fall that is done) (Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations", 2024). A run can be prolonged from any checkpoint before it. With a `decay` of 0
    the value stays at `start`.
    """
    if step < warmup:
        return start * step / max(1, warmup - 1)
    done = max(0.0, (step - (total - decay)) / max(1, decay))
    return end + (start - end) * (1 - math.sqrt(done))


# --- gradients and state ---------------------------------------------------------------------------------------------


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, per_tensor: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Clip gradients in place; return the norm of all of them together, and each one's, both before clipping.

    Parameters without a gradient are left out. Norms are 0-dim tensors. With `per_tensor`, each parameter's gradient
    is clipped to `max_norm` by itself, as the published DINO does.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = list(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None and per_tensor:
        torch._foreach_mul_(grads, [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
    elif max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach=True)
    return total, norms


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimizer as named tensors, `parameter|state`, ready for a safetensors file."""
    return {
        f"{name}{NAME_SEPARATOR}{key}": value
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, onto each parameter's device. Raises UserError as `by_parameter`."""
    parameters = dict(_named(optimizer))
    for name, state in by_parameter(tensors, parameters).items():
        device = parameters[name].device
        optimizer.state[parameters[name]] = {key: value.to(device, copy=True) for key, value in state.items()}


def by_parameter(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Named tensors of `optimizer_tensors` as the state of each parameter.

    Raises:
        UserError: the tensors belong to other parameters than those called `names`.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(NAME_SEPARATOR)
        states.setdefault(name, {})[key] = tensor
    if unknown := set(states) - set(names):
        raise UserError(
            f"the optimizer state of the checkpoint has {len(unknown)} parameters that this model lacks, "
            f"such as {min(unknown)}: it belongs to another architecture"
        )
    return states


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"])]
