"""The folder of a run: one launch at a time, damaged files, and which recipes and images may continue a run."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from runs import assert_same_state, overrides, small
from selfvil import checkpoint, lease
from selfvil.cli import main
from selfvil.data.index import open_shards
from selfvil.diagnostics.checkup import open_run
from selfvil.errors import UserError
from selfvil.monitor.metrics import MetricsWriter
from selfvil.pretrain import pretrain
from selfvil.records import RunRecord, read_metrics, read_record
from selfvil.run import RunFolder, read_recipe

STEPS = ["budget.steps=4", "monitor.log_every=2", "run.checkpoint_every=2"]


@pytest.fixture(scope="module")
def finished(digit_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(small("mae", digit_shards, out, *STEPS))
    return out


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one launch at a time --------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from selfvil.run import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.take()
print("taken", flush=True)
time.sleep(600)
"""


def test_a_second_launch_is_refused_until_the_first_has_ended(digit_shards, finished, tmp_path):
    """The first launch is another process, which is then killed with kill -9."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        before = files(out)
        with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on \S+, since 20\d\d-\S+: stop that"):
            pretrain(small("mae", digit_shards, out, *STEPS))
        assert files(out) == before
        assert exit_status(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0  # it only reads
    finally:
        holder.kill()
        holder.wait()
    assert pretrain(small("mae", digit_shards, out, *STEPS)).finished


def exit_status(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_a_second_launch_in_the_same_process_is_refused(tmp_path):
    with RunFolder(tmp_path / "run") as first, RunFolder(tmp_path / "run") as second:
        first.take()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            second.take()
        with pytest.raises(UserError, match="in use"):  # looking at the lease must not have released it
            RunFolder(tmp_path / "run").take()
    assert not (tmp_path / "run").exists(), "a launch that recorded nothing leaves no trace"
    with RunFolder(tmp_path / "run") as third:
        third.take()


def test_without_file_locks_there_is_a_warning_and_a_live_process_is_detected(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run") as folder:
        folder.take()
    assert "its file system has no locks (No locks available)" in caplog.text
    owner = {"host": lease.socket.gethostname(), "pid": os.getppid(), "started": "2999-01-01T00:00:00+00:00"}
    (tmp_path / "run" / "lease.json").write_text(json.dumps(owner))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        RunFolder(tmp_path / "run").take()
    (tmp_path / "run" / "lease.json").write_text(json.dumps(owner | {"pid": 2**22 + 1}))
    with RunFolder(tmp_path / "run") as folder:
        folder.take()


# --- where a run may lie ---------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_created_is_refused_first(digit_shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("selfvil.build.open_images", lambda *_, **__: pytest.fail("work was done"))
    for out, problem in {"file": "is a file", "file/run": "Not a directory", "a" * 300: "File name too long"}.items():
        with pytest.raises(UserError, match=rf"run\.out = .*{problem}"):
            pretrain(small("mae", digit_shards, tmp_path / out, *STEPS))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=r"run\.out = /proc/x/y cannot be made or written"):
        pretrain(small("mae", digit_shards, Path("/proc/x/y"), *STEPS))


def test_a_tilde_is_expanded_in_every_path(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher = "objective.teacher_weights=~/t.safetensors"
    recipe = small("distill", digit_shards, tmp_path / "x", "run.out=~/run", "data.train=~/a/{0..2}.tar", teacher,
                   "eval.knn.train=~/b.tar", "eval.knn.test=[~/c.tar, d.tar]", "model.start_from=~/old",
                   "model.start_heads=new")  # fmt: skip
    assert recipe.run.out == f"{tmp_path}/run"
    assert recipe.data.train == f"{tmp_path}/a/{{0..2}}.tar"
    assert recipe.objective.teacher_weights == f"{tmp_path}/t.safetensors"
    assert recipe.eval[0].train == f"{tmp_path}/b.tar"
    assert recipe.eval[0].test == [f"{tmp_path}/c.tar", "d.tar"]
    assert recipe.model.start_from == f"{tmp_path}/old"
    gram = small("dinov2", digit_shards, tmp_path / "x", "objective.gram_weight=1", "objective.gram_from=~/anchor")
    assert gram.objective.gram_from == f"{tmp_path}/anchor"


# --- files may be damaged ---------------------------------------------------------------------------------------

DAMAGE = {
    "missing": None,
    "empty": b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "garbage": bytes(range(256)) * 3,
    "a list": b"[1, {}, null]\n",
    "other types": b'{"launches": {"a": 1}, "summary": [], "id": {}, "model": 3, "step": "x", "kind": []}\n',
    "deep": b"[" * 100_000,
}
SIDE_FILES = ["recipe.yaml", "run.json", "metrics.jsonl", "ledger.jsonl", "lease.json"]


def damaged(finished: Path, out: Path, name: str, damage: str) -> Path:
    """A copy of a finished run that has two steps left to train, with one file damaged."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    content, made = (out / name).read_bytes() if (out / name).exists() else b"", DAMAGE[damage]
    (out / name).unlink(missing_ok=True)
    if made is not None:
        (out / name).write_bytes(made(content) if callable(made) else made)
    return out


@pytest.mark.parametrize("damage", list(DAMAGE))
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_run_with_a_damaged_file_can_be_read(finished, tmp_path, digit_shards, name, damage, caplog):
    out = damaged(finished, tmp_path / "run", name, damage)
    recipe = small("mae", digit_shards, finished, *STEPS)
    with RunFolder(out) as folder:
        folder.take()
        start = folder.start(recipe, open_shards(recipe.data.train))
    assert start.checkpoint == out / "checkpoints" / "step-00000002"
    assert start.steps["total_steps"] == 4
    assert read_recipe(out) == recipe
    assert read_record(out) == (RunRecord() if name == "run.json" else read_record(finished))
    if name == "metrics.jsonl" and damage != "cut":
        with pytest.raises(UserError, match="holds no training metrics"):
            open_run(out)
    else:
        assert open_run(out).total_steps == 4
    assert len(caplog.records) <= 3


SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in DAMAGE if damage != "other types"]


@pytest.mark.parametrize("damage", ["other types", *SLOW])
@pytest.mark.parametrize("name", SIDE_FILES)
def test_commands_work_on_a_run_with_a_damaged_file(finished, tmp_path, digit_shards, name, damage, capsys):
    """Report, doctor, export and resume succeed, or print one message if they need the damaged file."""
    out = damaged(finished, tmp_path / "run", name, damage)
    for arguments in [["report", str(out)], ["doctor", str(out)], ["export", str(out), str(tmp_path / "export")]]:
        capsys.readouterr()
        code = exit_status(arguments)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        if code:  # without metrics there is nothing to judge
            assert (code, name, arguments[0]) == (2, "metrics.jsonl", "doctor"), error
            assert "holds no training metrics" in error
    resumed = pretrain(small("mae", digit_shards, out, *STEPS))
    assert resumed.finished
    assert_same_state(finished, out)
    assert read_recipe(out) == small("mae", digit_shards, out, *STEPS)
    assert read_record(out).summary == resumed
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")][-1] == 4


def test_an_older_checkpoint_without_its_recipe_still_resumes(finished, tmp_path, digit_shards, caplog):
    """Checkpoints written before they held the recipe; recipe.yaml is damaged too."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    old = checkpoint.newest(out / "checkpoints")
    meta = {key: value for key, value in old.meta.items() if key not in ("recipe", "plan", "run")}
    checkpoint.save(out / "checkpoints", 2, {name: old.tensors(name) for name in old.names()}, meta)
    (out / "recipe.yaml").write_bytes(b"")
    with pytest.raises(UserError, match=r"run\.seed: 0 -> 1"):
        pretrain(small("mae", digit_shards, out, *STEPS, "run.seed=1"))
    assert pretrain(small("mae", digit_shards, out, *STEPS)).finished
    assert "only architecture, objective, images and seed are compared" in caplog.text
    assert_same_state(finished, out)


# --- a start that died early -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates kill -9: no handler of the program runs after it."""


class Crash:
    """Makes the n-th file operation below a folder fail, and all after it."""

    def __init__(self, folder: Path, number: int, error: BaseException) -> None:
        self.folder, self.number, self.error, self.count = folder, number, error, 0

    def before(self, function, changes=lambda *_, **__: True):
        def run(*args, **kwargs):
            if any(str(self.folder) in str(part) for part in args) and changes(*args, **kwargs):
                self.count += 1
            if self.count >= self.number:
                raise self.error
            return function(*args, **kwargs)

        return run


def for_writing(_path, mode="r", *_, **__) -> bool:
    return isinstance(mode, int) or any(letter in mode for letter in "wax+")


@pytest.mark.parametrize("how", ["full disk", "kill"])
def test_a_start_killed_at_any_file_operation_can_be_repeated(digit_shards, tmp_path, monkeypatch, how):
    recipe = small("mae", digit_shards, tmp_path / "run", *STEPS)
    shards = open_shards(recipe.data.train)

    def begin() -> None:
        with RunFolder(tmp_path / "run") as folder:
            folder.take()
            assert folder.start(recipe, shards).checkpoint is None
            folder.record_launch(recipe, {"device": "CPU"}, None)
            MetricsWriter(tmp_path / "run", 0, False, None, "run", "id").close()

    for number in range(1, 100):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if how == "full disk" else Killed()
        crash = Crash(tmp_path, number, error)
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", crash.before(open, for_writing))
            for owner, name in [(os, "replace"), (os, "fsync"), (Path, "mkdir")]:
                patched.setattr(owner, name, crash.before(getattr(owner, name)))
            patched.setattr(Path, "open", crash.before(Path.open, for_writing))
            patched.setattr(os, "open", crash.before(os.open, for_writing))
            if how == "kill":  # a dead process tidies nothing
                for owner, name in [(Path, "unlink"), (Path, "rmdir"), (lease.Lease, "_write")]:
                    patched.setattr(owner, name, crash.before(getattr(owner, name), lambda *_, **__: False))
            with suppress(UserError, Killed):
                begin()
        for held in list(lease._held.values()):  # as the kernel does
            held.release()
        if crash.count < number:
            break
        begin()
        assert len(read_record(tmp_path / "run").launches) in (1, 2), f"after operation {number}"
        assert read_recipe(tmp_path / "run") == recipe
        shutil.rmtree(tmp_path / "run")
    assert number > 8


def test_files_of_others_in_a_folder_are_not_changed(digit_shards, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for early in ("recipe.yaml.aside", "metrics.jsonl", "ledger-1.jsonl", "run.json.aside"):
        (out / early).write_text("")
    with RunFolder(out) as folder:
        folder.take()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(out).take()


# --- what may continue what ------------------------------------------------------------------------------------------


def test_a_recipe_may_change_before_the_first_checkpoint(digit_shards, tmp_path, monkeypatch):
    """Its first launch ends in an error, after some lines of metrics."""
    first = small("mae", digit_shards, tmp_path / "run", "budget.steps=9", "monitor.log_every=1",
                  "run.checkpoint_every=9")  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(UserError, match="full"):
            pretrain(first)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 9
    summary = pretrain(small("mae", digit_shards, tmp_path / "run", "budget.steps=3", "optim.batch_size=20"))
    assert summary.finished
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3]


def test_moved_images_and_other_micro_batches_continue_a_run(digit_shards, finished, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for number, path in enumerate(sorted(digit_shards.glob("digits-*.tar"))):
        shutil.copy(path, moved / f"other-{number}.tar")
    pretrain(small("mae", digit_shards, tmp_path / "run", *STEPS, "budget.pause_minutes=1e-6"))
    resumed = small("mae", digit_shards, tmp_path / "run", *STEPS, f"data.train={moved}/*.tar")
    assert pretrain(resumed.model_copy(update={"budget": resumed.budget.model_copy(update={"pause_minutes": 1e-6})}))
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2
    assert pretrain(resumed).finished
    assert_same_state(finished, tmp_path / "run")
    again = small("mae", digit_shards, tmp_path / "run", *STEPS, "optim.accumulate=2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert pretrain(again).finished


SCHEDULES = {
    "wsd": ["optim.schedule=wsd", "optim.cooldown=0.25"],
    "constant": ["optim.schedule=constant"],
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_prolonged_run_equals_one_that_was_longer_from_the_start(digit_shards, tmp_path, schedule):
    """With the same number of warm-up and heads_first steps, bit for bit."""
    more = [*SCHEDULES[schedule], "run.checkpoint_every=9", "monitor.log_every=1"]
    short = [*more, "budget.steps=12", "optim.warmup=0.25", "optim.heads_first=0.2"]
    long = [*more, "budget.steps=24", "optim.warmup=0.125", "optim.heads_first=0.1"]
    pretrain(small("mae", digit_shards, tmp_path / "long", *long))
    for _ in range(2):
        pretrain(small("mae", digit_shards, tmp_path / "run", *short, "budget.pause_minutes=1e-6"))
    prolonged = small("mae", digit_shards, tmp_path / "run", *short, "budget.steps=24")
    assert pretrain(prolonged).step == 24
    assert_same_state(tmp_path / "long", tmp_path / "run")
    with pytest.raises(UserError, match="launched for 24 steps, and the budget now makes 12: a run cannot be short"):
        pretrain(small("mae", digit_shards, tmp_path / "run", *short))
    longer = small("mae", digit_shards, tmp_path / "run", *short, "budget.steps=25")
    if schedule == "wsd":
        with pytest.raises(UserError, match="newest checkpoint is of step 24, and its learning rate has been falling"):
            pretrain(longer)
    else:
        assert pretrain(longer).step == 25


def test_a_change_of_more_than_rounding_gives_a_warning(digit_shards, tmp_path, caplog):
    """Sinkhorn-Knopp depends on the micro-batch, the teacher's momentum on the length of the run; MAE has neither."""
    constant = [*SCHEDULES["constant"], "optim.weight_decay_end=null", "optim.accumulate=1", "budget.steps=3"]
    for objective, more in {"ibot": ["objective.centring=sinkhorn"], "mae": []}.items():
        out = tmp_path / objective
        pretrain(small(objective, digit_shards, out, *constant, *more, "budget.pause_minutes=1e-6"))
        changed = small(objective, digit_shards, out, *constant, *more, "optim.accumulate=2", "budget.steps=4")
        caplog.clear()
        start = RunFolder(out).start(changed, open_shards(changed.data.train))
        assert start.steps["total_steps"] == 4
        if objective == "ibot":
            assert "prolonged from 3 to 4 steps: the teacher's momentum" in caplog.text
            assert "has 20 images now, and had 40" in caplog.text
        else:
            assert not caplog.records


def test_a_cosine_run_is_neither_prolonged_nor_shortened(finished, digit_shards):
    with pytest.raises(UserError, match="a cosine schedule cannot be prolonged"):
        pretrain(small("mae", digit_shards, finished, *STEPS, "budget.steps=5"))
    same = small("mae", digit_shards, finished, *STEPS, "budget.steps=null", "budget.samples=160")
    assert pretrain(same).finished, "the same length in another unit is the same budget"


def test_two_runs_of_one_name_have_different_ids(digit_shards, finished, tmp_path, monkeypatch):
    """Weights & Biases identifies a run by it; a damaged run.json does not change it."""
    ids = []

    class Wandb:
        @staticmethod
        def init(*, id, name, **_):
            ids.append(id)
            assert name == "run"
            return Wandb

        log = finish = staticmethod(lambda *_, **__: None)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for parent in ("a", "b"):
        out = tmp_path / parent / "run"
        recipe = small("mae", digit_shards, out, "budget.steps=2", "monitor.wandb=mine", "budget.pause_minutes=1e-6")
        pretrain(recipe)
        (out / "run.json").write_text("{")
        pretrain(recipe)
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert len(ids[0]) == 32


def test_overrides_are_recorded(digit_shards, tmp_path):
    """The overrides of a launch are in the run's recipe and in its checkpoints."""
    arguments = overrides("mae", digit_shards, tmp_path / "run", "budget.steps=1")
    assert exit_status(["pretrain", "demo", *arguments]) == 0
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved.meta["recipe"] == read_recipe(tmp_path / "run").model_dump(mode="json")
    assert saved.meta["run"] == read_record(tmp_path / "run").id
