"""run.compile: the same numbers to rounding, the same checkpoints, one graph for each crop size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from runs import small, state
from selfvil.build import build_objective
from selfvil.engine import blocks
from selfvil.engine.blocks import blocks_of, compile_blocks, require_compiler
from selfvil.errors import UserError
from selfvil.pretrain import pretrain
from selfvil.records import read_metrics


def test_blocks_of_student_teacher_and_decoder_are_found(digit_shards, tmp_path):
    counts = {name: len(blocks_of(build_objective(small(name, digit_shards, tmp_path)))) for name in ("mae", "dino")}
    assert counts == {"mae": 2, "dino": 2}, "one pair of blocks each in backbone and decoder, or student and teacher"


def test_equal_blocks_share_a_graph_for_each_crop_size(digit_shards, tmp_path, monkeypatch):
    counter = CompileCounter()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode=None, **kw: original(self, backend=counter, **kw))
    monkeypatch.setattr(blocks, "require_compiler", lambda device: None)
    torch._dynamo.reset()
    objective = build_objective(small("dino", digit_shards, tmp_path, "model.depth=3"))
    names = list(objective.state_dict())
    compile_blocks(objective, "default", torch.device("cpu"))
    assert list(objective.state_dict()) == names
    for size in (16, 32, 24, 16):
        objective.backbone.forward_features(torch.randn(2, 1, size, size)).sum().backward()
    assert counter.frame_count == 3


def test_without_a_compiler_there_is_an_error_message(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    torch._inductor.cpp_builder.get_cpp_compiler.cache_clear() if hasattr(
        torch._inductor.cpp_builder.get_cpp_compiler, "cache_clear"
    ) else None
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(UserError, match=r"run\.compile needs a C\+\+ compiler on CPUs, and none was found: install g"):
        require_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_a_compiled_run_equals_an_eager_one_to_rounding_and_each_continues_the_other(digit_shards, tmp_path, objective):
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    more = ["budget.steps=6", "monitor.log_every=1"]
    pretrain(small(objective, digit_shards, plain, *more))
    pretrain(small(objective, digit_shards, mixed, *more, "run.compile=default", "budget.pause_minutes=1e-6"))
    pretrain(small(objective, digit_shards, mixed, *more))
    compiled = tmp_path / "compiled"
    pretrain(small(objective, digit_shards, compiled, *more, "run.compile=default"))
    for run in (mixed, compiled):
        ours, theirs = ([r["loss"] for r in read_metrics(path / "metrics.jsonl")] for path in (run, plain))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        assert state(run).keys() == state(plain).keys()
