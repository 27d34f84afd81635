"""The loop. Read it from `pretrain` downwards: what happens is what is written, in this order.

recipe -> shards -> order -> decode -> views -> objective -> loss -> optimizer step -> teacher -> metrics, checkpoint
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from selfvil import checkpoint, optim, runtime
from selfvil.build import build_objective, parameter_groups
from selfvil.data.index import Shards, open_shards
from selfvil.data.ledger import Ledger
from selfvil.data.loader import train_batches
from selfvil.data.render import drawable
from selfvil.divergence import BuffersBefore, LossSpikes, NonFinite, non_finite
from selfvil.errors import UserError, shorten
from selfvil.files import Outputs
from selfvil.memory import need_memory
from selfvil.monitor.collapse import Doctor
from selfvil.monitor.console import ProgressLine
from selfvil.monitor.metrics import Means, MetricsWriter
from selfvil.monitor.pictures import save_picture
from selfvil.monitor.probes import check_probes, probe_scores
from selfvil.monitor.summary import print_summary
from selfvil.monitor.vitals import Vitals
from selfvil.objectives import objective_class
from selfvil.objectives.base import Objective, Progress
from selfvil.preflight import check_batch, check_wandb, workers_warning
from selfvil.recipe import Recipe
from selfvil.run import RunFolder, Summary, checkpoint_meta
from selfvil.stop import COLLAPSE, PAUSE, Interrupted, StopRequest
from selfvil.unused import freeze_unused
from selfvil.watchdog import Watchdog, longest_wait
from selfvil.zero import Zero, apply_recipe, numel

log = logging.getLogger("selfvil")


@runtime.undisturbed()
def pretrain(recipe: Recipe) -> Summary:
    """Run a recipe to its end, or until it is asked to stop; in both cases the state is saved.

    Every process of a launch calls this. `run.resume=auto` goes on from the newest valid checkpoint in `run.out`.
    It may be called again in the same process, with any recipe, and in a thread, where signals cannot stop it.

    Raises:
        UserError: nothing has been overwritten; the message says what to change.
    """
    with RunFolder(Path(recipe.run.out)) as folder:
        return _pretrain(recipe, folder)


def _pretrain(recipe: Recipe, folder: RunFolder) -> Summary:
    patience = longest_wait(recipe.run.stall_minutes)
    accelerator = runtime.start(recipe.run.precision, recipe.optim.accumulate, recipe.run.threads, patience)
    is_main, world_size, out = accelerator.is_main_process, accelerator.num_processes, folder.path
    per_step = world_size * recipe.optim.accumulate
    if recipe.optim.batch_size % per_step:
        raise UserError(
            f"optim.batch_size = {recipe.optim.batch_size} is not divisible by {world_size} processes x "
            f"{recipe.optim.accumulate} micro-batches: take a multiple of {per_step}"
        )
    divided = accelerator.distributed_type == DistributedType.DEEPSPEED  # the optimizer's state, among processes
    if divided:
        _configure_deepspeed(recipe, accelerator)
    runtime.on_main(accelerator, folder.take)
    with accelerator.main_process_first():
        if is_main:
            check_wandb(recipe)
        shards = open_shards(recipe.data.train, image=recipe.data.image)
        check_batch(recipe.optim.batch_size, len(shards))
        for warning in check_probes(recipe):
            log.log(logging.WARNING if is_main else logging.DEBUG, warning)
    start = runtime.on_main(accelerator, partial(folder.start, recipe, shards))
    plan, resumed = start.plan, start.checkpoint

    objective = build_objective(recipe, start=resumed is None).to(accelerator.device)
    micro_batch, channels = recipe.optim.batch_size // per_step, recipe.model.in_chans
    objective.check_batch(micro_batch * world_size)
    if recipe.data.augment == "device":
        drawable(objective.views())
    autocast = runtime.autocast(accelerator.device, recipe.run.precision)
    parts = accelerator.num_processes if divided else 1
    need_memory(objective, micro_batch, channels, accelerator.device, autocast, parts)
    freeze_unused(objective, channels, accelerator.device, runtime.autocast(accelerator.device, recipe.run.precision))
    groups = parameter_groups(recipe, objective)
    optimizer = optim.adamw(groups, recipe.optim.betas)
    saved = checkpoint.load(Path(resumed)) if resumed is not None else None
    if saved:  # before it is prepared: DeepSpeed takes its copy of the weights then
        objective.load_state_dict(saved.tensors("objective"))
    model, optimizer = accelerator.prepare(objective, optimizer)
    zero = Zero(model, optimizer) if divided else None

    batch_size = recipe.optim.batch_size
    total_steps = plan.total_steps
    first_step, seconds_before = 0, 0.0
    if saved:
        if zero:
            zero.load_optimizer_tensors(saved.tensors("optimizer"))
        else:
            optim.load_optimizer_tensors(optimizer, saved.tensors("optimizer"))
        first_step, seconds_before = saved.step, saved.meta["seconds"]
    if first_step == total_steps and (ended_before := folder.final_summary(total_steps)):
        if is_main:
            print_summary(out)
        accelerator.end_training()
        return ended_before
    description = runtime.describe(accelerator) | ({"zero_stage": zero.stage} if zero else {})
    known_id = saved.meta.get("run") if saved else None
    run_id = runtime.on_main(accelerator, partial(folder.record_launch, recipe, first_step, description, known_id))

    seed, rank, device = recipe.run.seed, accelerator.process_index, accelerator.device
    final_decay = recipe.optim.weight_decay_end
    final_decay = recipe.optim.weight_decay if final_decay is None else final_decay
    steps_per_epoch = len(shards) / batch_size

    ledger = Ledger(out, len(shards), recipe.data.max_bad, rank)
    ledger.merge(runtime.gather_lists(accelerator, ledger.unshared()))
    if problem := ledger.excess():
        raise UserError(problem)
    written = Outputs()
    metrics = MetricsWriter(
        out, first_step, recipe.monitor.tensorboard, recipe.monitor.wandb, out.name, run_id, written,
        recipe.model_dump(mode="json"),
    ) if is_main else None  # fmt: skip
    line = ProgressLine(first_step, total_steps, enabled=is_main, outputs=written)
    if is_main:
        _greet(line, recipe, accelerator, objective, shards, first_step, total_steps)
        if crowded := workers_warning(recipe.data.workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
            line.say(crowded)
    means, last_loss = Means(), None
    doctor_every = recipe.monitor.doctor_every
    doctor = Doctor(recipe, total_steps, takes_vitals=doctor_every is not None)
    vitals = Vitals(objective, first_step) if is_main and doctor_every else None
    step, saved_at, stopping = first_step, first_step if resumed else None, False
    began = window_began = time.monotonic()
    window_step = first_step
    buffers, nonfinite, spikes = BuffersBefore(objective), NonFinite(recipe.optim.on_nonfinite, out), LossSpikes()
    batches = train_batches(
        shards, objective.views(), seed=seed, batch_size=batch_size, rank=rank, world_size=world_size,
        accumulate=recipe.optim.accumulate, start_step=first_step, stop_step=total_steps, workers=recipe.data.workers,
        channels=recipe.model.in_chans, augment=recipe.data.augment,
    )  # fmt: skip

    def save(alone: bool = False) -> Path:
        """Save the state after the last whole step: called by all processes, or `alone` by the main one's watchdog."""
        moments = zero.optimizer_tensors() if zero else optim.optimizer_tensors(optimizer)
        if metrics:
            metrics.flush_to_disk()
        with zero.whole() if zero else nullcontext():
            weights = {name: buffers.values.get(name, tensor) for name, tensor in objective.state_dict().items()}
            seconds = seconds_before + time.monotonic() - began
            meta = checkpoint_meta(recipe, shards, objective.networks, objective.export, step, seconds, plan, run_id)

            def write() -> Path:
                nonfinite.refuse(step, non_finite(weights | moments))
                tensors = {"objective": weights, "optimizer": moments}
                return checkpoint.save(out / "checkpoints", step, tensors, meta, recipe.run.keep_checkpoints)

            return write() if alone else runtime.on_main(accelerator, write)

    model.train()
    stop = StopRequest(world_size, answers=is_main)
    watchdog = Watchdog(recipe.run.stall_minutes, rank, world_size, stop, None if zero else partial(save, alone=True))
    try:
        with stop, watchdog:
            while step < total_steps:
                optional = partial(_optional, step + 1, metrics, line)
                watchdog.step(step)
                # One optimizer step: micro-batches, clipping, update, teacher.
                progress = Progress(step, total_steps, steps_per_epoch, seed)
                lr = plan.learning_rate(recipe, step)
                decay = optim.cosine(step, total_steps, recipe.optim.weight_decay, final_decay)
                backbone_waits = step < plan.heads_first_steps
                scales = {optim.BACKBONE: 0.0 if backbone_waits else 1.0} | objective.lr_scales(progress)
                optim.set_rates(optimizer, lr, decay, scales)
                runtime.seed_step(seed, step, rank)
                outputs: list[dict[str, Tensor]] = []
                ids: list[Tensor] = []
                for micro in range(recipe.optim.accumulate):
                    if stopping := stop.agreed():
                        break
                    with watchdog.stage("waiting for a batch", patience=1):
                        batch = next(batches).to(device)
                    ledger.record(batch.bad)
                    problem = problem or batch.problem
                    last = micro == recipe.optim.accumulate - 1
                    with nullcontext() if last or zero else accelerator.no_sync(model):
                        output = model(batch, progress)
                        loss = output.loss / recipe.optim.accumulate
                        zero.backward(loss, last) if zero else accelerator.backward(loss)
                    outputs.append({"loss": output.loss.detach()} | output.logs)
                    ids.append(batch.ids)
                if stopping:  # the micro-batches of this step are discarded
                    buffers.restore()
                    break
                looked_at = _due(step + 1, doctor_every, step + 1 == total_steps)
                if vitals and looked_at:
                    with optional("the diagnosis"):
                        vitals.before_step(gradients=zero is None)
                clip = recipe.optim.clip_norm, recipe.optim.clip_per_tensor
                norm = zero.clip_gradients(*clip) if zero else optim.clip_gradients(objective.parameters(), *clip)
                broken = nonfinite.find(outputs, norm, ids)
                skipped = runtime.any_process(accelerator, broken is not None)
                with watchdog.updating:
                    if zero:
                        zero.step(update=not skipped)
                    else:
                        optimizer.step() if not skipped else None
                        optimizer.zero_grad()
                    if skipped:
                        objective.discard_step()
                        buffers.restore()
                    else:
                        objective.after_step(progress)
                        buffers.remember()
                    step += 1
                line.step(step)
                if skipped:
                    found = runtime.gather_lists(accelerator, [broken] if broken else [])
                    line.say(nonfinite.skip(step, found, record=is_main))
                else:
                    nonfinite.in_a_row = 0
                    for logged in [*outputs, {"grad_norm": norm}]:
                        means.add(logged)

                # What is due after it.
                ended, seen = step == total_steps, dict[str, float]()
                log_due = ended or step % recipe.monitor.log_every == 0
                # While steps are being skipped, the checkpoint from before stays the newest.
                save_due = ended or (step % recipe.run.checkpoint_every == 0 and not skipped)
                if log_due or world_size == 1:  # asking the other processes costs a collective: not at every step
                    ledger.merge(runtime.gather_lists(accelerator, ledger.unshared()))
                    problem = problem or ledger.excess()
                paused = recipe.budget.pause_minutes and time.monotonic() - began > 60 * recipe.budget.pause_minutes
                if reason := problem or written.failure or (PAUSE if paused else None):
                    stop.request(reason)
                if log_due:
                    now = time.monotonic()
                    speed = (step - window_step) * batch_size / (now - window_began)
                    window_began, window_step = now, step
                    averages = accelerator.reduce(means.means(), reduction="mean")
                    nonfinite.refuse(step, non_finite(averages))
                    values = {name: value.item() for name, value in averages.items()}
                    last_loss = values.get("loss", last_loss)  # none where all steps were skipped
                    values |= {"lr": lr, "weight_decay": decay, "samples": step * batch_size,
                               "epoch": step / steps_per_epoch, "images_per_second": speed}  # fmt: skip
                    if "loss" in values and (height := spikes.add(values["loss"])):
                        values["loss_spike"] = height
                        line.say(
                            f"step {step:,}: loss {last_loss:.4f} is {height:.0f} deviations above the recent ones"
                        )
                    if metrics:
                        metrics.write(step, values)
                    if last_loss is not None:
                        line.log(step, last_loss, speed)
                    seen |= values
                    means.reset()
                if save_due:
                    with watchdog.stage("saving a checkpoint"):
                        save()
                    saved_at = step
                # Only now what the run can do without: the state is safe, whatever fails here.
                if vitals and metrics and looked_at and not skipped:
                    with optional("the diagnosis"):
                        signs = vitals.after_step(step, lr, batch, output)
                        metrics.write(step, signs, kind="doctor")
                        seen |= signs
                if metrics and _due(step, recipe.monitor.pictures_every, ended):
                    with optional("the picture"), _evaluating(objective):
                        with runtime.autocast(device, recipe.run.precision):
                            picture = objective.picture(batch, progress)
                        if picture is not None:
                            save_picture(picture, out / "pictures" / f"step-{step:08d}.png")
                            metrics.picture(step, picture)
                if recipe.eval.train and recipe.eval.test and _due(step, recipe.eval.every or total_steps, ended):
                    with watchdog.stage("scoring the backbone on process 0"):
                        if metrics:
                            with optional("the score of the eval section"), _evaluating(objective), stop.interrupts():
                                score = probe_scores(objective.exported(), recipe, device)
                                metrics.write(step, score, kind="eval")
                                seen |= score
                                scores = " · ".join(f"{name} {value:.2f} %" for name, value in score.items())
                                line.say(f"step {step:,}: {scores}")
                        accelerator.wait_for_everyone()
                for alarm in doctor.see(step, seen) if is_main else ():
                    line.say(f"step {step:,}: {alarm.sentence}")
                    if recipe.monitor.on_collapse == "stop":
                        stop.request(COLLAPSE)

            if stopping:
                if saved_at != step:
                    with watchdog.stage("saving a checkpoint"):
                        save()
                    saved_at = step
                why = runtime.agreed_reason(accelerator, stop.reason)
                if problems := runtime.gather_lists(accelerator, [problem] if problem else []):
                    raise UserError(f"stopped after step {step:,}, whose state is saved: {problems[0]}")
                line.say(f"stopped after step {step:,} ({why}): "
                         f"the state is saved, and the same command goes on from here")  # fmt: skip
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
        with written.writing(out / "run.json"):
            folder.record_end(summary)
    failure = runtime.agreed_reason(accelerator, written.failure)
    accelerator.end_training()
    if failure:
        state = "the run is finished" if summary.finished else f"the run stopped after step {step:,}"
        advice = "" if summary.finished else "; once it can be written, the same command continues"
        raise UserError(f"{failure}: {state} and its state is saved as {summary.checkpoint}{advice}")
    if is_main:
        print_summary(out)
    return summary


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


def _due(step: int, every: int | None, ended: bool) -> bool:
    return every is not None and (ended or step % every == 0)


@contextmanager
def _optional(step: int, metrics: MetricsWriter | None, line: ProgressLine, what: str) -> Iterator[None]:
    """Within, an error costs `what` alone: it is printed and recorded in the metrics, and training continues."""
    try:
        yield
    except Interrupted:
        line.say(f"step {step:,}: {what} was abandoned, since the run was asked to stop")
    except Exception as error:  # a decoder, a plot, a probe: each has its own
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        message = shorten(f"{what} failed, training continues ({kind}{error})")
        log.debug(message, exc_info=True)
        line.say(f"step {step:,}: {message}")
        if metrics:
            metrics.warn(step, message)


@contextmanager
def _evaluating(objective: Objective) -> Iterator[None]:
    objective.eval()
    try:
        yield
    finally:
        objective.train()


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
