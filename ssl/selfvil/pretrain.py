"""The loop. Read `train` from top to bottom: what happens is what is written, in this order.

recipe -> shards -> order -> decode -> views -> objective -> loss -> optimizer step -> teacher -> metrics, checkpoint
"""

import logging
import os
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor

from selfvil import checkpoint, optim, runtime
from selfvil.build import build_objective, classifier, open_training, parameter_groups
from selfvil.data.base import Images
from selfvil.data.ledger import Ledger
from selfvil.data.loader import train_batches
from selfvil.divergence import BuffersBefore, NonFinite, non_finite
from selfvil.engine import Engine, start_engine
from selfvil.errors import UserError
from selfvil.monitor.evaluations import check_evaluations
from selfvil.monitor.journal import Journal
from selfvil.monitor.observers import Observers
from selfvil.monitor.summary import print_summary
from selfvil.objectives.base import Objective
from selfvil.plan import Plan, check_batch, check_division
from selfvil.preflight import check_objective, check_wandb, workers_warning
from selfvil.profiling import Profile
from selfvil.recipe import Recipe
from selfvil.run import RunFolder, Start, Summary, checkpoint_meta
from selfvil.saving import BackgroundSaver
from selfvil.stop import COLLAPSE, PAUSE, StopRequest
from selfvil.unused import freeze_unused
from selfvil.watchdog import Watchdog

log = logging.getLogger("selfvil")


@runtime.undisturbed()
def pretrain(recipe: Recipe, *, summarise: bool = True) -> Summary:
    """Run a recipe to its end, or until it is asked to stop; in both cases the state is saved.

    Every process of a launch calls this. `run.resume=auto` continues from the newest valid checkpoint in `run.out`.
    It may be called again in the same process, with any recipe, and in a thread, where signals cannot stop it.
    summarise: print a table at the end.

    Raises:
        UserError: nothing has been overwritten; the message says what to change.
    """
    with RunFolder(Path(recipe.run.out)) as folder:
        engine = start_engine(recipe)
        check_division(recipe.optim, engine.world_size)
        engine.on_main(folder.take)
        with engine.main_first():
            recipe, shards = open_data(recipe, engine)
        check_same_images(engine, shards)
        start = engine.on_main(partial(folder.start, recipe, shards))
        summary = start.finished or train(recipe, engine, folder, shards, start)
        engine.close()
        if engine.is_main and summarise:
            print_summary(folder.path)
        return summary


def train(recipe: Recipe, engine: Engine, folder: RunFolder, shards: Images, start: Start) -> Summary:
    """Train from `start` to the end of its plan, or until a stop."""
    plan = Plan.read(start.steps, recipe, len(shards), engine.world_size)
    accumulate, rank = recipe.optim.accumulate, engine.rank
    saved = checkpoint.load(start.checkpoint) if start.checkpoint is not None else None
    objective = prepare(recipe, engine, plan, fresh=saved is None)
    engine.setup(objective, parameter_groups(recipe, objective), saved)
    first_step, seconds_before = (saved.step, saved.meta["seconds"]) if saved else (0, 0.0)
    run_id = engine.on_main(partial(folder.record_launch, recipe, engine.describe(), saved))
    ledger = open_ledger(recipe, engine, folder, len(shards))
    journal = Journal(recipe, engine, folder, plan, first_step, run_id)
    observers = Observers(recipe, engine, objective, folder, journal, first_step, plan.total_steps)
    buffers, nonfinite = BuffersBefore(objective), NonFinite(recipe.optim.on_nonfinite, folder.path)
    saver = BackgroundSaver(
        folder.checkpoints, recipe.run.keep_checkpoints, recipe.run.milestone_every,
        lambda at, tensors: nonfinite.refuse(at, non_finite(tensors)),
    )  # fmt: skip
    batches = train_batches(
        shards, objective.views(), seed=recipe.run.seed, batch_size=recipe.optim.batch_size, rank=rank,
        world_size=engine.world_size, accumulate=accumulate, start_step=first_step, stop_step=plan.total_steps,
        workers=recipe.data.workers, channels=recipe.model.in_chans, augment=recipe.data.augment,
        balanced=recipe.data.order == "class_balanced", decode=recipe.data.decode, window=recipe.data.window,
    )  # fmt: skip
    greet(journal, recipe, engine, objective, shards, first_step, plan.total_steps)
    head = classifier(recipe, objective.backbone, shards)
    step, saved_at, stopping, problem = first_step, first_step if saved else None, False, None

    def state() -> tuple[dict[str, dict[str, Tensor]], dict]:
        """What a checkpoint after the last whole step holds. Collective where state is divided among processes."""
        tensors = engine.state()
        tensors["objective"] = {name: buffers.values.get(name, x) for name, x in tensors["objective"].items()}
        seconds = seconds_before + journal.clock.wall()
        meta = checkpoint_meta(recipe, shards, objective.networks, objective.export, step, seconds, plan, run_id)
        meta |= {} if head is None else {"classifier": head}
        return tensors, meta

    def save() -> None:
        with watchdog.stage("saving a checkpoint"):
            journal.flush_to_disk()
            engine.on_main(partial(saver.start, step, *state()))

    stop = StopRequest(engine.world_size, verbose=engine.is_main)
    watchdog = Watchdog(
        recipe.run.stall_minutes, rank, engine.world_size, stop,
        None if engine.divides_optimizer else lambda: saver.save(step, *state()),
    )  # fmt: skip
    profile = Profile(recipe.run.profile if engine.is_main else None, folder.path / "profile", journal.say)
    objective.train()
    with closing(batches), closing(journal), closing(profile), saver, stop, watchdog:
        if step == 0 and observers.evaluation_due(step):
            with journal.clock.paused(), watchdog.stage("evaluating the backbone"):
                observers.evaluate(step, stop)
        while step < plan.total_steps:
            # One optimizer step: micro-batches, clipping, update, teacher.
            watchdog.step(step)
            progress, rates = plan.progress(step), plan.rates(step, objective)
            optim.set_rates(engine.optimizer, *rates)
            runtime.seed_step(recipe.run.seed, step, rank)
            outputs, ids = list[dict[str, Tensor]](), list[Tensor]()
            for micro in range(1, accumulate + 1):
                if stopping := stop.agreed():
                    break
                try:
                    with watchdog.stage("waiting for a batch", patience=1):
                        batch = next(batches).to(engine.device)
                except UserError as error:  # a store that fails, say
                    if engine.world_size > 1:  # the others wait in a collective: no state is the same on all
                        raise
                    problem, stopping = str(error), True
                    stop.request(problem)
                    break
                output = engine.forward(batch, progress, last=micro == accumulate)
                engine.backward(output.loss / accumulate, last=micro == accumulate)
                outputs.append({"loss": output.loss.detach()} | output.logs)
                ids.append(batch.ids)
                ledger.record(batch.bad)
                problem = problem or batch.problem
            if stopping:  # the micro-batches of this step are discarded
                buffers.restore()
                break
            norms = engine.clip_gradients(recipe.optim.clip_norm, recipe.optim.clip_per_tensor)
            observers.before_update(step + 1, norms)
            broken = nonfinite.find(outputs, norms.total, ids)
            skipped = engine.any(broken is not None)
            with watchdog.updating:
                engine.update(apply=not skipped)
                if skipped:
                    objective.discard_step()
                    buffers.restore()
                else:
                    objective.after_step(progress)
                    buffers.remember()
                step += 1
            journal.step(step)
            if skipped:
                found = engine.gather([broken] if broken else [])
                journal.say(nonfinite.skip(step, found, record=engine.is_main))
            else:
                nonfinite.in_a_row = 0
                journal.add(outputs, norms.total)

            # What is due after it.
            log_due = due(step, recipe.monitor.log_every, plan)
            if log_due or engine.world_size == 1:  # asking the other processes costs a collective: not at every step
                ledger.merge(engine.gather(ledger.unshared()))
                problem = problem or ledger.excess() or saver.take_failure()
            paused = recipe.budget.pause_minutes and journal.clock.wall() > 60 * recipe.budget.pause_minutes
            if reason := problem or journal.outputs.failure or (PAUSE if paused else None):
                stop.request(reason)
            if log_due:
                journal.log(step, rates, nonfinite, shards.shares(plan.samples(step)))
            with journal.clock.paused():
                # While steps are being skipped, the checkpoint from before stays the newest.
                if step == plan.total_steps or (not skipped and save_due(step, recipe)):
                    save()
                    saved_at = step
                if not skipped:
                    observers.after_step(step, rates.lr, batch, output, progress)
                if observers.evaluation_due(step):
                    with watchdog.stage("evaluating the backbone"):
                        saver.join()  # a process that is killed during a long evaluation has its checkpoint
                        observers.evaluate(step, stop)
            if journal.judge(step) and recipe.monitor.on_collapse == "stop":
                stop.request(COLLAPSE)
            with journal.optional(step, "the trace"):
                profile.step()

        if stopping and saved_at != step:
            save()
            saved_at = step
        with watchdog.stage("saving a checkpoint"):
            engine.on_main(saver.wait)
        if stopping:
            report_stop(engine, journal, step, stop.reason, problem)
    return finish(recipe, engine, folder, journal, plan, first_step, step, saved_at, seconds_before)


# --- before the first step -------------------------------------------------------------------------------------------


def open_data(recipe: Recipe, engine: Engine) -> tuple[Recipe, Images]:
    """The recipe with the classes of its images, the images, and all else that the run needs, checked.

    Raises UserError.
    """
    if engine.is_main:
        check_wandb(recipe)
    recipe, shards = open_training(recipe)
    check_batch(recipe.optim.batch_size, len(shards))
    for warning in check_evaluations(recipe):
        log.log(logging.WARNING if engine.is_main else logging.DEBUG, warning)
    return recipe, shards


def check_same_images(engine: Engine, shards: Images) -> None:
    """Raise UserError if a process has other images than the main one, as on a host with an old copy. Collective."""
    found = engine.gather([(shards.fingerprint, len(shards))])
    if different := [rank for rank, each in enumerate(found) if each != found[0]]:
        raise UserError(
            f"data.train: process {different[0]} has other images or labels than process 0 ({found[different[0]][1]:,} "
            f"and {found[0][1]:,} images): give all hosts the same version of the images"
        )


def prepare(recipe: Recipe, engine: Engine, plan: Plan, fresh: bool) -> Objective:
    """The objective on its device, once it is known that a step can be taken. Raises UserError.

    fresh: start from model.start_from where the recipe has it; otherwise a checkpoint follows.
    """
    objective = build_objective(recipe, start=fresh).to(engine.device)
    check_objective(objective, recipe, plan, engine.device, parts=engine.world_size if engine.divides_optimizer else 1)
    freeze_unused(objective, recipe.model.in_chans, engine.device, engine.autocast())
    return objective


def open_ledger(recipe: Recipe, engine: Engine, folder: RunFolder, num_samples: int) -> Ledger:
    """The damaged samples of earlier launches. Raises UserError where there are too many already. Collective."""
    ledger = Ledger(folder.path, num_samples, recipe.data.max_bad, engine.rank)
    ledger.merge(engine.gather(ledger.unshared()))
    if problem := ledger.excess():
        raise UserError(problem)
    return ledger


def greet(
    journal: Journal, recipe: Recipe, engine: Engine, objective: Objective, shards: Images, first_step: int,
    total_steps: int,
) -> None:  # fmt: skip
    """Print what will be trained, on what, and for how long."""
    if not engine.is_main:
        return
    trained = sum(engine.numel(parameter) for parameter in objective.parameters() if parameter.requires_grad)
    backbone = sum(engine.numel(parameter) for parameter in objective.backbone.parameters())
    batch_size = recipe.optim.batch_size
    journal.say(
        f"{recipe.objective.name} on {recipe.model.name}: {backbone / 1e6:.2f} M parameters in the backbone, "
        f"{trained / 1e6:.2f} M trained\n"
        f"{len(shards):,} images, {total_steps:,} steps of {batch_size} "
        f"({total_steps * batch_size / len(shards):.1f} epochs) on {engine.world_size} x "
        f"{runtime.device_name(engine.device)}, {recipe.run.precision}, into {recipe.run.out}"
    )
    for name, images, share, epochs in shards.shares(total_steps * batch_size):
        journal.say(f"{100 * share:.4g} % from {name}: {images:,} images, {epochs:.1f} epochs")
    if first_step:
        journal.say(f"continuing after step {first_step:,}")
    if crowded := workers_warning(recipe.data.workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        journal.say(crowded)


# --- during and after it ---------------------------------------------------------------------------------------------


def due(step: int, every: int, plan: Plan) -> bool:
    return step == plan.total_steps or step % every == 0


def save_due(step: int, recipe: Recipe) -> bool:
    milestones = recipe.run.milestone_every
    return step % recipe.run.checkpoint_every == 0 or (milestones is not None and step % milestones == 0)


def report_stop(engine: Engine, journal: Journal, step: int, reason: str | None, problem: str | None) -> None:
    """Print why the run stopped after `step` steps. Raises UserError where a process has a `problem`. Collective."""
    why = engine.first_reason(reason)
    if problems := engine.gather([problem] if problem else []):
        raise UserError(f"stopped after step {step:,}, whose state is saved: {problems[0]}")
    journal.say(f"stopped after step {step:,} ({why}): the state is saved, and the same command continues")


def finish(
    recipe: Recipe, engine: Engine, folder: RunFolder, journal: Journal, plan: Plan, first_step: int, step: int,
    saved_at: int | None, seconds_before: float,
) -> Summary:  # fmt: skip
    """Record how the launch ended. Raises UserError where something could not be written; the state is saved."""
    clock, batch_size = journal.clock, recipe.optim.batch_size
    summary = Summary(
        run=str(folder.path),
        finished=step == plan.total_steps,
        step=step,
        total_steps=plan.total_steps,
        samples=step * batch_size,
        seconds=round(seconds_before + clock.wall(), 1),
        images_per_second=round((step - first_step) * batch_size / max(clock.steps(), 1e-9), 1),
        loss=journal.last_loss,
        checkpoint=None if saved_at is None else str(folder.checkpoints / f"step-{saved_at:08d}"),
        alarms=tuple(journal.doctor.alarms),
    )
    if engine.is_main:
        with journal.outputs.writing(folder.record):
            folder.record_end(summary)
    if failure := engine.first_reason(journal.outputs.failure):
        state = "the run is finished" if summary.finished else f"the run stopped after step {step:,}"
        advice = "" if summary.finished else "; once it can be written, the same command continues"
        raise UserError(f"{failure}: {state} and its state is saved as {summary.checkpoint}{advice}")
    return summary
