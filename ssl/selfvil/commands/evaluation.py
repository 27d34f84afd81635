"""`selfvil eval`, and `selfvil eval compare`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selfvil.commands import shard_cache
from selfvil.errors import UserError


def evaluate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME... SOURCE [key=value ...]",
            help="Evaluations (all: knn and linear); an export, run or checkpoint folder, or a timm model; "
            "settings: key=value, or NAME.key=value for one of several.",
        ),
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Labelled images to fit on (shards, a folder, a table); repeat for more.")
    ] = None,
    test: Annotated[list[str] | None, typer.Option(help="Labelled images to score, one for each --train.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also the untrained network and raw pixels.")] = False,
    network: Annotated[str | None, typer.Option(help="Which network of a run that has several.")] = None,
    image: Annotated[str | None, typer.Option(help="Extension of the image if samples have several.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the untrained network, held-out images, draws, training.")] = 0,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the backbone.")] = "fp32",
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="Score although some test images are in --train too.")
    ] = False,
    cache: shard_cache.Folder = None,
    cache_gb: shard_cache.Gigabytes = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Of a comparison: draw it to this PNG or SVG file.")] = None,
    show_help: Annotated[bool, typer.Option("--help", help="Show this message, and the settings of NAME.")] = False,
) -> None:  # fmt: skip
    """Score a pretrained backbone on labelled images, by all named evaluations in one pass over the images.

    selfvil eval knn linear EXPORT --train 'a/train-*.tar' --test 'a/test-*.tar' k=20 --json scores.json

    selfvil eval compare [NAME...] SOURCE SOURCE ... scores several networks and measures their speed in one table.

    On several devices: torchrun --nproc_per_node N eval/knn.py SOURCE ..., or another script of eval/.
    """
    from selfvil.evaluate import EVALUATIONS, arguments

    words = words or []
    if show_help or not words:
        from selfvil.evaluate import settings_model
        from selfvil.explain import settings_help

        print(context.get_help())
        named = arguments.names(words)
        print("\nEvaluations (selfvil eval NAME --help has the settings of NAME):" if not named else "")
        for name in named or EVALUATIONS:
            print(settings_help(name, settings_model(name), keys=bool(named)))
        return
    comparing = words[0] == arguments.COMPARE
    evaluations, *sources = arguments.parse_comparison(words[1:]) if comparing else arguments.parse(words)
    if missing := [option for option, value in (("--train", train), ("--test", test)) if not value]:
        raise UserError(f"{' and '.join(missing)} missing: {arguments.COMPARE_FORM if comparing else arguments.FORM}")
    trains, tests = train or [], test or []
    if len(trains) != len(tests):
        raise UserError(
            f"--train is given {len(trains)} times and --test {len(tests)} times; several data sets are pairs: "
            f"--train A --test B --train C --test D (quote a glob, so that the shell does not expand it)"
        )
    if comparing:
        if len(trains) > 1 or baselines or network is not None:
            raise UserError("a comparison has one pair of --train and --test, and no --baselines and no --network")
        options = {"image": image, "workers": workers, "seed": seed, "allow_shared": allow_shared}
        _compare(sources, trains[0], tests[0], evaluations, chart, json_file, precision=precision, **options)
        return
    if chart is not None:
        raise UserError(f"--chart belongs to a comparison: {arguments.COMPARE_FORM}")
    source = sources[0]
    from selfvil.evaluate.processes import launched

    with launched() as processes, _results(json_file if processes.is_main else None) as keep:
        from selfvil.evaluate.score import Pair, score_pairs

        score_pairs(
            source, [Pair(*pair) for pair in zip(trains, tests)], evaluations, baselines=baselines, network=network,
            image=image, workers=workers, precision=precision, seed=seed, allow_shared=allow_shared, keep=keep,
            processes=processes, trainer=_trainer(evaluations),
        )  # fmt: skip
    out = getattr(evaluations.get("finetune"), "out", None)
    if out is not None and processes.is_main:
        print(f"fine-tuned network in {out}; in Python: import selfvil; model = selfvil.load_backbone({out!r})")


def _compare(
    sources: list[str],
    train: str,
    test: str,
    evaluations: Any,
    chart: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Compare networks; the table is printed, and the chart and the file are written if asked for."""
    from selfvil import terminal
    from selfvil.evaluate.compare import as_table, compare, draw
    from selfvil.evaluate.processes import launched
    from selfvil.evaluate.score import as_json
    from selfvil.files import require_chart, require_writable, write_text

    with launched() as processes:
        if chart is not None and processes.is_main:
            chart = require_chart(chart)
        if json_file is not None and processes.is_main:
            require_writable(json_file)

        def keep(rows: list[Any]) -> None:
            if json_file is not None and processes.is_main:
                write_text(json_file, json.dumps({"scores": as_json(rows)}, indent=1) + "\n")

        found = compare(
            sources, train, test, evaluations, keep=keep, processes=processes, trainer=_trainer(evaluations), **options
        )
        if found is None:
            return
        terminal.console().print(as_table(found))
        if json_file is not None:
            write_text(json_file, json.dumps(found.as_json(), indent=1) + "\n")
        if chart is not None:
            print(f"chart: {draw(found, chart)}")


def _trainer(evaluations: Any) -> Any:
    """The training loop, imported only for an evaluation that trains the network."""
    if "finetune" not in evaluations:
        return None
    from selfvil.trainer import Trainer

    return Trainer()


@contextmanager
def _results(json_file: Path | None) -> Iterator[Callable[[list[Any]], None]]:
    """A function that stores all rows so far, in `json_file` if given; they are printed at the end, after an error too.

    Raises UserError at once if the file cannot be written.
    """
    from selfvil.files import require_writable, write_text

    file = None if json_file is None else json_file.expanduser()
    if file is not None:
        require_writable(file)
    rows: list[Any] = []

    def write() -> None:
        from selfvil.evaluate.score import as_json

        text = json.dumps(as_json(rows), indent=1) + "\n"
        if file is not None and (file.is_symlink() or (file.exists() and not file.is_file())):  # such as /dev/stdout
            file.write_text(text)
        elif file is not None:
            write_text(file, text)

    def keep(so_far: list[Any]) -> None:
        rows[:] = so_far
        with suppress(OSError):  # tried again at the end
            if file is not None and not file.is_symlink():
                write()

    try:
        yield keep
    finally:
        if rows:
            from selfvil import terminal
            from selfvil.evaluate.score import as_table

            terminal.console().print(as_table(rows))
            try:
                write()
            except OSError as error:
                raise UserError(f"{file} could not be written: {error.strerror or error}") from None
