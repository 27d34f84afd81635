"""Memory and time that a data worker needs for the largest accepted images: decoding, and a view of 224 x 224.

    python benchmarks/decoding.py

Prints JSON. Each image of `MAX_PIXELS` pixels is decoded in its own process, whose peak memory is compared with its
memory before.
"""

import argparse
import io
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from about import about
from PIL import Image

from selfvil.data.read import MAX_PIXELS, decode_image
from selfvil.data.views import CenterCrop

SIDE = int(MAX_PIXELS**0.5)


def encoded(mode: str, kind: str, size: tuple[int, int], **settings: object) -> Callable[[], bytes]:
    def encode() -> bytes:
        file = io.BytesIO()
        image = Image.fromarray(np.zeros(size[::-1], np.uint16)) if mode == "I;16" else Image.new(mode, size)
        image.save(file, kind, **settings)
        return file.getvalue()

    return encode


CASES = {
    "JPEG, RGB": (3, encoded("RGB", "JPEG", (SIDE, SIDE))),
    "JPEG, progressive RGB": (3, encoded("RGB", "JPEG", (SIDE, SIDE), progressive=True)),
    "JPEG, grey to 1 channel": (1, encoded("L", "JPEG", (SIDE, SIDE))),
    "PNG, RGB": (3, encoded("RGB", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, RGBA to 4 channels": (4, encoded("RGBA", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, palette": (3, encoded("P", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, 16-bit grey": (3, encoded("I;16", "PNG", (SIDE, SIDE), compress_level=1)),
    "PNG, RGB, a strip of 1 x 65,000": (3, encoded("RGB", "PNG", (1, 65_000), compress_level=1)),
}


def memory(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM its peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str) -> dict[str, float]:
    channels, encode = CASES[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # encoding must not count
        return pool.apply(_measure, (encode(), channels))


def _measure(data: bytes, channels: int) -> dict[str, float]:
    view = CenterCrop(224, (0.5,) * channels, (0.5,) * channels)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory("VmRSS"), time.perf_counter()
    view(decode_image(data, channels))
    return {"gigabytes": round((memory("VmHWM") - before) / 1e9, 2), "seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time that a data worker needs for the largest images.")
    args = parser.parse_args()
    args.device, args.threads = "cpu", 1
    print(json.dumps(about(args) | {"pixels": MAX_PIXELS, "images": {name: measure(name) for name in CASES}}, indent=2))


if __name__ == "__main__":
    main()
