"""The `selfvil` command. Each command is a few lines over the function that does the work, imported when it is run."""

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

eval_app = typer.Typer(
    help="Score a pretrained backbone on labelled shards.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(eval_app, name="eval")

Shards = Annotated[str, typer.Argument(help="Shards: a path, a glob, a folder, or a pattern with {000000..000009}.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit.

    0: done. 2: a user's mistake, told in one message. 3: a run stopped by its doctor. 4: a run that made no progress
    (run.stall_minutes). 75: a run stopped early with its state saved; the same command continues. 130: interrupted by
    Ctrl-C, without saving.
    """
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
    classes: Annotated[Path | None, typer.Option(help="classes.txt of earlier shards, whose labels to keep.")] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Class subfolders are no labels.")] = False,
    image: Annotated[str | None, typer.Option(help="Ending of the image where one name has several, as jpg.")] = None,
    mask: Annotated[str | None, typer.Option(help="Ending of its mask, kept as KEY.mask.png, as png.")] = None,
    max_value: Annotated[int | None, typer.Option(help="White in 16-bit grey: 4095 where it holds 12 bits.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Leave out images that decoders complain about.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores unless told.")] = None,
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
    image: Annotated[str | None, typer.Option(help="Extension of the image to use where samples have several.")] = None,
) -> None:
    """Index shards, so that samples are read by position; pretrain and eval do this when it was not done."""
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

    settings = load(recipe, overrides or ())  # before the slow import, so that a mistake is answered at once
    from selfvil.pretrain import pretrain
    from selfvil.stop import STOPPED

    summary = pretrain(settings)
    if summary.alarms and settings.monitor.on_collapse == "stop":
        raise typer.Exit(3)
    if not summary.finished:
        raise typer.Exit(STOPPED)


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
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    network: Annotated[str | None, typer.Option(help="Which network, where an objective has several.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Also write the rest of the objective, to continue.")] = False,
) -> None:
    """Export the pretrained backbone: a folder that selfvil.load_backbone and timm load."""
    from selfvil.export import export

    export(run, out, network=network, heads=heads)
    print(f"exported {run} to {out}; in Python: import selfvil; backbone = selfvil.load_backbone({str(out)!r})")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of an export, of a run, or of one of its checkpoints.")],
) -> None:
    """Compare every file with the digest that was written with it; exit with status 2 if one was damaged."""
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
    from selfvil.monitor import checkup

    record = checkup.open_run(run)
    if record.cut:
        print(f"{run / 'metrics.jsonl'} ends in the middle of a line, as a killed run leaves it: that line is left out")
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
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the page; RUN/report.html.")] = None,
    curve: Annotated[Path | None, typer.Option(help="Also draw the loss curve alone, to this PNG file.")] = None,
) -> None:
    """Write how a run went on one HTML page: curves, doctor, scores, pictures, features, memory, recipe."""
    from selfvil.build import build_objective
    from selfvil.monitor.checkup import open_run
    from selfvil.monitor.pictures import loss_curve
    from selfvil.monitor.report import write_report
    from selfvil.monitor.summary import print_summary

    record = open_run(run)
    if record.summary:
        print_summary(run)
    if curve is not None:
        print(f"loss curve: {loss_curve(run, curve)}")
    print(f"report: {write_report(record, out or run / 'report.html', build_objective)}")


Source = Annotated[Path, typer.Argument(help="Export folder, run folder or checkpoint folder.")]
Train = Annotated[str, typer.Option(help="Labelled shards to fit on.")]
Test = Annotated[str, typer.Option(help="Labelled shards to score.")]
Baselines = Annotated[bool, typer.Option("--baselines", help="Also score the untrained network and raw pixels.")]
Readout = Annotated[str | None, typer.Option(help="How tokens become features; the architecture's usual way.")]
NetworkName = Annotated[str | None, typer.Option("--network", help="Which network of a run that has several.")]
ImageName = Annotated[
    str | None, typer.Option("--image", help="Extension of the image to use where samples have several.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Seed = Annotated[int, typer.Option(help="Seed of the untrained network, the held-out part and the draws.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
LabelsPerClass = Annotated[int | None, typer.Option(min=1, help="Fit on so few labels of each class; all otherwise.")]
ProbeSeeds = Annotated[int, typer.Option(min=1, help="Linear probes on all labels, for their mean and deviation.")]
PrecisionName = Annotated[Literal["fp32", "bf16"], typer.Option("--precision", help="Arithmetic of the backbone.")]


@eval_app.command("knn")
def eval_knn(
    source: Source, train: Train, test: Test, baselines: Baselines = False, readout: Readout = None,
    network: NetworkName = None, image: ImageName = None, workers: Workers = 2, seed: Seed = 0, json_file: Json = None,
    precision: PrecisionName = "fp32",
) -> None:  # fmt: skip
    """Weighted k-nearest-neighbour accuracy, k = 10, 20, 100 and 200."""
    _eval(["knn"], source, train, test, json_file,
          baselines=baselines, readout=readout, network=network, image=image, workers=workers, seed=seed,
          precision=precision)  # fmt: skip


@eval_app.command("linear")
def eval_linear(
    source: Source, train: Train, test: Test, baselines: Baselines = False, readout: Readout = None,
    network: NetworkName = None, image: ImageName = None, workers: Workers = 2, seed: Seed = 0, json_file: Json = None,
    labels_per_class: LabelsPerClass = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the few labels.")] = 20,
    probe_seeds: ProbeSeeds = 1, precision: PrecisionName = "fp32",
) -> None:  # fmt: skip
    """Accuracy of a logistic regression on frozen features, its strength chosen on a held-out part of train."""
    _eval(["linear"], source, train, test, json_file, labels_per_class=labels_per_class, draws=draws,
          probe_seeds=probe_seeds, baselines=baselines, readout=readout, network=network, image=image,
          workers=workers, seed=seed, precision=precision)  # fmt: skip


@eval_app.command("finetune")
def eval_finetune(
    source: Source, train: Train, test: Test, baselines: Baselines = False,
    readout: Annotated[str | None, typer.Option(help="The only head wanted; the architecture's and mean else.")] = None,
    network: NetworkName = None, image: ImageName = None, workers: Workers = 2, seed: Seed = 0, json_file: Json = None,
    labels_per_class: LabelsPerClass = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 1024,
    base_lr: Annotated[float, typer.Option(help="Peak learning rate for 256 images a step.")] = 5e-4,
    layer_decay: Annotated[float, typer.Option(help="Learning rate of a layer over that of the one above.")] = 0.65,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.05,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.05,
    drop_path: Annotated[float, typer.Option(help="Probability of leaving a block out.")] = 0.1,
    label_smoothing: Annotated[float, typer.Option(help="Share of a target spread over all classes.")] = 0.1,
    min_crop: Annotated[float, typer.Option(help="Smallest share of an image that a crop shows.")] = 0.08,
    out: Annotated[Path | None, typer.Option(help="New folder for the fine-tuned network, which timm loads.")] = None,
    img_size: Annotated[str | None, typer.Option(help="Side in pixels, or HEIGHTxWIDTH; pretraining's else.")] = None,
    precision: PrecisionName = "fp32",
) -> None:  # fmt: skip
    """Accuracy after fine-tuning everything, beside a linear probe of the same tokens; Bilateral Concat and mean."""
    size = _size(img_size)
    with _results(json_file) as keep:
        from selfvil.evaluate.finetune import Settings, finetune

        settings = Settings(
            epochs=epochs, batch_size=batch_size, base_lr=base_lr, layer_decay=layer_decay, weight_decay=weight_decay,
            warmup=warmup, drop_path=drop_path, label_smoothing=label_smoothing, min_crop=min_crop,
        )  # fmt: skip
        finetune(
            source, train, test, settings=settings, labels_per_class=labels_per_class, baselines=baselines,
            readout=readout, network=network, image=image, img_size=size, workers=workers, precision=precision,
            seed=seed, keep=keep, out=out,
        )  # fmt: skip
    if out is not None:
        print(f"fine-tuned network in {out}; in Python: import selfvil; model = selfvil.load_backbone({str(out)!r})")


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width of `224` or `224x320`. Raises UserError."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 100_000 for side in sides):
        raise UserError(f"--img-size {text} is no size: give pixels, such as 224, or HEIGHTxWIDTH, such as 224x320")
    return int(sides[0]), int(sides[-1])


@eval_app.command("all")
def eval_all(
    source: Source, train: Train, test: Test, baselines: Baselines = False, readout: Readout = None,
    network: NetworkName = None, image: ImageName = None, workers: Workers = 2, seed: Seed = 0, json_file: Json = None,
    probe_seeds: ProbeSeeds = 1, precision: PrecisionName = "fp32",
) -> None:  # fmt: skip
    """Every protocol, on features computed once."""
    _eval(["knn", "linear"], source, train, test, json_file,
          baselines=baselines, readout=readout, network=network, image=image, workers=workers, seed=seed,
          probe_seeds=probe_seeds, precision=precision)  # fmt: skip


def _eval(
    protocols: list[str], source: Path, train: str, test: str, json_file: Path | None, **options: Any
) -> None:  # fmt: skip
    with _results(json_file) as keep:
        from selfvil.evaluate.score import score

        score(source, train, test, protocols=protocols, keep=keep, **options)


@contextmanager
def _results(json_file: Path | None) -> Iterator[Callable[[list[Any]], None]]:
    """A function that keeps all rows so far, in `json_file` if given; they are printed at the end, after an error too.

    Raises UserError at once if the file cannot be written.
    """
    from selfvil.files import need_writable, write_text

    file = None if json_file is None else json_file.expanduser()
    if file is not None:
        need_writable(file)
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


if __name__ == "__main__":
    main()
