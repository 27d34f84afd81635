"""Measurements of a run at intervals: signs of collapse, a picture and scores, in this order.

They do not change the run: an error is printed and recorded, and training continues. If each process holds only a part
of the weights, all processes take part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from selfvil.diagnostics.vitals import Vitals
from selfvil.engine import Engine
from selfvil.engine.base import GradientNorms
from selfvil.monitor.evaluations import due_evaluations, plain_copy, run_evaluations
from selfvil.monitor.journal import Journal
from selfvil.monitor.pictures import save_picture
from selfvil.objectives.base import Batch, Objective, Progress, StepOutput
from selfvil.recipe import Recipe
from selfvil.run import RunFolder
from selfvil.stop import StopRequest


class Observers:
    """The measurements of one launch; created before its first step."""

    def __init__(
        self, recipe: Recipe, engine: Engine, objective: Objective, folder: RunFolder, journal: Journal,
        first_step: int, total_steps: int,
    ) -> None:  # fmt: skip
        self.recipe, self.engine, self.objective, self.folder, self.journal = recipe, engine, objective, folder, journal
        self.total_steps = total_steps
        self._takes_part = engine.is_main or engine.divides_weights
        self._vitals: Vitals | None = None
        if recipe.monitor.doctor_every and self._takes_part:
            with engine.gathered():
                self._vitals = Vitals(objective, first_step)

    def before_update(self, step: int, norms: GradientNorms) -> None:
        """Call before step number `step`, counted from 1, changes the weights. norms: of its gradients."""
        if self._vitals and self._due(step, self.recipe.monitor.doctor_every):
            with self.journal.optional(step, "the diagnosis"), self.engine.gathered():
                self._vitals.before_step(norms.of)

    def after_step(self, step: int, lr: float, batch: Batch, output: StepOutput, progress: Progress) -> None:
        """Measure what is due after `step` steps. batch, output: of the last micro-batch."""
        if self._vitals and self._due(step, self.recipe.monitor.doctor_every):
            with self.journal.optional(step, "the diagnosis"), self.engine.gathered():
                signs = self._vitals.after_step(step, lr, batch, output)
                self.journal.write(step, signs, kind="doctor")
        if self._takes_part and self._due(step, self.recipe.monitor.pictures_every):
            with self.journal.optional(step, "the picture"), self._for_reading():
                self._picture(step, batch, progress)

    def _picture(self, step: int, batch: Batch, progress: Progress) -> None:
        with self.engine.autocast():
            picture = self.objective.picture(batch, progress)
        if picture is not None and self.journal.metrics:
            save_picture(picture, self.folder.picture(step))
            self.journal.metrics.picture(step, picture)

    def evaluation_due(self, step: int) -> bool:
        """Whether `evaluate` has anything to run after `step` steps."""
        return bool(due_evaluations(self.recipe, step, step == self.total_steps))

    def evaluate(self, step: int, stop: StopRequest) -> None:
        """Run the evaluations that are due after `step` steps. All processes share the images. Collective."""
        due = due_evaluations(self.recipe, step, step == self.total_steps)
        with self._for_reading():
            backbone = self.objective.exported()
            if self.engine.divides_weights:  # its processes may run it different numbers of times, on their images
                backbone = plain_copy(self.recipe, backbone)
        with self._evaluating():
            scores = run_evaluations(
                self.recipe, due, backbone, self.engine.device,
                guard=partial(self.journal.optional, step), interrupts=stop.interrupts,
            )  # fmt: skip
        if scores:
            self.journal.write(step, scores, kind="eval")
            self.journal.say(f"step {step:,}: " + " · ".join(f"{name} {x:.2f} %" for name, x in scores.items()))
        self.engine.wait()

    @contextmanager
    def _for_reading(self) -> Iterator[None]:
        """Whole weights, in evaluation mode."""
        with self.engine.gathered(), self._evaluating():
            yield

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.objective.eval()
        try:
            yield
        finally:
            self.objective.train()

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and (step == self.total_steps or step % every == 0)
