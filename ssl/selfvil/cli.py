"""The `selfvil` command: its entry point and the list of its commands (`selfvil.commands`)."""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from selfvil.commands import embeddings, evaluation, images, networks, runs
from selfvil.errors import UserError
from selfvil.version import __version__

app = typer.Typer(
    help="Self-supervised pretraining of Vision-LSTM backbones.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

COMMANDS = (
    images.pack,
    images.index,
    images.inspect,
    runs.plan,
    runs.pretrain,
    runs.doctor,
    runs.report,
    networks.export,
    networks.push,
    networks.verify,
    embeddings.embed,
    embeddings.neighbours,
    embeddings.duplicates,
    runs.recipes,
    runs.explain,
    runs.schema,
)

for command in COMMANDS:
    app.command()(command)
# key=value and the options of evaluations are parsed by `evaluate.arguments`.
app.command("eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})(evaluation.evaluate)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit.

    Exit status: 0: success. 1: `selfvil inspect` or `pack --verify` found a problem. 2: an error of the user, with a
    message. 3: a run stopped by its doctor. 4: a run without progress (run.stall_minutes). 75: a run stopped early with
    its state saved; the same command continues it. 130: interrupted by Ctrl-C, without saving.
    """
    logging.basicConfig(level=logging.WARNING, format="selfvil: %(message)s", stream=sys.stderr)
    try:
        app(args=None if argv is None else list(argv), prog_name="selfvil")
    except UserError as error:
        print(f"selfvil: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
