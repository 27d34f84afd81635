"""Prepares a folder for `make gpu` on a machine with a GPU and no network: wheels, shards, published checkouts.

    python benchmarks/gpu_prepare.py gpu --data ../shared/data --python 3.12 \\
        --published ../vision-lstm --published-kernels ../mlstm_kernels

Wheels of all that this project needs are downloaded for the other machine's Python and platform. torch, torchvision,
triton and NVIDIA's libraries are left out: the machine must have them, and its torch be at least the version that
pyproject.toml asks for; with --torch they are downloaded too, some 3 GB. Half of CIFAR-10 is copied, or --share of it.
Copy the folder into the other machine's checkout, and run `make gpu GPU_FOLDER=gpu` there.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PRESENT = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$")
"""Names of packages that a machine with a GPU has."""
TESTS = ["pytest>=8", "pytest-timeout>=2.3"]
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="folder with cifar10/cifar10-train-*.tar and cifar10-test-*.tar")
    parser.add_argument("--share", type=float, default=0.5, help="of the shards")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="the other machine's")
    parser.add_argument("--machine", default="x86_64", help="the other machine's processor, as uname -m prints it")
    parser.add_argument("--torch", action="store_true", help="also torch and NVIDIA's libraries")
    parser.add_argument("--published", type=Path, help="checkout of NX-AI/vision-lstm")
    parser.add_argument("--published-kernels", type=Path, help="checkout of NX-AI/mlstm_kernels")
    parser.add_argument("--no-wheels", action="store_true", help="the machine has all packages")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.data:
        print(f"{copy_shards(args.data, args.folder, args.share)} shards")
    for checkout, name in ((args.published, "vision-lstm"), (args.published_kernels, "mlstm_kernels")):
        if checkout:
            ignored = shutil.ignore_patterns(".git", "__pycache__")
            shutil.copytree(checkout, args.folder / name, ignore=ignored, dirs_exist_ok=True)
            print(f"{name}, which {'needs einops' if name == 'vision-lstm' else 'is compared with'}")
    if not args.no_wheels:
        more = ["einops"] if args.published else []
        download(args, [*needs(), *TESTS, *more])


def copy_shards(data: Path, folder: Path, share: float) -> int:
    """Copy a share of the shards of CIFAR-10 of both parts, at least one of each. How many."""
    chosen: list[Path] = []
    for part in ("train", "test"):
        found = sorted((data / "cifar10").glob(f"cifar10-{part}-*.tar"))
        if not found:
            sys.exit(f"{data}/cifar10 has no cifar10-{part}-*.tar; `selfvil pack` makes them")
        chosen += found[: math.ceil(share * len(found))]
    (folder / "cifar10").mkdir(exist_ok=True)
    for shard in chosen:
        shutil.copyfile(shard, folder / "cifar10" / shard.name)
    classes = data / "cifar10" / "classes.txt"
    if classes.exists():
        shutil.copyfile(classes, folder / "cifar10" / "classes.txt")
    return len(chosen)


def needs() -> list[str]:
    """What this project depends on."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]


def target(args: argparse.Namespace) -> list[str]:
    """pip's options for the other machine. pip takes each platform literally, so all older ones are listed."""
    platforms = [f"manylinux_2_{minor}_{args.machine}" for minor in GLIBC] + [f"manylinux2014_{args.machine}"]
    platforms += [f"linux_{args.machine}"]
    return [
        "--only-binary=:all:", "--python-version", args.python, "--implementation", "cp",
        *(word for platform in platforms for word in ("--platform", platform)),
    ]  # fmt: skip


def download(args: argparse.Namespace, requirements: list[str]) -> None:
    """Resolve the requirements for the other machine, and download what it lacks."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        resolve = ["install", "--quiet", "--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
        subprocess.run([*pip, *resolve, *target(args), *requirements], check=True)
        pins = pinned(json.loads(report.read_text()), with_torch=args.torch)
    wheels = args.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)  # two versions of a package could not be installed together
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), *target(args), *pins], check=True)
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) / 1e6
    print(f"{len(pins)} wheels, {size:,.0f} MB, for Python {args.python}")


def pinned(report: dict[str, Any], with_torch: bool) -> list[str]:
    """name==version of the packages of pip's report, without those that the other machine has."""
    found = [(package["metadata"]["name"], package["metadata"]["version"]) for package in report["install"]]
    return [f"{name}=={version}" for name, version in found if with_torch or not PRESENT.match(name.lower())]


if __name__ == "__main__":
    main()
