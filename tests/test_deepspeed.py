"""DeepSpeed on two processes of a CPU: it computes what DDP computes, and leaves behind what DDP leaves behind."""

import json
import socket
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from run_many import torchrun
from runs import PACKAGED, REPOSITORY, assert_same_state, environment, overrides, small, state
from selfvil import checkpoint
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.monitor.metrics import read_metrics
from selfvil.pretrain import pretrain
from selfvil.weights import load_export
from selfvil.zero import apply_recipe

MISSING = [package for package in ("deepspeed", "transformers") if find_spec(package) is None]
if MISSING:
    warnings.warn(f"DeepSpeed is not tested: {' and '.join(MISSING)} not installed", stacklevel=1)
needs_deepspeed = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")

# What would tell if accumulation, clipping or a schedule were not those of DDP; DINO's recipe clips each tensor.
TELLING = {
    "mae": ["optim.accumulate=2", "model.drop_path_rate=0.2"],
    "dino": ["optim.accumulate=2", "optim.clip_norm=0.3", "objective.freeze_last_layer_epochs=0.4"],
    "dinov2": [
        "optim.accumulate=2",
        "objective.centring=sinkhorn",
        "objective.gram_weight=1",
        "objective.gram_start=0.3",
    ],
    "lejepa": ["optim.accumulate=2", "optim.clip_norm=0.3"],
}
PAUSED = ["monitor.log_every=3", "budget.pause_minutes=1e-6"]  # several processes stop a micro-batch later
ZERO = [("mae", 1), ("mae", 2), ("dino", 1), ("dino", 2), ("dinov2", 2), ("mae", 3), ("lejepa", 3)]


def settings(objective: str, precision: str = "fp32") -> list[str]:
    return ["budget.steps=6", "monitor.log_every=1", f"run.precision={precision}", *TELLING[objective]]


@pytest.fixture(scope="module")
def folder(digit_shards, tmp_path_factory) -> Path:
    """Runs of 6 steps: OBJECTIVE-PRECISION-STRATEGY; `...-paused` were stopped early and went on.

    `across` was begun by one process without DeepSpeed, and stopped on two with ZeRO-2.
    """
    folder = tmp_path_factory.mktemp("runs")

    def case(objective: str, precision: str, strategy: str, *more: str, zero: int | None = None) -> dict:
        out = folder / f"{objective}-{precision}-{strategy}"
        arguments = overrides(objective, digit_shards, out, *settings(objective, precision), *more)
        return {"zero": zero, "whole": 1000, "recipe": PACKAGED[objective], "arguments": arguments}

    ddp = [case(objective, precision, "ddp") for objective in TELLING for precision in ("fp32", "bf16")]
    torchrun(ddp, 2, folder)
    across = small("mae", digit_shards, folder / "across", "budget.steps=6", "budget.pause_minutes=1e-6")
    assert pretrain(across).step == 1
    arguments = overrides("mae", digit_shards, folder / "across", "budget.steps=6", *PAUSED)
    cases = [{"zero": 2, "recipe": PACKAGED["mae"], "arguments": arguments}, case("mae", "fp32", "zero0", zero=0)]
    for objective, stage in ZERO:
        cases += [case(objective, precision, f"zero{stage}", zero=stage) for precision in ("fp32", "bf16")]
        cases += [case(objective, "fp32", f"zero{stage}-paused", *more, zero=stage) for more in (PAUSED, ())]
    torchrun(cases, 2, folder, ACCELERATE_USE_CPU="false", ACCELERATE_USE_DEEPSPEED="true")
    return folder


def series(run: Path, name: str) -> torch.Tensor:
    values = [record[name] for record in read_metrics(run / "metrics.jsonl")]
    assert len(values) == 6
    return torch.tensor(values)


@needs_deepspeed
@pytest.mark.parametrize(("objective", "stage"), ZERO)
def test_deepspeed_is_what_ran(folder, objective, stage):
    """Each process held half of the optimizer state, to which padding may add a little."""
    run = folder / f"{objective}-fp32-zero{stage}"
    (launch,) = json.loads((run / "run.json").read_text())["launches"]
    assert (launch["strategy"], launch["zero_stage"], launch["processes"]) == ("DEEPSPEED", stage, 2)
    assert launch["versions"]["deepspeed"]
    whole = sum(value.numel() for name, value in state(run).items() if name.startswith("optimizer/") and value.ndim)
    held = [int((run / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert held[0] == held[1]
    assert whole <= sum(held) <= whole + 100
    divided = json.loads((run / "divided-0.json").read_text())
    expected = {name for name, value in checkpoint.newest(run / "checkpoints").tensors("objective").items()
                if value.numel() > 1000 and "pos_embed" not in name} if stage == 3 else set()  # fmt: skip
    assert set(divided) == expected


@needs_deepspeed
@pytest.mark.parametrize(
    ("objective", "stage", "precision"),
    [("mae", 0, "fp32"), *((*each, precision) for each in ZERO for precision in ("fp32", "bf16"))],
)
def test_it_computes_what_ddp_computes(folder, objective, stage, precision):
    """Losses, the gradient's norm before clipping, weights (a teacher's too), and both moments, to rounding."""
    run, ddp = folder / f"{objective}-{precision}-zero{stage}", folder / f"{objective}-{precision}-ddp"
    rounding = 1e-5 if precision == "fp32" else 1e-4  # a sum in another order may round a weight to another bfloat16
    torch.testing.assert_close(series(run, "loss"), series(ddp, "loss"), rtol=rounding, atol=0)
    torch.testing.assert_close(series(run, "grad_norm"), series(ddp, "grad_norm"), rtol=rounding, atol=0)
    ours, theirs = state(run), state(ddp)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        if objective == "lejepa" and "backbone.norm.bias" in name:
            continue  # batch norm takes it off: its gradient is rounding, and AdamW's step has the sign of that
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@needs_deepspeed
@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_the_recipes_precision_is_used(folder, objective):
    bf16, fp32 = (series(folder / f"{objective}-{precision}-zero2", "loss") for precision in ("bf16", "fp32"))
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=0)


@needs_deepspeed
@pytest.mark.parametrize(("objective", "stage"), ZERO)
def test_a_paused_run_goes_on_bit_for_bit(folder, objective, stage):
    straight, paused = folder / f"{objective}-fp32-zero{stage}", folder / f"{objective}-fp32-zero{stage}-paused"
    first, second = json.loads((paused / "run.json").read_text())["launches"]
    assert first["first_step"] == 0 < second["first_step"] < 6
    assert_same_state(straight, paused)


@needs_deepspeed
def test_a_run_goes_on_with_and_without_deepspeed(folder, digit_shards, tmp_path):
    """One process, two with ZeRO-2, one process: to rounding the run of one process, on the same samples."""
    launches = json.loads((folder / "across" / "run.json").read_text())["launches"]
    assert [launch["strategy"] for launch in launches] == ["NO", "DEEPSPEED"]
    assert pretrain(small("mae", digit_shards, folder / "across", "budget.steps=6")).finished
    pretrain(small("mae", digit_shards, tmp_path / "alone", "budget.steps=6"))
    ours, theirs = state(folder / "across"), state(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@needs_deepspeed
@pytest.mark.parametrize(("objective", "prefix"), [("mae", "backbone."), ("dino", "teacher.backbone.")])
def test_it_is_exported_like_any_run(folder, tmp_path, objective, prefix):
    run = folder / f"{objective}-bf16-zero2"
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    exported = load_export(export(run, tmp_path / "out")).backbone.state_dict()
    trained = {name: value for name, value in saved.tensors("objective").items() if name.startswith(prefix)}
    assert trained.keys() == {prefix + name for name in exported}
    assert all(torch.equal(value, trained[prefix + name]) for name, value in exported.items())
    assert any((value.bfloat16() != value).any() for value in exported.values()), "weights were rounded to bf16"


@needs_deepspeed
def test_accelerate_launch_takes_the_configuration_file(digit_shards, tmp_path):
    """On CPUs too: with DeepSpeed, Accelerate does start several processes there."""
    config = REPOSITORY / "launch" / "configs" / "deepspeed_zero1.yaml"
    arguments = overrides("mae", digit_shards, tmp_path / "run", "budget.steps=2", "run.precision=bf16")
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
         "--main_process_port", "0", "launch/pretrain.py", PACKAGED["mae"], *arguments],
        cwd=REPOSITORY, env=environment(ACCELERATE_USE_CPU="false"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "gives way" not in launched.stderr, "the file must not contradict a recipe"
    (launch,) = json.loads((tmp_path / "run" / "run.json").read_text())["launches"]
    assert (launch["strategy"], launch["zero_stage"], launch["processes"]) == ("DEEPSPEED", 1, 2)


@needs_deepspeed
def test_zero_3_with_a_teacher_is_refused_in_a_sentence(digit_shards, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = subprocess.run(
        [sys.executable, "launch/pretrain.py", PACKAGED["dino"], *overrides("dino", digit_shards, tmp_path / "run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env=environment(
            ACCELERATE_USE_CPU="false", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        ),
    )  # fmt: skip
    assert launched.returncode == 2
    assert "selfvil: ZeRO-3 divides the weights, so a teacher that follows them would silently" in launched.stderr
    assert "Traceback" not in launched.stderr
    assert not (tmp_path / "run").exists()


# --- settings, without DeepSpeed -------------------------------------------------------------------------------------

RECIPE = dict(batch_size=64, accumulate=2, world_size=4, clip_norm=0.3, bf16=True, has_teacher=False)


def told(zero: dict | None = None, **more: object) -> dict:
    return {"zero_optimization": {"stage": 2} | (zero or {})} | more


def test_deepspeed_is_told_what_the_recipe_says():
    deepspeed = told(train_micro_batch_size_per_gpu="auto", gradient_clipping="auto", bf16={"enabled": "auto"})
    assert apply_recipe(deepspeed, **RECIPE) == []
    assert deepspeed["train_batch_size"] == 64
    assert deepspeed["train_micro_batch_size_per_gpu"] == 8
    assert deepspeed["gradient_accumulation_steps"] == 2
    assert deepspeed["torch_autocast"]["dtype"] == "bfloat16"
    assert not deepspeed["bf16"]["enabled"], "its weights would be rounded"
    assert deepspeed["gradient_clipping"] == 0, "selfvil has clipped already"
    apply_recipe(deepspeed, **RECIPE | {"bf16": False})
    assert not deepspeed["torch_autocast"]["enabled"]


def test_what_contradicts_the_recipe_gives_way_and_says_so():
    deepspeed = told(train_batch_size=32, gradient_clipping=1.0, gradient_accumulation_steps=2, bf16={"enabled": True})
    assert apply_recipe(deepspeed, **RECIPE) == [
        "DeepSpeed's train_batch_size = 32 gives way to the recipe's 64",
        "DeepSpeed's gradient_clipping = 1.0 gives way to the recipe's 0.3",
        "DeepSpeed's bf16 gives way to run.precision: weights stay float32, bf16 is autocast",
    ]


@pytest.mark.parametrize(
    ("deepspeed", "has_teacher", "expected"),
    [
        (told({"stage": 3}), True, "a teacher that follows them would silently miss its updates: use ZeRO-2"),
        (told({"offload_optimizer": {"device": "cpu"}}), False, "zero_optimization.offload_optimizer: not tested"),
        (told({"reduce_bucket_size": "auto"}), False, "zero_optimization.reduce_bucket_size: not tested"),
        (told({"round_robin_gradients": True}), False, "zero_optimization.round_robin_gradients: not tested"),
        (told(optimizer={"type": "Lamb"}), False, "DeepSpeed's optimizer: not tested with selfvil; leave it out"),
    ],
)
def test_what_is_not_tested_is_refused(deepspeed, has_teacher, expected):
    with pytest.raises(UserError, match=expected):
        apply_recipe(deepspeed, **RECIPE | {"has_teacher": has_teacher})


def test_under_zero_3_nothing_looks_at_divided_weights():
    looks = ["monitor.doctor_every", "monitor.pictures_every"]
    with pytest.raises(UserError, match=r"monitor\.doctor_every and monitor\.pictures_every to null, or use"):
        apply_recipe(told({"stage": 3}), **RECIPE, looks=looks)
    deepspeed = told({"stage": 3})
    assert apply_recipe(deepspeed, **RECIPE) == []
    assert deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 1_000_000
    assert apply_recipe(told({"stage": 2}), **RECIPE, looks=looks) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configuration_files_are_sound(stage):
    config = load_config_from_file(str(REPOSITORY / "launch" / "configs" / f"deepspeed_zero{stage}.yaml"))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == stage
