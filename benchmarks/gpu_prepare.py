"""Prepares a folder for `make gpu` on a machine with a GPU and no network: wheels, shards, published checkouts.

    python benchmarks/gpu_prepare.py gpu --data ../shared/data --python 3.12 \\
        --published ../vision-lstm --published-kernels ../mlstm_kernels

Wheels of all that this project needs are downloaded for the other machine's Python and platform. torch, torchvision,
triton and NVIDIA's libraries are left out: the machine must have them, and its torch be at least the version that
pyproject.toml asks for; with --torch they are downloaded too, some 3 GB. Half of CIFAR-10 is copied, or --share of it.
Copy the folder into the other machine's checkout, and run `make gpu GPU_FOLDER=gpu` there.
"""

import argparse
import email
import math
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

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
    """Download wheels of the requirements and of all that they need, for the other machine.

    pip would download torch only to read what it needs; so the wheels are followed here, each in the newest version
    that those before it allow. Exits if a later wheel needs another version.
    """
    wheels, asked = args.folder / "wheels", dict[str, list[Requirement]]()
    shutil.rmtree(wheels, ignore_errors=True)  # two versions of a package could not be installed together
    due = wanted(requirements, args)
    while due:
        for need in due:
            asked.setdefault(canonicalize_name(need.name), []).append(need)
        new = [name for name in asked if name not in versions(wheels)]
        specified = [f"{name}{','.join(str(need.specifier) for need in asked[name] if need.specifier)}" for name in new]
        fetch(specified, wheels, args)
        found = [
            need for wheel in wheels.glob("*.whl") if name_of(wheel) in new for need in wanted(needs_of(wheel), args)
        ]
        due = [need for need in found if canonicalize_name(need.name) not in asked or need.specifier]
        for need in [need for need in due if canonicalize_name(need.name) in versions(wheels)]:
            have = versions(wheels)[canonicalize_name(need.name)]
            if not need.specifier.contains(have, prereleases=True):
                sys.exit(f"{need.name} {have} was chosen, but {need} is needed: add the version to pyproject.toml")
            due.remove(need)
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) / 1e6
    print(f"{len(asked)} wheels, {size:,.0f} MB, for Python {args.python}")


def fetch(requirements: list[str], wheels: Path, args: argparse.Namespace) -> None:
    """Download these wheels. A package without one is built here, and must then run on every system."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--dest", str(wheels), *target(args)]
    try:
        subprocess.run([*pip, "download", *options, *requirements], check=True)
    except subprocess.CalledProcessError:
        if len(requirements) > 1:  # one of them
            for requirement in requirements:
                fetch([requirement], wheels, args)
            return
        before = set(wheels.glob("*.whl"))
        build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), *requirements]
        if subprocess.run(build).returncode:
            print(f"LEFT OUT: {requirements[0]} has no wheel, and cannot be built here")
        built = set(wheels.glob("*.whl")) - before
        if not all(wheel.name.endswith("-none-any.whl") for wheel in built):
            sys.exit(f"{requirements[0]} has no wheel for Python {args.python} on {args.machine}")


def wanted(requirements: list[str], args: argparse.Namespace) -> list[Requirement]:
    """Those requirements that apply to the other machine, and that it lacks."""
    environment = {
        "python_version": args.python, "python_full_version": f"{args.python}.0", "platform_machine": args.machine,
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": "",
    }  # fmt: skip
    parsed = [Requirement(text) for text in requirements]
    applying = [need for need in parsed if need.marker is None or need.marker.evaluate(environment)]
    return [need for need in applying if args.torch or not PRESENT.match(canonicalize_name(need.name))]


def needs_of(wheel: Path) -> list[str]:
    """What a wheel depends on, with markers."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []


def name_of(wheel: Path) -> str:
    return parse_wheel_filename(wheel.name)[0]


def versions(wheels: Path) -> dict[str, Version]:
    """The packages of a folder of wheels."""
    return {name: version for name, version, *_ in (parse_wheel_filename(wheel.name) for wheel in wheels.glob("*.whl"))}


if __name__ == "__main__":
    main()
