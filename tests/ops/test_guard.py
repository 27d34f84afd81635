"""The check of the Triton kernels before their first use, in Triton's interpreter, with broken kernels too."""

import json
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import interpreted
import interpreted_guard
from selfvil.ops import fused, guard, triton_mlstm
from selfvil.ops.mlstm import choose

pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not checked")

KINDS = ["triton", "triton_chunkwise", "layer", "convolution"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ask():
    """`interpreted_guard.answers` in the interpreter's process."""
    with interpreted.start() as pool:
        yield lambda *args, **how: pool.submit(interpreted_guard.answers, *args, **how).result()


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """Ask the guard about a kernel with this error as a new process would: its answer, and whether it has computed."""
    monkeypatch.setenv("SELFVIL_CACHE", str(tmp_path))

    def ask(error=1e-6, name="kernel", width=8):
        computed = []

        def errors():
            computed.append(True)
            yield "result", error

        monkeypatch.setattr(guard, "_known", {})
        monkeypatch.setattr(guard, "_warned", set())
        return guard._passes(name, CPU, torch.float32, width, errors), bool(computed)

    guard._key.cache_clear()
    yield ask
    guard._key.cache_clear()


def test_right_kernels_pass(ask, tmp_path):
    found, warnings, _ = ask(str(tmp_path), KINDS)
    assert not warnings
    assert found == dict.fromkeys(KINDS, True)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("kernels/triton-*/*.json")]
    assert len(records) == len(KINDS)
    names = {name for record in records for name in record["relative errors"]}
    assert {"reverse scan: gradient of log f", "projections: result 5", "norm: gradient of skip"} <= names
    assert {"flipped convolution of kept tokens: gradient of x", "sum with the convolution: result 1"} <= names
    assert max(max(record["relative errors"].values()) for record in records) < 1e-5


@pytest.mark.slow
def test_right_kernels_pass_in_bfloat16(ask, tmp_path):
    assert ask(str(tmp_path), KINDS, torch.bfloat16)[:2] == (dict.fromkeys(KINDS, True), [])


@pytest.mark.parametrize(("broken", "kind", "what"), [
    ("gate_gradients", "triton", "gradient of log f has a relative error of 5.0e-01"),
    pytest.param("states", "triton_chunkwise", "relative error", marks=pytest.mark.slow),
    pytest.param("forward", "triton", "relative error", marks=pytest.mark.slow),
    pytest.param("project_backward", "layer", "gradient of", marks=pytest.mark.slow),
    ("norm_backward", "layer", "gradient of"),
    ("conv_backward", "convolution", "sum with the convolution: gradient of weight has a relative error"),
    ("compiler", "layer", "RuntimeError: out of resource: shared memory"),
])  # fmt: skip
def test_a_broken_kernel_falls_back_with_one_warning(broken, kind, what, ask, tmp_path):
    found, (warning,), _ = ask(str(tmp_path), [kind, kind], broken=broken)
    assert found == {kind: False}
    assert what in warning
    assert "Please report this" in warning
    assert f"torch {torch.__version__}" in warning
    assert not list(tmp_path.glob("kernels/*/*")), "a failure is not recorded"


def test_an_answer_is_recorded_for_each_kind(passes, tmp_path):
    assert passes() == (True, True)
    assert passes() == (True, False)
    assert passes(width=16) == (True, True)
    assert passes(name="another") == (True, True)
    assert len(list(tmp_path.glob("kernels/triton-*/*"))) == 3, "no temporary file remains"


@pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
def test_a_failure_is_found_by_each_process(error, passes, caplog):
    with caplog.at_level(logging.WARNING):
        assert passes(error) == (False, True)
    assert "result has a relative error of" in caplog.text
    assert passes(error) == (False, True)
    assert passes() == (True, True)


def test_a_folder_that_cannot_be_written_is_no_error(passes, monkeypatch, tmp_path, caplog):
    (tmp_path / "kernels").write_text("a file, not a folder")
    assert passes() == passes() == (True, True)
    monkeypatch.delenv("SELFVIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert passes() == (True, True)
    assert not caplog.text


def test_a_record_belongs_to_versions_and_sources(passes, monkeypatch, tmp_path):
    assert passes() == (True, True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        guard._key.cache_clear()
        assert passes() == (True, True)
    for name in guard.SOURCES:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(guard, "__file__", str(tmp_path / "guard.py"))
    guard._key.cache_clear()
    assert passes() == (True, True)
    assert len(list(tmp_path.glob("kernels/triton-*"))) == 3


def test_the_answer_is_a_constant_of_a_compiled_graph(monkeypatch):
    operators = (fused.conv_silu, fused.project, fused.norm_skip_gate)
    asked = []
    monkeypatch.setattr(guard, "_passes", lambda name, device, dtype, width, errors: not asked.append((name, width)))

    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        layer = guard.layer_agrees(operators, x.device, x.dtype, x.shape[-1])
        return x + int(layer) + 2 * int(guard.mlstm_agrees(x.device, x.dtype, 16, "triton_chunkwise"))

    assert add(torch.zeros(3, 64)).unique().tolist() == [3.0]
    assert asked == [("layer", 64), ("mlstm-triton_chunkwise", 16)]


def test_what_is_chosen_depends_on_the_answer(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = []
    monkeypatch.setattr(guard, "layer_agrees", lambda operators, *kind: asked.append(kind) or len(asked) == 1)
    with FakeTensorMode():
        tokens = torch.empty(1, 4, 64, device="cuda")
        with monkeypatch.context() as patch:  # as under autocast, which torch disables without a GPU
            patch.setattr(torch, "is_autocast_enabled", lambda device: True)
            patch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
            assert fused.applies(tokens)
        assert not fused.applies(tokens)
    assert [kind[1:] for kind in asked] == [(torch.bfloat16, 64), (torch.float32, 64)]
    monkeypatch.setattr(guard, "mlstm_agrees", lambda device, dtype, width, form: form == "triton")
    assert choose(196, 96, "cuda", torch.bfloat16) == "triton"
    assert choose(triton_mlstm.CHUNK * 16, 96, "cuda", torch.bfloat16) == "chunkwise"
