"""The loop. Read it from `pretrain` downwards: what happens is what is written, in this order.

recipe -> shards -> order -> decode -> views -> objective -> loss -> optimizer step -> teacher -> metrics, checkpoint
"""

import difflib
import json
import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from selfvil import checkpoint, optim, runtime
from selfvil.data.index import Shards, open_shards
from selfvil.data.loader import Batch, Ledger, train_batches
from selfvil.data.render import drawable
from selfvil.errors import UserError
from selfvil.memory import need_memory
from selfvil.monitor.collapse import Doctor
from selfvil.monitor.console import ProgressLine
from selfvil.monitor.metrics import Means, MetricsWriter, finite
from selfvil.monitor.pictures import save_picture
from selfvil.monitor.probes import probe_scores
from selfvil.monitor.summary import print_summary
from selfvil.monitor.vitals import Vitals
from selfvil.objectives import objective_class
from selfvil.objectives.base import ImageSpec, Objective, Progress
from selfvil.recipe import Recipe, differences, parse
from selfvil.start_from import start_backbone, start_objective
from selfvil.zero import Zero, apply_recipe, numel

log = logging.getLogger("selfvil")


@dataclass(frozen=True)
class Summary:
    """How a launch ended. `seconds` and `samples` count the whole run, earlier launches included."""

    run: str
    finished: bool
    step: int
    total_steps: int
    samples: int
    seconds: float
    images_per_second: float
    """Of this launch, from its first step to its last."""
    loss: float | None
    """Mean over the last logged steps."""
    checkpoint: str | None
    alarms: tuple[str, ...] = ()
    """What the doctor said in this launch, by the names of its rules."""


def pretrain(recipe: Recipe) -> Summary:
    """Run a recipe to its end, or until it is asked to stop; in both cases the state is saved.

    Every process of a launch calls this. `run.resume=auto` goes on from the newest valid checkpoint in `run.out`.

    Raises:
        UserError: nothing has been overwritten; the message says what to change.
    """
    accelerator = runtime.start(recipe.run.precision, recipe.optim.accumulate, recipe.run.threads)
    is_main, world_size = accelerator.is_main_process, accelerator.num_processes
    out = Path(recipe.run.out)
    per_step = world_size * recipe.optim.accumulate
    if recipe.optim.batch_size % per_step:
        raise UserError(
            f"optim.batch_size = {recipe.optim.batch_size} is not divisible by {world_size} processes x "
            f"{recipe.optim.accumulate} micro-batches: take a multiple of {per_step}"
        )
    divided = accelerator.distributed_type == DistributedType.DEEPSPEED  # the optimizer's state, among processes
    if divided:
        _configure_deepspeed(recipe, accelerator)
    with accelerator.main_process_first():
        shards = open_shards(recipe.data.train, image=recipe.data.image)
        resumed = _claim(out, recipe, shards) if is_main else None
    resumed = runtime.agree(accelerator, resumed)

    objective = build_objective(recipe, start=resumed is None).to(accelerator.device)
    micro_batch, channels = recipe.optim.batch_size // per_step, recipe.model.in_chans
    objective.check_batch(micro_batch * world_size)
    if recipe.data.augment == "device":
        drawable(objective.views())
    autocast = runtime.autocast(accelerator.device, recipe.run.precision)
    parts = accelerator.num_processes if divided else 1
    need_memory(objective, micro_batch, channels, accelerator.device, autocast, parts)
    groups = _parameter_groups(recipe, objective)
    optimizer = optim.adamw(groups, recipe.optim.betas)
    saved = checkpoint.load(Path(resumed)) if resumed is not None else None
    if saved:  # before it is prepared: DeepSpeed takes its copy of the weights then
        objective.load_state_dict(saved.tensors("objective"))
    model, optimizer = accelerator.prepare(objective, optimizer)
    zero = Zero(model, optimizer) if divided else None

    batch_size = recipe.optim.batch_size
    total_steps = recipe.budget.total_steps(len(shards), batch_size)
    first_step, seconds_before = 0, 0.0
    if saved:
        if zero:
            zero.load_optimizer_tensors(saved.tensors("optimizer"))
        else:
            optim.load_optimizer_tensors(optimizer, saved.tensors("optimizer"))
        first_step, seconds_before = saved.step, saved.meta["seconds"]
    if first_step == total_steps and (ended_before := _summary_of(out)):
        if is_main:
            print_summary(out)
        accelerator.end_training()
        return ended_before
    if is_main:
        _record_launch(out, recipe, accelerator, first_step, zero.stage if zero else None)
    accelerator.wait_for_everyone()

    seed, rank, device = recipe.run.seed, accelerator.process_index, accelerator.device
    final_decay = recipe.optim.weight_decay_end
    final_decay = recipe.optim.weight_decay if final_decay is None else final_decay
    steps_per_epoch = len(shards) / batch_size
    pause_at = time.monotonic() + 60 * (recipe.budget.pause_minutes or math.inf)

    metrics = MetricsWriter(
        out, first_step, recipe.monitor.tensorboard, recipe.monitor.wandb, out.name
    ) if is_main else None  # fmt: skip
    ledger = Ledger(out / ("ledger.jsonl" if is_main else f"ledger-{rank}.jsonl"), len(shards), recipe.data.max_bad)
    line = ProgressLine(first_step, total_steps, enabled=is_main)
    if is_main:
        _greet(line, recipe, accelerator, objective, shards, first_step, total_steps)
    means, last_loss = Means(), None
    doctor_every = recipe.monitor.doctor_every
    doctor = Doctor(recipe, total_steps, takes_vitals=doctor_every is not None)
    vitals = Vitals(objective) if is_main and doctor_every else None
    step, saved_at = first_step, first_step if resumed else None
    began = window_began = time.monotonic()
    window_step, collapsed = first_step, False
    batches = train_batches(
        shards, objective.views(), seed=seed, batch_size=batch_size, rank=rank, world_size=world_size,
        accumulate=recipe.optim.accumulate, start_step=first_step, stop_step=total_steps, workers=recipe.data.workers,
        channels=recipe.model.in_chans, augment=recipe.data.augment,
    )  # fmt: skip

    model.train()
    try:
        with runtime.StopRequest() as stop:
            while step < total_steps:
                # One optimizer step: micro-batches, clipping, update, teacher.
                progress = Progress(step, total_steps, steps_per_epoch, seed)
                lr = _learning_rate(recipe, step, total_steps)
                decay = optim.cosine(step, total_steps, recipe.optim.weight_decay, final_decay)
                backbone_waits = progress.fraction < recipe.optim.heads_first
                scales = {optim.BACKBONE: 0.0 if backbone_waits else 1.0} | objective.lr_scales(progress)
                optim.set_rates(optimizer, lr, decay, scales)
                runtime.seed_step(seed, step, rank)
                batch: Batch | None = None
                for micro in range(recipe.optim.accumulate):
                    batch = next(batches).to(device)
                    ledger.record(batch.bad)
                    last = micro == recipe.optim.accumulate - 1
                    with nullcontext() if last or zero else accelerator.no_sync(model):
                        output = model(batch, progress)
                        loss = output.loss / recipe.optim.accumulate
                        zero.backward(loss, last) if zero else accelerator.backward(loss)
                    means.add({"loss": output.loss} | output.logs)
                looked_at = _due(step + 1, doctor_every, step + 1 == total_steps)
                if vitals and looked_at:
                    vitals.before_step(gradients=zero is None)
                clip = recipe.optim.clip_norm, recipe.optim.clip_per_tensor
                if zero:
                    norm = zero.clip_gradients(*clip)
                    zero.step()
                else:
                    norm = optim.clip_gradients(objective.parameters(), *clip)
                    optimizer.step()
                    optimizer.zero_grad()
                means.add({"grad_norm": norm})
                objective.after_step(progress)
                step += 1
                line.step(step)

                # What is due after it.
                ended, seen = step == total_steps, dict[str, float]()
                log_due = ended or step % recipe.monitor.log_every == 0
                save_due = ended or step % recipe.run.checkpoint_every == 0
                stopping = False
                if log_due or world_size == 1:  # asking the other processes costs a collective: not at every step
                    stopping = runtime.any_process(accelerator, bool(stop) or time.monotonic() > pause_at or collapsed)
                if log_due or save_due or stopping:
                    averages = accelerator.reduce(means.means(), reduction="mean")
                    if not finite(averages):
                        raise UserError(_diverged(step, averages, out))
                if log_due:
                    now = time.monotonic()
                    speed = (step - window_step) * batch_size / (now - window_began)
                    window_began, window_step = now, step
                    values = {name: value.item() for name, value in averages.items()}
                    last_loss = values["loss"]
                    values |= {"lr": lr, "weight_decay": decay, "samples": step * batch_size,
                               "epoch": step / steps_per_epoch, "images_per_second": speed}  # fmt: skip
                    if metrics:
                        metrics.write(step, values)
                    line.log(step, last_loss, speed)
                    seen |= values
                    means.reset()
                if vitals and metrics and looked_at and batch is not None:
                    signs = vitals.after_step(lr, batch, output)
                    metrics.write(step, signs, kind="doctor")
                    seen |= signs
                if is_main and _due(step, recipe.monitor.pictures_every, ended) and batch is not None:
                    objective.eval()
                    with runtime.autocast(device, recipe.run.precision):
                        picture = objective.picture(batch, progress)
                    objective.train()
                    if picture is not None and metrics:
                        save_picture(picture, out / "pictures" / f"step-{step:08d}.png")
                        metrics.picture(step, picture)
                if recipe.eval.train and recipe.eval.test and _due(step, recipe.eval.every or total_steps, ended):
                    objective.eval()
                    score = probe_scores(objective.exported(), recipe, device) if is_main else {}
                    objective.train()
                    if metrics:
                        metrics.write(step, score, kind="eval")
                        seen |= score
                    line.say(f"step {step:,}: " + " · ".join(f"{name} {value:.2f} %" for name, value in score.items()))
                    accelerator.wait_for_everyone()
                for alarm in doctor.see(step, seen) if is_main else ():
                    line.say(f"step {step:,}: {alarm.sentence}")
                    collapsed = recipe.monitor.on_collapse == "stop"  # the next step asks every process
                if save_due or stopping:
                    moments = zero.optimizer_tensors() if zero else optim.optimizer_tensors(optimizer)
                    with zero.whole() if zero else nullcontext():
                        if is_main:
                            tensors = {"objective": objective.state_dict(), "optimizer": moments}
                            meta = _meta(recipe, shards, objective, step, seconds_before + time.monotonic() - began)
                            checkpoint.save(out / "checkpoints", step, tensors, meta, recipe.run.keep_checkpoints)
                    accelerator.wait_for_everyone()
                    saved_at = step
                if stopping and not ended:
                    why = stop.signal_name or ("monitor.on_collapse = stop" if collapsed else "pause_minutes")
                    line.say(f"stopped after step {step:,} ({why}): "
                             f"the state is saved, and the same command goes on from here")  # fmt: skip
                    break
    finally:
        batches.close()
        line.close()
        if metrics:
            metrics.close()
    summary = Summary(
        run=str(out),
        finished=step == total_steps,
        step=step,
        total_steps=total_steps,
        samples=step * batch_size,
        seconds=round(seconds_before + time.monotonic() - began, 1),
        images_per_second=round((step - first_step) * batch_size / (time.monotonic() - began), 1),
        loss=last_loss,
        checkpoint=str(out / "checkpoints" / f"step-{saved_at:08d}") if saved_at is not None else None,
        alarms=tuple(doctor.alarms),
    )
    if is_main:
        _record_end(out, summary)
        print_summary(out)
    accelerator.end_training()
    return summary


def build_objective(recipe: Recipe, start: bool = True) -> Objective:
    """The objective of a recipe, initialised as a function of `run.seed` and, with `start`, of model.start_from."""
    torch.manual_seed(recipe.run.seed)
    name, kwargs = recipe.model.name, recipe.model.create_kwargs()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"model.name = {name!r} is no model that timm knows; did you mean {' or '.join(close)}?"
            if close
            else f"model.name = {name!r} is no model that timm knows; try vil_tiny_patch16_224"
        )
    try:
        backbone = timm.create_model(name, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        advice = ""
        if "'img_size'" in str(error) or "'patch_size'" in str(error):
            advice = (
                "; a masked objective needs a vil_* model or one of timm's plain vision transformers (vit_*), and for "
                "any other objective on a network without patches model.patch_size must be null"
            )
        raise UserError(f"model: {name} cannot be built with {kwargs}: {error}{advice}") from None
    if recipe.model.patch_size is None and getattr(getattr(backbone, "patch_embed", None), "patch_size", None):
        raise UserError(
            f"model.patch_size = null is for networks without patches, and {name} has them: set it to their side, "
            "such as 16"
        )
    source = recipe.model.start_from if start else None
    if source is not None and recipe.model.start_heads == "new":
        with torch.random.fork_rng(devices=[]):  # the heads are those that the seed gives without a start
            start_backbone(backbone, source)  # now, since the objective's teacher begins as a copy of it
    image = ImageSpec(
        recipe.model.img_size, recipe.model.patch_size or 1, recipe.model.in_chans, recipe.data.mean, recipe.data.std
    )
    objective = objective_class(recipe.objective.name)(backbone, recipe.objective, image)
    if source is not None and recipe.model.start_heads == "load":
        start_objective(objective, source)
    return objective


def _parameter_groups(recipe: Recipe, objective: Objective) -> list[dict]:
    """The objective's groups, with the recipe's rates for the layers of its backbone."""
    settings, backbone = recipe.optim, objective.backbone
    scales = optim.layer_lr_scales(backbone, settings.layer_decay, settings.patch_embed_lr)
    scales = {f"backbone.{name}": scale for name, scale in scales.items()}
    tags = dict.fromkeys(scales, optim.BACKBONE) | objective.tags()
    return optim.parameter_groups(objective, objective.no_weight_decay(), tags, scales)


def _learning_rate(recipe: Recipe, step: int, total: int) -> float:
    settings = recipe.optim
    peak = optim.peak_lr(settings.base_lr, settings.batch_size, settings.lr_scaling)
    warmup = round(settings.warmup * total)
    if settings.schedule == "cosine":
        return optim.cosine(step, total, peak, settings.min_lr, warmup)
    cooldown = round(settings.cooldown * total) if settings.schedule == "wsd" else 0
    return optim.warmup_stable_decay(step, total, peak, settings.min_lr, warmup, cooldown)


def _configure_deepspeed(recipe: Recipe, accelerator: Accelerator) -> None:
    """Let DeepSpeed's settings say what the recipe says. Raises UserError if they ask for what is not tested."""
    asked = {
        "monitor.doctor_every": recipe.monitor.doctor_every,
        "monitor.pictures_every": recipe.monitor.pictures_every,
        "eval.train and eval.test": recipe.eval.train,
    }
    looks = [key for key, value in asked.items() if value is not None]
    gave_way = apply_recipe(
        accelerator.deepspeed_plugin.deepspeed_config, batch_size=recipe.optim.batch_size,
        accumulate=recipe.optim.accumulate, world_size=accelerator.num_processes, clip_norm=recipe.optim.clip_norm,
        bf16=recipe.run.precision == "bf16",
        has_teacher="teacher" in objective_class(recipe.objective.name).networks, looks=looks,
    )  # fmt: skip
    accelerator.gradient_accumulation_steps = recipe.optim.accumulate
    for sentence in gave_way if accelerator.is_main_process else []:
        log.warning(sentence)


def _claim(out: Path, recipe: Recipe, shards: Shards) -> str | None:
    """Make sure that `out` is new, or a run of the same recipe on the same images; return the checkpoint to go on from.

    Raises UserError before anything is written.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    old_file = out / "recipe.yaml"
    if not old_file.exists():
        raise UserError(f"run.out = {out} is not empty and holds no run: choose a new folder")
    if recipe.run.resume == "never":
        raise UserError(f"run.out = {out} already holds a run, and run.resume is never: choose a new folder")
    old = parse(yaml.safe_load(old_file.read_text()), str(old_file))
    if changed := differences(old.identity(), recipe.identity()):
        raise UserError(
            f"run.out = {out} holds a run of another recipe ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose a new run.out, or the old settings to go on"
        )
    newest = checkpoint.newest(out / "checkpoints")
    if newest is None and any((out / "checkpoints").glob("step-*")):
        raise UserError(f"{out / 'checkpoints'} holds checkpoints, all damaged: restore one, or choose a new run.out")
    if newest is None:
        log.warning("%s holds a run without a usable checkpoint: it begins again from its first step", out)
        return None
    model = {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()}
    if changed := differences(newest.meta["model"], model):
        raise UserError(f"{newest.folder} is of another architecture ({'; '.join(changed)}): choose a new run.out")
    if newest.meta["data"]["fingerprint"] != shards.fingerprint:
        raise UserError(
            f"data.train = {recipe.data.train}: the shards are not those that {out} was trained on (their names, sizes "
            f"or counts differ), so its sample order cannot be continued: restore them, or choose a new run.out"
        )
    return str(newest.folder)


def _meta(recipe: Recipe, shards: Shards, objective: Objective, step: int, seconds: float) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to rebuild and export its networks without this recipe."""
    train = recipe.data.train
    return {
        "format": 1,
        "step": step,
        "samples": step * recipe.optim.batch_size,
        "seconds": seconds,
        "seed": recipe.run.seed,
        "model": {"name": recipe.model.name, "kwargs": recipe.model.create_kwargs()},
        "networks": dict(objective.networks),
        "export": objective.export,
        "objective": recipe.objective.model_dump(mode="json"),
        "data": {
            "pattern": train if isinstance(train, str) else " ".join(train),
            "mean": recipe.data.mean,
            "std": recipe.data.std,
            "img_size": list(recipe.model.img_size),
            "fingerprint": shards.fingerprint,
            "num_samples": len(shards),
        },
    }


def _record_launch(
    out: Path, recipe: Recipe, accelerator: Accelerator, first_step: int, zero_stage: int | None
) -> None:
    """Save the resolved recipe, and one entry of versions, device and command for each launch."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "recipe.yaml", recipe.to_yaml())
    record = _read_record(out)
    launch = {"started": _now(), "first_step": first_step} | runtime.describe(accelerator)
    if zero_stage is not None:
        launch["zero_stage"] = zero_stage
    record["launches"] = [*record.get("launches", []), launch]
    _write(out / "run.json", json.dumps(record, indent=2) + "\n")


def _record_end(out: Path, summary: Summary) -> None:
    record = _read_record(out)
    record["launches"][-1]["ended"] = _now()
    record["summary"] = asdict(summary)
    _write(out / "run.json", json.dumps(record, indent=2) + "\n")


def _summary_of(out: Path) -> Summary | None:
    """How a run that has finished ended; None if it has not, or was killed before it could say so."""
    summary = _read_record(out).get("summary")
    return Summary(**summary) if summary and summary["finished"] else None


def _read_record(out: Path) -> dict[str, Any]:
    path = out / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text)
    os.replace(aside, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _due(step: int, every: int | None, ended: bool) -> bool:
    return every is not None and (ended or step % every == 0)


def _greet(
    line: ProgressLine, recipe: Recipe, accelerator: Accelerator, objective: Objective, shards: Shards,
    first_step: int, total_steps: int,
) -> None:  # fmt: skip
    trainable = sum(numel(parameter) for parameter in objective.parameters() if parameter.requires_grad)
    backbone = sum(numel(parameter) for parameter in objective.backbone.parameters())
    line.say(
        f"{recipe.objective.name} on {recipe.model.name}: {backbone / 1e6:.2f} M parameters in the backbone, "
        f"{trainable / 1e6:.2f} M trained\n"
        f"{len(shards):,} images, {total_steps:,} steps of {recipe.optim.batch_size} "
        f"({total_steps * recipe.optim.batch_size / len(shards):.1f} epochs) on {accelerator.num_processes} x "
        f"{runtime.device_name(accelerator.device)}, {recipe.run.precision}, into {recipe.run.out}"
    )
    if first_step:
        line.say(f"going on after step {first_step:,}")


def _diverged(step: int, averages: dict[str, torch.Tensor], out: Path) -> str:
    culprits = [name for name, value in averages.items() if not torch.isfinite(value).all()]
    return (
        f"{' and '.join(culprits)} became NaN or infinite by step {step}; nothing broken was saved, and the "
        f"checkpoints in {out / 'checkpoints'} are sound. Lower optim.base_lr, raise optim.warmup or set "
        f"optim.clip_norm, with a new run.out"
    )
