"""DeepSpeed's ZeRO-1, -2 and -3: DDP's computation with the optimizer's state divided among the processes.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020). DeepSpeed
concatenates the parameters of a group to one flat vector and gives each process an equal part of it, whose bounds need
not be those of parameters. Only that process holds the part's AdamW state and, after the backward pass, its gradients.
ZeRO-3 also divides each large parameter, and gathers it while a layer uses it. ZeRO-3 is refused for objectives with a
teacher, because the teacher's update needs whole weights.

Two things differ from DeepSpeed's defaults, so that loss, clipping, schedules and teacher equal DDP's to rounding:

- Weights stay float32 and bf16 is autocast. DeepSpeed's bf16 mode trains on rounded weights, in which the small steps
  of a teacher would be lost.
- Gradients are clipped here, because DeepSpeed cannot clip each tensor by itself.

A checkpoint holds whole tensors by parameter name, so that a run may continue under any strategy and on any number of
processes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from selfvil import optim
from selfvil.engine.base import Engine, GradientNorms, clip_parts
from selfvil.errors import UserError
from selfvil.objectives import objective_class
from selfvil.objectives.base import Batch, Progress, StepOutput

if TYPE_CHECKING:
    from selfvil.recipe import Recipe

log = logging.getLogger("selfvil")

# DeepSpeed's settings that were tested, or have no effect here. Any other setting is refused.
_SETTINGS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "torch_autocast", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print",
    "wall_clock_breakdown",
}  # fmt: skip
_ZERO_SETTINGS = {
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
}  # fmt: skip

WHOLE = 1_000_000
"""Under ZeRO-3, every process keeps parameters of up to this many values whole. Above are the matrices of linear
layers. Below are parameters that one module reads from another (positions, gates, convolutions), which are not gathered
by DeepSpeed's hooks."""


BUCKET = 20_000_000
"""Largest number of values in one exchange between processes and, under ZeRO-3, in the weights that are whole at the
same time, unless the settings give another. DeepSpeed's defaults of 500 and 1,000 million suit language models: a whole
backbone fits into them, which would cost the memory that ZeRO saves."""


def apply_recipe(
    settings: dict[str, Any], *, batch_size: int, accumulate: int, world_size: int, clip_norm: float | None, bf16: bool,
    has_teacher: bool, compiled: bool = False,
) -> list[str]:  # fmt: skip
    """Overwrite DeepSpeed's settings, in place, with the recipe's; return one sentence for each value that differed.

    Raises:
        UserError: the settings request something that is not tested or would be wrong.
    """
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)
    if stage == 3 and has_teacher:
        raise UserError(
            "ZeRO-3 divides the weights, so a teacher that follows them would silently miss its updates: use ZeRO-2 "
            "or FSDP2 (launch/configs/fsdp2.yaml)"
        )
    if stage == 3 and compiled:
        raise UserError(
            "run.compile does not work under ZeRO-3, which gathers weights by hooks that torch.compile cannot trace: "
            "set run.compile=none, or use ZeRO-2 or FSDP2 (launch/configs/fsdp2.yaml)"
        )
    unknown = [key for key in settings if key not in _SETTINGS]
    unknown += [
        f"zero_optimization.{key}" for key, value in zero.items() if key not in _ZERO_SETTINGS or _unsupported(value)
    ]
    if unknown:
        raise UserError(f"DeepSpeed's {' and '.join(sorted(unknown))}: not tested with selfvil; leave it out")
    ours: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // (accumulate * world_size),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_norm or 0.0,
    }
    overwritten = [
        f"DeepSpeed's {key} = {settings[key]} is overwritten by the recipe's {value}"
        for key, value in ours.items()
        if settings.get(key, "auto") not in ("auto", value)
    ]
    overwritten += [
        f"DeepSpeed's {key} is overwritten by run.precision: weights stay float32, bf16 is autocast"
        for key in ("bf16", "fp16", "torch_autocast")
        if settings.get(key, {}).get("enabled", False) not in ("auto", False)
    ]
    off = {"enabled": False}
    # DeepSpeed would add up the gradients of "lower precision safe" modules in bf16, so there must be none.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []} if bf16 else off
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(key, BUCKET)
    if stage == 3:
        for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
            zero.setdefault(key, BUCKET)
        zero["stage3_param_persistence_threshold"] = WHOLE
        zero["memory_efficient_linear"] = False  # its backward pass rounds differently from autocast's
    settings.update(ours | {"gradient_clipping": 0.0, "bf16": off, "fp16": off, "torch_autocast": autocast})
    return overwritten


def _unsupported(value: Any) -> bool:
    """Whether a value of zero_optimization requests offloading, or is "auto", which DeepSpeed derives from the width of
    a language model."""
    return value == "auto" or (isinstance(value, dict) and value.get("device", "none") not in (None, "none"))


class Zero(Engine):
    """An objective under DeepSpeed. Groups of `optimizer` keep their `names`, and hold this process's flat part in
    place of parameters."""

    divides_optimizer = True

    def __init__(self, accelerator: Accelerator, recipe: "Recipe") -> None:
        super().__init__(accelerator, recipe)
        overwritten = apply_recipe(
            accelerator.deepspeed_plugin.deepspeed_config, batch_size=recipe.optim.batch_size,
            accumulate=recipe.optim.accumulate, world_size=self.world_size, clip_norm=recipe.optim.clip_norm,
            bf16=recipe.run.precision == "bf16",
            has_teacher="teacher" in objective_class(recipe.objective.name).networks
            or getattr(recipe.objective, "ema_decay", None) is not None,
            compiled=recipe.run.compile != "none",
        )  # fmt: skip
        accelerator.gradient_accumulation_steps = recipe.optim.accumulate
        for sentence in overwritten if self.is_main else []:
            log.warning(sentence)

    def wrap(self, groups: list[dict]) -> None:
        self.engine, self.optimizer = self.accelerator.prepare(self.objective, optim.adamw(groups, self.betas))
        self.stage = int(self.engine.zero_optimization_stage())
        self.strategy = f"zero{self.stage}"
        self.divides_optimizer, self.divides_weights = self.stage > 0, self.stage == 3
        # Name, parameter, and the flat vector of this process that holds a part of it; the same order everywhere.
        self._trained: list[tuple[str, Any, Tensor]] = [
            (name, parameter := self.objective.get_parameter(name), self._flat(parameter, group, index))
            for group in self.optimizer.param_groups
            for index, name in enumerate(group["names"])
        ]

    def _flat(self, parameter: Any, group: dict[str, Any], index: int) -> Tensor:
        if self.stage == 3:
            zero3 = parameter._z3_optimizer
            return zero3.fp32_partitioned_groups_flat[zero3.grad_position[zero3.get_param_id(parameter)][0]]
        return group["params"][index if self.stage == 0 else 0]

    def forward(self, batch: Batch, progress: Progress, last: bool) -> StepOutput:
        return self.engine(batch, progress)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, apply: bool = True) -> None:
        if apply:
            self.engine.step()
            return
        # DeepSpeed clears gradients, which each stage stores differently, only as a part of its own step.
        adamw = self.engine.basic_optimizer
        adamw.step = lambda *_, **__: None
        try:
            self.engine.step()
        finally:
            del adamw.step  # the method of its class again

    def clip_gradients(self, max_norm: float | None, per_tensor: bool = False) -> GradientNorms:
        names, trained = [name for name, *_ in self._trained], [parameter for _, parameter, _ in self._trained]
        if self.stage == 0:
            total, norms = optim.clip_gradients(trained, max_norm, per_tensor)
            return GradientNorms(total, dict(zip(names, norms)))
        parts = [self._gradient(parameter) for parameter in trained]
        return clip_parts(names, parts, max_norm, per_tensor, self.device)

    def numel(self, parameter: Tensor) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        # Parameters that are complete already, such as small ones between steps, would be divided at the end.
        divided = [parameter for parameter in self.objective.parameters() if parameter.numel() < self.numel(parameter)]
        with deepspeed.zero.GatheredParameters(divided):
            yield

    def weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return self.objective.state_dict()
        with self.gathered():
            return {name: tensor.detach().clone() for name, tensor in self.objective.state_dict().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return optim.optimizer_tensors(self.optimizer)
        tensors: dict[str, Tensor] = {}
        for name, parameter, flat in self._trained:
            for key, value in self.optimizer.state[flat].items():
                whole = value
                if value.ndim:
                    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor
                    whole = torch.zeros(shape.numel(), dtype=value.dtype, device=value.device)
                    for here, there in self._part(parameter):
                        whole[there] = value[here]
                    distributed.all_reduce(whole)
                    whole = whole.view(shape)
                if distributed.get_rank() == 0:
                    tensors[f"{name}{optim.NAME_SEPARATOR}{key}"] = whole.cpu()
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
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

    # DeepSpeed stores the position of a parameter in this process's flat vector as the parameter's `_hp_mapping`, which
    # is None if this process has no part of it. Its functions safe_get_full_... communicate whole tensors one by one.

    # Under ZeRO-3, a parameter's equal parts, the last one padded, are at `grad_position` of a flat vector.

    def _gradient(self, parameter: Any) -> Tensor | None:
        if self.stage == 3:
            part = self._part(parameter)
            gradient = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
            return gradient.flatten()[: part[0][1].stop - part[0][1].start] if part else None
        if parameter._hp_mapping is None:
            return None
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _part(self, parameter: Any) -> list[tuple[slice, slice]]:
        """Slices of the flat vector and of the flattened parameter with their common part; empty if there is none."""
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
