"""Small shards of images with masks, in which the colour of a pixel decides its class."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 210]])
SIZES = [(32, 48), (40, 24), (24, 24), (36, 52)]
"""Height and width in pixels; the cells of four pixels have one class each."""


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def masked_image(seed: int, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 (H, W, 3) with noise, and its mask uint8 (H, W) of the ids 0, 1, 2; a border of the id 255."""
    generator = np.random.default_rng(seed)
    height, width = size or SIZES[seed % len(SIZES)]
    cells = generator.integers(0, 3, (height // 4, width // 4), dtype=np.uint8)
    mask = cells.repeat(4, axis=0).repeat(4, axis=1)
    image = (COLOURS[mask] + generator.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)
    mask[:4] = 255
    return image, mask


def write_masked(folder: Path, count: int, first: int = 0, mask: str = "mask.png", **changed: dict[str, bytes]) -> str:
    """A shard of `count` images. changed: members by key (k0, k1 ...) that replace those of the image; b"" removes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{first:06d}.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            image, ids = masked_image(i)
            members = {"png" if mask == "mask.png" else "bmp": png(image), mask: png(ids)}
            if mask != "mask.png":
                file = io.BytesIO()
                Image.fromarray(image).save(file, "BMP")
                members["bmp"] = file.getvalue()
            for name, data in (members | changed.get(f"k{i}", {})).items():
                if data:
                    info = tarfile.TarInfo(f"k{i}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(path)
