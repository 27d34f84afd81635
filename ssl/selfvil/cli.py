"""The `selfvil` command. Each command calls a function of another module, which is imported when the command runs."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selfvil.errors import UserError, shorten
from selfvil.version import __version__

app = typer.Typer(
    help="Self-supervised pretraining of Vision-LSTM backbones.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Shards = Annotated[str, typer.Argument(help="Shards: a path, a glob, a folder, or a pattern with {000000..000009}.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit.

    Exit status: 0: success. 2: an error of the user, with a message. 3: a run stopped by its doctor. 4: a run without
    progress (run.stall_minutes). 75: a run stopped early with its state saved; the same command continues it. 130:
    interrupted by Ctrl-C, without saving.
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


@app.command()
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
    with _progress("packing") as progress:
        report = pack(
            source, out, name=name, samples_per_shard=samples_per_shard, size=size, classes=names, labels=not no_labels,
            image=image, mask=mask, max_value=max_value, strict=strict, seed=seed, workers=workers, progress=progress,
        )  # fmt: skip
    print(report)
    for what, found in (("skipped", report.skipped), ("warning:", report.warnings)):
        for file, reason in found[:5]:
            print(shorten(f"  {what} {file}: {reason}", 300))


@app.command()
def index(
    shards: Shards,
    image: Annotated[str | None, typer.Option(help="Extension of the image to use if samples have several.")] = None,
) -> None:
    """Index shards, so that samples can be read by position; pretrain and eval do this if needed."""
    from selfvil.data.index import index_shards

    with _progress("indexing") as progress:
        report = index_shards(shards, progress, image)
    print(report)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; called with (done, total)."""
    from rich.progress import Progress

    from selfvil import terminal

    with Progress(console=terminal.console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
) -> None:
    """Pretrain by a recipe; on several devices, start it with accelerate launch or torchrun launch/pretrain.py.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and stop: exit status 75, and the same command continues.
    """
    from selfvil.recipe import load

    settings = load(recipe, overrides or ())  # before the slow import, so that errors are reported at once
    from selfvil.pretrain import pretrain
    from selfvil.stop import STOPPED

    summary = pretrain(settings)
    if summary.alarms and settings.monitor.on_collapse == "stop":
        raise typer.Exit(3)
    if not summary.finished:
        raise typer.Exit(STOPPED)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the launch: its world size.")] = 1,
    trial: Annotated[bool, typer.Option("--trial/--no-trial", help="Take 3 steps on real images for the time.")] = True,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the first images' crops to this PNG; in a folder, to RECIPE.png.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Print what a recipe will do on this machine: steps, rates, memory, disk, time. Refuse recipes that cannot run."""
    from selfvil.files import require_writable, write_text
    from selfvil.recipe import load

    settings, name = load(recipe, overrides or ()), Path(recipe).stem
    target = picture / f"{name}.png" if picture is not None and picture.is_dir() else picture
    for file in (target, json_file):
        if file is not None:
            require_writable(file)
    from selfvil import terminal
    from selfvil.plan_report import report
    from selfvil.plan_table import print_report

    found = report(settings, name, processes, trial, target)
    print_report(found, terminal.console())
    if target is not None:
        print(f"crops of the first images: {target}")
    if json_file is not None:
        write_text(json_file, json.dumps(found.as_json(), indent=1) + "\n")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the packaged recipes, or print one."""
    from selfvil.packaged import find, packaged_recipes

    if name is not None:
        print(find(name).read_text(), end="")
        return
    for each, path in packaged_recipes().items():
        print(f"{each:20} {path.read_text().splitlines()[0].lstrip('# ')}")


@app.command()
def explain(key: Annotated[str, typer.Argument(help="A key such as optim.base_lr, or a section.")]) -> None:
    """Explain a recipe's key: meaning, type, default."""
    from selfvil.explain import explain

    print(explain(key))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for completion in editors."""
    from selfvil.recipe import schema

    print(json.dumps(schema(), indent=2))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of one of its checkpoints, or of an export.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    network: Annotated[str | None, typer.Option(help="Which network, if the objective has several.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also write the rest of the objective, to continue.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx.")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Also write model.pt2.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Also weights for the code of NX-AI.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write model.onnx and model.int8.onnx.")] = False,
    images: Annotated[
        str | None, typer.Option(help="Shards that measure int8's cost; default: --test, or those of pretraining.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Labelled shards, for int8's k-NN accuracy.")] = None,
    test: Annotated[str | None, typer.Option(help="Labelled shards, for int8's k-NN accuracy.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 2,
    licence: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
) -> None:
    """Export the pretrained backbone: a folder that selfvil.load_backbone and timm load, and further formats.

    Of an existing export, only the further formats are written. Each is read again and compared with the network.
    """
    from selfvil.export import export

    wanted = {"onnx": onnx, "torch-export": torch_export, "published": published, "int8": int8}
    formats = [name for name, chosen in wanted.items() if chosen]
    export(
        run, out, network=network, heads=heads, formats=formats, images=images, train=train, test=test,
        workers=workers, licence=licence,
    )  # fmt: skip
    files = ", ".join(sorted(path.name for path in out.expanduser().iterdir()))
    if (out.expanduser() / "model.safetensors").exists():
        print(f"exported {run} to {out}; in Python: import selfvil; backbone = selfvil.load_backbone({str(out)!r})")
    else:
        print(f"exported formats of {run} to {out}")
    print(f"files: {files}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: OWNER/NAME.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    licence: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
) -> None:
    """Upload an export to the Hugging Face hub; timm.create_model("hf-hub:REPO", pretrained=True) then loads it.

    The token is that of the environment variable HF_TOKEN, or of `hf auth login`.
    """
    from selfvil.export import require_licence
    from selfvil.exporting import hub

    require_licence(licence)
    upload = hub.prepare(folder, repo, licence)
    sizes = upload.sizes()
    for name, size in sizes.items():
        print(f"{size:>14,} bytes  {name}")
    print(f"{sum(sizes.values()):>14,} bytes  in {len(sizes)} files, {'private, ' if private else ''}to {repo}")
    if dry_run:
        print("dry run: nothing was sent")
        return
    print(f"pushed to {hub.send(upload, private=private or None)}")
    load = f'timm.create_model("hf-hub:{repo}", pretrained=True)'
    print(f"in Python: import selfvil, timm; backbone = {load}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of an export, of a run, or of one of its checkpoints.")],
) -> None:
    """Compare every file with its digest; exit with status 2 if one is damaged."""
    from selfvil.verification import verify

    for sentence in verify(folder):
        print(sentence)


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the newest checkpoint.")] = False,
) -> None:
    """Examine a run for signs of collapse: what was measured, what is healthy, and what to change."""
    from selfvil import terminal
    from selfvil.diagnostics import checkup

    record = checkup.open_run(run)
    if record.cut:
        print(f"{run / 'metrics.jsonl'} ends with an incomplete line, as after a kill: it is left out")
    examined = checkup.examine(record)
    console = terminal.console()
    if checkup.rows(examined):
        console.print(checkup.as_table(examined, f"{run}, by its metrics"))
    else:
        print(checkup.NOTHING_JUDGED)
    if measure:
        signs = checkup.measure(record)
        console.print(checkup.signs_table(signs, f"{run}, its newest checkpoint on its training images"))
    for alarm in examined.alarms.values():
        print(f"step {alarm.step:,}: {alarm.sentence}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page; RUN/report.html, or report.html of several.")
    ] = None,
    curve: Annotated[Path | None, typer.Option(help="Also draw only the loss curve of one run, to this PNG.")] = None,
) -> None:
    """Write one HTML page about a run, or a comparison of several: curves, scores, settings that differ, pictures."""
    from selfvil.monitor.pictures import loss_curve
    from selfvil.monitor.summary import print_summary
    from selfvil.records import read_record
    from selfvil.reporting.report import report

    if curve is not None and len(runs) > 1:
        raise UserError("--curve draws the loss curve of one run: give one RUN, or leave --curve out")
    with _progress("evaluating checkpoints") as progress:
        page = report(runs, out, progress)
    if len(runs) == 1 and read_record(runs[0]).summary:
        print_summary(runs[0])
    if curve is not None:
        print(f"loss curve: {loss_curve(runs[0], curve)}")
    print(f"report: {page}")


@app.command("eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
def evaluate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME... SOURCE [key=value ...]", help="Evaluations (all: knn and linear); an export, run or checkpoint folder, or a timm model; "
                       "settings: key=value, or NAME.key=value for one of several."),
    ] = None,
    train: Annotated[list[str] | None, typer.Option(help="Labelled shards to fit on; repeat for more data.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Labelled shards to score, one for each --train.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also the untrained network and raw pixels.")] = False,
    network: Annotated[str | None, typer.Option(help="Which network of a run that has several.")] = None,
    image: Annotated[str | None, typer.Option(help="Extension of the image if samples have several.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the untrained network, held-out images, draws, training.")] = 0,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the backbone.")] = "fp32",
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="Score although some test images are in --train too.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Of a comparison: draw it to this PNG or SVG file.")] = None,
    show_help: Annotated[bool, typer.Option("--help", help="Show this message, and the settings of NAME.")] = False,
) -> None:  # fmt: skip
    """Score a pretrained backbone on labelled shards, by all named evaluations in one pass over the images.

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

        trainer = None
        if "finetune" in evaluations:
            from selfvil.trainer import Trainer

            trainer = Trainer()
        score_pairs(
            source, [Pair(*pair) for pair in zip(trains, tests)], evaluations, baselines=baselines, network=network,
            image=image, workers=workers, precision=precision, seed=seed, allow_shared=allow_shared, keep=keep,
            processes=processes, trainer=trainer,
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
    from selfvil.files import require_writable, write_text

    if chart is not None and chart.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--chart {chart}: name a file that ends in .png, .svg or .pdf")
    with launched() as processes:
        for file in (chart, json_file) if processes.is_main else ():
            if file is not None:
                require_writable(file)

        def keep(rows: list[Any]) -> None:
            if json_file is not None and processes.is_main:
                write_text(json_file, json.dumps({"scores": as_json(rows)}, indent=1) + "\n")

        found = compare(sources, train, test, evaluations, keep=keep, processes=processes, **options)
        if found is None:
            return
        terminal.console().print(as_table(found))
        if json_file is not None:
            write_text(json_file, json.dumps(found.as_json(), indent=1) + "\n")
        if chart is not None:
            print(f"chart: {draw(found, chart)}")


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


# --- embeddings -------------------------------------------------------------------------------------------------------


@app.command()
def embed(
    images: Annotated[list[str], typer.Argument(help="Folder of images, at any depth, or shards.")],
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
) -> None:
    """Embed images: keys and features, one row for each image, in a Parquet or NumPy file.

    A killed command continues where it was if it is run again. On several devices: torchrun --nproc_per_node N
    eval/embed.py IMAGES --model SOURCE --out FILE.
    """
    from selfvil.embedding.write import embed
    from selfvil.evaluate.processes import launched

    with launched() as processes, _progress("embedding") as progress:
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


@app.command()
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
    with _progress("searching") as progress:
        found = search.neighbours(opened, asked, k, progress)
    terminal.console().print(tables.neighbours_table(asked, found))
    if json_file is not None:
        tables.write_json(json_file, tables.neighbours_json(opened, asked, found))
    if out is not None and pictures is not None:
        print(f"picture: {neighbours_sheet(out, opened, pictures, asked, found)}")


@app.command()
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
    with _progress("comparing") as progress:
        found = search.duplicates(opened, threshold, progress=progress)
    terminal.console().print(tables.similarities_table(found))
    print(tables.duplicates_sentence(found))
    if json_file is not None:
        tables.write_json(json_file, tables.duplicates_json(opened, found))
    if out is not None and pictures is not None:
        print(f"picture: {duplicates_sheet(out, opened, pictures, found)}")


if __name__ == "__main__":
    main()
