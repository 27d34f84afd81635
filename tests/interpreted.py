"""A separate process that runs Triton kernels on a CPU, in Triton's interpreter."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor


def start() -> ProcessPoolExecutor:
    """Start the process, for `submit(gradients, ...)`. TRITON_INTERPRET must be set before Triton is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(_prepare).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def _prepare() -> None:
    """Correct the interpreter for bfloat16: it truncates instead of rounding, and multiplies raw bits (Triton 3.9)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self, x, dtype):
        if dtype.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            bits = x.data.view(np.uint32)
            bits = bits + 0x7FFF + (bits >> 16 & 1)  # round to nearest, ties to even
            return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        return widened(x) if dtype.scalar == tl.float32 and x.dtype.scalar == tl.bfloat16 else cast(self, x, dtype)

    def widening_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, widening_dot


def gradients(inputs: list[Tensor], dh: Tensor, chunk: int, device: str = "cpu", **how) -> list[Tensor]:
    """h, and the gradients of q, k, v, i and f, with this chunk size, and half of it for scans of the gates."""
    from selfvil.ops import mlstm, triton_mlstm

    before = triton_mlstm.CHUNK, triton_mlstm.SCAN
    triton_mlstm.CHUNK, triton_mlstm.SCAN = chunk, triton_mlstm.SCAN._replace(block=chunk // 2)
    try:
        inputs = [x.detach().clone().to(device).requires_grad_() for x in inputs]
        h = mlstm(*inputs, **how)
        return [x.cpu() for x in (h.detach(), *torch.autograd.grad(h, inputs, dh.to(device)))]
    finally:
        triton_mlstm.CHUNK, triton_mlstm.SCAN = before


def check_operator(form: str) -> None:
    """Run `torch.library.opcheck` on the custom operator, and compile it."""
    from selfvil.ops import mlstm

    torch.manual_seed(0)  # in this process
    inputs = [x.requires_grad_() for x in (*torch.randn(3, 1, 2, 20, 4).unbind(), *torch.randn(2, 1, 2, 20).unbind())]
    q, k, v, i, f = inputs
    operands = (q, k, v, i, f.sigmoid().log().detach(), True, form == "triton_chunkwise", q.shape[-1])
    torch.library.opcheck(torch.ops.selfvil.mlstm_triton.default, operands)
    compiled = torch.compile(lambda *x: mlstm(*x, reverse=True, backend=form), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*inputs).square().sum(), inputs)
               for function in (compiled, lambda *x: mlstm(*x, reverse=True, backend=form))]  # fmt: skip
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
