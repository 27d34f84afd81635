"""Time of `selfvil embed` beside that of the forward pass alone, and its memory.

    python benchmarks/embed.py speed --data ../shared/data/cifar10 --json benchmarks/results/embed_cpu.json
    python benchmarks/embed.py memory --data ../shared/data/cifar10 --json benchmarks/results/embed_cpu.json

speed: images are embedded to Parquet, and the same batches, already decoded and in memory, go through the same network;
both alternate, each time with the next images, and the ratios of all rounds are reported. Time of `embed` counts from
its first batch to the finished file: loading the model and starting the workers take the same time for any number of
images. Processor time (of workers too, from their start) is reported besides: other programs change it less.

memory: one process of `selfvil embed` with all 60,000 images (train and test). Its own peak is the largest resident set
(ru_maxrss); that of the command includes its workers, whose shared pages are counted once (proportional set size).
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from about import about
from torch import Tensor

from selfvil.data.index import open_shards
from selfvil.data.loader import ordered_batches
from selfvil.embedding import write
from selfvil.embedding.encoder import load_encoder
from selfvil.timm_folder import write_network
from selfvil.weights import Normalisation

_CIFAR = Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), (32, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10-train-*.tar and cifar10-test-*.tar")
    parser.add_argument("--model", default="vil_nano_patch4_32")
    parser.add_argument("--arguments", type=json.loads, default={}, help='of the model, as JSON: {"depth": 2}')
    parser.add_argument("--images", type=int, default=1024, help="in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = export(args.model, args.arguments, Path(folder) / "model")
        measured = speed(args, model, Path(folder)) if args.what == "speed" else memory(args, model, Path(folder))
    figures = about(args, timm=timm.__version__) | {"model": args.model, "arguments": args.arguments} | measured
    print(json.dumps(figures, indent=1))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.what: figures}, indent=1) + "\n")


def export(name: str, arguments: dict[str, Any], folder: Path) -> Path:
    """An export of an untrained network: weights change neither time nor memory."""
    folder.mkdir()
    torch.manual_seed(0)
    arguments = {"img_size": [32, 32], "num_classes": 0} | arguments
    backbone = timm.create_model(name, **arguments)
    write_network(folder, backbone, arguments, _CIFAR, {"samples_seen": 0}, "# an untrained network\n")
    return folder


def speed(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Seconds for `args.images` images: the forward pass alone, and `embed`, in alternating rounds."""
    encoder = load_encoder(model, device=args.device)
    shards = split(args.data / "cifar10-train-000000.tar", args.images, folder)
    rounds = []
    for number in range(-1, args.rounds):  # the first round is not counted
        shard = shards[number % len(shards)]
        loaded = ordered_batches(open_shards(shard), encoder.view, batch_size=64)
        batches = [batch.views[0] for batch in loaded]

        def forward(batches: list[Tensor] = batches) -> float:
            start = time.perf_counter()
            for images in batches:
                encoder.encode(images)
            return time.perf_counter() - start

        def embed(shard: Path = shard) -> float:
            began: list[float] = []
            write.embed(
                shard, model, folder / "speed.parquet", batch_size=64, workers=args.workers, device=args.device,
                overwrite=True, progress=lambda done, total: began.append(time.perf_counter()),
            )  # fmt: skip
            # The first batch, which includes the start of the workers, is replaced by a mean one.
            return (time.perf_counter() - began[0]) * len(began) / (len(began) - 1)

        seconds, used = {}, {}
        for function in (forward, embed) if number % 2 == 0 else (embed, forward):
            before = processor_seconds()
            seconds[function.__name__] = function()
            used[function.__name__] = processor_seconds() - before
        if number >= 0:
            rounds.append((seconds["forward"], seconds["embed"], used["forward"], used["embed"]))
            print(" ".join(f"{each:.2f}" for each in rounds[-1]), flush=True)
    alone, embedded, alone_used, embedded_used = ([round(each, 2) for each in column] for column in zip(*rounds))
    return {
        "images_in_a_round": args.images,
        "forward_seconds": alone,
        "embed_seconds": embedded,
        "median_ratio": round(statistics.median(b / a for a, b in zip(alone, embedded)), 3),
        "workers": args.workers,
        "ratio_of_sums": round(sum(embedded) / sum(alone), 3),
        "forward_processor_seconds": alone_used,
        "embed_processor_seconds": embedded_used,
        "processor_ratio": round(sum(embedded_used) / sum(alone_used), 3),
        "load_average": [round(each, 1) for each in os.getloadavg()],
    }


def split(shard: Path, count: int, folder: Path) -> list[Path]:
    """Shards of `count` images each, from one shard."""
    images, shards = open_shards(shard), []
    for first in range(0, len(images) - count + 1, count):
        shards.append(folder / f"{first}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for i in range(first, first + count):
                info = tarfile.TarInfo(f"{images.key(i)}.jpg")
                info.size = len(data := images.read(i))
                tar.addfile(info, io.BytesIO(data))
        open_shards(shards[-1])  # to index it
    return shards


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def memory(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Peak memory in GB of `selfvil embed` with all images, and its seconds."""
    shards = [str(path) for path in sorted(args.data.glob("cifar10-t*.tar"))]
    environ = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    words = [*shards, "--model", str(model), "--out", str(folder / "all.parquet"), "--workers", str(args.workers)]
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "selfvil", "embed", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        size = 0
        for each in _family(tree):
            try:
                size += each.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        peak = max(peak, size)
        time.sleep(2)  # reading the pages of a process is slow
    printed = process.stdout.read().split(" in ")[0] if process.stdout else ""
    if process.returncode:
        sys.exit(f"selfvil embed ended with {process.returncode}")
    return {
        "printed": printed.split(" of /")[0],
        "seconds": round(time.perf_counter() - start, 1),
        "own_peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 3),
        "peak_with_workers_gb": round(peak / 1e9, 3),
    }


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
