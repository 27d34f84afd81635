"""Metrics of a run: JSON lines always; TensorBoard and Weights & Biases by the recipe."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from selfvil.errors import UserError
from selfvil.files import Outputs, write_text
from selfvil.records import METRICS, TENSORBOARD, read_metrics


class Means:
    """Running means of float scalars between two log lines, kept on the device to avoid synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The means so far, still on the device."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def reset(self) -> None:
        self._sums.clear()
        self._counts.clear()


class MetricsWriter:
    """Appends records to `metrics.jsonl` in the run's folder, and sends them to TensorBoard and Weights & Biases.

    Records after `resume_step` are removed when a run resumes from an earlier checkpoint, so that the file has every
    step once. If a later write fails, this is recorded in `outputs`, and no exception is raised.

    Raises:
        UserError: wandb is requested and not installed, or metrics.jsonl cannot be written.
    """

    def __init__(
        self, folder: Path, resume_step: int, tensorboard: bool, wandb: str | None, name: str,
        run_id: str, outputs: Outputs | None = None, config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.path, self._outputs = folder / METRICS, outputs or Outputs()
        try:
            _drop_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_step + 1)
        if wandb:
            try:
                import wandb as wandb_module
            except ImportError:
                raise UserError(
                    "monitor.wandb is set, but wandb is not installed: pip install 'selfvil[wandb]'"
                ) from None
            try:
                self._wandb = wandb_module.init(
                    project=wandb, name=name, dir=str(folder), id=run_id, resume="allow", config=config
                )
            except Exception as error:  # wandb raises its own classes for network, account and service
                raise UserError(
                    f"Weights & Biases cannot be started: {str(error)[:300]}; set WANDB_MODE=offline, or "
                    "monitor.wandb=null"
                ) from error

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Write one record; `step` is the number of finished optimizer steps."""
        self._append({"step": step, "kind": kind} | values)
        if self._tensorboard:
            with self._outputs.writing("the TensorBoard files"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def warn(self, step: int, message: str) -> None:
        """Record that something optional failed at `step`, as {"step", "kind": "warning", "message"}."""
        self._append({"step": step, "kind": "warning", "message": message})

    def flush_to_disk(self) -> None:
        """Write all records so far to the disk, so that they survive a power failure."""
        with self._outputs.writing(self.path):
            os.fsync(self._file.fileno())

    def picture(self, step: int, picture: Tensor) -> None:
        """Send a picture (3, H, W) in [0, 1] to TensorBoard."""
        if self._tensorboard:
            with self._outputs.writing("the TensorBoard files"):
                self._tensorboard.add_image("picture", picture.cpu(), step)

    def close(self) -> None:
        with self._outputs.writing(self.path):
            self._file.close()
        if self._tensorboard:
            with self._outputs.writing("the TensorBoard files"):
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _append(self, record: dict[str, Any]) -> None:
        if self._outputs.failure is None:  # after a failure, as on a full disk, later records would leave a gap
            with self._outputs.writing(self.path):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
