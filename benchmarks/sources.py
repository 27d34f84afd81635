"""Sources of images: our bookkeeping, the start of large ones, and a folder in place beside shards.

    python benchmarks/sources.py bookkeeping --data ../shared/data/photos --json benchmarks/results/sources_cpu.json
    python benchmarks/sources.py resume --json benchmarks/results/sources_cpu.json
    python benchmarks/sources.py folder --data ../shared/data/photos --json benchmarks/results/sources_cpu.json
    python benchmarks/sources.py start --files 200000 --json benchmarks/results/sources_cpu.json

bookkeeping: processor time of the loader with read, decode and view replaced by constants (what remains is the order,
the index with its CRC-32, labels, seeds and ledger; the constant view is small, since any loader collates), over that
of the whole loader with the MAE view at 224 pixels.

resume: 10,000 small files stand for shards of 10,000 samples each, with a joined index of 100 million samples. A new
process opens them, compares the fingerprint, and asks for the samples at position 50 million. Memory is the growth of
the resident set, mapped pages included.

folder: processor time of an epoch with the MAE view over shards, and over the same files in a folder, in alternation.

start: seconds of the first and second opening of a folder of small files in 200 subfolders, each in a new process.

Processor times of one process: the machine is shared, and other programs change them less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from about import about
from PIL import Image

from selfvil.data import columns, index, patterns
from selfvil.data.base import Images
from selfvil.data.images import open_images
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.data.sidecar import Stamp
from selfvil.data.views import RandomCropFlip

_SAMPLES, _SHARDS, _POSITION = 100_000_000, 10_000, 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*MEASUREMENTS, "open"])
    parser.add_argument("--data", type=Path, help="folder of shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "open":
        print(json.dumps(opened(args.data)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        figures = about(args) | MEASUREMENTS[args.what](args, Path(folder))
    print(json.dumps(figures, indent=1))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.what: figures}, indent=1) + "\n")


def view() -> RandomCropFlip:
    return RandomCropFlip((224, 224), (0.2, 1.0), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def epoch(images: Images, views: list[Any], batch_size: int = 64) -> float:
    """Processor seconds for an image, over one epoch of whole batches, in this process."""
    steps = len(images) // batch_size
    batches = train_batches(images, views, seed=0, batch_size=batch_size, stop_step=steps)
    began = time.process_time()
    for _ in batches:
        pass
    return (time.process_time() - began) / (steps * batch_size)


def bookkeeping(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shards = open_shards(args.data)
    tensor, image, data = torch.zeros(3, 8, 8), Image.new("RGB", (8, 8)), shards.read(0)
    own, whole = [], []
    for _ in range(args.rounds):
        whole.append(epoch(shards, [view()]))
        # The CRC-32 of the constant differs from the expected ones, so that comparison is made to pass.
        crcs, sizes = shards.crcs, shards.sizes
        shards.crcs, shards.sizes = np.full_like(crcs, crcs[0]), np.full_like(sizes, sizes[0])
        with mock.patch("selfvil.data.loader.decode_image", return_value=image), \
                mock.patch("os.pread", return_value=data):  # fmt: skip
            own.append(epoch(shards, [lambda image: tensor]))
        shards.crcs, shards.sizes = crcs, sizes
    return {
        "images": len(shards), "bytes_of_the_constant": len(data), "mean_bytes": round(float(shards.sizes.mean())),
        "whole_ms": [round(1e3 * each, 3) for each in whole], "bookkeeping_ms": [round(1e3 * each, 4) for each in own],
        "median_share": round(statistics.median(a / b for a, b in zip(own, whole)), 5),
    }  # fmt: skip


def resume(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shards, each = folder / "shards", _SAMPLES // _SHARDS
    shards.mkdir()
    for number in range(_SHARDS):
        (shards / f"{number:05}.tar").write_bytes(b"stands for a shard")
    paths = patterns.expand_shards(shards)
    generator = np.random.default_rng(0)
    joined = {name: generator.integers(0, 1 << 31, _SAMPLES, dtype=np.uint32) for name in ("blocks", "sizes", "crcs")}
    joined["labels"] = (joined["crcs"] % 1000).astype(np.int32)
    facts = {
        "stamps": index._stamps(map(Stamp.of, paths)), "ends": [each * (number + 1) for number in range(_SHARDS)],
        "several": [], "ignored": 0, "highest": 999, "fingerprint": "0" * 16, "digests": [f"{each}:00000000"] * _SHARDS,
    }  # fmt: skip
    file = columns.cache_file("shards", None, *map(os.path.abspath, paths))
    assert file is not None
    columns.save(file, facts, joined)
    del joined
    rounds = [in_new_process(shards) for _ in range(args.rounds)]
    return {
        "samples": _SAMPLES, "shards": _SHARDS, "index_bytes": file.stat().st_size,
        "seconds": [round(each["seconds"], 3) for each in rounds],
        "median_seconds": round(statistics.median(each["seconds"] for each in rounds), 3),
        "processor_seconds": [round(each["processor_seconds"], 3) for each in rounds],
        "median_processor_seconds": round(statistics.median(each["processor_seconds"] for each in rounds), 3),
        "grown_mb": max(each["grown_mb"] for each in rounds), "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def start(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    images, small = folder / "images", Image.new("RGB", (4, 4))
    small.save(folder / "small.png")
    data = (folder / "small.png").read_bytes()
    for number in range(args.files):
        if number % (args.files // 200) == 0:
            within = images / f"{number:07}"
            within.mkdir(parents=True)
        (within / f"{number:07}.png").write_bytes(data)
    first, *others = (in_new_process(images) for _ in range(1 + args.rounds))
    second = statistics.median(each["seconds"] for each in others)
    return {
        "files": args.files, "first_seconds": round(first["seconds"], 2),
        "second_seconds": [round(each["seconds"], 2) for each in others], "median_second_seconds": round(second, 2),
        "second_processor_seconds": [round(each["processor_seconds"], 2) for each in others],
        "load_average": round(os.getloadavg()[0], 1), "files_a_second": round(args.files / second),
        "million_files_seconds": round(1e6 / args.files * second, 1),
        "grown_mb": max(each["grown_mb"] for each in others),
    }  # fmt: skip


def in_new_process(source: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "open", "--data", str(source)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def opened(source: Path) -> dict[str, Any]:
    """Seconds and memory of opening images and finding those of a step in the middle of a run."""
    process = psutil.Process()
    before, began, used = process.memory_info().rss, time.perf_counter(), time.process_time()
    images = open_images(source)
    known = images.fingerprint
    ids = images.order(seed=0).ids(np.arange(_POSITION, _POSITION + 4096))
    labels = None if images.labels is None else images.labels[ids]
    found = images.sizes[ids], images.crcs[ids], labels, images.shard_of(int(ids[0]))
    seconds, used = time.perf_counter() - began, time.process_time() - used
    grown = (process.memory_info().rss - before) / 2**20
    facts = {"fingerprint": known, "shard": str(found[-1])}
    return {"seconds": seconds, "processor_seconds": used, "grown_mb": round(grown)} | facts


def folder_in_place(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shards = open_shards(args.data)
    for i in range(len(shards)):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{i:06}.jpg").write_bytes(shards.read(i))
    images = open_images(folder / "images")
    assert images.fingerprint == shards.fingerprint or images.labels is None
    rounds = []
    for number in range(-1, args.rounds):  # the first round is not counted
        pair = {}
        for name in ("shards", "folder") if number % 2 else ("folder", "shards"):
            pair[name] = epoch(shards if name == "shards" else images, [view()])
        if number >= 0:
            rounds.append((pair["shards"], pair["folder"]))
    return {
        "images": len(shards),
        "shards_ms": [round(1e3 * each, 3) for each, _ in rounds],
        "folder_ms": [round(1e3 * each, 3) for _, each in rounds],
        "median_speed_ratio": round(statistics.median(a / b for a, b in rounds), 4),
    }


MEASUREMENTS = {"bookkeeping": bookkeeping, "resume": resume, "folder": folder_in_place, "start": start}

if __name__ == "__main__":
    main()
