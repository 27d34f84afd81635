"""Metrics out: JSON lines always; TensorBoard and Weights & Biases when asked."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfvil.errors import UserError
from selfvil.files import Outputs, write_text

log = logging.getLogger("selfvil")

_ALWAYS = ("lr", "samples", "epoch")  # in every record of kind "train"; a loss is not, where all steps were skipped


class Means:
    """Running means of float scalars between two log lines, kept on the device so that no step waits for them."""

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
    """Appends records to `metrics.jsonl` in the run's folder and passes them on.

    Records after `resume_step` are taken out when a run goes on from an earlier checkpoint, so that every step stands
    in the file once. A write that fails later is recorded in `outputs` and raises nothing.

    Raises:
        UserError: wandb is asked for and not installed, or metrics.jsonl cannot be written.
    """

    def __init__(
        self, folder: Path, resume_step: int, tensorboard: bool, wandb: str | None, name: str,
        run_id: str, outputs: Outputs | None = None, config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.path, self._outputs = folder / "metrics.jsonl", outputs or Outputs()
        try:
            _drop_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
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
            except Exception as error:  # of the network, the account or the service, by classes of wandb's own
                raise UserError(
                    f"Weights & Biases cannot be started: {str(error)[:300]}; set WANDB_MODE=offline, or "
                    "monitor.wandb=null"
                ) from error

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Write one record; `step` counts finished optimizer steps."""
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
        """Records written so far survive a power cut from now on."""
        with self._outputs.writing(self.path):
            os.fsync(self._file.fileno())

    def picture(self, step: int, picture: Tensor) -> None:
        """Pass a picture (3, H, W) in [0, 1] on to TensorBoard."""
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
        if self._outputs.failure is None:  # else the disk may be full: what fits again would leave a gap
            with self._outputs.writing(self.path):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, each with "step" and "kind"; damaged lines, and values that are neither number nor
    text, are left out, with one warning unless it is only the last line, which a crash cuts off."""
    records, damaged = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged += 1
    if damaged:
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    if record["kind"] == "train" and not all(isinstance(record.get(key), int | float) for key in _ALWAYS):
        return None
    return {key: value for key, value in record.items() if isinstance(value, int | float | str)}


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def finite(values: dict[str, Tensor]) -> bool:
    """Whether all values are finite; waits for the device."""
    return not values or bool(torch.isfinite(torch.stack([value.float() for value in values.values()])).all())
