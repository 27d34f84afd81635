"""Every kernel compiles for an H200, without one, and fits it: what the interpreter knows nothing of."""

import importlib
import os

import pytest
import torch

from selfvil.models.layers import ViLLayer
from selfvil.ops import fused, mlstm, triton_mlstm

triton = pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: nothing would be compiled", allow_module_level=True)

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on compute capability 9.0."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def launches(dtype, head_dim, form, reverse, num_tokens):
    """What a forward and a backward pass start: kernel, plan, arguments and constants, each sort once."""
    found = {}

    def record(kernel, programs, plan, *args, **constants):
        found[kernel, tuple(constants.items())] = (kernel, plan, args, constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_mlstm, "_launch", record)
        patch.setattr(triton_mlstm, "_check", lambda q: None)
        q, k, v = (torch.zeros(1, 1, num_tokens, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
        i, f = torch.zeros(2, 1, 1, num_tokens)
        mlstm(q, k, v, i, f, backend=form, reverse=reverse).sum().backward()
    return list(found.values())


def launches_of_a_layer(dtype, dim, bias, reverse):
    """The same for the fused parts of a whole layer, its mLSTM apart; parameters are float32, as autocast has them."""
    found = {}

    def record(kernel, programs, cut, *args, **constants):
        found[kernel, tuple(constants.items())] = (kernel, cut, args, constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_launch", record)
        patch.setattr(fused, "applies", lambda x: True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = ViLLayer(dim, bias=bias, reverse=reverse)(torch.zeros(1, 196, dim), (14, 14))
        y.sum().backward()
    return list(found.values())


def compiled(kernel, plan, args, constants, source="triton_kernels"):
    """The kernel for compute capability 9.0, as a call with these arguments would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"selfvil.ops.{source}"), kernel)
    signature, aligned = {}, {}
    for index, (name, value) in enumerate(zip(function.arg_names, args, strict=False)):
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + DTYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif value == 1:  # as a call would have it, too
            constants = {**constants, name: 1}
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(function.arg_names)
    source = ASTSource(function, {name: signature[name] for name in function.arg_names}, constants, aligned)
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check(dtype, head_dim, form, reverse, tmp_path, monkeypatch, num_tokens=600):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(dtype, head_dim, form, reverse, num_tokens)
    scans, products = {"scan_gates", "gate_gradients"}, {"forward", "backward_rows", "backward_columns"}
    products |= {"states"} if form == "triton_chunkwise" else set()
    assert {kernel for kernel, *_ in found} == scans | products
    for kernel, *how in found:
        result = compiled(kernel, *how)
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_MEMORY, f"{kernel}: {result.metadata.shared} bytes of shared memory"
        # Hopper's own products, without which it has half its speed; for one token, the compiler needs none.
        if kernel in products and dtype != torch.float32 and num_tokens > 1:
            assert "wgmma.mma_async" in result.asm["ptx"], kernel
            assert "mma.sync" not in result.asm["ptx"], kernel


@pytest.mark.parametrize(("head_dim", "form", "reverse"), [(96, "triton_chunkwise", True), (384, "triton", False)])
def test_kernels_fit_an_h200(head_dim, form, reverse, tmp_path, monkeypatch):
    check(torch.bfloat16, head_dim, form, reverse, tmp_path, monkeypatch)


def test_kernels_compile_for_a_single_token(tmp_path, monkeypatch):
    check(torch.bfloat16, 16, "triton_chunkwise", False, tmp_path, monkeypatch, num_tokens=1)


def check_layer(dtype, dim, bias, reverse, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches_of_a_layer(dtype, dim, bias, reverse)
    assert sorted(kernel for kernel, *_ in found) == [
        "conv_backward", "conv_forward", "conv_forward", "norm_backward", "norm_forward", "project_backward",
        "project_forward",
    ]  # fmt: skip
    for kernel, *how in found:
        result = compiled(kernel, *how, source="triton_neighbours")
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_MEMORY, f"{kernel}: {result.metadata.shared} bytes of shared memory"


def test_neighbours_fit_an_h200(tmp_path, monkeypatch):
    check_layer(torch.bfloat16, 768, True, True, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [192, 768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_of_every_kind_fit_an_h200(dtype, dim, bias, reverse, tmp_path, monkeypatch):
    check_layer(dtype, dim, bias, reverse, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["triton", "triton_chunkwise"])
@pytest.mark.parametrize("head_dim", [16, 48, 96, 192, 384])
@pytest.mark.parametrize(("dtype", "tf32"), [(dtype, False) for dtype in DTYPES] + [(torch.float32, True)])
def test_kernels_of_every_kind_fit_an_h200(dtype, tf32, head_dim, form, reverse, tmp_path, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        check(dtype, head_dim, form, reverse, tmp_path, monkeypatch)
    finally:
        torch.set_float32_matmul_precision(before)
