"""What a recipe will do on this machine, before it runs: `selfvil plan`.

`report` does what a launch does before its first step, by the same functions: it opens the shards, builds the objective
and refuses what cannot work. Then it measures in place of training. Nothing is written, and no lease is taken.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from selfvil import optim, runtime
from selfvil.build import build_objective, image_spec, open_training, parameter_groups
from selfvil.data.base import Images, SourceShare
from selfvil.data.loader import train_batches
from selfvil.footprint import multiply_adds, state_bytes
from selfvil.machine import free_bytes, usable_cores
from selfvil.memory import StepMemory, blank_batch, step_memory
from selfvil.monitor.evaluations import check_evaluations
from selfvil.monitor.pictures import save_picture
from selfvil.objectives.base import Objective, Progress
from selfvil.objectives.crops import crops_picture
from selfvil.plan import Plan, check_division
from selfvil.preflight import check_objective, check_wandb, workers_warning
from selfvil.recipe import Recipe
from selfvil.unused import freeze_unused

_TRIAL_STEPS = 3
_SAFETENSORS_ENTRY = 100  # bytes of a tensor's entry in the header of a safetensors file, about


@dataclass(frozen=True)
class Schedule:
    """Rates and the objective's own scheduled values at one step."""

    at: str
    step: int
    lr: float
    weight_decay: float
    values: dict[str, float]
    """Factors on the learning rate by tag (`lr × backbone`), and the objective's schedules."""


@dataclass(frozen=True)
class Group:
    """Parameters that share weight decay, tag and learning rate."""

    tag: str
    decayed: bool
    lr_scale: float
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Size:
    """Numbers of parameters; multiply-adds for one image."""

    backbone_parameters: int
    trained_parameters: int
    frozen_parameters: int
    """Those of a teacher, and those that the loss does not depend on."""
    backbone_multiply_adds: int
    """Of the backbone's forward pass over a whole image of model.img_size."""
    step_multiply_adds: int
    """Of the objective's forward and backward pass, all crops and the teacher included."""


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, how many remain, and what is free where run.out lies."""

    checkpoint: int
    kept: int
    free: int

    @property
    def most(self) -> int:
        """Bytes while a new checkpoint is written, before the oldest is removed."""
        return self.checkpoint * (self.kept + 1)


@dataclass(frozen=True)
class Trial:
    """Seconds of one optimizer step of one process, measured on real images."""

    loading: float
    """Reading, decoding and augmenting, by one worker."""
    computing: float
    """Forward, backward and update."""
    step: float
    """A step with data.workers loading ahead, if nothing else uses the machine."""
    images_per_second: float
    """Of all processes together."""
    total: float
    """Seconds of all steps; evaluations, pictures and saves not included."""
    damaged: int
    """Images that were damaged and replaced."""


@dataclass(frozen=True)
class Report:
    """Everything `selfvil plan` prints."""

    recipe: str
    objective: str
    model: str
    device: str
    plan: Plan
    peak_lr: str
    """How the peak learning rate follows from optim.base_lr."""
    schedules: list[Schedule]
    groups: list[Group]
    size: Size
    memory: StepMemory
    machine: int
    disk: Disk
    trial: Trial | None
    sources: list[SourceShare]
    """Of a mixture, with the epochs of the whole run; else empty."""
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Bytes, seconds, and numbers of images, steps and parameters."""
        plan, total = self.plan, self.plan.total_steps
        numbers = {
            "images": plan.num_samples, "processes": plan.processes, "batch_size": plan.recipe.optim.batch_size,
            "accumulate": plan.recipe.optim.accumulate, "micro_batch": plan.micro_batch, "steps": total,
            "samples": plan.samples(total), "epochs": plan.epochs(total), "steps_per_epoch": plan.steps_per_epoch,
            "peak_lr": plan.recipe.optim.peak_lr,
        }  # fmt: skip
        whole = {name: value for name, value in vars(self).items() if name not in ("plan", "peak_lr")}
        whole |= {name: asdict(value) for name, value in whole.items() if hasattr(value, "__dataclass_fields__")}
        whole |= {name: [asdict(row) for row in whole[name]] for name in ("schedules", "groups")}
        whole["sources"] = [each._asdict() for each in self.sources]
        whole["memory"] |= {"total": self.memory.total}
        return whole | {"plan": numbers}


@runtime.undisturbed()
def report(
    recipe: Recipe,
    name: str,
    processes: int = 1,
    trial: bool = True,
    picture: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """Examine `recipe`, called `name`, for a launch of `processes` processes of DDP.

    Args:
        trial: take 3 real steps to measure time. Without it and `picture`, no image is decoded.
        picture: draw the crops of the first images to this PNG file.
        tell: called with what is done next, in a few words; on a CPU, large images take minutes.

    Raises:
        UserError: the launch would be refused, for the same reason and in the same words.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    device = torch.device("cuda" if on_gpu else "cpu")
    check_division(recipe.optim, processes)
    check_wandb(recipe)
    tell("opening the images")
    recipe, shards = open_training(recipe)
    plan = Plan.of(recipe, len(shards), processes)
    warnings = [*check_evaluations(recipe), *filter(None, [workers_warning(recipe.data.workers, processes)])]
    tell("building the networks")
    objective = build_objective(recipe)
    tell("counting multiply-adds")
    products = _multiply_adds(objective, recipe)
    objective.to(device)
    autocast = runtime.autocast(device, recipe.run.precision)
    tell("measuring the memory of two images")
    with _one_of(processes):
        check_objective(objective, recipe, plan, device)
        free = free_bytes(device)
    freeze_unused(objective, recipe.model.in_chans, device, autocast)
    groups = [_group(each) for each in parameter_groups(recipe, objective)]
    trained = sum(group.parameters for group in groups)
    size = Size(_numel(objective.backbone), trained, _numel(objective) - trained, *products)
    tell("measuring the memory of a step")
    memory = step_memory(
        objective, plan.micro_batch, recipe.model.in_chans, device, autocast,
        processes=processes, accumulate=recipe.optim.accumulate,
    )  # fmt: skip
    disk = _disk(objective, recipe)
    # On a CPU, a checkpoint is written from a copy in the same memory while training goes on.
    needed = memory.total + (disk.checkpoint if device.type == "cpu" else 0)
    if needed - memory.weights - memory.teacher > free:
        warnings.append(
            f"a step is predicted to need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free for a "
            f"process on {device}: lower optim.batch_size or the number of crops, or raise optim.accumulate"
        )
    if disk.most > disk.free:
        warnings.append(
            f"checkpoints need up to {disk.most / 1e9:.1f} GB, and {disk.free / 1e9:.1f} GB are free for run.out = "
            f"{recipe.run.out}: free some space, choose another run.out, or lower run.keep_checkpoints"
        )
    schedules = [_schedule(at, plan, step, objective) for at, step in plan.key_steps().items()]
    if picture is not None:
        draw_crops(objective, recipe, shards, picture)
    timed = None
    if trial:  # last: it trains the objective
        tell(f"taking {_TRIAL_STEPS} steps of {plan.micro_batch} images")
        timed = run_trial(objective, plan, shards, device)
    if timed is not None and timed.damaged:
        warnings.append(f"{timed.damaged} of the images of the trial are damaged and were replaced")
    return Report(
        name, recipe.objective.name, recipe.model.name, runtime.device_name(device), plan, _peak_lr(recipe), schedules,
        groups, size, memory, free, disk, timed, shards.shares(plan.samples(plan.total_steps)), warnings,
    )  # fmt: skip


@contextmanager
def _one_of(processes: int) -> Iterator[None]:
    """Within, this process counts as one of `processes` on this machine, which share its memory."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def _peak_lr(recipe: Recipe) -> str:
    settings = recipe.optim
    factor = {
        "linear": f" x {settings.batch_size} / 256", "sqrt": f" x sqrt({settings.batch_size} / 256)", "none": "",
    }[settings.lr_scaling]  # fmt: skip
    return f"{settings.base_lr:g}{factor} = {settings.peak_lr:.4g} (lr_scaling {settings.lr_scaling})"


def _schedule(at: str, plan: Plan, step: int, objective: Objective) -> Schedule:
    rates = plan.rates(step, objective)
    scales = {f"lr x {tag}": scale for tag, scale in rates.lr_scales.items()}
    return Schedule(at, step, rates.lr, rates.weight_decay, scales | objective.schedules(plan.progress(step)))


def _group(group: dict[str, Any]) -> Group:
    parameters = sum(parameter.numel() for parameter in group["params"])
    return Group(group["tag"], group["decay"], group["lr_scale"], len(group["params"]), parameters)


def _multiply_adds(objective: Objective, recipe: Recipe) -> tuple[int, int]:
    """The two numbers of `Size`, counted on the CPU, where every operator has a formula."""
    context, backbone = runtime.autocast(torch.device("cpu"), recipe.run.precision), objective.backbone
    image = torch.zeros(1, recipe.model.in_chans, *recipe.model.img_size)
    batch = blank_batch(objective.views(), 2, recipe.model.in_chans)

    def forward() -> None:
        with torch.no_grad(), context:
            backbone.forward_features(image)  # type: ignore[operator]

    def step() -> None:
        with context:
            loss = objective(batch, Progress(0, 1, 1.0, recipe.run.seed)).loss
        loss.backward()

    objective.eval()  # running statistics must not change
    try:
        return multiply_adds(forward), multiply_adds(step) // 2
    finally:
        objective.train()
        objective.zero_grad()


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _disk(objective: Objective, recipe: Recipe) -> Disk:
    trained = sum(parameter.requires_grad for parameter in objective.parameters())
    headers = _SAFETENSORS_ENTRY * (len(objective.state_dict()) + 3 * trained)
    out = Path(recipe.run.out).absolute()
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    return Disk(state_bytes(objective) + headers, recipe.run.keep_checkpoints, shutil.disk_usage(existing).free)


def draw_crops(objective: Objective, recipe: Recipe, shards: Images, path: Path) -> Path:
    """Draw the crops of the first 8 images of the run, one row for each image, to a PNG file."""
    batches = train_batches(
        shards, objective.views(), seed=recipe.run.seed, batch_size=min(8, len(shards)), stop_step=1,
        channels=recipe.model.in_chans, augment=recipe.data.augment, decode=recipe.data.decode,
        balanced=recipe.data.order == "class_balanced", window=recipe.data.window,
    )  # fmt: skip
    with closing(batches):
        sheet = crops_picture(next(batches).to("cpu").views, image_spec(recipe))
    return save_picture(sheet, path)


def run_trial(objective: Objective, plan: Plan, shards: Images, device: torch.device) -> Trial:
    """Take 3 steps of one micro-batch each on the run's first images, and time loading and computing apart.

    The first step is not counted: it also allocates memory and chooses kernels. `objective` is trained by this.
    """
    recipe, accumulate = plan.recipe, plan.recipe.optim.accumulate
    optimizer = optim.adamw(parameter_groups(recipe, objective), recipe.optim.betas)
    batches = train_batches(
        shards, objective.views(), seed=recipe.run.seed, batch_size=plan.micro_batch, stop_step=_TRIAL_STEPS,
        channels=recipe.model.in_chans, augment=recipe.data.augment, decode=recipe.data.decode,
        balanced=recipe.data.order == "class_balanced", window=recipe.data.window,
    )  # fmt: skip
    seconds: list[tuple[float, float, float]] = []
    damaged = 0
    objective.train()
    with closing(batches):
        for step in range(_TRIAL_STEPS):
            moments = [_now(device)]
            batch = next(batches).to(device)
            moments.append(_now(device))
            with runtime.autocast(device, recipe.run.precision):
                loss = objective(batch, plan.progress(step)).loss
            loss.backward()
            moments.append(_now(device))
            optim.set_rates(optimizer, *plan.rates(step, objective))
            optim.clip_gradients(objective.parameters(), recipe.optim.clip_norm, recipe.optim.clip_per_tensor)
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(plan.progress(step))
            moments.append(_now(device))
            seconds.append((moments[1] - moments[0], moments[2] - moments[1], moments[3] - moments[2]))
            damaged += len(batch.bad)
    load, pass_, update = (median(parts) for parts in zip(*seconds[1:]))
    loading, computing = accumulate * load, accumulate * pass_ + update
    step_seconds = step_time(
        loading, computing, recipe.data.workers, plan.processes, usable_cores(),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )  # fmt: skip
    speed = recipe.optim.batch_size / step_seconds
    return Trial(loading, computing, step_seconds, speed, step_seconds * plan.total_steps, damaged)


def step_time(loading: float, computing: float, workers: int, processes: int, cores: int, threads: int) -> float:
    """Seconds of a step whose images take `loading` seconds in one worker, and whose computation takes `computing`.

    Workers load while the device computes, so the slower of both decides; without workers both take their time. And
    all processes of the machine together need no more seconds of its cores than it has.

    Args:
        workers: of each of the `processes`. threads: CPU threads that compute in each process; 0 on a GPU.
    """
    alone = max(loading / workers, computing) if workers else loading + computing
    return max(alone, processes * (loading + threads * computing) / cores)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
