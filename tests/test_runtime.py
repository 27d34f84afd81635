"""Launches that would go wrong silently, and stops."""

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
def test_sound_launches_pass(environ, num_processes):
    runtime.refuse_split_launch(environ, num_processes)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, but Accelerate would silently train without"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}, "without ACCELERATE_"),
        ({"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0"}, "asks for FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for MEGATRON_LM"),
    ],
)  # fmt: skip
def test_a_strategy_that_would_be_left_out_is_refused(environ, expected):
    with pytest.raises(UserError, match=expected):
        runtime.refuse_strategy(environ)


def test_deepspeed_without_its_packages_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda package: None if package == "transformers" else object())
    with pytest.raises(
        UserError, match=r"DeepSpeed needs transformers, not installed: pip install 'selfvil\[deepspeed\]'"
    ):
        runtime.refuse_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"})
    runtime.refuse_strategy({"LOCAL_RANK": "0"})


def test_a_deepspeed_that_computed_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda package: object())
    monkeypatch.setattr(runtime, "version", lambda package: "0.18.0")
    monkeypatch.setattr(runtime, "compare_versions", lambda *asked: asked == ("deepspeed", "<", "0.18.5"))
    with pytest.raises(UserError, match=r"DeepSpeed 0\.18\.0 is too old .* install 0\.18\.5 or newer"):
        runtime.refuse_strategy({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"})


def test_the_recipe_has_the_last_word_and_says_so():
    agreed = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    assert runtime.overruled(agreed, "bf16", 2) == []
    assert runtime.overruled({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16", 2) == []
    assert runtime.overruled(agreed, "fp32", 1) == [
        "ACCELERATE_MIXED_PRECISION = bf16 gives way to the recipe's run.precision = fp32",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS = 2 gives way to the recipe's optim.accumulate = 1",
    ]


def test_the_launchers_accumulation_divides_no_loss(monkeypatch):
    """Accelerate would divide the loss by it, after the loop has divided by the recipe's."""
    import torch

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    runtime.start("fp32", accumulate=1).backward(3 * weight)
    assert weight.grad == 3


def test_draws_of_a_step_depend_on_seed_step_and_rank_only():
    import torch

    def draw(*key: int) -> float:
        runtime.seed_step(*key)
        return torch.rand(()).item()

    assert draw(0, 5, 0) == draw(0, 5, 0)
    assert len({draw(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(3)}) == 180


@pytest.mark.parametrize(("busy", "threads", "processes", "warned"), [
    (0.3, 2, 1, False), (1.0, 2, 1, True), (1.0, 1, 1, False), (0.0, 2, 2, True), (2.0, 4, 1, True),
])  # fmt: skip
def test_threads_without_a_core_of_their_own_are_told(busy, threads, processes, warned):
    sentence = runtime.crowded(busy, 2, threads, processes)
    assert (sentence is not None) == warned
    assert not warned or "set run.threads=1" in sentence


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2 fma", False), ("avx512f avx512_bf16", True), ("amx_bf16", True)]
)
def test_bfloat16_instructions_are_found(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime.Path, "read_text", lambda self: f"flags : {flags}")
    assert runtime.bf16_in_hardware() is expected
