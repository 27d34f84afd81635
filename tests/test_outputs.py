"""Writing metrics, pictures or text may fail; the weights are saved nevertheless."""

import errno
import os
import subprocess

import pytest

from runs import REPOSITORY, assert_same_state, command, environment, overrides, small
from selfvil import checkpoint, pretrain
from selfvil.diagnostics.vitals import Vitals
from selfvil.engine import base
from selfvil.engine.ddp import DDP
from selfvil.errors import UserError
from selfvil.files import write_text
from selfvil.monitor import observers
from selfvil.monitor.metrics import MetricsWriter
from selfvil.objectives.mae import MAE
from selfvil.records import read_metrics

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(error: BaseException):
    def failing(*_args, **_kwargs):
        raise error

    return failing


@pytest.fixture(scope="module")
def straight(digit_shards, tmp_path_factory):
    """A run of 8 steps without a failure."""
    out = tmp_path_factory.mktemp("straight") / "run"
    pretrain.pretrain(small("mae", digit_shards, out, "budget.steps=8", "monitor.log_every=2"))
    return out


def test_a_run_continues_after_a_failed_score_picture_or_diagnosis(digit_shards, straight, tmp_path, monkeypatch):
    saved_at_score = []

    def score(*_, guard, **__):
        saved_at_score.append(checkpoint.newest(tmp_path / "run" / "checkpoints").step)
        with guard("the evaluation knn"):
            raise UserError("test.tar has no labels")
        return {}

    monkeypatch.setattr(observers, "run_evaluations", score)
    monkeypatch.setattr(MAE, "picture", fail(ValueError("no picture")))
    monkeypatch.setattr(Vitals, "after_step", fail(RuntimeError("no SVD")))
    more = [
        "eval.knn.train=a",
        "eval.knn.test=b",
        "eval.knn.every=5",
        "monitor.pictures_every=4",
        "monitor.doctor_every=8",
    ]
    recipe = small("mae", digit_shards, tmp_path / "run", "budget.steps=8", "monitor.log_every=2", *more)
    monkeypatch.setattr(pretrain, "check_evaluations", lambda _: [])
    assert pretrain.pretrain(recipe).finished
    assert saved_at_score == [5, 8]
    assert_same_state(straight, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    warnings = [(record["step"], record["message"]) for record in records if record["kind"] == "warning"]
    assert [step for step, _ in warnings] == [4, 5, 8, 8, 8]
    assert "the picture failed, training continues (ValueError: no picture)" in warnings[0][1]
    assert "the evaluation knn failed, training continues (test.tar has no labels)" in warnings[1][1]
    assert "the diagnosis failed, training continues (RuntimeError: no SVD)" in warnings[2][1]


@pytest.mark.parametrize("what", ["metrics", "TensorBoard", "standard output"])
def test_a_full_disk_saves_and_stops(digit_shards, straight, tmp_path, monkeypatch, what):
    """The output fails once, at about step 3; the same command then finishes the run, bit for bit."""
    recipe = small(
        "mae", digit_shards, tmp_path / "run", "budget.steps=8", "monitor.log_every=2",
        f"monitor.tensorboard={'true' if what == 'TensorBoard' else 'false'}",
    )  # fmt: skip
    with monkeypatch.context() as patched:
        if what == "metrics":
            patched.setattr(MetricsWriter, "_file", property(fail(FULL), lambda *_: None), raising=False)
        elif what == "TensorBoard":
            from torch.utils.tensorboard import SummaryWriter

            patched.setattr(SummaryWriter, "add_scalar", fail(FULL))
        else:
            patched.setattr("builtins.print", fail(BrokenPipeError(errno.EPIPE, "Broken pipe")))
        expected = r"cannot be written \((No space left on device|Broken pipe)\): the run stopped after step \d"
        with pytest.raises(UserError, match=expected) as caught:
            pretrain.pretrain(recipe)
    assert "the same command continues" in str(caught.value)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert 0 < newest.step < 8
    assert pretrain.pretrain(recipe).finished
    assert_same_state(straight, tmp_path / "run")


def test_a_full_disk_at_a_checkpoint_keeps_the_older_ones(digit_shards, straight, tmp_path, monkeypatch):
    recipe = small("mae", digit_shards, tmp_path / "run", "budget.steps=8", "monitor.log_every=2")
    save_file = checkpoint.save_file

    def failing(tensors, path):
        if "00000008" in str(path):
            raise FULL
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(UserError, match=r"No space left on device\. Older checkpoints are unchanged"):
        pretrain.pretrain(recipe)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 5
    monkeypatch.undo()
    assert pretrain.pretrain(recipe).finished
    assert_same_state(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_closed_pipe_gives_one_message(digit_shards, tmp_path):
    """selfvil pretrain ... | head -1"""
    arguments = overrides("mae", digit_shards, tmp_path / "run", "budget.steps=100000", "run.checkpoint_every=100000")
    run = subprocess.Popen(
        command("mae", *arguments), cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    run.stdout.readline()
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait(timeout=120) == 2, error
    assert "selfvil: standard output cannot be written (Broken pipe): the run stopped after step" in error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def main_of_two() -> DDP:
    """The engine of the main process of two, without a process group."""
    engine = object.__new__(DDP)
    engine.world_size, engine.is_main = 2, True
    return engine


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ([None, "SIGTERM"], "SIGTERM at process 1"),
        (["pause_minutes", "SIGTERM"], "pause_minutes"),
        ([None, None], None),
    ],
)
def test_the_reason_of_a_stop_names_its_process(monkeypatch, reasons, expected):
    monkeypatch.setattr(DDP, "any", lambda _, flag: any(reason is not None for reason in reasons))
    monkeypatch.setattr(base, "gather_object", lambda _: reasons)
    assert main_of_two().first_reason(reasons[0]) == expected


def test_an_error_on_the_main_process_is_raised_on_every_process(monkeypatch):
    """The others get the message instead of a result."""
    sent = []
    monkeypatch.setattr(DDP, "agree", lambda _, value: sent.append(value) or value)
    with pytest.raises(UserError, match="full"):
        main_of_two().on_main(fail(UserError("full")))
    assert sent == [(None, "full")]
    assert main_of_two().on_main(lambda: 7) == 7


def test_a_text_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", fail(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
