"""Saving in the background: checkpoints hold the state of their step, and a failed save is reported."""

import threading

import pytest
import torch

from runs import assert_same_state, small
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.pretrain import pretrain
from selfvil.saving import BackgroundSaver


def accept(step, tensors):
    pass


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"objective": {"x": torch.full((3,), value)}, "optimizer": {}}


def test_the_state_is_copied_before_training_continues(tmp_path, monkeypatch):
    """While the file is being written, the tensors change, as they do in the next step."""
    written, original = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (written.wait(10), original(*args)))
    trained = state(1.0)
    with BackgroundSaver(tmp_path, 2, None, accept) as saver:
        saver.start(1, trained, {})
        trained["objective"]["x"].fill_(2.0)
        assert not list(tmp_path.glob("step-*")), "the save is still running"
        written.set()
    assert checkpoint.newest(tmp_path).tensors("objective")["x"].tolist() == [1, 1, 1]


def test_a_save_starts_after_the_previous_one_has_ended(tmp_path, monkeypatch):
    running, overlapped, original = [], [], checkpoint.save

    def save(*args):
        overlapped.extend(running)
        running.append(args[1])
        original(*args)
        running.remove(args[1])

    monkeypatch.setattr(checkpoint, "save", save)
    with BackgroundSaver(tmp_path, 3, None, accept) as saver:
        for step in (1, 2, 3):
            saver.start(step, state(step), {})
    assert not overlapped
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_a_failed_save_is_raised_by_the_next_one_or_at_the_end(tmp_path):
    def refuse(step, tensors):
        raise UserError(f"step {step} is not finite")

    saver = BackgroundSaver(tmp_path, 2, None, refuse)
    saver.start(1, state(1), {})
    saver._thread.join()
    with pytest.raises(UserError, match="step 1 is not finite"):
        saver.start(2, state(2), {})
    assert saver.take_failure() is None, "it is raised once"
    saver = BackgroundSaver(tmp_path, 2, None, refuse)
    saver.start(3, state(3), {})
    with pytest.raises(UserError, match="step 3 is not finite"):
        saver.wait()
    saver.start(4, state(4), {})
    saver._thread.join()
    assert saver.take_failure() == "step 4 is not finite"
    saver.wait()
    saver.start(5, state(5), {})
    with pytest.raises(UserError, match="step 4 is not finite"):
        saver.wait()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_checkpoint_cannot_be_written_stops_with_a_message(digit_shards, tmp_path, monkeypatch):
    """The first save fails, as on a full disk; the run stops at the next step and then saves a complete checkpoint."""
    original, failed = checkpoint.save, []

    def full(root, step, *args):
        if not failed:
            failed.append(step)
            raise UserError(f"Could not save the checkpoint step-{step:08d}: no space left on device.")
        return original(root, step, *args)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match=r"stopped after step \d+, whose state is saved: Could not save .*00000002"):
        pretrain(small("mae", digit_shards, tmp_path / "run", "run.checkpoint_every=2"))
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step > 2
    assert pretrain(small("mae", digit_shards, tmp_path / "run", "run.checkpoint_every=2")).finished
    pretrain(small("mae", digit_shards, tmp_path / "straight"))
    assert_same_state(tmp_path / "run", tmp_path / "straight")


def test_milestones_are_never_removed(digit_shards, tmp_path):
    more = ["run.checkpoint_every=2", "run.milestone_every=3", "budget.steps=10"]
    pretrain(small("mae", digit_shards, tmp_path / "run", *more))
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == [3, 6, 9, 10]
