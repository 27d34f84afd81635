"""Block sizes of the Triton kernels: times those in the code beside others, on a GPU.

    python benchmarks/tune.py operator --dtypes bf16 fp32 --json tune_operator.json
    python benchmarks/tune.py layer --json tune_layer.json

operator: the configuration of `triton_mlstm._config`, and the chunk size of the chunkwise form. layer: those of
`ops/fused.py`. For each kind of kernels, dtype and width, the forward and the backward pass are timed with every
candidate, in rounds that interleave them: sizes of blocks together, all else one at a time. A candidate that does not
fit the GPU, or whose results differ from those of the current one, is left out with the reason. The record has all
times. A better configuration is adopted by changing the constants in these two files, if it is better for all widths of
the networks: they are not chosen at run time.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from about import about
from torch import Tensor

from selfvil.ops import fused, mlstm, triton_mlstm
from selfvil.ops.triton_mlstm import KernelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 0.05
"""Largest relative difference of a result or gradient from that of the current configuration."""

Call = Callable[[], list[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["operator", "layer"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=[96, 192], help="of a head")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes and two candidates, for Triton's interpreter")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    args.batch, args.side = (1, 4) if args.tiny else (64, 14)
    if args.tiny:
        args.rounds, args.widths = 1, [16]
    rows = []
    for dtype, width in itertools.product(args.dtypes, args.widths):
        for row in (tune_operator if args.what == "operator" else tune_layer)(dtype, width, args):
            rows.append(row)
            print(f"{row['kernels']} {dtype} {width}: now {row['now']} {row['now_ms']:.3f} ms, "
                  f"best {row['best']} {row['best_ms']:.3f} ms", flush=True)  # fmt: skip
            if args.json:
                args.json.write_text(json.dumps({"about": about(args), "rows": rows}, indent=1) + "\n")


def tune_operator(dtype: str, width: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    lengths = {"triton": args.side**2, "triton_chunkwise": 150 if args.tiny else 4096}
    for backend, num_tokens in lengths.items():
        batch = max(1, args.batch * args.side**2 // num_tokens)
        inputs = random_inputs((batch, 4, num_tokens, width), 3, dtype, args) + [
            x + shift
            for x, shift in zip(random_inputs((batch, 4, num_tokens), 2, "fp32", args), (0.0, 4.0), strict=True)
        ]
        call = differentiated(lambda *x, backend=backend: [mlstm(*x, backend=backend)], inputs)
        now = triton_mlstm._config(inputs[0])
        sizes = [KernelConfig(*size, *now[2:]) for size in itertools.product((32, 64, 128), repeat=2)]
        sizes += variations(now, warps=(4, 8), stages=(1, 2, 3))
        candidates = [now, *(config for config in sizes if config != now and allowed(config))]
        candidates = candidates[:2] if args.tiny else candidates
        changes = {str(tuple(c)): [patch.object(triton_mlstm, "_config", lambda q, c=c: c)] for c in candidates}
        yield time_all(backend, dtype, width, call, changes, args)
        if backend == "triton_chunkwise":
            chunks = [triton_mlstm.CHUNK, *(size for size in (128, 256, 512) if size != triton_mlstm.CHUNK)]
            chunks = chunks[:2] if args.tiny else chunks
            changes = {f"chunk {size}": [patch.object(triton_mlstm, "CHUNK", size)] for size in chunks}
            yield time_all("triton_chunkwise, chunk", dtype, width, call, changes, args)


def variations(now: Any, **choices: tuple[int, ...]) -> list[Any]:
    """Configurations that differ from the current one in one value."""
    return [now._replace(**{name: value}) for name, values in choices.items() for value in values]


def allowed(config: KernelConfig) -> bool:
    """A block consists of whole steps, and a chunk of whole blocks."""
    return config.block % config.step == 0 and triton_mlstm.CHUNK % config.block == 0


def tune_layer(dtype: str, width: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    channels, tokens = 4 * width, args.side**2
    x, c, gate = random_inputs((args.batch, tokens, channels), 3, dtype, args)
    (h,) = random_inputs((args.batch, 4, tokens, width), 1, dtype, args)
    vectors = random_inputs((channels,), 6, "fp32", args)
    blocks = random_inputs((channels // 4, 4, 4), 3, "fp32", args)
    gates = [g / channels**0.5 for g in random_inputs((8, channels), 2, "fp32", args)]
    kernel, bias = random_inputs((channels, 1, 3, 3), 1, "fp32", args)[0], random_inputs((8,), 1, "fp32", args)[0]
    grid = (args.side, args.side)
    convolve = differentiated(lambda x, w, b: [fused.conv_silu(x, w, b, grid, False)], [x, kernel, vectors[0]])
    project = differentiated(
        lambda c, x, *p: list(fused.project(c, x, p[:3], p[3:6], *p[6:])), [c, x, *blocks, *vectors[:3], *gates, bias]
    )
    normalise = differentiated(
        lambda h, c, gate, *p: [fused.norm_skip_gate(h, c, gate, *p, 1e-5)], [h, c, gate, *vectors[3:]]
    )
    plans: dict[str, tuple[Call, tuple[int, ...], tuple[int, ...]]] = {
        "CONV": (convolve, (32, 64, 128), (128, 256, 512)),
        "PROJECT": (project, (16, 32, 64), ()),
        "PROJECT_BACKWARD": (project, (16, 32, 64), (256, 512, 1024)),
        "NORM": (normalise, (), (32, 64, 128)),
    }
    for name, (call, widths, spans) in plans.items():
        now, shared = getattr(fused, name), {"tokens": (8, 16, 32, 64), "warps": (2, 4, 8), "stages": (1, 2)}
        sizes = variations(now, channels=widths, span=spans, **shared)
        candidates = [now, *(c for c in sizes if c != now and c.span % c.tokens == 0)]
        candidates = candidates[:2] if args.tiny else candidates
        changes = {str(tuple(c)): [patch.object(fused, name, c)] for c in candidates}
        yield time_all(name, dtype, width, call, changes, args)


def random_inputs(shape: tuple[int, ...], count: int, dtype: str, args: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(torch.rand(count, *shape, generator=generator).to(args.device, DTYPES[dtype]).unbind())


def differentiated(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Call:
    """A call that returns the results and the gradients of their sums for all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def call() -> list[Tensor]:
        results = function(*leaves)
        return [*results, *torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results])]

    return call


def time_all(
    kernels: str, dtype: str, width: int, call: Call, changes: dict[str, list[Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """Times of the candidates, of which the first is the current one. changes: patches for each of them."""
    seconds: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    exact: list[Tensor] = []
    for name, patches in changes.items():  # compiles, and finds those that cannot be used
        try:
            with all_of(patches):
                results = [x.detach() for x in call()]
            exact = exact or results
            error = max(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(results, exact, strict=True))
            if error < TOLERANCE:
                seconds[name] = []
            else:
                refused[name] = f"results differ by {error:.1e}"
        except Exception as problem:  # a compiler may fail in any way
            refused[name] = f"{type(problem).__name__}: {str(problem)[:150]}"
    now = next(iter(changes))
    if now not in seconds:
        raise RuntimeError(f"{kernels} {dtype} {width}: the current configuration {now} fails: {refused[now]}")
    repeats = 1 if args.tiny else 10
    for _ in range(args.rounds):
        for name in seconds:
            with all_of(changes[name]):
                synchronize(args)
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                synchronize(args)
                seconds[name].append((time.perf_counter() - start) / repeats)
    medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "kernels": kernels, "dtype": dtype, "width": width, "now": now, "now_ms": medians[now], "best": best,
        "best_ms": medians[best], "milliseconds": medians, "refused": refused,
    }  # fmt: skip


@contextmanager
def all_of(patches: list[Any]) -> Iterator[None]:
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
