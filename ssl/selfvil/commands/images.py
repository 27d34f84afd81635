"""Commands for images: `selfvil pack`, `index`."""

from pathlib import Path
from typing import Annotated

import typer

from selfvil.errors import shorten
from selfvil.terminal import progress_bar

Images = Annotated[
    str,
    typer.Argument(help="Shards (a path, a glob, a folder, or a pattern with {000000..000009}), a folder, or a table."),
]


def pack(
    source: Annotated[str, typer.Argument(help="Folder of images (class subfolders become labels), or shards.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards.")],
    name: Annotated[str, typer.Option(help="Shards are called NAME-000000.tar.")] = "shard",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 5000,
    size: Annotated[int | None, typer.Option(min=1, help="Shrink the shorter side to this many pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    classes: Annotated[Path | None, typer.Option(help="classes.txt of earlier shards, to use the same labels.")] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Do not use class subfolders as labels.")] = False,
    image: Annotated[str | None, typer.Option(help="Extension of the image if a name has several, as jpg.")] = None,
    mask: Annotated[str | None, typer.Option(help="Extension of its mask, stored as KEY.mask.png.")] = None,
    max_value: Annotated[
        int | None, typer.Option(help="White in 16-bit grey images: 4095 if 12 bits are used.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Leave out images that decode with warnings.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
) -> None:
    """Pack images into WebDataset shards, and index them."""
    from selfvil.data.classes import read_classes
    from selfvil.data.pack import pack

    names = None if classes is None else read_classes(classes)
    with progress_bar("packing") as progress:
        report = pack(
            source, out, name=name, samples_per_shard=samples_per_shard, size=size, classes=names, labels=not no_labels,
            image=image, mask=mask, max_value=max_value, strict=strict, seed=seed, workers=workers, progress=progress,
        )  # fmt: skip
    print(report)
    for what, found in (("skipped", report.skipped), ("warning:", report.warnings)):
        for file, reason in found[:5]:
            print(shorten(f"  {what} {file}: {reason}", 300))


def index(
    images: Images,
    image: Annotated[str | None, typer.Option(help="Extension of the image to use if samples have several.")] = None,
) -> None:
    """Index images, so that they can be read by position; pretrain and eval do this if needed."""
    from selfvil.data.images import open_images
    from selfvil.data.index import report_index

    with progress_bar("indexing") as progress:
        report = report_index(open_images(images, progress, image))
    print(report)
