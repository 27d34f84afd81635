"""The plan of a run, its steps and rates, and the report of `selfvil plan`."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import runs
from selfvil import checkpoint, cli, optim, plan_report
from selfvil.build import build_objective, parameter_groups
from selfvil.errors import UserError
from selfvil.plan import Plan
from selfvil.plan_report import report, step_time
from selfvil.pretrain import pretrain
from selfvil.recipe import load
from selfvil.records import read_metrics


def recipe_of(*more, steps=100, batch=40):
    keys = ["budget.epochs=null", f"budget.steps={steps}", f"optim.batch_size={batch}", *more]
    return load("demo", keys)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_numbers_of_images_and_steps():
    plan = Plan.of(recipe_of("optim.accumulate=2", "optim.warmup=0.1", "optim.heads_first=0.25"), 200, processes=4)
    assert (plan.micro_batch, plan.steps_per_epoch, plan.samples(3), plan.epochs(10)) == (5, 5.0, 120, 2.0)
    assert (plan.warmup_steps, plan.cooldown_steps, plan.heads_first_steps) == (10, 100, 25)
    progress = plan.progress(50)
    assert (progress.fraction, progress.epoch, progress.seed) == (0.5, 10.0, 0)
    assert Plan.of(load("demo", ["budget.epochs=2.5", "optim.batch_size=40"]), 200).total_steps == 12


def test_rates_equal_those_of_the_schedules():
    more = ["optim.warmup=0.1", "optim.heads_first=0.25", "optim.weight_decay=0.1", "optim.weight_decay_end=0.4"]
    recipe = recipe_of(*more)
    plan, peak = Plan.of(recipe, 200), recipe.optim.peak_lr
    for step in (0, 9, 10, 24, 25, 50, 99):
        rates = plan.rates(step)
        assert rates.lr == optim.cosine(step, 100, peak, 0.0, 10)
        assert rates.weight_decay == optim.cosine(step, 100, 0.1, 0.4)
        assert rates.lr_scales == {"backbone": float(step >= 25)}
    constant = Plan.of(recipe_of("optim.weight_decay=0.1"), 200)
    assert {constant.rates(step).weight_decay for step in range(100)} == {0.1}


def test_an_objective_adds_the_rates_of_its_tags():
    objective = SimpleNamespace(lr_scales=lambda progress: {"last_layer": float(progress.epoch >= 1)})
    plan = Plan.of(recipe_of(), 200)
    assert plan.rates(4, objective).lr_scales == {"backbone": 1.0, "last_layer": 0.0}
    assert plan.rates(5, objective).lr_scales == {"backbone": 1.0, "last_layer": 1.0}


def test_rates_can_be_set(digit_shards, tmp_path):
    recipe = runs.small("dino", digit_shards, tmp_path / "run", "optim.heads_first=0.5")
    objective = build_objective(recipe)
    optimizer = optim.adamw(parameter_groups(recipe, objective), (0.9, 0.95))
    plan = Plan.of(recipe, 200)
    optim.set_rates(optimizer, *plan.rates(2, objective))
    rates = {group["tag"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"backbone": 0.0, "last_layer": 0.0, "": plan.learning_rate(2)}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["optim.warmup=0.1"], {"start": 0, "end of warm-up": 10, "middle": 50, "end": 99}),
        (["optim.warmup=0", "optim.schedule=constant"], {"start": 0, "middle": 50, "end": 99}),
        (
            ["optim.warmup=0.1", "optim.schedule=wsd", "optim.cooldown=0.2", "optim.heads_first=0.05"],
            {"start": 0, "backbone is trained": 5, "end of warm-up": 10, "middle": 50, "start of cool-down": 80}
            | {"end": 99},
        ),
    ],
)  # fmt: skip
def test_key_steps(more, expected):
    plan = Plan.of(recipe_of(*more), 200)
    assert plan.key_steps() == expected
    assert list(plan.key_steps().values()) == sorted(plan.key_steps().values())


def test_a_run_of_one_step_has_key_steps():
    steps = Plan.of(recipe_of("optim.warmup=0.9", "optim.heads_first=0.9", steps=1), 200).key_steps()
    assert set(steps.values()) == {0}


def test_impossible_steps_are_refused():
    with pytest.raises(UserError, match="not divisible by 3 processes x 1 micro-batches: take a multiple of 3"):
        Plan.of(recipe_of(), 200, processes=3)
    with pytest.raises(UserError, match="more than the 39 images"):
        Plan.of(recipe_of(), 39)
    with pytest.raises(UserError, match="not divisible by 7 processes"):
        Plan.of(recipe_of(), 200, processes=7)
    assert Plan.of(recipe_of(), 200, processes=8).micro_batch == 5


def test_a_checkpoint_stores_the_steps_only():
    recipe = recipe_of("optim.schedule=wsd", "optim.warmup=0.1")
    stored = {"total_steps": 100, "warmup_steps": 10, "cooldown_steps": 20, "heads_first_steps": 0}
    plan = Plan.of(recipe, 200)
    assert plan.as_json() == stored
    assert Plan.read(json.loads(json.dumps(plan.as_json())), recipe, 200) == plan
    prolonged = stored | {"warmup_steps": 7}
    assert Plan.read(prolonged, recipe, 200).warmup_steps == 7
    assert Plan.read(stored | {"new": 1}, recipe, 200) == plan  # a field of a later version


@pytest.mark.parametrize("damaged", [None, 3, "plan", {}, {"total_steps": 5}, {"total_steps": "many"}, [1, 2]])
def test_a_missing_or_damaged_plan_is_computed_from_the_recipe(damaged):
    recipe = recipe_of()
    assert Plan.read(damaged, recipe, 200) == Plan.of(recipe, 200)


def test_a_prolonged_plan_keeps_its_warm_up():
    old, new = (Plan.of(recipe_of("optim.schedule=wsd", "optim.warmup=0.1", steps=steps), 200) for steps in (100, 300))
    longer = old.prolonged(new, 60, "run")
    assert longer.as_json() == {
        "total_steps": 300, "warmup_steps": 10, "cooldown_steps": 60, "heads_first_steps": 0,
    }  # fmt: skip
    assert all(longer.rates(step) == old.rates(step) for step in range(60))
    assert old.prolonged(old, 90, "run") == old
    with pytest.raises(UserError, match="cannot be shortened"):
        new.prolonged(old, 10, "run")
    with pytest.raises(UserError, match="has been falling since step 80"):
        old.prolonged(new, 81, "run")


# --- the report ------------------------------------------------------------------------------------------------------


def test_a_run_follows_its_plan(digit_shards, tmp_path):
    """Rates, samples, trained parameters and the size of a checkpoint, against a run."""
    recipe = runs.small("dino", digit_shards, tmp_path / "run", "monitor.log_every=1", "run.checkpoint_every=12")
    found = report(recipe, "dino", trial=False)
    pretrain(recipe)
    logged = {record["step"]: record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    for row in found.schedules:
        record = logged[row.step + 1]
        assert (record["lr"], record["weight_decay"]) == (row.lr, row.weight_decay)
        for name in ("teacher_temp", "teacher_momentum"):
            assert record[name] == pytest.approx(row.values[name], rel=1e-6)
    assert logged[12]["samples"] == found.as_json()["plan"]["samples"] == 480
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    saved = newest.tensors("optimizer")
    assert sum(group.parameters for group in found.groups) == found.size.trained_parameters
    assert sum(t.numel() for name, t in saved.items() if name.endswith("exp_avg")) == found.size.trained_parameters
    written = sum(file.stat().st_size for file in newest.folder.glob("*.safetensors"))
    assert found.disk.checkpoint == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("objective", list(runs.PACKAGED))
def test_every_objective_has_a_report(digit_shards, tmp_path, objective):
    recipe = runs.small(objective, digit_shards, tmp_path / "run")
    found = report(recipe, objective, trial=objective == "simmim")
    assert found.memory.total > found.memory.activations > 0
    assert found.size.step_multiply_adds > found.size.backbone_multiply_adds / 4
    assert [row.at for row in found.schedules][-1] == "end"
    assert json.loads(json.dumps(found.as_json()))["memory"]["total"] == found.memory.total
    assert not (tmp_path / "run").exists()
    if found.trial:
        assert found.trial.step >= max(found.trial.loading, found.trial.computing) > 0
        assert found.trial.total == pytest.approx(12 * found.trial.step)


def test_a_report_restores_the_settings_of_the_process(digit_shards, tmp_path, monkeypatch):
    torch.set_num_threads(2)
    draws = torch.default_generator.get_state()
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    environment = dict(os.environ)
    report(runs.small("mae", digit_shards, tmp_path / "run"), "mae", processes=2, trial=False)
    assert torch.get_num_threads() == 2
    assert torch.equal(draws, torch.default_generator.get_state())
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    ("more", "processes"),
    [
        (["optim.batch_size=400"], 1),
        (["optim.batch_size=39"], 2),
        (["data.train=nothing-*.tar"], 1),
        (["model.name=vil_nono"], 1),
        (["objective.out_dim=100000000000"], 1),
        (["monitor.wandb=a/b"], 1),
    ],
)
def test_a_plan_and_a_run_raise_the_same_error(digit_shards, tmp_path, monkeypatch, more, processes):
    monkeypatch.setattr("selfvil.memory.free_bytes", lambda device: 2**33)  # a message has it; it changes all the time
    recipe = runs.small("dino", digit_shards, tmp_path / "run", *more)
    with pytest.raises(UserError) as planned:
        report(recipe, "dino", processes)
    assert not (tmp_path / "run").exists()
    if processes == 1:  # a launch of several is refused by the same function
        with pytest.raises(UserError) as started:
            pretrain(recipe)
        messages = [re.sub(r"[\d.,]+ GiB are free", "free", str(each.value)) for each in (started, planned)]
        assert messages[0] == messages[1]


def test_a_plan_that_does_not_fit_is_refused_and_one_that_almost_fits_warns(digit_shards, tmp_path, monkeypatch):
    recipe = runs.small("dino", digit_shards, tmp_path / "run")
    needed = report(recipe, "dino", trial=False).memory
    monkeypatch.setattr("selfvil.memory.free_bytes", lambda device: 2**20)
    with pytest.raises(UserError, match=r"needs at least .* raise optim\.accumulate"):
        report(recipe, "dino", trial=False)
    monkeypatch.undo()
    step = needed.total - needed.weights - needed.teacher  # more than that is needed where a checkpoint is copied, too
    for free in (needed.activations, step):
        monkeypatch.setattr(plan_report, "free_bytes", lambda device, free=free: free)
        assert any("is predicted to need" in warning for warning in report(recipe, "dino", trial=False).warnings)
    monkeypatch.setattr(plan_report, "free_bytes", lambda device: 2 * step)
    assert not any("is predicted to need" in warning for warning in report(recipe, "dino", trial=False).warnings)


def test_the_command_prints_and_writes(digit_shards, tmp_path, capsys):
    words = runs.overrides("dino", digit_shards, tmp_path / "run", "data.workers=99")
    arguments = ["plan", "cifar10_dino", *words, "--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--processes", "2"])
    assert not ended.value.code
    text = capsys.readouterr().out
    for expected in ("12 of 40 images", "teacher_temp", "last_layer", "activations", "set data.workers=", "images/s"):
        assert expected in text
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["plan"] | {"micro_batch": 20, "processes": 2, "images": 200, "steps": 12} == written["plan"]
    assert written["memory"]["buckets"] == written["memory"]["moments"] / 2
    with Image.open(tmp_path / "cifar10_dino.png") as picture:
        assert picture.width > 4 * 16
        assert picture.height / picture.width == pytest.approx(8 / 4)


def test_a_plan_without_a_trial_decodes_no_image(digit_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("selfvil.data.loader.decode_pixels", lambda *_: pytest.fail("an image was decoded"))
    assert report(runs.small("mae", digit_shards, tmp_path / "run"), "mae", trial=False).trial is None


def test_a_plan_tells_what_it_does_next(digit_shards, tmp_path):
    recipe, told = runs.small("mae", digit_shards, tmp_path / "run"), []
    assert report(recipe, "mae", tell=told.append).trial
    assert told == ["opening the images", "building the networks", "counting multiply-adds",
                    "measuring the memory of two images", "measuring the memory of a step",
                    "taking 3 steps of 40 images"]  # fmt: skip
    without: list[str] = []
    report(recipe, "mae", trial=False, tell=without.append)
    assert without == told[:-1]


@pytest.mark.parametrize(
    ("workers", "processes", "cores", "threads", "expected"),
    [
        (0, 1, 8, 0, 6.0),  # loading and computing take turns
        (1, 1, 8, 0, 4.0),  # a GPU computes meanwhile: the slower decides
        (8, 1, 8, 0, 2.0),
        (8, 4, 4, 0, 4.0),  # 32 workers on 4 cores
        (8, 1, 2, 2, 4.0),  # workers and training share 2 cores
    ],
)
def test_time_of_a_step(workers, processes, cores, threads, expected):
    assert step_time(4.0, 2.0, workers, processes, cores, threads) == expected
