"""Small checks on a GPU: versions, tests, the guard's answers, and synchronisations in a training step.

    python benchmarks/gpu_checks.py device --json device.json
    python benchmarks/gpu_checks.py guard --widths 96 192 --json guard.json
    python benchmarks/gpu_checks.py tests tests/ops/test_triton.py --json tests.json
    python benchmarks/gpu_checks.py sync cifar10_mae_gpu --json sync.json

guard: asks `selfvil.ops.guard` about the kernels for each dtype and head width, with an empty cache folder, so that
each answer is computed. `tests` exits with pytest's status. sync: torch warns of every operation that waits for the
GPU; the first two steps, which allocate memory and compile kernels, are not counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from step import Stepper, make_batch

from selfvil.ops import fused, guard
from selfvil.recipe import load

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["device", "guard", "tests", "sync"])
    parser.add_argument("names", nargs="*", help="tests: files; sync: recipes")
    parser.add_argument("-k", help="tests: pytest's expression")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", nargs="+", type=int, default=[96, 192])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="sync: overrides of the recipes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    status = 0
    if args.what == "device":
        figures = device()
    elif args.what == "guard":
        figures = ask_guard(args)
        status = 0 if all(row["agree"] for row in figures["rows"]) else 1
    elif args.what == "tests":
        figures, status = run_tests(args)
    else:
        figures = {"rows": [count_synchronisations(name, args) for name in args.names]}
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(status)


def device() -> dict[str, Any]:
    """Facts about the GPUs and the libraries."""
    import timm
    import triton

    facts: dict[str, Any] = {"GPUs": torch.cuda.device_count()}
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        facts[f"GPU {number}"] = (
            f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB, "
            f"{found.multi_processor_count} multiprocessors"
        )
    facts |= {"CUDA of torch": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    facts |= {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__}
    facts |= {"Python": sys.version.split()[0], "cores": os.cpu_count()}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        facts["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        facts["driver, clock, power"] = "no nvidia-smi"
    return facts


def ask_guard(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    operators = (fused.conv_silu, fused.project, fused.norm_skip_gate)
    where = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SELFVIL_CACHE"] = folder
        for dtype in args.dtypes:
            for width in args.widths:
                for kernels in ("triton", "triton_chunkwise", "layer", "convolution"):
                    start = time.perf_counter()
                    if kernels == "layer":
                        agree = guard.layer_agrees(operators, where, DTYPES[dtype], guard.HEADS * width)
                    elif kernels == "convolution":
                        agree = guard.conv_agrees(fused.add_conv, where, DTYPES[dtype], guard.HEADS * width)
                    else:
                        agree = guard.mlstm_agrees(where, DTYPES[dtype], width, kernels)
                    seconds = round(time.perf_counter() - start, 1)
                    written = sorted(Path(folder).rglob("*.json"), key=os.path.getmtime)
                    errors = json.loads(written[-1].read_text())["relative errors"] if agree and written else {}
                    name, error = max(errors.items(), key=lambda item: item[1], default=("see the log", 0.0))
                    rows.append(
                        {"kernels": kernels, "dtype": dtype, "width": width, "agree": agree, "seconds": seconds,
                         "error": f"{error:.1e} ({name})"}
                    )  # fmt: skip
    return {"rows": rows}


def run_tests(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *args.names]
        status = subprocess.run([*command, *(["-k", args.k] if args.k else [])]).returncode
        suites = xml.etree.ElementTree.parse(report).getroot()
    cases = list(suites.iter("testcase"))
    kinds = [
        next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed") for case in cases
    ]
    counts = Counter(kinds)
    failures = {
        case.get("name"): next(iter(case)).get("message", "")[:300]
        for case, kind in zip(cases, kinds, strict=True)
        if kind in ("failure", "error")
    }
    return {
        "passed": counts["passed"],
        "failed": counts["failure"] + counts["error"],
        "skipped": counts["skipped"],
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
        "failures": failures,
    }, status


def count_synchronisations(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """How often a step waits for the GPU, and where in this package. On a CPU nothing waits."""
    recipe = load(name, ["data.train=none", "run.out=unused", *args.set])
    options = SimpleNamespace(device=args.device, clock="wall", whole=True)
    stepper = Stepper(recipe, "eager", make_batch(recipe, options), options)  # type: ignore[arg-type]
    for _ in range(2):
        stepper.take()
    places: Counter[str] = Counter()

    def show(message: Any, *_: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if re.search(r"/selfvil/|/step\.py", frame.filename)]
            places[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if args.device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(args.steps):
            stepper.take()
        if args.device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("default")
    return {
        "recipe": name,
        "steps": args.steps,
        "per_step": round(sum(places.values()) / args.steps, 1),
        "places": [f"{place} ({count})" for place, count in places.most_common(12)],
    }


if __name__ == "__main__":
    main()
