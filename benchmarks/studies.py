"""Studies: tables of runs with equal budgets, whose scores are compared over seeds.

    python benchmarks/studies.py list
    python benchmarks/studies.py run bakeoff --data ../shared/data --out runs/bakeoff --json bakeoff.json
    python benchmarks/studies.py run bakeoff --data ../shared/data --out runs/bakeoff --rows mae --pause-minutes 9
    python benchmarks/studies.py table bakeoff.json

A study is a file in benchmarks/studies/, or any YAML file of that form: `Study` and `Row` below document the keys. Rows
run one after the other as `selfvil pretrain` and `selfvil eval`, all rows of a seed before the next seed. Everything is
kept under --out, so that the same command continues at any moment, even after a kill: a run continues as every run of
this project does, and finished runs and scores are not computed again. --pause-minutes ends the command after a time.

A budget is a number of images, or processor time. For the latter, the rate of each row is measured once, by steps of
all rows in turns in one process, and turned into images; then neither another row nor a busy machine changes what a row
trains on. One process runs one row at a time. To use more cores, measure with --rates-only, then start one process per
core with its own --rows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from about import processor
from pydantic import Field, ValidationError, model_validator
from scipy.stats import ttest_rel

from selfvil.build import build_objective
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.files import write_text
from selfvil.objectives.base import Progress
from selfvil.optim import adamw, parameter_groups
from selfvil.recipe import load
from selfvil.safe_yaml import read_mapping
from selfvil.settings import Section

FOLDER = Path(__file__).parent / "studies"
PAUSED = 75
ROUNDS = 7
"""Steps of each row when rates are measured; the first warms up."""


class Row(Section):
    """One row: a recipe and what differs from it."""

    recipe: str
    """A packaged recipe, or a file."""
    set: list[str] = Field([])
    """Overrides, after those of the study."""
    samples: int | None = Field(None, gt=0)
    """Budget of this row in images, in place of the study's."""
    rate_of: str | None = None
    """A row of the same speed, whose number of images this one gets; null measures this row's own rate."""
    evaluate: dict[str, list[str]] = Field({})
    """Words that are added to evaluations of the study, by name."""


class Study(Section):
    """A study."""

    about: str
    """What it compares, in one sentence."""
    train: str
    """Training shards, relative to --data."""
    fit: str
    """Labelled shards on which evaluations are fitted, relative to --data."""
    test: str
    """Labelled shards that are scored, relative to --data."""
    processor_minutes: float | None = Field(None, gt=0)
    """Budget of a row in processor time, turned into images."""
    samples: int | None = Field(None, gt=0)
    """Budget of a row in images."""
    seeds: list[int] = Field([0])
    set: list[str] = Field([])
    """Overrides of all rows."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of training and of evaluation."""
    evaluate: dict[str, list[str]] = Field({"frozen": ["all"]})
    """Words after `selfvil eval`, by a name: evaluations, then their settings."""
    untrained: list[str] = Field([])
    """Rows whose network is also scored untrained, and raw pixels, with the first seed: one for each architecture."""
    baseline: str | None = None
    """The row with which all others are compared."""
    rows: dict[str, Row]

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if (self.processor_minutes is None) == (self.samples is None):
            raise ValueError("a study has one budget: set processor_minutes or samples")
        named = [*self.untrained, *filter(None, (self.baseline, *(row.rate_of for row in self.rows.values())))]
        if unknown := [name for name in named if name not in self.rows]:
            raise ValueError(f"{unknown[0]} is not one of the rows: {', '.join(self.rows)}")
        if unknown := [name for row in self.rows.values() for name in row.evaluate if name not in self.evaluate]:
            raise ValueError(f"{unknown[0]} is not one of the evaluations: {', '.join(self.evaluate)}")
        return self


def read_study(name: str) -> Study:
    """The study of that name in benchmarks/studies/, or in that file."""
    file = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not file.exists():
        sys.exit(f"there is no study {name}; choose one of: {', '.join(sorted(f.stem for f in FOLDER.glob('*.yaml')))}")
    try:
        return Study.model_validate(read_mapping(file))
    except ValidationError as error:
        first = error.errors()[0]
        sys.exit(f"{file}: {'.'.join(map(str, first['loc'])) or 'the study'}: {first['msg']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all studies")
    run = commands.add_parser("run", help="run a study, or continue it")
    run.add_argument("study", help="a name from `list`, or a YAML file")
    run.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    run.add_argument("--out", type=Path, required=True, help="folder for runs and scores")
    run.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    run.add_argument("--seeds", nargs="+", type=int, help="in place of the study's")
    run.add_argument("--processor-minutes", type=float, help="in place of the study's budget")
    run.add_argument("--samples", type=int, help="images, in place of the study's budget")
    run.add_argument("--rates-only", action="store_true", help="only measure the rate of each row")
    run.add_argument("--pause-minutes", type=float, help="end after this time; the same command continues")
    run.add_argument("--json", type=Path, help="file for the figures of finished rows")
    table = commands.add_parser("table", help="print the Markdown table of a file of figures")
    table.add_argument("file", type=Path)
    table.add_argument("--protocols", nargs="+", default=PROTOCOLS, help="columns, in this order, as far as scored")
    args = parser.parse_args()
    if args.command == "list":
        for file in sorted(FOLDER.glob("*.yaml")):
            study = read_study(file.stem)
            print(f"{file.stem:24} {len(study.rows)} rows, {len(study.seeds)} seeds: {study.about}")
    elif args.command == "run":
        sys.exit(Runner(args).run())
    else:
        print(markdown(json.loads(args.file.read_text()), args.protocols))


class Runner:
    """Runs a study under `args.out`: for each row and seed a run folder, and beside it its scores and its pieces."""

    def __init__(self, args: argparse.Namespace) -> None:
        study = read_study(args.study)
        if args.processor_minutes or args.samples:
            budget = {"processor_minutes": args.processor_minutes, "samples": args.samples}
            rows = {name: row.model_copy(update={"samples": None}) for name, row in study.rows.items()}
            study = study.model_copy(update={**budget, "rows": rows})
        if unknown := [name for name in args.rows or [] if name not in study.rows]:
            sys.exit(f"{unknown[0]} is not a row of {args.study}; choose from: {', '.join(study.rows)}")
        self.study, self.args = study, args
        self.rows = args.rows or list(study.rows)
        self.seeds = study.seeds if args.seeds is None else args.seeds
        self.data, self.out = args.data.resolve(), args.out.resolve()
        self.ends = time.monotonic() + 60 * args.pause_minutes if args.pause_minutes else None

    def run(self) -> int:
        """Run or continue, and return the exit status: 75 if the time is over before the study is finished."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.study.samples is None:
            self.measure_rates()
        finished = self.args.rates_only or self._run_rows()
        found = self.figures()
        if self.args.json:
            write_text(self.args.json, json.dumps(found, indent=1) + "\n")
        print(markdown(found))
        return 0 if finished else PAUSED

    def _run_rows(self) -> bool:
        for seed in self.seeds:
            for name in self.rows:
                if not self.train(name, seed) or not self.score(name, seed):
                    return False
        return True

    def folder(self, name: str, seed: int) -> Path:
        return self.out / name / f"seed-{seed}"

    # --- budgets -----------------------------------------------------------------------------------------------------

    def samples(self, name: str) -> int:
        """Images that a row trains on."""
        if own := self.study.rows[name].samples or self.study.samples:
            return own
        rates = json.loads((self.out / "rates.json").read_text())
        return round(rates[self.study.rows[name].rate_of or name] * 60 * (self.study.processor_minutes or 0))

    def measure_rates(self) -> None:
        """Write the images per second of processor time of each row into rates.json, for rows that it lacks.

        If some rows were measured before, the first of them is measured again, and the ratio of its two rates scales
        the new ones.
        """
        file = self.out / "rates.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        rows = {name: self.study.rows[name] for name in self.rows}
        names = dict.fromkeys(row.rate_of or name for name, row in rows.items() if not row.samples)
        new, old = [name for name in names if name not in known], next(iter(known), None)
        if not new:
            return
        steppers = {name: self._steps(name) for name in [*new, *([old] if old else [])]}
        rounds = [{name: next(stepper) for name, stepper in steppers.items()} for _ in range(ROUNDS)]
        rates = {name: statistics.median(each[name] for each in rounds[1:]) for name in steppers}
        scale = known[old] / rates[old] if old else 1.0
        known |= {name: rates[name] * scale for name in new}
        write_text(file, json.dumps(known, indent=1) + "\n")

    def _steps(self, name: str) -> Iterator[float]:
        """For each training step of a row: its images per second of processor time, decoding included."""
        recipe = load(self.study.rows[name].recipe, self.overrides(name, 0))
        torch.set_num_threads(recipe.run.threads or 1)
        objective, size = build_objective(recipe), recipe.optim.batch_size
        optimizer = adamw(parameter_groups(objective), recipe.optim.betas)
        shards = open_shards(recipe.data.train, image=recipe.data.image)
        batches = train_batches(
            shards, objective.views(), seed=0, batch_size=size, stop_step=ROUNDS, channels=recipe.model.in_chans
        )
        for step in range(ROUNDS):
            began, progress = time.process_time(), Progress(step, ROUNDS, len(shards) / size, seed=0)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.study.precision == "bf16"):
                loss = objective(next(batches), progress).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.after_step(progress)
            yield size / (time.process_time() - began)

    # --- runs --------------------------------------------------------------------------------------------------------

    def overrides(self, name: str, seed: int) -> list[str]:
        return [
            f"data.train={self.data}/{self.study.train}", f"run.out={self.folder(name, seed)}", f"run.seed={seed}",
            f"run.precision={self.study.precision}", *self.study.set, *self.study.rows[name].set,
        ]  # fmt: skip

    def train(self, name: str, seed: int) -> bool:
        """Pretrain or continue; False if the time is over before the end."""
        length = ["budget.epochs=null", "budget.steps=null", f"budget.samples={self.samples(name)}"]
        words = ["pretrain", self.study.rows[name].recipe, *self.overrides(name, seed), *length]
        run = self.folder(name, seed)
        ended = [piece for piece in self.pieces(run) if piece["command"] == self.command(words)]
        if ended and ended[-1].get("status") == 0:
            return True
        for kind in self.study.evaluate:  # of a shorter run
            run.with_suffix(f".{kind}.json").unlink(missing_ok=True)
        return self.selfvil(run, words, pausable=True)

    def pieces(self, run: Path) -> list[dict[str, Any]]:
        """The beginnings and ends of all commands of a run so far."""
        file = run.with_suffix(".pieces.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def score(self, name: str, seed: int) -> bool:
        """Compute the scores that are missing; False if the time is over."""
        run, study = self.folder(name, seed), self.study
        for kind, words in study.evaluate.items():
            file = run.with_suffix(f".{kind}.json")
            if file.exists():
                continue
            labelled = ["--train", f"{self.data}/{study.fit}", "--test", f"{self.data}/{study.test}"]
            baselines = ["--baselines"] if name in study.untrained and seed == self.seeds[0] else []
            options = [word for word in words if "=" in word] + study.rows[name].evaluate.get(kind, [])
            names = [word for word in words if "=" not in word]
            how = ["--workers", "0", "--precision", study.precision, "--seed", str(seed)]
            part = file.with_suffix(".part")
            if not self.selfvil(
                run, ["eval", *names, str(run), *labelled, *how, *baselines, "--json", str(part), *options]
            ):
                return False
            part.rename(file)
        return True

    def selfvil(self, run: Path, words: list[str], pausable: bool = False) -> bool:
        """Run a command of selfvil, and enter its times into the run's pieces; False if the time is over."""
        left = None if self.ends is None else self.ends - time.monotonic()
        if left is not None and left < 1:
            return False
        run.parent.mkdir(parents=True, exist_ok=True)
        pieces = run.with_suffix(".pieces.jsonl")
        began, used = time.monotonic(), children_seconds()
        piece: dict[str, Any] = {"command": self.command(words)}
        print("$", piece["command"], flush=True)
        append(pieces, piece | {"began": True})
        if pausable and left is not None:
            words = [*words, f"budget.pause_minutes={left / 60:.4f}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        status = subprocess.run([sys.executable, "-m", "selfvil", *words], env=environment, check=False).returncode
        seconds = {"wall_seconds": time.monotonic() - began, "processor_seconds": children_seconds() - used}
        append(pieces, piece | {name: round(value, 1) for name, value in seconds.items()} | {"status": status})
        if status not in (0, PAUSED):
            sys.exit(f"selfvil {words[0]} ended with status {status}; the same command continues the study")
        return status == 0

    def command(self, words: list[str]) -> str:
        """The command line without the folders of this machine."""
        return " ".join(["selfvil", *words]).replace(str(self.data), "DATA").replace(str(self.out), "OUT")

    # --- figures -----------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Every score of the finished rows, and for each how it was made."""
        rows, budget = [], self.study.samples
        for seed in self.seeds:
            for name in self.rows:
                rows += self._figures(name, seed)
        return {
            "study": Path(self.args.study).stem, "about": self.study.about, "baseline": self.study.baseline,
            "budget": (f"{budget:,} images" if budget else f"{self.study.processor_minutes:g} processor minutes")
            + (", or a row's own" if any(row.samples for row in self.study.rows.values()) else ""),
            "rows": rows,
        }  # fmt: skip

    def _figures(self, name: str, seed: int) -> list[dict[str, Any]]:
        run, found = self.folder(name, seed), []
        if not (run / "run.json").exists():
            return []
        launches = json.loads((run / "run.json").read_text())["launches"]
        trained = [piece for piece in self.pieces(run) if piece["command"].startswith("selfvil pretrain")]
        ended = [piece for piece in trained if "status" in piece]
        about = {
            "row": name, "seed": seed, "command": trained[0]["command"], "precision": self.study.precision,
            "processor": processor(), "trained_at": launches[-1]["commit"], "pieces": len(trained) - len(ended),
            "wall_seconds": round(sum(piece["wall_seconds"] for piece in ended), 1),
            "processor_seconds": round(sum(piece["processor_seconds"] for piece in ended), 1),
            # A piece that was killed together with this command has no end, and its time is not known.
            "whole_time": 2 * len(ended) == len(trained),
        }  # fmt: skip
        keys = ("network", "protocol", "value", "deviation", "readout", "train_images", "test_images", "samples_seen",
                "versions", "commit")  # fmt: skip
        for kind in self.study.evaluate:
            file = run.with_suffix(f".{kind}.json")
            if file.exists():
                for row in json.loads(file.read_text()):
                    found.append(about | {"evaluation": kind} | {key: row.get(key) for key in keys})
        return found


def append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def children_seconds() -> float:
    """Processor time of all finished child processes, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the table -------------------------------------------------------------------------------------------------------

PROTOCOLS = ["k-NN, k = 20", "linear probe", "fine-tuning", "few labels"]
"""Columns of a table: the first words of a protocol, up to a comma; with the evaluation, if that is not `frozen`."""


def markdown(found: dict[str, Any], protocols: list[str] = PROTOCOLS) -> str:
    """Means and deviations over seeds, and for each column the difference to the baseline with its paired t-test."""
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    samples: dict[str, int] = {}
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for figure in found["rows"]:
        protocol = next((p for p in protocols if f"{figure['protocol']},".startswith(f"{p},")), None)
        if protocol is None:
            continue
        column = protocol if figure["evaluation"] == "frozen" else f"{protocol} ({figure['evaluation']})"
        row = figure["row"] if figure["network"] == "pretrained" else f"*{figure['network']}, {figure['row']}*"
        values[column][row][figure["seed"]] = figure["value"]
        if figure["network"] == "pretrained":
            samples[row] = figure["samples_seen"]
            times[row][figure["seed"]] = figure["processor_seconds"]
    columns = sorted(values, key=lambda column: next(i for i, p in enumerate(protocols) if column.startswith(p)))
    rows = list(dict.fromkeys(row for column in columns for row in values[column]))
    baseline = found.get("baseline")
    lines = ["| row | seeds | images | processor s | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            of_row, base = values[column].get(row, {}), values[column].get(baseline, {})
            cells.append(cell(of_row, base if row != baseline and row in samples else {}))
        seeds = max(len(values[column].get(row, {})) for column in columns)
        spent = f"{statistics.mean(times[row].values()):.0f}" if row in times else ""
        lines.append(
            f"| {row} | {seeds} | {samples[row]:,} | {spent} | " if row in samples else f"| {row} | {seeds} | | | "
        )
        lines[-1] += " | ".join(cells) + " |"
    return "\n".join(lines)


def cell(values: dict[int, float], baseline: dict[int, float]) -> str:
    """Mean ± deviation over seeds, then the difference to the baseline over the seeds of both and its p."""
    if not values:
        return ""
    text = f"{statistics.mean(values.values()):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values.values()):.2f}"
    both = sorted(values.keys() & baseline.keys())
    if not both:
        return text
    text += f" ({statistics.mean(values[seed] - baseline[seed] for seed in both):+.2f}"
    p = paired_p([values[seed] for seed in both], [baseline[seed] for seed in both])
    return text + (")" if p is None else f", p = {p:.2g})")


def paired_p(ours: list[float], theirs: list[float]) -> float | None:
    """Two-sided p of the paired t-test over seeds; None for fewer than two, or if all differences are equal."""
    differences = [a - b for a, b in zip(ours, theirs)]
    if len(differences) < 2 or max(differences) - min(differences) < 1e-12:
        return None
    return float(ttest_rel(ours, theirs).pvalue)


if __name__ == "__main__":
    main()
