"""What a run writes beside its checkpoints may fail; the weights are saved all the same."""

import errno
import os
import subprocess

import pytest

from runs import REPOSITORY, assert_same_state, command, environment, overrides, small
from selfvil import checkpoint, pretrain, runtime
from selfvil.errors import UserError
from selfvil.files import write_text
from selfvil.monitor.metrics import MetricsWriter, read_metrics
from selfvil.monitor.vitals import Vitals
from selfvil.objectives.mae import MAE

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(error: BaseException):
    def failing(*_args, **_kwargs):
        raise error

    return failing


@pytest.fixture(scope="module")
def straight(digit_shards, tmp_path_factory):
    """A run of 8 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    pretrain.pretrain(small("mae", digit_shards, out, "budget.steps=8", "monitor.log_every=2"))
    return out


def test_a_score_picture_or_diagnosis_that_fails_costs_only_itself(digit_shards, straight, tmp_path, monkeypatch):
    saved_at_score = []

    def score(*_):
        saved_at_score.append(checkpoint.newest(tmp_path / "run" / "checkpoints").step)
        raise UserError("eval.test has no labels")

    monkeypatch.setattr(pretrain, "probe_scores", score)
    monkeypatch.setattr(MAE, "picture", fail(ValueError("no picture")))
    monkeypatch.setattr(Vitals, "after_step", fail(RuntimeError("no SVD")))
    more = ["eval.train=a.tar", "eval.test=b.tar", "eval.every=5", "monitor.pictures_every=4", "monitor.doctor_every=8"]
    recipe = small("mae", digit_shards, tmp_path / "run", "budget.steps=8", "monitor.log_every=2", *more)
    monkeypatch.setattr(pretrain, "check_probes", lambda _: [])
    assert pretrain.pretrain(recipe).finished
    assert saved_at_score == [5, 8]
    assert_same_state(straight, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    warnings = [(record["step"], record["message"]) for record in records if record["kind"] == "warning"]
    assert [step for step, _ in warnings] == [4, 5, 8, 8, 8]
    assert "the picture failed, training continues (ValueError: no picture)" in warnings[0][1]
    assert "score of the eval section failed, training continues (eval.test has no labels)" in warnings[1][1]
    assert "the diagnosis failed, training continues (RuntimeError: no SVD)" in warnings[2][1]


@pytest.mark.parametrize("what", ["metrics", "TensorBoard", "standard output"])
def test_a_full_disk_saves_and_stops(digit_shards, straight, tmp_path, monkeypatch, what):
    """The output fails once, at step 3 or so; the same command then finishes the run, bit for bit."""
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
    with pytest.raises(UserError, match=r"No space left on device\. Older checkpoints are untouched"):
        pretrain.pretrain(recipe)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 5
    monkeypatch.undo()
    assert pretrain.pretrain(recipe).finished
    assert_same_state(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_closed_pipe_is_one_sentence(digit_shards, tmp_path):
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


class _Process:
    """An accelerator of two processes, as the main one has it."""

    num_processes, is_main_process = 2, True


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ([None, "SIGTERM"], "SIGTERM at process 1"),
        (["pause_minutes", "SIGTERM"], "pause_minutes"),
        ([None, None], None),
    ],
)
def test_the_reason_of_a_stop_is_that_of_the_process_that_has_one(monkeypatch, reasons, expected):
    monkeypatch.setattr(runtime, "any_process", lambda _, flag: any(reason is not None for reason in reasons))
    monkeypatch.setattr(runtime, "gather_object", lambda _: reasons)
    assert runtime.agreed_reason(_Process(), reasons[0]) == expected


def test_a_mistake_found_by_the_main_process_ends_every_process(monkeypatch):
    """The others get the message in place of a result, and raise it too."""
    sent = []
    monkeypatch.setattr(runtime, "agree", lambda _, value: sent.append(value) or value)
    with pytest.raises(UserError, match="full"):
        runtime.on_main(_Process(), fail(UserError("full")))
    assert sent == [(None, "full")]
    assert runtime.on_main(_Process(), lambda: 7) == 7


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", fail(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
