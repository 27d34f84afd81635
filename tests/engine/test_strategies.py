"""ZeRO and FSDP2 on two processes of a CPU: they compute what DDP computes, and leave behind what DDP leaves."""

import json
import socket
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from run_many import torchrun
from runs import PACKAGED, REPOSITORY, assert_same_state, environment, overrides, small, state
from selfvil import checkpoint
from selfvil.engine.fsdp import check_settings
from selfvil.engine.zero import apply_recipe
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.monitor.metrics import read_metrics
from selfvil.pretrain import pretrain
from selfvil.runtime import bf16_in_hardware
from selfvil.weights import load_export

MISSING = [package for package in ("deepspeed", "transformers") if find_spec(package) is None]
if MISSING:
    warnings.warn(f"DeepSpeed is not tested: {' and '.join(MISSING)} not installed", stacklevel=1)
needs_deepspeed = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")

# Settings that would reveal another accumulation, clipping or schedule than DDP's; DINO's recipe clips each tensor.
REVEALING = {
    "mae": ["optim.accumulate=2", "model.drop_path_rate=0.2"],
    "dino": ["optim.accumulate=2", "optim.clip_norm=0.3", "objective.freeze_last_layer_epochs=0.4"],
    "dinov2": [
        "optim.accumulate=2",
        "objective.centring=sinkhorn",
        "objective.gram_weight=1",
        "objective.gram_start=0.3",
    ],
    "lejepa": ["optim.accumulate=2", "optim.clip_norm=0.3"],
    "ijepa": ["optim.accumulate=2", "optim.clip_norm=0.3", "objective.target_layers=2"],
    "visreg": ["optim.accumulate=2", "optim.clip_norm=0.3"],
}
PAUSED = ["monitor.log_every=3", "budget.pause_minutes=1e-6"]  # several processes stop a micro-batch later
PAIRS = [
    ("mae", "zero1"), ("mae", "zero2"), ("mae", "zero3"), ("mae", "fsdp"), ("dino", "zero1"), ("dino", "zero2"),
    ("dino", "fsdp"), ("dinov2", "zero2"), ("dinov2", "fsdp"), ("lejepa", "zero3"), ("lejepa", "fsdp"),
    ("ijepa", "zero2"), ("ijepa", "fsdp"), ("visreg", "zero3"), ("visreg", "fsdp"),
]  # fmt: skip
"""Objective and strategy. ZeRO-3 refuses a teacher; FSDP2 divides it like its student."""
FAST = {("mae", "zero2"), ("mae", "zero3"), ("mae", "fsdp"), ("dino", "zero2"), ("dino", "fsdp")}
"""The others are slow tests; a fast session does not start their runs."""


def marked(*values: str) -> object:
    """Parameters of a test, marked by what they need: DeepSpeed, and time."""
    objective, strategy, *precision = values
    marks = [needs_deepspeed] if strategy.startswith("zero") else []
    if (objective, strategy) not in FAST or (precision == ["bf16"] and objective == "mae"):
        marks.append(pytest.mark.slow)
    return pytest.param(*values, marks=marks)


ALL = [marked(*pair) for pair in PAIRS]
ALL_PRECISIONS = [marked(*pair, precision) for pair in [("mae", "zero0"), *PAIRS] for precision in ("fp32", "bf16")]
BF16 = [marked(objective, strategy, "bf16") for objective in ("mae", "dino") for strategy in ("zero2", "fsdp")]


def settings(objective: str, precision: str, shards: Path) -> list[str]:
    observed = ["monitor.log_every=1", "monitor.doctor_every=2", "monitor.pictures_every=6"]
    scored = ["eval.knn.at_start=true", "eval.knn.every=4"]
    scored += [f"eval.knn.{part}={shards}/digits-00000{number}.tar" for number, part in enumerate(("train", "test"))]
    return ["budget.steps=6", f"run.precision={precision}", *observed, *scored, *REVEALING[objective]]


@pytest.fixture(scope="module")
def folder(request, digit_shards, tmp_path_factory) -> Path:
    """Runs of 6 steps that the session's tests need: OBJECTIVE-PRECISION-STRATEGY; `...-paused` were stopped early and
    continued.

    `across` was begun by one process alone, and stopped on two with FSDP2, and with ZeRO-2 where DeepSpeed is there.
    """
    folder = tmp_path_factory.mktemp("runs")

    def case(objective: str, precision: str, strategy: str, *more: str, out: str = "") -> dict:
        path = folder / f"{objective}-{precision}-{strategy}{out}"
        arguments = overrides(objective, digit_shards, path, *settings(objective, precision, digit_shards), *more)
        return {"recipe": PACKAGED[objective], "arguments": arguments} | launcher(strategy)

    def launcher(strategy: str) -> dict:
        return {"whole": 1000, "zero": strategy.removeprefix("zero"), "fsdp": strategy == "fsdp"}

    needed = {
        (p["objective"], p.get("precision", "fp32"), p["strategy"])
        for p in (getattr(item, "callspec", None) and item.callspec.params for item in request.session.items)
        if p and {"objective", "strategy"} <= p.keys()
    }

    needed |= {(objective, "fp32", strategy) for objective, _, strategy in needed}  # which bf16 is compared with

    def cases_of(kind: str) -> list[dict]:
        cases = []
        for objective, precision, strategy in sorted(needed):
            if strategy.startswith(kind):
                cases.append(case(objective, precision, strategy))
                if precision == "fp32" and strategy != "zero0":
                    cases += [case(objective, precision, strategy, *more, out="-paused") for more in (PAUSED, ())]
        return cases

    across = small("mae", digit_shards, folder / "across", "budget.steps=6", "budget.pause_minutes=1e-6")
    assert pretrain(across).step == 1
    arguments = overrides("mae", digit_shards, folder / "across", "budget.steps=6", *PAUSED)
    crossing = {"recipe": PACKAGED["mae"], "arguments": arguments}
    ddp = [case(objective, precision, "ddp") for objective, precision in sorted({each[:2] for each in needed})]
    torchrun([*ddp, crossing | launcher("fsdp"), *cases_of("fsdp")], 2, folder)
    if not MISSING:
        environ = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
        torchrun([crossing | launcher("zero2"), *cases_of("zero")], 2, folder, **environ)
    return folder


def series(run: Path, name: str, kind: str = "train") -> torch.Tensor:
    values = [record[name] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]
    assert len(values) == (6 if kind == "train" else 3)
    return torch.tensor(values)


@pytest.mark.parametrize(("objective", "strategy"), ALL)
def test_the_strategy_is_what_ran(folder, objective, strategy):
    """Each process held about half of the optimizer state, and under ZeRO-3 and FSDP2 a part of the weights."""
    run = folder / f"{objective}-fp32-{strategy}"
    (launch,) = json.loads((run / "run.json").read_text())["launches"]
    assert (launch["strategy"], launch["processes"]) == (strategy, 2)
    whole = sum(value.numel() for name, value in state(run).items() if name.startswith("optimizer/") and value.ndim)
    held = [int((run / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert whole <= sum(held) <= whole + 100, "padding may add a little"
    assert max(held) < 0.65 * whole, "FSDP2 leaves tensors of one row to process 0"
    divided = set(json.loads((run / "divided-0.json").read_text()))
    weights = checkpoint.newest(run / "checkpoints").tensors("objective")
    large = {name for name, value in weights.items() if value.numel() > 1000 and "pos_embed" not in name}
    if strategy == "zero3":
        assert divided == large
    elif strategy == "fsdp":
        assert {name for name in large if "center" not in name and "_pos" not in name} <= divided
        assert objective not in ("dino", "dinov2", "ijepa") or any(name.startswith("teacher.") for name in divided)
    else:
        assert not divided


@pytest.mark.parametrize(("objective", "strategy", "precision"), ALL_PRECISIONS)
def test_it_computes_what_ddp_computes(folder, objective, strategy, precision):
    """Losses, the gradient's norm before clipping, weights (a teacher's too), and both moments, to rounding."""
    run, ddp = folder / f"{objective}-{precision}-{strategy}", folder / f"{objective}-{precision}-ddp"
    rounding = 1e-5 if precision == "fp32" else 1e-4  # a sum in another order may round a weight to another bfloat16
    emulated = precision == "bf16" and not bf16_in_hardware()
    if emulated:  # more such roundings were found there, of up to 5e-3 of LeJEPA's loss, though DDP repeats every bit
        rounding = 2**-7
    torch.testing.assert_close(series(run, "loss"), series(ddp, "loss"), rtol=rounding, atol=0)
    torch.testing.assert_close(series(run, "grad_norm"), series(ddp, "grad_norm"), rtol=rounding, atol=0)
    ours, theirs = state(run), state(ddp)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        if emulated:
            continue
        if objective in ("lejepa", "visreg") and "backbone.norm.bias" in name:
            continue  # batch norm removes it: its gradient is rounding, and AdamW's step has the sign of that
        message = partial("{}: {}".format, name)
        # A weight that rounds to another bfloat16 changes the gradients of others by a rounding of theirs.
        moment = precision == "bf16" and name.startswith("optimizer/")
        bound = max(1e-6, 2**-8 * float(theirs[name].abs().max())) if moment else 1e-6
        torch.testing.assert_close(value, theirs[name], rtol=10 * rounding, atol=bound, msg=message)


@pytest.mark.parametrize(("objective", "strategy"), ALL)
def test_doctor_pictures_and_evaluations_use_whole_weights(folder, objective, strategy):
    """Gradients, features, gates and the teacher's distance are those under DDP; the picture is the same file."""
    run, ddp = folder / f"{objective}-fp32-{strategy}", folder / f"{objective}-fp32-ddp"
    assert not [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "warning"]
    names = {"rankme", "typical_weight", "speed", "grad_norm/patch_embed", "grad_norm/heads", "grad_reach"}
    names |= {"teacher_lag"} if objective in ("dino", "dinov2", "ijepa") else set()
    for name in names:
        ours, theirs = series(run, name, "doctor"), series(ddp, name, "doctor")
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6, msg=lambda text, name=name: name + text)
    ours, theirs = series(run, "knn_20", "eval"), series(ddp, "knn_20", "eval")  # at steps 0, 4 and 6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2.6, msg="two of 80 images may be on the other side")
    assert ours[0] == theirs[0]
    assert (run / "pictures" / "step-00000006.png").exists() == (ddp / "pictures" / "step-00000006.png").exists()


@pytest.mark.parametrize(("objective", "strategy", "precision"), BF16)
def test_the_recipes_precision_is_used(folder, objective, strategy, precision):
    bf16, fp32 = (series(folder / f"{objective}-{each}-{strategy}", "loss") for each in (precision, "fp32"))
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=0)


@pytest.mark.parametrize(("objective", "strategy"), ALL)
def test_a_paused_run_continues_bit_for_bit(folder, objective, strategy):
    straight, paused = folder / f"{objective}-fp32-{strategy}", folder / f"{objective}-fp32-{strategy}-paused"
    first, second = json.loads((paused / "run.json").read_text())["launches"]
    assert first["first_step"] == 0 < second["first_step"] < 6
    assert_same_state(straight, paused)


def test_a_run_continues_under_other_strategies(folder, digit_shards, tmp_path):
    """One process, two with FSDP2, two with ZeRO-2, one process: to rounding the run of one, on the same samples."""
    launches = json.loads((folder / "across" / "run.json").read_text())["launches"]
    assert [launch["strategy"] for launch in launches] == ["one process", "fsdp", *([] if MISSING else ["zero2"])]
    assert pretrain(small("mae", digit_shards, folder / "across", "budget.steps=6")).finished
    pretrain(small("mae", digit_shards, tmp_path / "alone", "budget.steps=6"))
    ours, theirs = state(folder / "across"), state(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("objective", "strategy", "precision"), BF16)
def test_it_is_exported_like_any_run(folder, tmp_path, objective, strategy, precision):
    run, prefix = (
        folder / f"{objective}-{precision}-{strategy}",
        {"mae": "", "dino": "teacher."}[objective] + "backbone.",
    )
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
    assert "overwritten" not in launched.stderr, "the file must not contradict a recipe"
    (launch,) = json.loads((tmp_path / "run" / "run.json").read_text())["launches"]
    assert (launch["strategy"], launch["processes"]) == ("zero1", 2)


@needs_deepspeed
@pytest.mark.slow  # `apply_recipe` is tested below
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


def test_values_that_contradict_the_recipe_are_overwritten_with_a_sentence():
    deepspeed = told(train_batch_size=32, gradient_clipping=1.0, gradient_accumulation_steps=2, bf16={"enabled": True})
    assert apply_recipe(deepspeed, **RECIPE) == [
        "DeepSpeed's train_batch_size = 32 is overwritten by the recipe's 64",
        "DeepSpeed's gradient_clipping = 1.0 is overwritten by the recipe's 0.3",
        "DeepSpeed's bf16 is overwritten by run.precision: weights stay float32, bf16 is autocast",
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


def test_zero_3_refuses_compiled_blocks():
    assert apply_recipe(told({"stage": 2}), **RECIPE, compiled=True) == []
    with pytest.raises(UserError, match=r"run\.compile does not work under ZeRO-3.* or use ZeRO-2 or FSDP2"):
        apply_recipe(told({"stage": 3}), **RECIPE, compiled=True)


def test_zero_3_keeps_small_parameters_whole():
    deepspeed = told({"stage": 3})
    assert apply_recipe(deepspeed, **RECIPE) == []
    assert deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 1_000_000


@pytest.mark.parametrize(
    ("environ", "processes", "expected"),
    [
        ({"FSDP_VERSION": "1"}, 2, "only version 2 is supported; set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, 2, "FSDP_OFFLOAD_PARAMS = true: offloading to the CPU is not tested"),
        ({}, 1, "this launch has one: start two or more, or use DDP"),
    ],
)
def test_settings_of_fsdp_that_are_not_tested_are_refused(environ, processes, expected):
    with pytest.raises(UserError, match=expected):
        check_settings(environ, processes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configuration_files_of_zero_are_sound(stage):
    config = load_config_from_file(str(REPOSITORY / "launch" / "configs" / f"deepspeed_zero{stage}.yaml"))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == stage


def test_the_configuration_file_of_fsdp_is_sound():
    config = load_config_from_file(str(REPOSITORY / "launch" / "configs" / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
