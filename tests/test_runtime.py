"""Launches that would go wrong silently, and stops."""

import os
import signal

import pytest

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


def test_first_signal_asks_and_a_later_one_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with runtime.StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher: the same wish
        monkeypatch.setattr(stop, "SAME_SIGNAL", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_draws_of_a_step_depend_on_seed_step_and_rank_only():
    import torch

    def draw(*key: int) -> float:
        runtime.seed_step(*key)
        return torch.rand(()).item()

    assert draw(0, 5, 0) == draw(0, 5, 0)
    assert len({draw(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(3)}) == 180
