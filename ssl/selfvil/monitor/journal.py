"""Records and messages of a launch during training: metrics, progress, warnings, and the doctor's alarms."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from selfvil.data.base import SourceShare
from selfvil.diagnostics.collapse import Alarm, Doctor
from selfvil.divergence import LossSpikes, NonFinite, non_finite
from selfvil.engine import Engine
from selfvil.errors import UserError, shorten
from selfvil.files import Outputs
from selfvil.monitor.console import ProgressLine
from selfvil.monitor.metrics import Means, MetricsWriter
from selfvil.plan import Plan, Rates
from selfvil.recipe import Recipe
from selfvil.run import RunFolder
from selfvil.stop import Interrupted

log = logging.getLogger("selfvil")


class StepClock:
    """Measures the time of training steps, in seconds, without evaluations, pictures and saves."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._paused = 0.0

    def wall(self) -> float:
        """Seconds since the start of training, pauses included."""
        return time.monotonic() - self.began

    def steps(self) -> float:
        """Seconds since the start of training, without pauses."""
        return self.wall() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began


class Journal:
    """The records of one launch. Every process has one; only the main process writes and prints.

    Attributes:
        clock: of this launch.
        last_loss: mean loss of the last logged steps; None if there are none, or all were skipped.
        outputs: failures to write anything but checkpoints.
        doctor: is applied to the records.
    """

    def __init__(
        self, recipe: Recipe, engine: Engine, folder: RunFolder, plan: Plan, first_step: int, run_id: str
    ) -> None:  # fmt: skip
        self.engine, self.plan = engine, plan
        self.outputs, self.clock = Outputs(), StepClock()
        self.last_loss: float | None = None
        self.metrics = MetricsWriter(
            folder.path, first_step, recipe.monitor.tensorboard, recipe.monitor.wandb, folder.path.name, run_id,
            self.outputs, recipe.as_record(),
        ) if engine.is_main else None  # fmt: skip
        self.line = ProgressLine(first_step, plan.total_steps, enabled=engine.is_main, outputs=self.outputs)
        self.doctor = Doctor(recipe, plan.total_steps, takes_vitals=recipe.monitor.doctor_every is not None)
        self._means, self._spikes = Means(), LossSpikes()
        self._window_step, self._window_began = first_step, 0.0
        self._unjudged: dict[str, float] = {}

    def add(self, outputs: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """Add the values of a step's micro-batches to the means that `log` writes."""
        for values in [*outputs, {"grad_norm": grad_norm}]:
            self._means.add(values)

    def log(self, step: int, rates: Rates, nonfinite: NonFinite, sources: Sequence[SourceShare]) -> None:
        """Write the means since the last call, with the speed and the epochs of the sources of a mixture. Collective.

        Raises UserError if a mean is not finite.
        """
        seconds = self.clock.steps()
        speed = self.plan.samples(step - self._window_step) / max(seconds - self._window_began, 1e-9)
        self._window_step, self._window_began = step, seconds
        averages = self.engine.reduce(self._means.means())
        self._means.reset()
        nonfinite.refuse(step, non_finite(averages))
        values = {name: value.item() for name, value in averages.items()}
        self.last_loss = values.get("loss", self.last_loss)  # absent if all steps were skipped
        values |= {"lr": rates.lr, "weight_decay": rates.weight_decay, "samples": self.plan.samples(step),
                   "epoch": self.plan.epochs(step), "images_per_second": speed}  # fmt: skip
        values |= {f"epoch/{source.name}": source.epochs for source in sources}
        if "loss" in values and (height := self._spikes.add(values["loss"])):
            values["loss_spike"] = height
            self.say(f"step {step:,}: loss {values['loss']:.4f} is {height:.0f} deviations above the recent ones")
        self.write(step, values)
        if self.last_loss is not None:
            self.line.log(step, self.last_loss, speed)

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Write one record, which the next call of `judge` includes."""
        if self.metrics:
            self.metrics.write(step, values, kind=kind)
        self._unjudged |= values

    def judge(self, step: int) -> list[Alarm]:
        """Apply the doctor to the records since the last call; print and return its new alarms."""
        alarms = self.doctor.judge(step, self._unjudged) if self.engine.is_main else []
        self._unjudged = {}
        for alarm in alarms:
            self.say(f"step {step:,}: {alarm.sentence}")
        return alarms

    def step(self, step: int) -> None:
        """Report that `step` optimizer steps are done."""
        self.line.step(step)

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.line.print_line(sentence)

    @contextmanager
    def optional(self, step: int, what: str) -> Iterator[None]:
        """In this context, an error in `what` is printed and recorded, and training continues."""
        try:
            yield
        except Interrupted:
            self.say(f"step {step:,}: {what} was abandoned, since the run was asked to stop")
        except Exception as error:  # decoders, plots and evaluations raise different classes
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            message = shorten(f"{what} failed, training continues ({kind}{error})")
            log.debug(message, exc_info=True)
            self.say(f"step {step:,}: {message}")
            if self.metrics:
                self.metrics.warn(step, message)

    def flush_to_disk(self) -> None:
        """Write all records so far to the disk, so that they survive a power failure."""
        if self.metrics:
            self.metrics.flush_to_disk()

    def close(self) -> None:
        self.line.close()
        if self.metrics:
            self.metrics.close()
