"""Compiles every kernel for an H200, which need not be present, and checks that it fits its memory."""

import importlib
import os
from collections import Counter

import pytest
import torch

from selfvil.models.layers import ViLLayer
from selfvil.models.layout import TokenLayout
from selfvil.models.mlp_block import MLPBlock
from selfvil.ops import fused, mlstm, triton_mlstm

triton = pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: nothing would be compiled", allow_module_level=True)

SHARED_MEMORY = 227 * 1024
"""Maximum of a program on compute capability 9.0, in bytes."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def launches(dtype, head_dim, form, reverse, num_tokens):
    """The distinct launches of a forward and a backward pass: kernel, configuration, arguments and constants."""
    found = {}

    def record(kernel, programs, config, *args, **constants):
        found[kernel, tuple(constants.items())] = (kernel, config, args, constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_mlstm, "_launch", record)
        patch.setattr(triton_mlstm, "_check", lambda q: None)
        q, k, v = (torch.zeros(1, 1, num_tokens, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
        i, f = torch.zeros(2, 1, 1, num_tokens)
        mlstm(q, k, v, i, f, backend=form, reverse=reverse).sum().backward()
    return list(found.values())


def layer_launches(dtype, dim, bias, reverse):
    """The same for the fused parts of a layer without its mLSTM; parameters are float32, as under autocast."""
    found = {}

    def record(kernel, programs, config, *args, **constants):
        found[kernel, tuple(constants.items())] = (kernel, config, args, constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_launch", record)
        patch.setattr(fused, "applies", lambda x: True)
        patch.setattr(fused, "adds_conv", lambda x: True)
        for layout in (TokenLayout((14, 14)), TokenLayout.of(torch.zeros(1, 196, dim), (14, 14), num_extra=4)):
            x = torch.zeros(1, 196 + layout.num_extra, dim)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                y = ViLLayer(dim, bias=bias, reverse=reverse)(x, layout)
                z = MLPBlock(dim, reverse=reverse, bias=bias)._convolve(x, layout)
            (y.sum() + z.sum()).backward()
    return list(found.values())


def compiled(kernel, config, args, constants, source="triton_kernels"):
    """The kernel, compiled for compute capability 9.0 as by a call with these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"selfvil.ops.{source}"), kernel)
    signature, aligned = {}, {}
    for index, (name, value) in enumerate(zip(function.arg_names, args, strict=False)):
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + (DTYPES | {torch.int64: "i64"})[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif value == 1:  # as in a call
            constants = {**constants, name: 1}
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(function.arg_names)
    source = ASTSource(function, {name: signature[name] for name in function.arg_names}, constants, aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
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
        # Products by Hopper's wgmma, which is twice as fast; for one token, the compiler needs no products.
        if kernel in products and dtype != torch.float32 and num_tokens > 1:
            assert "wgmma.mma_async" in result.asm["ptx"], kernel
            assert "mma.sync" not in result.asm["ptx"], kernel


@pytest.mark.parametrize(
    ("head_dim", "form", "reverse"),
    [pytest.param(96, "triton_chunkwise", True, marks=pytest.mark.slow), (384, "triton", False)],
)
def test_kernels_fit_an_h200(head_dim, form, reverse, tmp_path, monkeypatch):
    check(torch.bfloat16, head_dim, form, reverse, tmp_path, monkeypatch)


def test_kernels_compile_for_a_single_token(tmp_path, monkeypatch):
    check(torch.bfloat16, 16, "triton_chunkwise", False, tmp_path, monkeypatch, num_tokens=1)


def check_layer(dtype, dim, bias, reverse, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = layer_launches(dtype, dim, bias, reverse)
    # Of convolutions: with SiLU, its backward pass, and the sum; on a full grid and with extra tokens.
    assert Counter(kernel for kernel, *_ in found) == {
        "conv_backward": 4, "conv_forward": 8, "norm_backward": 1, "norm_forward": 1, "project_backward": 1,
        "project_forward": 1,
    }  # fmt: skip
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
