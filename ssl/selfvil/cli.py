"""The `selfvil` command. Each command is a few lines over the function that does the work, imported when it is run."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from selfvil.errors import UserError
from selfvil.version import __version__

app = typer.Typer(
    help="Self-supervised pretraining of Vision-LSTM backbones.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

Shards = Annotated[str, typer.Argument(help="Shards: a path, a glob, a folder, or a pattern with {000000..000009}.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 when done, 2 for a user's mistake (one message, no traceback), 130 on Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="selfvil: %(message)s", stream=sys.stderr)
    try:
        app(args=None if argv is None else list(argv), prog_name="selfvil")
    except UserError as error:
        print(f"selfvil: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder of images (class subfolders become labels), or shards.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards.")],
    name: Annotated[str, typer.Option(help="Shards are called NAME-000000.tar.")] = "shard",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 5000,
    size: Annotated[int | None, typer.Option(min=1, help="Shrink the shorter side to this many pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores unless told.")] = None,
) -> None:
    """Pack images into WebDataset shards, and index them."""
    from selfvil.data.pack import pack

    print(pack(source, out, name=name, samples_per_shard=samples_per_shard, size=size, seed=seed, workers=workers))


@app.command()
def index(shards: Shards) -> None:
    """Index shards, so that samples are read by position; pretrain and eval do this when it was not done."""
    from selfvil.data.index import index_shards

    print(index_shards(shards))


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
) -> None:
    """Pretrain by a recipe; on several devices, start it with accelerate launch or torchrun launch/pretrain.py."""
    import selfvil  # noqa: F401 - registers the vil_* models with timm
    from selfvil.pretrain import pretrain
    from selfvil.recipe import load

    pretrain(load(recipe, overrides or ()))


@app.command()
def recipes() -> None:
    """List the packaged recipes, each with the first line of its header."""
    from selfvil.recipe import packaged_recipes

    for name, path in packaged_recipes().items():
        print(f"{name:20} {path.read_text().splitlines()[0].lstrip('# ')}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for completion in editors."""
    from selfvil.recipe import schema

    print(json.dumps(schema(), indent=2))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    network: Annotated[str | None, typer.Option(help="Which network, where an objective has several.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also write the rest of the objective, to continue.")] = False,
) -> None:
    """Export the pretrained backbone: a folder that timm.create_model("local-dir:OUT", pretrained=True) loads."""
    import selfvil  # noqa: F401 - registers the vil_* models with timm
    from selfvil.export import export

    export(run, out, network=network, heads=heads)
    print(f"exported {run} to {out}: timm.create_model('local-dir:{out}', pretrained=True)")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    curve: Annotated[Path | None, typer.Option(help="Where to draw the loss curve; RUN/pictures/loss.png.")] = None,
) -> None:
    """Print how a run went, and draw its loss curve."""
    from selfvil.monitor.pictures import loss_curve
    from selfvil.monitor.summary import print_summary

    print_summary(run)
    print(f"loss curve: {loss_curve(run, curve or run / 'pictures' / 'loss.png')}")
