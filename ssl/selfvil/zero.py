"""DeepSpeed's ZeRO-1, -2 and -3: the run of DDP, its optimizer state divided among the processes.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020). DeepSpeed lays the
parameters of a group end to end in one flat vector and gives each process an equal part of it, which need not begin
or end where a parameter does. That process alone holds the part's AdamW state and, after backward, its gradients.
ZeRO-3 divides each large parameter by itself, and puts it together for as long as a layer needs it: for an objective
without a teacher, which could not follow what is not there.

Two things are ours, so that loss, clipping, schedules and teacher are those of DDP to rounding:

- Weights stay float32, as run.precision promises, and bf16 is autocast. DeepSpeed's own bf16 mode trains on rounded
  weights, from which the small steps of a teacher would be lost. With float32 the weights are the master weights.
- Gradients are clipped here: DeepSpeed has no clipping of single tensors.

A checkpoint holds whole tensors by parameter's name, as without DeepSpeed: any number of processes may go on from it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from selfvil import optim
from selfvil.errors import UserError

# Settings of DeepSpeed that were tried, or do nothing here; with any other, what is computed would be a guess.
_SETTINGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "torch_autocast", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print",
    "wall_clock_breakdown",
}  # fmt: skip
_ZERO_SETTINGS = {
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip

WHOLE = 1_000_000
"""Under ZeRO-3, numbers in a parameter up to which every process keeps it whole. Above are the matrices of linear
layers; what one module reads from another (positions, gates, convolutions), unforeseen by DeepSpeed, is below."""


def apply_recipe(
    settings: dict[str, Any], *, batch_size: int, accumulate: int, world_size: int, clip_norm: float | None, bf16: bool,
    has_teacher: bool, looks: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Write what the recipe says into DeepSpeed's settings, in place; return a sentence for each that gave way.

    looks: keys of the recipe by which the main process alone would run the networks, which under ZeRO-3 none can.

    Raises:
        UserError: the settings ask for something that is not tested, or that cannot be right.
    """
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)
    if stage == 3 and has_teacher:
        raise UserError(
            "ZeRO-3 divides the weights, so a teacher that follows them would silently miss its updates: use ZeRO-2"
        )
    if stage == 3 and looks:
        raise UserError(
            f"ZeRO-3 divides the weights, so no process can look at the networks by itself: set {' and '.join(looks)} "
            f"to null, or use ZeRO-2"
        )
    unknown = [key for key in settings if key not in _SETTINGS]
    unknown += [f"zero_optimization.{key}" for key, value in zero.items() if key not in _ZERO_SETTINGS or _set(value)]
    if unknown:
        raise UserError(f"DeepSpeed's {' and '.join(sorted(unknown))}: not tested with selfvil; leave it out")
    ours: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // (accumulate * world_size),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_norm or 0.0,
    }
    gave_way = [
        f"DeepSpeed's {key} = {settings[key]} gives way to the recipe's {value}"
        for key, value in ours.items()
        if settings.get(key, "auto") not in ("auto", value)
    ]
    gave_way += [
        f"DeepSpeed's {key} gives way to run.precision: weights stay float32, bf16 is autocast"
        for key in ("bf16", "fp16", "torch_autocast")
        if settings.get(key, {}).get("enabled", False) not in ("auto", False)
    ]
    off = {"enabled": False}
    # No module is safe for lower precision in the sense of DeepSpeed: that would add up its gradients in bf16.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []} if bf16 else off
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE
        zero["memory_efficient_linear"] = False  # its own backward rounds otherwise than autocast's
    settings.update(ours | {"gradient_clipping": 0.0, "bf16": off, "fp16": off, "torch_autocast": autocast})
    return gave_way


def _set(value: Any) -> bool:
    """Whether a value of zero_optimization asks for offloading, or to be guessed from a language model's width."""
    return value == "auto" or (isinstance(value, dict) and value.get("device", "none") not in (None, "none"))


def numel(parameter: Any) -> int:
    """Numbers in a parameter, which ZeRO-3 leaves empty where it is divided."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Zero:
    """A prepared objective under DeepSpeed: what the loop does by Accelerate elsewhere.

    engine: DeepSpeed's, around the objective. optimizer: as prepared; its groups keep their `names`, and hold the flat
    part of this process in place of parameters.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine, self.optimizer = engine, optimizer
        self.stage = int(engine.zero_optimization_stage())
        # Name, parameter, and the flat vector of this process in which a part of it may lie; the same order everywhere.
        self._trained: list[tuple[str, Any, Tensor]] = [
            (name, parameter := engine.module.get_parameter(name), self._flat(parameter, group, index))
            for group in optimizer.param_groups
            for index, name in enumerate(group["names"])
        ]

    def _flat(self, parameter: Any, group: dict[str, Any], index: int) -> Tensor:
        if self.stage == 3:
            zero3 = parameter._z3_optimizer
            return zero3.fp32_partitioned_groups_flat[zero3.grad_position[zero3.get_param_id(parameter)][0]]
        return group["params"][index if self.stage == 0 else 0]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process holds all weights whole, to be read; all must enter it. Below ZeRO-3 they are."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; after the last one of a step they are those of all processes."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, update: bool = True) -> None:
        """Update the weights on all processes and drop the gradients; without `update`, only drop the gradients.

        DeepSpeed drops gradients, in whatever form each stage keeps them, only as a part of its own step.
        """
        if update:
            self.engine.step()
            return
        adamw = self.engine.basic_optimizer
        adamw.step = lambda *_, **__: None
        try:
            self.engine.step()
        finally:
            del adamw.step  # the method of its class again

    def clip_gradients(self, max_norm: float | None, per_tensor: bool = False) -> Tensor:
        """`optim.clip_gradients`, where each process holds only parts of the gradients: their squares are added up."""
        trained = [parameter for _, parameter, _ in self._trained]
        if self.stage == 0:
            return optim.clip_gradients(trained, max_norm, per_tensor)
        parts = [self._gradient(parameter) for parameter in trained]
        ours = [part for part in parts if part is not None]
        norms = iter(torch._foreach_norm(ours) if ours else [])
        nothing = torch.zeros((), device=trained[0].device)
        squares = torch.stack([nothing if part is None else next(norms).square() for part in parts])
        distributed.all_reduce(squares)
        total = squares.sum().sqrt()
        if max_norm is not None and ours:
            scales = (max_norm / ((squares.sqrt() if per_tensor else total) + 1e-6)).clamp(max=1.0).expand(len(parts))
            torch._foreach_mul_(ours, [scale for scale, part in zip(scales, parts) if part is not None])
        return total

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """`optim.optimizer_tensors`, on the CPU of process 0, put together from all processes: all must call this."""
        if self.stage == 0:
            return optim.optimizer_tensors(self.optimizer)
        tensors: dict[str, Tensor] = {}
        for name, parameter, flat in self._trained:
            for key, value in self.optimizer.state[flat].items():
                whole = value
                if value.ndim:
                    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty one behind
                    whole = torch.zeros(shape.numel(), dtype=value.dtype, device=value.device)
                    for here, there in self._part(parameter):
                        whole[there] = value[here]
                    distributed.all_reduce(whole)
                    whole = whole.view(shape)
                if distributed.get_rank() == 0:
                    tensors[f"{name}{optim.NAME_SEPARATOR}{key}"] = whole.cpu()
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`: each process takes its part. Raises UserError as `optim` does."""
        if self.stage == 0:
            optim.load_optimizer_tensors(self.optimizer, tensors)
            return
        states = optim.by_parameter(tensors, [name for name, _, _ in self._trained])
        for name, parameter, flat in self._trained:
            for key, value in states.get(name, {}).items():
                state = self.optimizer.state[flat]
                if not value.ndim:  # the number of steps, the same for all parameters
                    state[key] = value.to(flat.device, copy=True)
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(flat)
                for here, there in self._part(parameter):
                    state[key][here] = value.flatten()[there].to(flat.device)

    # DeepSpeed hangs the place of a parameter in this process's flat vector on the parameter, as `_hp_mapping`: None if
    # no part of it lies there. Its own safe_get_full_... read it too, but send whole tensors around, one by one.

    # Under ZeRO-3 a parameter's equal parts, the last one padded, lie at `grad_position` of a flat vector.

    def _gradient(self, parameter: Any) -> Tensor | None:
        if self.stage == 3:
            part = self._part(parameter)
            gradient = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
            return gradient.flatten()[: part[0][1].stop - part[0][1].start] if part else None
        if parameter._hp_mapping is None:
            return None
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _part(self, parameter: Any) -> list[tuple[slice, slice]]:
        """Where in the flat vector, and where in the flattened parameter, their common part lies; none, or one."""
        if self.stage == 3:
            zero3 = parameter._z3_optimizer
            _, offset, size = zero3.grad_position[zero3.get_param_id(parameter)]
            start = distributed.get_rank() * size
            count = min(size, parameter.ds_numel - start)
            return [(slice(offset, offset + count), slice(start, start + count))] if count > 0 else []
        if parameter._hp_mapping is None:
            return []
        here, there = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        return [(slice(here.start, here.start + here.numel), slice(there.start, there.start + there.numel))]
