"""Launches that would silently train something else, settings of the launcher, seeds, and warnings."""

import pytest
import torch

from selfvil import runtime
from selfvil.errors import UserError


def test_torchrun_without_the_cpu_flag_is_refused():
    with pytest.raises(UserError, match=r"ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2"):
        runtime.refuse_split_launch({"WORLD_SIZE": "2"}, num_processes=1)


def test_accelerate_launch_that_started_one_of_several_is_refused():
    environ = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match=r"--num_processes 1"):
        runtime.refuse_split_launch(environ, num_processes=1)


@pytest.mark.parametrize(
    ("environ", "num_processes"),
    [({}, 1), ({"WORLD_SIZE": "2"}, 2), ({"WORLD_SIZE": "1", "MASTER_ADDR": "x", "ACCELERATE_USE_CPU": "true"}, 1)],
)
def test_supported_launches_pass(environ, num_processes):
    runtime.refuse_split_launch(environ, num_processes)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "requests DeepSpeed, but Accelerate would silently train without"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}, "without ACCELERATE_"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "requests MEGATRON_LM"),
    ],
)  # fmt: skip
def test_a_strategy_that_would_be_ignored_is_refused(environ, expected):
    with pytest.raises(UserError, match=expected):
        runtime.refuse_strategy(environ)


def test_deepspeed_without_its_packages_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda package: None if package == "transformers" else object())
    with pytest.raises(
        UserError, match=r"DeepSpeed needs transformers, not installed: pip install 'selfvil\[deepspeed\]'"
    ):
        runtime.refuse_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"})
    runtime.refuse_strategy({"LOCAL_RANK": "0"})


def test_an_old_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda package: object())
    monkeypatch.setattr(runtime, "version", lambda package: "0.18.0")
    monkeypatch.setattr(runtime, "compare_versions", lambda *arguments: arguments == ("deepspeed", "<", "0.18.5"))
    with pytest.raises(UserError, match=r"DeepSpeed 0\.18\.0 is too old .* install 0\.18\.5 or newer"):
        runtime.refuse_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"})


def test_the_recipe_overrides_the_launcher_with_a_message():
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    assert runtime.overridden_settings(environ, "bf16", 2) == []
    assert runtime.overridden_settings({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16", 2) == []
    assert runtime.overridden_settings(environ, "fp32", 1) == [
        "ACCELERATE_MIXED_PRECISION = bf16 is overridden by the recipe's run.precision = fp32",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS = 2 is overridden by the recipe's optim.accumulate = 1",
    ]


def test_the_launchers_accumulation_does_not_divide_the_loss(monkeypatch):
    """Accelerate would divide the loss by it, in addition to the loop's division by the recipe's value."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    runtime.start("fp32", accumulate=1).backward(3 * weight)
    assert weight.grad == 3


def test_random_values_of_a_step_depend_on_seed_step_and_rank_only():
    def draw(*key: int) -> float:
        runtime.seed_step(*key)
        return torch.rand(()).item()

    assert draw(0, 5, 0) == draw(0, 5, 0)
    assert len({draw(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(3)}) == 180


@pytest.mark.parametrize(("busy", "threads", "processes", "warned"), [
    (0.3, 2, 1, False), (1.0, 2, 1, True), (1.0, 1, 1, False), (0.0, 2, 2, True), (2.0, 4, 1, True),
])  # fmt: skip
def test_more_threads_than_free_cores_give_a_warning(busy, threads, processes, warned):
    sentence = runtime.threads_warning(busy, 2, threads, processes)
    assert (sentence is not None) == warned
    assert not warned or "set run.threads=1" in sentence


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2 fma", False), ("avx512f avx512_bf16", True), ("amx_bf16", True)]
)
def test_bfloat16_instructions_are_found(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime.Path, "read_text", lambda self: f"flags : {flags}")
    assert runtime.bf16_in_hardware() is expected
