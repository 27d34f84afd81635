"""Speed and error of the mLSTM operator's backends, for several lengths and head widths.

    python benchmarks/mlstm_operator.py --rounds 20 --json benchmarks/results/mlstm_operator.json
    python benchmarks/mlstm_operator.py --published-kernels ../mlstm_kernels --dtypes bf16  # on a GPU

Each round times every backend once, one after the other, so that other work on the machine affects all of them equally.
Reported are the median over the rounds, and the median of the ratios to the backend "auto" within each round with its
quartiles. In the same run each backend's output and gradients are compared with those of float64, on one sequence of
the batch: norms of the errors relative to the exact norms. If an error is above --tolerance, its row is marked and the
script fails.

The published kernels (a checkout of NX-AI/mlstm_kernels) are `triton_xl_chunk` in its wrapper that pads lengths. They
omit the gradient of the denominator and so compute less: their output is checked, the error of their gradients is only
printed. If they refuse a head width, q, k and v are padded with zeros to a power of two; the padding is part of the
time, and the row has a note.

fp32 multiplies in full precision, and tf32 lets a GPU round the factors to 10 bits.

Torch's causal attention of q, k and v is timed as "attention". It is another function, so that it has no error here.

The floor is the larger of two times. Operations: the multiply-adds of the two products of a forward pass and the five
of a backward pass, over the causal half of the scores, or over chunks of 64 and a state if that is less, at the speed
of a large matrix product. Bytes: every input read and every output written once, at the speed of a large copy. Both
speeds are measured in the same run.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from about import about
from torch import Tensor

from selfvil.ops import mlstm, triton_mlstm
from selfvil.ops.mlstm import choose

OURS, PUBLISHED, ATTENTION = "auto", "published", "attention"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("h", "dq", "dk", "dv", "di", "df")
Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[196, 576, 1024, 4096], help="tokens N")
    parser.add_argument("--widths", nargs="+", type=int, default=[96, 192, 384], help="head widths D")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="tokens in a batch, about: 65536 on a GPU, 4096 on a CPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, help="calls timed together: 10 on a GPU, 1 on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: of the one thread; other programs affect it less"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--backends", nargs="+", help="in addition to auto; by default all that the device supports")
    parser.add_argument("--published-kernels", type=Path, help="checkout of NX-AI/mlstm_kernels to compare with")
    parser.add_argument("--published-chunk", type=int, default=128, help="their chunk size")
    parser.add_argument("--tolerance", type=float, default=0.03, help="largest relative error of an output or gradient")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()

    on_gpu = args.device.startswith("cuda")
    args.tokens = args.tokens or (65536 if on_gpu else 4096)
    args.repeats = args.repeats or (10 if on_gpu else 1)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.clock == "cpu" and (on_gpu or args.threads > 1):
        sys.exit("--clock cpu measures one thread: use it on a CPU with --threads 1")
    if args.published_kernels and not on_gpu:
        sys.exit("--published-kernels need a GPU: they are written in Triton")
    if not args.backends:
        triton_forms = ["triton", "triton_chunkwise"] if on_gpu and triton_mlstm.INSTALLED else []
        args.backends = ["parallel", "chunkwise", *triton_forms]

    rows = []
    for dtype in args.dtypes:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        speeds = {"multiply_adds_per_s": product_speed(args, dtype), "bytes_per_s": copy_speed(args)}
        for width in args.widths:
            for num_tokens in args.lengths:
                new = measure(num_tokens, width, dtype, speeds, args)
                print_rows(new, header=not rows)
                rows += new
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about(args, triton=triton_version()), "rows": rows}, indent=2) + "\n")
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        sys.exit(f"{len(wrong)} rows are marked wrong: their timings are meaningless")


def measure(num_tokens: int, width: int, dtype: str, speeds: dict[str, float], args: argparse.Namespace) -> list[dict]:
    batch = max(1, args.tokens // num_tokens)
    inputs, dh = make_inputs((batch, args.heads, num_tokens, width), DTYPES[dtype], args.device)
    backends: dict[str, Backend] = {
        name: lambda *x, name=name: mlstm(*x, backend=name)  # type: ignore[misc]
        for name in (OURS, *args.backends)
    }
    backends[ATTENTION] = lambda q, k, v, i, f: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    notes = {OURS: choose(num_tokens, width, args.device, DTYPES[dtype]), ATTENTION: "another function"}
    if args.published_kernels:
        backends[PUBLISHED], notes[PUBLISHED] = published(inputs, args)

    one = [x[:1] for x in inputs]
    # The reference's N × N tensors in float64 are too large for long sequences; the chunkwise form has none.
    exact = run("reference" if num_tokens <= 1024 else "chunkwise", [x.double() for x in one], dh[:1].double())
    errors = {
        name: compare(run(function, one, dh[:1]), exact) for name, function in backends.items() if name != ATTENTION
    }

    rows = []
    for mode in ("forward", "training"):
        calls = {name: make_call(function, inputs, dh, mode) for name, function in backends.items()}
        times = time_in_turn(calls, args)
        least = floor(inputs, mode, speeds)
        for name in backends:
            ratios = [other / ours for other, ours in zip(times[name], times[OURS], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
            judged: Sequence[str] = {PUBLISHED: ["h"], ATTENTION: []}.get(name, NAMES)
            rows.append(
                {
                    "dtype": dtype, "batch": batch, "heads": args.heads, "num_tokens": num_tokens, "head_dim": width,
                    "mode": mode, "backend": name, "note": notes.get(name, ""),
                    "milliseconds": 1e3 * statistics.median(times[name]),
                    "time_over_ours": {"median": middle, "quartiles": [low, high]},
                    "floor_milliseconds": {key: 1e3 * value for key, value in least.items()},
                    "errors": errors.get(name),
                    "correct": all(errors[name][key] < args.tolerance for key in judged),
                    "seconds": times[name],
                }
            )  # fmt: skip
    return rows


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v, i, f and a gradient of h, as in an untrained network: gates mostly open. Scores are positive, so that
    their sums do not cancel: the output is divided by them, and cancellation would amplify every backend's rounding."""
    q, k = (torch.rand(shape, device=device).to(dtype) for _ in range(2))
    v, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    i = 0.1 * torch.randn(shape[:3], device=device)
    f = torch.linspace(3, 6, shape[1], device=device).view(1, -1, 1) + 0.1 * torch.randn(shape[:3], device=device)
    return [q, k, v, i, f], dh


def published(inputs: list[Tensor], args: argparse.Namespace) -> tuple[Backend, str]:
    """triton_xl_chunk in its wrapper, and a note on the changes to its inputs."""
    sys.path.insert(0, str(args.published_kernels))
    from mlstm_kernels.torch.chunkwise import mlstm_chunkwise__xl_chunk
    from mlstm_kernels.torch.kernel_wrappers import wrap_chunkwise__pad_zeros

    def direct(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return wrap_chunkwise__pad_zeros(
            mlstm_chunkwise__xl_chunk, q=q, k=k, v=v, f=f, i=i, eps=1e-6, chunk_size=args.published_chunk,
            autocast_kernel_dtype=q.dtype,
        )  # fmt: skip

    def padded(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        width = q.shape[-1]
        wide = 1 << (width - 1).bit_length()
        q = q * math.sqrt(wide / width)  # they divide by the root of the padded width
        q, k, v = (torch.nn.functional.pad(x, (0, wide - width)) for x in (q, k, v))
        return direct(q, k, v, i, f)[..., :width]

    try:
        run(direct, [x[:1] for x in inputs], torch.ones_like(inputs[0][:1]))
    except Exception as error:  # any error of a kernel that does not support this width
        return padded, f"heads padded to a power of two; without: {type(error).__name__}: {str(error)[:200]}"
    return direct, "gradients without the denominator's"


def run(backend: str | Backend, inputs: list[Tensor], dh: Tensor) -> list[Tensor]:
    """h and the gradients with respect to all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    h = mlstm(*inputs, backend=backend) if isinstance(backend, str) else backend(*inputs)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh)]


def compare(got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Norms of the errors, relative to the exact norm, or to 1e-3 of the largest gradient's."""
    least = 1e-3 * max(x.norm().item() for x in exact[1:])
    return {
        name: (a.double() - b).norm().item() / max(b.norm().item(), least)
        for name, a, b in zip(NAMES, got, exact, strict=True)
    }


def make_call(function: Backend, inputs: list[Tensor], dh: Tensor, mode: str) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_(mode == "training") for x in inputs]

    def call() -> None:
        h = function(*leaves)
        if mode == "training":
            torch.autograd.grad(h, leaves, dh, allow_unused=True)  # attention has no gates

    return call


def time_in_turn(calls: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per call, for each round."""
    for call in calls.values():
        call()  # the first call also allocates memory and compiles kernels
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call, args))
    return seconds


def timed(call: Callable[[], object], args: argparse.Namespace) -> float:
    clock = CLOCKS[args.clock]
    synchronize(args)
    start = clock()
    for _ in range(args.repeats):
        call()
    synchronize(args)
    return (clock() - start) / args.repeats


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def floor(inputs: list[Tensor], mode: str, speeds: dict[str, float]) -> dict[str, float]:
    """Lower bounds on the time in seconds: of the operations, and of the bytes."""
    q, *_, f = inputs
    batch, heads, num_tokens, width = q.shape
    # Columns that a row is multiplied with: all before it, or those of a chunk and a state.
    product = min(num_tokens / 2, 32 + width)
    products = {"forward": 2, "training": 7}[mode]
    # q, k, v, h; and q, k, v, dh, dq, dk, dv. Gates: i, f; and i, f, di, df.
    tensors, gates = {"forward": (4, 2), "training": (11, 6)}[mode]
    multiply_adds = products * batch * heads * num_tokens * width * product
    moved = tensors * q.nbytes + gates * f.nbytes
    return {
        "operations": multiply_adds / speeds["multiply_adds_per_s"],
        "bytes": moved / speeds["bytes_per_s"],
    }


def product_speed(args: argparse.Namespace, dtype: str) -> float:
    """Multiply-adds per second of a large matrix product."""
    size = 8192 if args.device.startswith("cuda") else 2048
    a, b = torch.randn(2, size, size, device=args.device).to(DTYPES[dtype])
    return size**3 / min(timed(lambda: a @ b, args) for _ in range(5))


def copy_speed(args: argparse.Namespace) -> float:
    """Bytes per second, read and written, of a large copy."""
    a = torch.zeros(2**28 if args.device.startswith("cuda") else 2**26, device=args.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), args) for _ in range(5))


def print_rows(rows: list[dict], header: bool) -> None:
    if header:
        print(
            f"{'':5}{'N':>6}{'D':>5}{'batch':>6} {'':9}{'backend':18}{'ms':>10}{'floor':>9}"
            "   time over ours: median [quartiles]   largest error of h, of a gradient"
        )
    for row in rows:
        ratio, (low, high) = row["time_over_ours"]["median"], row["time_over_ours"]["quartiles"]
        errors = ""
        if row["errors"]:
            worst = max((row["errors"][name], name) for name in NAMES[1:])
            errors = f"{row['errors']['h']:.1e}, {worst[0]:.1e} ({worst[1]})"
        print(
            f"{row['dtype']:5}{row['num_tokens']:6}{row['head_dim']:5}{row['batch']:6} {row['mode']:9}"
            f"{row['backend']:18}{row['milliseconds']:10.3f}{max(row['floor_milliseconds'].values()):9.3f}"
            f"   {ratio:.2f} [{low:.2f}, {high:.2f}]   {errors:24}"
            f"{'' if row['correct'] else '   WRONG'}   {row['note']}",
            flush=True,
        )


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


if __name__ == "__main__":
    main()
