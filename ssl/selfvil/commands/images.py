"""Commands for images: `selfvil pack`, `index`, `inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from selfvil.commands import shard_cache
from selfvil.errors import shorten
from selfvil.files import require_writable, write_text
from selfvil.terminal import progress_bar

Images = Annotated[
    str,
    typer.Argument(help="Shards (a path, a glob, a folder, or a pattern with {000000..000009}), a folder, or a table."),
]


def pack(
    source: Annotated[str, typer.Argument(help="Folder of images (class subfolders are labels), shards, or a table.")],
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
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of images in a shard, at most.")] = 1 << 30,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back afterwards.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    cache: shard_cache.Folder = None,
    cache_gb: shard_cache.Gigabytes = None,
) -> None:
    """Pack images into WebDataset shards, and index them.

    After an interruption, the same command continues. Exit status 1: --verify found a problem.
    """
    from selfvil.data.classes import read_classes
    from selfvil.data.pack import pack
    from selfvil.data.verify import verify_pack

    names = None if classes is None else read_classes(classes)
    with progress_bar("packing") as progress:
        report = pack(
            source, out, name=name, samples_per_shard=samples_per_shard, shard_bytes=shard_bytes, size=size,
            classes=names, labels=not no_labels,
            image=image, mask=mask, max_value=max_value, strict=strict, seed=seed, workers=workers, progress=progress,
        )  # fmt: skip
    print(report)
    for what, found in (("skipped", report.skipped), ("warning:", report.warnings)):
        for file, reason in found[:5]:
            print(shorten(f"  {what} {file}: {reason}", 300))
    if verify:
        with progress_bar("verifying") as progress:
            verification = verify_pack(out, workers, progress)
        print(verification)
        for key, problem in verification.problems[:5]:
            print(shorten(f"  {key}: {problem}", 300))
        if verification.problems:
            raise typer.Exit(1)


def index(
    images: Images,
    image: Annotated[str | None, typer.Option(help="Extension of the image to use if samples have several.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Measure the channels, for data.stats=auto.")] = False,
    channels: Annotated[
        int | None, typer.Option(min=1, max=32, help="With --stats: default, the first image's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of --stats; default: one per core.")] = None,
    cache: shard_cache.Folder = None,
    cache_gb: shard_cache.Gigabytes = None,
) -> None:
    """Index images, so that they can be read by position; pretrain and eval do this if needed."""
    from selfvil.data.images import open_images
    from selfvil.data.index import report_index

    with progress_bar("indexing") as progress:
        opened = open_images(images, progress, image)
    print(report_index(opened))
    if not stats:
        return
    from selfvil.data.stats import measure, save
    from selfvil.machine import usable_cores

    with progress_bar("measuring") as progress:
        found = measure(opened, channels, workers or usable_cores(), progress)
    print(found)
    print(f"saved in {save(opened, found)}")


def inspect(
    source: Images,
    against: Annotated[str | None, typer.Option(help="Another source, to find shared images: test images.")] = None,
    image: Annotated[str | None, typer.Option(help="Extension of the image if samples have several.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for all findings, as JSON.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG of random, damaged, equal and similar images.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
    cache: shard_cache.Folder = None,
    cache_gb: shard_cache.Gigabytes = None,
) -> None:
    """Examine every image: sizes, formats, classes, damage, equal and similar images.

    Exit status 1: images are damaged, or files occur more than once, in the source or in --against.
    """
    from json import dumps

    from selfvil.data.inspect import inspect
    from selfvil.data.sheet import inspection_sheet

    for file in (json, sheet):
        if file is not None:
            require_writable(file)
    with progress_bar("inspecting") as progress:
        found = inspect(source, against=against, image=image, workers=workers, progress=progress)
    print(found.report)
    if json is not None:
        write_text(json, dumps(found.report.to_json(), indent=2, ensure_ascii=False) + "\n")
    if sheet is not None:
        print(f"pictures: {inspection_sheet(sheet, found)}")
    if found.report.problems:
        raise typer.Exit(1)
