"""The whole pipeline in a few minutes on a CPU: pack, pretrain, export, reload, score. Started by `make demo`.

The images are scikit-learn's handwritten digits (1,797 real 8x8 scans, 10 classes): they come with a package that is
installed already, so nothing is downloaded. With all labels, every score is near 100 %, so the informative score is
the linear probe with 5 labels per class, over 20 draws.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_digits

import selfvil
from selfvil import terminal
from selfvil.evaluate import settings
from selfvil.evaluate.score import Row, score
from selfvil.monitor.pictures import loss_curve
from selfvil.runtime import bf16_in_hardware

TEST_IMAGES = 500
console = terminal.console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for all files of the demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    options = parser.parse_args()
    out = options.out
    if out.exists():
        if any(out.iterdir()) and not (out / "digits").is_dir():
            sys.exit(f"demo: {out} is not empty and not from an earlier demo: choose another folder with --out")
        shutil.rmtree(out)  # every demo starts from nothing
    began = time.monotonic()

    say("1. pack real images into WebDataset shards")
    write_digits(out / "digits")
    for split in ("train", "test"):
        run("selfvil", "pack", out / "digits" / split, out / "shards" / split, "--name", "digits")
    train, test = (f"{out}/shards/{split}/digits-*.tar" for split in ("train", "test"))

    say("2. pretrain a small ViL by MAE, without labels")
    precision = "bf16" if bf16_in_hardware() else "fp32"
    overrides = [
        f"data.train={train}", f"run.out={out / 'run'}", f"run.seed={options.seed}", f"run.precision={precision}"
    ]  # fmt: skip
    run("accelerate", "launch", "launch/pretrain.py", "recipes/demo.yaml", *overrides)
    loss_curve(out / "run", out / "loss.png")

    say("3. export it, and load the export by timm")
    run("selfvil", "export", out / "run", out / "export")
    reload_equals_run(out)

    say("4. score it, the same network untrained, and raw pixels")
    exported = out / "export"
    # MAE trains all patch tokens alike, and no single token to represent the image, so their mean is scored.
    evaluations = {name: settings(name, {"readout": "mean"}) for name in ("few_label", "knn", "linear")}
    rows = score(exported, train, test, evaluations, baselines=True, seed=options.seed)
    picture = out / "reconstructions.png"
    shutil.copy(max((out / "run" / "pictures").glob("step-*.png")), picture)
    close(out, rows, picture, time.monotonic() - began)


def write_digits(folder: Path) -> None:
    """Write the digits as grey PNG files, train/<class>/ and test/<class>/, split by a fixed permutation."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for rank, index in enumerate(order):
        label = digits.target[index]
        path = folder / ("test" if rank < TEST_IMAGES else "train") / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8)).save(path)


def reload_equals_run(out: Path) -> None:
    """The exported network, loaded through timm alone, must compute what the run's network computes."""
    reloaded = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True).eval()
    trained = selfvil.load_backbone(out / "run")
    image = torch.rand(2, reloaded.pretrained_cfg["input_size"][0], *reloaded.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        if not torch.equal(reloaded(image), trained(image)):
            sys.exit("demo: the reloaded export does not compute what the run's network computes")
    console.print("it computes the same, bit for bit:")
    console.print(use(out), soft_wrap=True)


def close(out: Path, rows: list[Row], picture: Path, seconds: float) -> None:
    """Print the closing table."""
    summary = json.loads((out / "run" / "run.json").read_text())["summary"]
    protocols = list(dict.fromkeys(row.protocol for row in rows))
    networks = list(dict.fromkeys(row.network for row in rows))
    table = Table(title="accuracy on 500 test images, in percent")
    table.add_column("protocol")
    for network in networks:
        table.add_column(network, justify="right")
    for protocol in protocols:
        found = {row.network: row for row in rows if row.protocol == protocol}
        table.add_row(protocol, *(cell(found[network]) for network in networks))
    console.print(table)
    where = Table(show_header=False)
    for name, value in {
        "images seen": f"{summary['samples']:,} at {summary['images_per_second']:,.0f} images/s",
        "time": f"{seconds:.0f} s in all, {summary['seconds']:.0f} s of it pretraining",
        "run": f"{out / 'run'} (recipe, metrics, checkpoints)",
        "export": str(out / "export"),
        "reconstructions": str(picture),
        "loss curve": str(out / "loss.png"),
    }.items():
        where.add_row(name, value)
    console.print(where)
    console.print("To use it, in Python:")
    console.print(use(out), soft_wrap=True)


def use(out: Path) -> str:
    """Python code that loads the export."""
    return (
        f"import selfvil, timm\nbackbone = timm.create_model({'local-dir:' + str(out / 'export')!r}, pretrained=True)"
    )


def cell(row: Row) -> str:
    return f"{row.value:.1f}" + (f" ± {row.deviation:.1f}" if row.deviation is not None else "")


def run(*command: object) -> None:
    """Print a command and run it with this environment's programs; exit if it fails."""
    words = [str(word) for word in command]
    console.print(f"$ {' '.join(words)}", style="bold", soft_wrap=True)
    program = Path(sys.executable).parent / words[0]
    if subprocess.run([str(program), *words[1:]], cwd=Path(__file__).parents[1]).returncode:
        sys.exit(f"demo: this command failed: {' '.join(words)}")


def say(title: str) -> None:
    console.rule(title, align="left")


if __name__ == "__main__":
    main()
