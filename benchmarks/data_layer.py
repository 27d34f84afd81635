"""The data layer against other pipelines, on the same images: whole epochs, decoders, and `selfvil inspect`.

    python benchmarks/data_layer.py --photos ../shared/data/photos --cifar ../shared/data/cifar10 \
        --json benchmarks/results/data_cpu.json

Each round times every pipeline once, one after the other. Since other programs may use the machine, the figures are
processor times of the process and its workers; wall times are recorded too. Ratios are medians over the rounds of
(other's time / ours), with quartiles.
"""

import argparse
import io
import json
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
import webdataset
from about import about
from lightly.transforms import DINOTransform
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from selfvil.data.base import Images
from selfvil.data.index import open_shards
from selfvil.data.inspect import inspect
from selfvil.data.loader import train_batches
from selfvil.data.views import DINOCrop, RandomCropFlip
from selfvil.recipe import IMAGENET_MEAN as MEAN
from selfvil.recipe import IMAGENET_STD as STD

BATCH = 50


def processor_seconds() -> float:
    """Processor time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def interleaved(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, Any]:
    """Processor and wall seconds of each way in each round. A way returns the number of images it made."""
    processor: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = processor_seconds(), time.perf_counter()
            counts[name] = way()
            processor[name].append(processor_seconds() - begin[0])
            wall[name].append(time.perf_counter() - begin[1])
    first = next(iter(ways))
    return {
        name: {
            "images": counts[name],
            "processor_s": spread(processor[name]),
            "wall_s": spread(wall[name]),
            "time_over_ours": spread([a / b for a, b in zip(processor[name], processor[first])]),
        }
        for name in ways
    }


def spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


# --- pipelines ----------------------------------------------------------------------------------------------------


def ours(shards: Any, views: list[RandomCropFlip], workers: int) -> int:
    batches = train_batches(
        shards, views, seed=0, batch_size=BATCH, stop_step=len(shards) // BATCH, workers=workers, decode="scaled"
    )
    return sum(len(batch.views[0]) for batch in batches)


class OneThread:
    """Transforms a decoded image in a worker with one thread, as ours."""

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image)


def plain(shards: list[str], transform: Callable[[Image.Image], Any], workers: int) -> int:
    """A plain WebDataset pipeline: decode by Pillow, transform, collate in the worker."""
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        .shuffle(200)
        .decode("pilrgb")
        .to_tuple("jpg")
        .map_tuple(OneThread(transform))
        .batched(BATCH, collation_fn=torch.utils.data.default_collate)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    return sum(len(first(batch)) for batch in loader)


def first(batch: Any) -> torch.Tensor:
    while not isinstance(batch, torch.Tensor):
        batch = batch[0]
    return batch


def mae_of_torchvision() -> Callable[[Image.Image], torch.Tensor]:
    return v2.Compose(
        [
            v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]
    )  # fmt: skip


def dino_views() -> list[RandomCropFlip]:
    large = {"size": 224, "scale": (0.25, 1.0), "mean": MEAN, "std": STD}
    small = DINOCrop(96, (0.05, 0.25), MEAN, STD, blur=0.5)
    return [DINOCrop(**large, blur=1.0), DINOCrop(**large, blur=0.1, solarise=0.2), *([small] * 8)]


def dino_of_lightly() -> Callable[[Image.Image], list[torch.Tensor]]:
    return DINOTransform(global_crop_scale=(0.25, 1.0), local_crop_scale=(0.05, 0.25), n_local_views=8)


# --- decoders -----------------------------------------------------------------------------------------------------


def by_simplejpeg(data: bytes) -> Any:
    return Image.fromarray(simplejpeg.decode_jpeg(data))


def by_pillow(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")


def by_torchvision(data: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


DECODERS = {"simplejpeg": by_simplejpeg, "Pillow": by_pillow, "torchvision": by_torchvision}


class Decoded(torch.utils.data.Dataset):
    """The sum of each image's pixels' first row: decoding, without the transfer of pixels between processes."""

    def __init__(self, files: list[bytes], decode: Callable[[bytes], Any]) -> None:
        self.files, self.decode = files, decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> int:
        image = self.decode(self.files[i])
        return image.size[0] if isinstance(image, Image.Image) else image.shape[-1]


def decode_all(files: list[bytes], decode: Callable[[bytes], Any], workers: int) -> int:
    loader = torch.utils.data.DataLoader(Decoded(files, decode), batch_size=BATCH, num_workers=workers)
    return sum(len(batch) for batch in loader)


def enlarged(files: list[bytes], side: int) -> Iterator[bytes]:
    """Photographs enlarged to a shorter side, with noise, so that the codes are about as many as those of a camera."""
    for number, data in enumerate(files):
        image = by_pillow(data)
        factor = side / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(number).normal(0, 3, (image.height, image.width, 1))
        file = io.BytesIO()
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield file.getvalue()


class Listed(Images):
    """A source of images in memory."""

    def __init__(self, files: list[bytes]) -> None:
        none = np.zeros(len(files), np.uint32)
        super().__init__([Path("memory")], [len(files)], none, none, np.full(len(files), -1, np.int32))
        self.files = files

    def read(self, i: int) -> bytes:
        return self.files[i]

    def key(self, i: int) -> str:
        return str(i)


def reduced_decoding(files: list[bytes], side: int, rounds: int) -> dict[str, Any]:
    """An MAE view at 224 pixels of large images, with and without reduced decoding, and the largest differences."""
    source = Listed(list(enlarged(files, side)))
    view, made = RandomCropFlip(224, (0.2, 1.0), MEAN, STD), {}

    def make(decode: str) -> int:
        batch = next(train_batches(source, [view], seed=0, batch_size=len(source), stop_step=1, decode=decode))  # type: ignore[arg-type]
        made[decode] = batch.views[0].numpy() / view.normalise.factor
        return len(batch.views[0])

    rows = interleaved({"scaled": lambda: make("scaled"), "exact": lambda: make("exact")}, rounds)
    difference = np.abs(made["scaled"] - made["exact"])
    return rows | {
        "mean_difference": round(float(difference.mean()), 3),
        "largest_mean_of_an_image": round(float(difference.mean((1, 2, 3)).max()), 3),
        "largest_difference": round(float(difference.max()), 1),
    }


def save(figures: dict[str, Any], file: Path | None) -> None:
    """Print the last figures, and write all of them: a run that is stopped early keeps what it has measured."""
    name, row = list(figures.items())[-1]
    print(name, json.dumps(row), flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="shards of photographs")
    parser.add_argument("--cifar", type=Path, required=True, help="folder of shards of CIFAR-10, train and test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    args.device, args.threads = "cpu", 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)
    photos, cifar = open_shards(args.photos), open_shards(args.cifar)
    paths = [str(path) for path in photos.paths]
    mae, dino = [RandomCropFlip(224, (0.2, 1.0), MEAN, STD)], dino_views()
    with_tv, with_lightly = mae_of_torchvision(), dino_of_lightly()
    figures: dict[str, Any] = {"about": about(
        args, pillow=PIL.__version__, torchvision=torchvision.__version__, simplejpeg=simplejpeg.__version__,
        webdataset=webdataset.__version__, numpy=np.__version__,
    )}  # fmt: skip
    ours(photos, mae, 1)  # builds the kernels, and reads the shards once
    figures["mae_224"] = interleaved(
        {"ours": lambda: ours(photos, mae, 1), "webdataset": lambda: plain(paths, with_tv, 1)}, args.rounds
    )
    save(figures, args.json)
    figures["dino_2_8"] = interleaved(
        {"ours": lambda: ours(photos, dino, 1), "lightly": lambda: plain(paths, with_lightly, 1)}, args.rounds
    )
    save(figures, args.json)
    files = {
        "photos": [photos.read(i) for i in range(min(300, len(photos)))],
        "cifar10": [cifar.read(i) for i in range(3000)],
    }
    for name, images in files.items():
        for workers in (0, 1, 2):
            ways = {key: (lambda d=d, w=workers, f=images: decode_all(f, d, w)) for key, d in DECODERS.items()}
            figures[f"decoders, {name}, {workers} workers"] = interleaved(ways, args.rounds)
            save(figures, args.json)
    for side in (1024, 2048):
        figures[f"reduced decoding, {side}"] = reduced_decoding(files["photos"][:8], side, args.rounds)
        save(figures, args.json)
    begin, wall = processor_seconds(), time.perf_counter()
    report = inspect(args.cifar, workers=2).report
    taken = processor_seconds() - begin
    figures["inspect_cifar10"] = {
        "images": report.images, "near_groups": len(report.near), "processor_s": round(taken, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
    }  # fmt: skip
    save(figures, args.json)


if __name__ == "__main__":
    main()
