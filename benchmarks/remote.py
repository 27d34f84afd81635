"""Shards behind HTTP against the same shards on the local disk: images per second of the data loader.

    python benchmarks/remote.py ../shared/data/photos/*.tar --json benchmarks/results/remote_cpu.json

A server in a process of its own sends shards with ranges and waits 20 ms before each response. Each round reads the
same positions of the same order twice, with one worker and the MAE view, from the disk and from the server with an
empty cache, in alternating order. What is timed begins after the first window of shards, which no thread can download
ahead. The server needs part of the same cores. CPU seconds are those of the loader, for all images:
where others use the machine, they vary less than images per second.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from about import about

from selfvil.data.index import Shards, open_shards
from selfvil.data.loader import train_batches
from selfvil.data.order import WindowOrder
from selfvil.data.pack import pack
from selfvil.data.remote.cache import Cache
from selfvil.data.views import RandomCropFlip
from selfvil.recipe import IMAGENET_MEAN, IMAGENET_STD

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="images, as WebDataset shards")
    parser.add_argument("--size", type=int, default=224, help="of the view, in pixels")
    parser.add_argument("--per-shard", type=int, default=16, help="images in a shard of the benchmark")
    parser.add_argument("--window", type=int, default=4, help="shards")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="photos", help="of the figures in the file of results")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        pack(args.shards, Path(folder, "shards"), samples_per_shard=args.per_shard, workers=2)
        port = multiprocessing.Value("i", 0)
        server = multiprocessing.get_context("fork").Process(
            target=serve, args=(Path(folder, "shards"), args.latency, port), daemon=True
        )
        server.start()
        while not port.value:
            time.sleep(0.01)
        figures = measure(args, Path(folder), f"http://127.0.0.1:{port.value}")
        server.terminate()
    figures = about(args) | vars(args) | figures
    for name in ("json", "shards", "device"):
        figures.pop(name)
    print(json.dumps(figures, indent=1))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.name: figures}, indent=1) + "\n")


def measure(args: argparse.Namespace, folder: Path, url: str) -> dict:
    """Images per second of each round, and the median of the ratios."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "user")
    local = open_shards(folder / "shards")
    names = [path.name for path in local.paths]
    rows = []
    for number in range(args.rounds):
        row = {}
        for kind in ("local", "remote") if number % 2 else ("remote", "local"):
            cache = Cache(folder / f"cache-{number}")
            shards = local if kind == "local" else open_shards([f"{url}/{name}" for name in names], cache=cache)
            row |= {f"{kind}_{key}": value for key, value in run(args, shards).items()}
        row["ratio"] = round(row["remote_rate"] / row["local_rate"], 3)
        row["cpu_ratio"] = round(row["local_cpu_seconds"] / row["remote_cpu_seconds"], 3)
        print(row, flush=True)
        rows.append(row)
    return {
        "images": len(local), "shards_of_benchmark": len(names),
        "shard_megabytes": round(sum(map(local.files.size, range(len(names)))) / len(names) / 1e6, 3),
        "load_average": os.getloadavg()[0],
        "median_ratio": statistics.median(row["ratio"] for row in rows),
        "median_cpu_ratio": statistics.median(row["cpu_ratio"] for row in rows),
        "median_local": statistics.median(row["local_rate"] for row in rows),
        "median_remote": statistics.median(row["remote_rate"] for row in rows),
        "rounds_measured": rows,
    }  # fmt: skip


def run(args: argparse.Namespace, shards: Shards) -> dict[str, float]:
    """Images per second after the first window; seconds of the first window; CPU seconds of this process and its
    workers, for all images."""
    order = shards.order(0, window=args.window)
    assert isinstance(order, WindowOrder)
    now, _ = order.shards(0)
    first = -(-sum(shards.ends[n] - (shards.ends[n - 1] if n else 0) for n in now) // BATCH)
    steps = args.epochs * len(shards) // BATCH
    view = RandomCropFlip(args.size, (0.2, 1.0), IMAGENET_MEAN, IMAGENET_STD)
    used, began = cpu_seconds(), time.perf_counter()
    batches = train_batches(
        shards, [view], seed=0, batch_size=BATCH, stop_step=steps, workers=args.workers, window=args.window
    )
    for step, _ in enumerate(batches, 1):
        if step == first:
            started = time.perf_counter()
    ended = time.perf_counter()
    return {
        "rate": round((steps - first) * BATCH / (ended - started), 1),
        "first_window_seconds": round(started - began, 2),
        "cpu_seconds": round(cpu_seconds() - used, 2),
    }


def cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def serve(folder: Path, latency: float, port: "multiprocessing.sharedctypes.Synchronized") -> None:
    """Serve the files of `folder` with ranges, until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(latency)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}-{size}"')
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            with open(path, "rb") as file:
                while first <= last:
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a loader that ends closes its connections
    port.value = server.server_address[1]
    server.serve_forever()


if __name__ == "__main__":
    main()
