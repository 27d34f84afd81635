"""The pieces of `benchmarks/gpu.py`: their commands, the same with small sizes, and tables of their figures."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Where a piece finds what it needs. folder: of gpu_prepare.py. train, test: globs of shards."""

    folder: Path
    out: Path
    tiny: bool
    train: str | None
    test: str | None
    published: Path | None
    published_kernels: Path | None

    @classmethod
    def find(cls, folder: Path, out: Path, tiny: bool) -> "Options":
        """Look for shards and checkouts in `folder`, and for an installed mlstm_kernels."""
        spec = importlib.util.find_spec("mlstm_kernels")
        installed = (
            Path(spec.submodule_search_locations[0]).parent if spec and spec.submodule_search_locations else None
        )
        kernels = folder / "mlstm_kernels"
        shards = {part: str(folder / "cifar10" / f"cifar10-{part}-*.tar") for part in ("train", "test")}
        found = {
            part: glob if any((folder / "cifar10").glob(Path(glob).name)) else None for part, glob in shards.items()
        }
        return cls(
            folder, out, tiny, found["train"], found["test"],
            folder / "vision-lstm" if (folder / "vision-lstm").is_dir() else None,
            kernels if kernels.is_dir() else installed,
        )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A part of the programme.

    script, arguments, tiny: a script of this folder or words for python, its arguments on a GPU, and those of a
    rehearsal. "{train}" and "{test}" are shards, "{out}" is the folder of results. table: Markdown from the piece's
    JSON. minutes: to expect, at most. published: the option that takes the published network's checkout, or that of the
    published kernels, if there is one. after: the piece that must be done before. interpreted: a rehearsal runs Triton
    kernels.
    """

    name: str
    title: str
    script: str
    arguments: str
    tiny: str
    table: Callable[[Any], str]
    minutes: float = 4.0
    published: str | None = None
    after: str | None = None
    interpreted: bool = False

    def command(self, options: Options) -> list[str]:
        words = (self.tiny if options.tiny else self.arguments).split()
        known = {"{train}": options.train, "{test}": options.test, "{out}": str(options.out)}
        for place, value in known.items():
            words = [word.replace(place, value or place) for word in words]
        checkout = {"--published": options.published, "--published-kernels": options.published_kernels}
        found = checkout.get(self.published or "")
        extra = [str(self.published), str(found)] if found and not options.tiny else []
        return [*(self.script.split() if " " in self.script else [f"benchmarks/{self.script}"]), *words, *extra]

    def missing(self, options: Options) -> str | None:
        """What this piece needs and `options` lack."""
        needs_data = "{train}" in self.arguments or "{test}" in self.arguments
        return "shards of CIFAR-10 in FOLDER/cifar10" if needs_data and not (options.train and options.test) else None


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(value: dict[str, Any]) -> str:
    """A median with its quartiles."""
    low, high = value["quartiles"]
    return f"{value['median']:.2f} [{low:.2f}, {high:.2f}]"


def facts_table(result: dict) -> str:
    return markdown(["", "value"], result.items())


def tests_table(result: dict) -> str:
    failures = "\n".join(f"- {name}: {text}" for name, text in result["failures"].items())
    counts = markdown(
        ["passed", "failed", "skipped", "seconds"],
        [[result[key] for key in ("passed", "failed", "skipped", "seconds")]],
    )
    return f"{counts}\n\n{failures}".rstrip()


def guard_table(result: dict) -> str:
    return markdown(
        ["kernels", "dtype", "width", "agree with torch", "largest relative error", "seconds"],
        [
            [r["kernels"], r["dtype"], r["width"], "yes" if r["agree"] else "NO", r["error"], r["seconds"]]
            for r in result["rows"]
        ],
    )


def operator_table(result: dict) -> str:
    def cells(row: dict) -> list[str]:
        errors = row["errors"]
        error = (
            f"{errors['h']:.0e}, {max(value for name, value in errors.items() if name != 'h'):.0e}" if errors else ""
        )
        return [
            row["dtype"], row["num_tokens"], row["head_dim"], row["mode"], f"{row['backend']} {row['note']}".strip(),
            f"{row['milliseconds']:.3f}", f"{max(row['floor_milliseconds'].values()):.3f}",
            spread(row["time_over_ours"]), error + ("" if row["correct"] else " WRONG"),
        ]  # fmt: skip

    columns = ["dtype", "N", "D", "", "backend", "ms", "floor", "time over ours", "error of h, of a gradient"]
    return markdown(columns, [cells(row) for row in result["rows"]])


def backbone_table(result: dict) -> str:
    floors = ", ".join(f"{dtype} {1e3 * seconds:.2f} ms" for dtype, seconds in result["floor_seconds"].items())
    rows = [
        [r["dtype"], r["mode"], r["network"], f"{r['images_per_s']:,.1f}", spread(r["time_over_ours"]),
         f"{r['peak_bytes'] / 2**20:,.0f}" if r.get("peak_bytes") else ""]
        for r in result["rows"]
    ]  # fmt: skip
    table = markdown(["dtype", "", "network", "images/s", "time over ours", "peak MiB"], rows)
    return f"{table}\n\nFloor of a forward pass of ours: {floors}"


def step_table(result: dict) -> str:
    columns = ["recipe", "", "images/s", "time over the first", "first step, s", "loss"]
    rows = [
        [r["recipe"], r["variant"], f"{r['images_per_s']:,.0f}", spread(r["time_over_first"]),
         f"{r['first_step_seconds']:.0f}", f"{r['loss']:.3f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows)


def syncs_table(result: dict) -> str:
    rows = [[r["recipe"], r["steps"], r["per_step"], "; ".join(r["places"])] for r in result["rows"]]
    return markdown(["recipe", "steps", "synchronisations in a step", "where"], rows)


def augmentation_table(result: dict) -> str:
    rows = [
        [row["recipe"], *(spread(value) for value in row["images_per_s"].values()), row["difference_in_levels"]["mean"]]
        for row in result["rows"]
    ]
    return markdown(["views of", *result["rows"][0]["images_per_s"], "mean difference, levels"], rows)


def tune_table(result: dict) -> str:
    columns = ["kernels", "dtype", "width", "now", "ms", "best", "ms", "time of best over now"]
    rows = [
        [r["kernels"], r["dtype"], r["width"], r["now"], f"{r['now_ms']:.3f}", r["best"], f"{r['best_ms']:.3f}",
         f"{r['best_ms'] / r['now_ms']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows)


def train_table(result: dict) -> str:
    columns = ["recipe", "strategy", "processes", "steps", "images/s", "loss", "peak GiB", "finished"]
    rows = [
        [r["recipe"], r["strategy"], r["processes"], f"{r['step']} of {r['total_steps']}", r["images_per_second"],
         r["loss"], r["peak_gib"], "yes" if r["finished"] else "no"]
        for r in result["rows"]
    ]  # fmt: skip
    return markdown(columns, rows)


def loop_table(result: dict) -> str:
    shares = result["overhead"]["shares"] | {"loop": result["overhead"]["loop"]}
    step = result["overhead"]["seconds_per_step"]
    return markdown(["seconds for a step", *shares], [[step, *(f"{100 * share:.1f} %" for share in shares.values())]])


def scores_table(result: list) -> str:
    return markdown(
        ["network", "protocol", "value"], [[r["network"], r["protocol"], f"{r['value']:.4f}"] for r in result]
    )


# --- the pieces ------------------------------------------------------------------------------------------------------

TINY_BACKBONE = "--device cpu --threads 1 --img-size 32 --batch 1 --rounds 1 --depth 1"
SHORT = "data.workers=0 optim.batch_size=4 model.name=vil_nano_patch4_32 run.precision=fp32"
"""Overrides that make a recipe of CIFAR-10 small enough for a rehearsal."""


def operator(dtype: str) -> Piece:
    return Piece(
        f"operator-{dtype}", f"The operator in {dtype}", "mlstm_operator.py",
        f"--device cuda --dtypes {dtype} --lengths 196 1024 4096 --widths 96 192 --rounds 10",
        "--device cpu --threads 1 --dtypes fp32 --lengths 20 --widths 16 --tokens 20 --heads 1 --rounds 1 "
        "--backends triton triton_chunkwise",
        operator_table, published="--published-kernels", interpreted=True,
    )  # fmt: skip


def backbone(name: str, title: str, arguments: str, tiny: str = "", published: bool = True) -> Piece:
    return Piece(
        f"backbone-{name}", title, "backbone.py", f"--device cuda --modes inference training {arguments}",
        f"{TINY_BACKBONE} --modes training {tiny}", backbone_table, minutes=5,
        published="--published" if published else None,
    )  # fmt: skip


def recipe(name: str) -> list[Piece]:
    """A whole run of a recipe, and its scores."""
    run, short = f"{{out}}/runs/{name}", f"budget.epochs=null budget.steps=2 monitor.pictures_every=null {SHORT}"
    train = f"{name} --out {run} --minutes 7.5"
    return [
        Piece(
            f"recipe-{name}", f"The recipe {name}", "train.py", f"{train} --set data.train={{train}}",
            f"{train} --device cpu --set data.train={{train}} {short}", train_table, minutes=9,
        ),
        Piece(
            f"scores-{name}", f"k-NN and linear probe of {name}", "-m selfvil eval knn linear",
            f"{run} --train {{train}} --test {{test}} --workers 8 --precision bf16",
            f"{run} --train {{train}} --test {{test}} --workers 0 knn.k=2", scores_table, minutes=5,
            after=f"recipe-{name}",
        ),
    ]  # fmt: skip


def tune(what: str, dtype: str, width: int) -> Piece:
    return Piece(
        f"tune-{what}-{dtype}-{width}", f"Block sizes: {what}, {dtype}, heads of {width}", "tune.py",
        f"{what} --device cuda --dtypes {dtype} --widths {width}", f"{what} --device cpu --dtypes fp32 --tiny",
        tune_table, minutes=7, interpreted=True,
    )  # fmt: skip


BESIDE = "--beside vit_tiny_patch16_224 vil_mlp_tiny_patch16_224"
PIECES: list[Piece] = [
    Piece("device", "Device and versions", "gpu_checks.py", "device", "device", facts_table, minutes=1),
    Piece("guard", "Triton kernels against torch, on first use", "gpu_checks.py",
          "guard --device cuda --widths 96 --dtypes bf16 fp32",
          "guard --device cpu --widths 16 --dtypes fp32", guard_table, interpreted=True),
    Piece("tests-operator", "Tests of the operator's kernels, compiled", "gpu_checks.py",
          "tests tests/ops/test_triton.py", "tests tests/ops/test_triton.py -k tiles", tests_table, minutes=5),
    Piece("tests-layer", "Tests of the fused kernels, compiled", "gpu_checks.py",
          "tests tests/ops/test_fused.py", "tests tests/ops/test_fused.py -k without_a_gate", tests_table, minutes=5),
    Piece("sync", "Synchronisations in a training step", "gpu_checks.py",
          "sync cifar10_mae_gpu cifar10_dino_gpu --device cuda",
          f"sync cifar10_mae_gpu --device cpu --steps 1 --set {SHORT}", syncs_table, minutes=2),
    operator("bf16"),
    backbone("224-bf16", "224 px, bfloat16", f"--dtypes bf16 --batch 128 {BESIDE}", "--dtypes bf16"),
    backbone("224-tf32", "224 px, tf32", f"--dtypes tf32 --batch 128 {BESIDE}", "--dtypes tf32"),
    Piece("step", "Whole steps of the recipes, eager and compiled", "step.py",
          "cifar10_mae_gpu cifar10_dino_gpu --device cuda --variants eager compiled --whole",
          f"cifar10_mae_gpu --device cpu --variants eager --rounds 1 --threads 1 --set {SHORT}", step_table, minutes=8),
    *recipe("cifar10_mae_gpu"),
    *recipe("cifar10_dino_gpu"),
    operator("tf32"),
    operator("fp32"),
    backbone("224-fp32", "224 px, float32", f"--dtypes fp32 --batch 128 {BESIDE}", "--dtypes fp32"),
    backbone("224-base", "224 px, bfloat16, networks of base size",
             "--dtypes bf16 --batch 64 --model vil_base_patch16_224 --beside vit_base_patch16_224", published=False),
    backbone("512", "512 px", f"--dtypes bf16 tf32 --batch 32 --img-size 512 {BESIDE}", published=False),
    backbone("1024", "1,024 px", f"--dtypes bf16 tf32 --batch 8 --img-size 1024 {BESIDE}", published=False),
    backbone("2048", "2,048 px", f"--dtypes bf16 --batch 2 --img-size 2048 {BESIDE}", published=False),
    backbone("224-compiled", "224 px, bfloat16, compiled", "--dtypes bf16 --batch 128 --compile"),
    Piece("augmentation", "Augmentation on the device", "augmentation.py",
          "cifar10_mae_gpu cifar10_dino_gpu --train {train} --device cuda",
          "cifar10_mae_gpu --train {train} --device cpu --batch 4 --rounds 1", augmentation_table, minutes=3),
    Piece("loop", "The loop around the step", "loop.py",
          "overhead --recipe cifar10_mae_gpu --train {train} --steps 300",
          f"overhead --recipe cifar10_mae_gpu --train {{train}} --steps 4 --set {SHORT}", loop_table, minutes=3),
    Piece("processes", "One process for each GPU, and all strategies", "train.py",
          "cifar10_mae_gpu --scaling --out {out}/runs/processes --set data.train={train} budget.epochs=null "
          "budget.steps=300",
          "cifar10_mae_gpu --scaling --out {out}/runs/processes --device cpu --set data.train={train} "
          f"budget.epochs=null budget.steps=2 monitor.pictures_every=null {SHORT}", train_table, minutes=8),
    *(tune(what, dtype, width) for what in ("operator", "layer") for dtype in ("bf16", "fp32") for width in (96, 192)),
]  # fmt: skip
