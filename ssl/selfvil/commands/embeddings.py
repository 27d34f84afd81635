"""Commands for embeddings: `selfvil embed`, `neighbours`, `duplicates`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from selfvil.commands import shard_cache
from selfvil.errors import UserError
from selfvil.terminal import progress_bar


def embed(
    images: Annotated[list[str], typer.Argument(help="A folder of images, at any depth, shards, or a table.")],
    model: Annotated[str, typer.Option(help="An export, run or checkpoint.")],
    out: Annotated[Path, typer.Option(help="FILE.parquet (needs pyarrow) or FILE.npy.")],
    patches: Annotated[bool, typer.Option("--patches", help="Also the features of each patch.")] = False,
    readout: Annotated[str | None, typer.Option(help="How tokens become one vector: mean, cls ...")] = None,
    network: Annotated[str | None, typer.Option(help="Which network of a run that has several.")] = None,
    image: Annotated[str | None, typer.Option(help="Extension of the image if a name has several.")] = None,
    img_size: Annotated[str | None, typer.Option(help="Pixels, or HEIGHTxWIDTH; default: as in pretraining.")] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the values in the file.")] = "float32",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the backbone.")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in a forward pass.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    cache: shard_cache.Folder = None,
    cache_gb: shard_cache.Gigabytes = None,
) -> None:
    """Embed images: keys and features, one row for each image, in a Parquet or NumPy file.

    A killed command continues where it was if it is run again. On several devices: torchrun --nproc_per_node N
    eval/embed.py IMAGES --model SOURCE --out FILE.
    """
    from selfvil.embedding.write import embed
    from selfvil.evaluate.processes import launched

    with launched() as processes, progress_bar("embedding") as progress:
        embed(
            images[0] if len(images) == 1 else images, model, out, patches=patches, readout=readout, network=network,
            image=image, img_size=_img_size(img_size), dtype=dtype, precision=precision, batch_size=batch_size,
            workers=workers, overwrite=overwrite, progress=progress if processes.is_main else None,
            processes=processes,
        )  # fmt: skip
    if processes.is_main:
        from selfvil.embedding.reader import open_embeddings

        file = open_embeddings(out)
        print(f"{len(file):,} embeddings of {file.dim} values ({file.metadata['readout']} of {model}) in {out}")


def _img_size(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isascii() and side.strip().isdigit() for side in sides):
        raise UserError(
            f"--img-size {text[:50]} is not possible; expected a number of pixels, or HEIGHTxWIDTH as 224x320"
        )
    return [int(side) for side in sides] if len(sides) == 2 else int(sides[0])


def neighbours(
    file: Annotated[Path, typer.Argument(help="File of `selfvil embed`.")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Keys in the file, or paths of images.")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours of each query.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Draw queries and neighbours to this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the neighbours to this file.")] = None,
    images: Annotated[str | None, typer.Option(help="Where the images are now, if they were moved.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it was moved.")] = None,
) -> None:
    """Find the most similar images, by cosine similarity, among all in a file of embeddings."""
    from selfvil import terminal
    from selfvil.embedding import search, tables
    from selfvil.embedding.reader import open_embeddings
    from selfvil.embedding.sheet import Pictures, neighbours_sheet

    tables.require_outputs(file, out, json_file)
    opened = open_embeddings(file)
    asked = search.find_queries(opened, queries, model)
    pictures = None if out is None else Pictures(opened, images)
    with progress_bar("searching") as progress:
        found = search.neighbours(opened, asked, k, progress)
    terminal.console().print(tables.neighbours_table(asked, found))
    if json_file is not None:
        tables.write_json(json_file, tables.neighbours_json(opened, asked, found))
    if out is not None and pictures is not None:
        print(f"picture: {neighbours_sheet(out, opened, pictures, asked, found)}")


def duplicates(
    file: Annotated[Path, typer.Argument(help="File of `selfvil embed`.")],
    threshold: Annotated[float, typer.Option(help="Least cosine similarity of near-duplicates.")] = 0.98,
    out: Annotated[Path | None, typer.Option(help="Draw the largest groups to this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all groups to this file.")] = None,
    images: Annotated[str | None, typer.Option(help="Where the images are now, if they were moved.")] = None,
) -> None:
    """Find groups of near-duplicate images in a file of embeddings.

    How similar two nearly equal images are depends on the model, so the similarities of all nearest neighbours are
    printed: near-duplicates lie above most of them. Look at the groups of several thresholds before you remove images.
    """
    from selfvil import terminal
    from selfvil.embedding import search, tables
    from selfvil.embedding.reader import open_embeddings
    from selfvil.embedding.sheet import Pictures, duplicates_sheet

    tables.require_outputs(file, out, json_file)
    opened = open_embeddings(file)
    pictures = None if out is None else Pictures(opened, images)
    with progress_bar("comparing") as progress:
        found = search.duplicates(opened, threshold, progress=progress)
    terminal.console().print(tables.similarities_table(found))
    print(tables.duplicates_sentence(found))
    if json_file is not None:
        tables.write_json(json_file, tables.duplicates_json(opened, found))
    if out is not None and pictures is not None:
        print(f"picture: {duplicates_sheet(out, opened, pictures, found)}")
