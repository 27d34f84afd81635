"""Speed of the backbone, compared with the published network and a vision transformer of the same width.

    python benchmarks/backbone.py --published ../vision-lstm --rounds 10 --json benchmarks/results/backbone.json

Each round times every network once, one after the other, so that other work on the machine affects all of them equally.
Reported are the median over the rounds, and the median of the ratios within each round with its quartiles. The
published network (a checkout of NX-AI/vision-lstm, needs einops) has the same parameters as ours, and both must compute
the same outputs before anything is timed. Masked training drops three quarters of the tokens, as MAE does; the
published network cannot do that.

    --compile           networks under torch.compile
    --depth 2           all networks have 2 pairs of blocks: the published one needs too much memory at 1024 px
    --without-native    also our network without the native kernels for CPUs
    --clock cpu         CPU time of the one thread, which other programs affect less than the time of day
    --dtypes tf32       float32, whose products a GPU may compute in tf32
    --memory            also the peak memory of a training step, each network in its own process

The floor is the time that the matrix products alone would take at the speed of a large product, measured in the same
run: multiply-adds with parameters and, in the mLSTM, of tokens with tokens or with states; three times as many for
training. The rest of a step are products too small or narrow for that speed, and passes over memory.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from about import about
from torch import Tensor, nn

from selfvil.models.adapter import adapt
from selfvil.models.layers import EXPANSION, NUM_HEADS
from selfvil.models.masking import keep_from_noise
from selfvil.models.published import checkpoint_filter_fn
from selfvil.models.vision_lstm import VisionLSTM
from selfvil.ops import linear, triton_mlstm
from selfvil.ops.chunkwise import chunk_size
from selfvil.ops.cpu.mlstm import chunk_size as native_chunk_size
from selfvil.ops.fused import SWITCH
from selfvil.ops.mlstm import OVERRIDE, choose

OURS, WITHOUT_NATIVE = "ours", "ours without native kernels"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vil_tiny_patch16_224", help="our model's name in timm")
    parser.add_argument(
        "--beside", nargs="*", default=["vit_tiny_patch16_224"], help="networks to compare with, by their names in timm"
    )
    parser.add_argument("--published", type=Path, help="checkout of NX-AI/vision-lstm to compare with")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--depth", type=int, help="block pairs, or layers of a transformer; the model's own by default")
    parser.add_argument("--compile", action="store_true", help="run under torch.compile")
    parser.add_argument("--without-native", action="store_true", help="also our network without the native CPU kernels")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: CPU time, with --threads 1")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step too")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads > 1 or args.device != "cpu"):
        sys.exit("--clock cpu measures one thread: use it on a CPU with --threads 1")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    models = build_models(args)
    if "published" in models:
        check_equal(models, images)
    floors = {}
    for dtype in args.dtypes:
        use_tf32(dtype)
        floors[dtype] = floor(models[OURS], args, dtype)
    if args.compile:
        models = {name: torch.compile(model) for name, model in models.items()}  # type: ignore[misc]

    rows = []
    for dtype in args.dtypes:
        use_tf32(dtype)
        for mode in args.modes:
            steps = {
                name: make_step(MODES[mode], model, images, dtype)
                for name, model in models.items()
                if not (mode == "masked training" and name == "published")
            }
            if args.without_native:
                steps[WITHOUT_NATIVE] = without_native(steps[OURS], models[OURS], images)
            rows += measure(steps, args, dtype, mode)
    print_table(rows, args)
    for dtype, seconds in floors.items():
        speeds = f"{args.batch / seconds:.2f} images/s inference, {args.batch / seconds / 3:.2f} training"
        print(f"{dtype} floor of ours: {speeds}")
    memory = {}
    if args.memory:
        memory = {name: peak_memory(args, name) for name in models}
        print(
            "peak memory of a training step, fp32: " + ", ".join(f"{n} {b / 2**20:,.0f} MiB" for n, b in memory.items())
        )
    if args.json:
        record = {
            "about": about(args, timm=timm.__version__),
            "rows": rows,
            "floor_seconds": floors,
            "peak_bytes": memory,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def use_tf32(dtype: str) -> None:
    """Let a GPU multiply float32 in tf32, or not."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def build_models(args: argparse.Namespace) -> dict[str, nn.Module]:
    size = {"img_size": args.img_size}
    ours = timm.create_model(args.model, **size | ({"depth": args.depth} if args.depth else {}))
    models: dict[str, nn.Module] = {OURS: ours}
    if args.published:
        sys.path.insert(0, str(args.published))
        from vision_lstm import VisionLSTM2

        models["published"] = VisionLSTM2(
            dim=ours.embed_dim,
            depth=len(ours.blocks),
            input_shape=(3, args.img_size, args.img_size),
            patch_size=ours.patch_embed.patch_size,
            output_shape=(ours.num_classes,),
        )
    for name in args.beside:
        models[name] = timm.create_model(name, **size | ({"depth": args.depth} if args.depth else {}))
    return {name: model.to(args.device) for name, model in models.items()}


def check_equal(models: dict[str, nn.Module], images: Tensor) -> None:
    """Copy the published network's parameters into ours, and exit unless both then compute the same outputs."""
    ours, published = models[OURS], models["published"]
    assert isinstance(ours, VisionLSTM)
    nn.init.normal_(published.head.weight, std=0.02)  # it is initialised to almost zero
    ours.load_state_dict(checkpoint_filter_fn(published.state_dict(), ours))
    with torch.no_grad():
        got, expected = ours(images), published(images)
    error = ((got - expected).norm() / expected.norm()).item()
    print(f"scores of ours and the published network differ by {error:.1e} (relative norm, float32)")
    if not error < 1e-4:
        sys.exit("they do not compute the same function, so timings would be meaningless")


def infer(model: nn.Module, images: Tensor, keep: Tensor) -> None:
    with torch.no_grad():
        model(images)


def train(model: nn.Module, images: Tensor, keep: Tensor) -> None:
    model(images).float().square().mean().backward()


def train_masked(model: nn.Module, images: Tensor, keep: Tensor) -> None:
    adapt(model).encode_kept(images, keep).float().square().mean().backward()


MODES: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "inference": infer,
    "training": train,
    "masked training": train_masked,
}


def make_step(function: Callable, model: nn.Module, images: Tensor, dtype: str) -> Callable[[], None]:
    """One step as a function without arguments: forward, and backward if `function` has one. No optimizer."""
    rows, cols = adapt(model).token_grid(images.shape) if function is train_masked else (2, 2)
    keep = keep_from_noise(torch.rand(len(images), rows * cols, device=images.device), rows * cols // 4)

    def step() -> None:
        model.train(function is not infer)
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            function(model, images, keep)
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def without_native(step: Callable[[], None], model: nn.Module, images: Tensor) -> Callable[[], None]:
    """The same step with the operator in plain torch, and plain torch around it."""
    rows, cols = adapt(model).token_grid(images.shape)
    form = choose(rows * cols, head_widths(model)[1], "cpu", torch.float64)  # which has no native kernel

    def plain_step() -> None:
        os.environ.update({SWITCH: "0", OVERRIDE: form})
        step()
        del os.environ[SWITCH], os.environ[OVERRIDE]

    return plain_step


def head_widths(model: nn.Module) -> tuple[int, int]:
    """Widths of the heads of q and k, and of v."""
    layer = model.blocks[0].first.layer
    if model.block == "mlp":
        heads, of_qk, of_v = layer.readings[0].num_heads, layer.readings[0].qk_dim, model.embed_dim
    else:
        heads, of_qk, of_v = NUM_HEADS, EXPANSION * model.embed_dim, EXPANSION * model.embed_dim
    return of_qk // heads, of_v // heads


def measure(steps: dict[str, Callable[[], None]], args: argparse.Namespace, dtype: str, mode: str) -> list[dict]:
    peaks = {}
    for name, step in steps.items():
        step()  # the first step also allocates memory and chooses kernels
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = CLOCKS[args.clock]()
            step()
            seconds[name].append(CLOCKS[args.clock]() - start)
    rows = []
    for name, times in seconds.items():
        ratios = [other / ours for other, ours in zip(times, seconds[OURS], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        rows.append(
            {
                "dtype": dtype,
                "mode": mode,
                "network": name,
                "images_per_s": args.batch / statistics.median(times),
                "time_over_ours": {"median": middle, "quartiles": [low, high]},
                "peak_bytes": peaks.get(name),
                "seconds": times,
            }
        )
    return rows


def floor(model: nn.Module, args: argparse.Namespace, dtype: str) -> float:
    """Seconds that the multiply-adds of a forward pass take at the speed of a large matrix product."""
    rows, cols = adapt(model).token_grid((args.img_size, args.img_size))
    tokens = rows * cols
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "pos_embed" not in n and "head" not in n
    )
    layers, (score_width, head) = 2 * len(model.blocks), head_widths(model)
    of_v = model.embed_dim * (1 if model.block == "mlp" else EXPANSION)
    of_qk = of_v // head * score_width
    # Multiply-adds of each token: with half of all tokens, or with half of a chunk's tokens and the state of each head.
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    backend = choose(tokens, head, args.device, torch_dtype)
    chunk = {
        "chunkwise": chunk_size(head),
        "triton_chunkwise": triton_mlstm.CHUNK,
        "native": native_chunk_size(tokens, score_width, head),
    }.get(backend, tokens)
    state = 2 * of_qk * head if chunk < tokens else 0
    of_tokens = (of_qk + of_v) // 2 * chunk + state
    products = tokens * (weights + layers * of_tokens)
    a, b = torch.randn(2, 2048, 2048, device=args.device, dtype=torch_dtype)
    times = []
    for _ in range(5):
        start = CLOCKS[args.clock]()
        linear(a, b, None)
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(CLOCKS[args.clock]() - start)
    return args.batch * products / (2048**3 / min(times))


def peak_memory(args: argparse.Namespace, name: str) -> int:
    """Bytes that one training step adds, at its peak, to the memory of a new process that holds the network."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (args, name))


def _peak_memory(args: argparse.Namespace, name: str) -> int:
    torch.set_num_threads(args.threads)
    model = build_models(args)[name]
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(model, images, images)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    before = _resident("VmRSS")
    train(model, images, images)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS) or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1])  # type: ignore[index]


def print_table(rows: list[dict], args: argparse.Namespace) -> None:
    print(f"{args.model}, {args.img_size} px, batch {args.batch}, {args.device}, {args.threads} threads")
    print(f"{'':5} {'':16} {'network':28} {'images/s':>9}   time over ours: median [quartiles]")
    for row in rows:
        ratio, (low, high) = row["time_over_ours"]["median"], row["time_over_ours"]["quartiles"]
        print(
            f"{row['dtype']:5} {row['mode']:16} {row['network']:28} {row['images_per_s']:9.2f}"
            f"   {ratio:.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
