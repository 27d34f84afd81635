"""The facts that every benchmark records with its figures, so that they can be judged and measured again."""

import argparse
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch

import selfvil


def about(args: argparse.Namespace, **versions: str | None) -> dict:
    """Facts about this run of a benchmark that has --device and --threads.

    versions: of the other packages that it times.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    # No absolute path of this machine is recorded.
    words = [f"../{Path(word).name}" if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        **versions,
        "selfvil": selfvil.__version__,
        "commit": commit.stdout.strip() or None,
    }


def processor() -> str:
    """The processor's name, and its bfloat16 instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return " ".join([fields.get("model name", platform.machine()), *bf16])
