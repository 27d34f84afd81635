"""Exports of every size: difference from torch, speed of onnxruntime beside torch, and cost of int8.

    python benchmarks/export.py --images 'cifar10-test-*.tar' --json benchmarks/results/export_cpu.json

For each network: the largest absolute difference of any output of model.onnx and model.pt2 from torch, over the image
sizes and batches that `selfvil export` compares; images per second of torch (eager, as selfvil runs the network), of
model.onnx and of model.int8.onnx at the network's own image size; sizes of the files; and the cosine similarity of
int8's pooled features with those of float32, on real images.

The networks are untrained, except for one that `--trained EXPORT` names: with `--train` and `--test` its k-NN accuracy
is measured by float32 and by int8. Each round times every runtime once, one after the other, so that other work on the
machine affects all of them equally; reported is the median of the ratios within each round, with its quartiles.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import timm
import torch
from about import about
from torch import Tensor

from selfvil.data.index import open_shards
from selfvil.exporting import exported_program, onnx, quantise
from selfvil.exporting.graph import Graph, require_equal, trace
from selfvil.weights import Normalisation, load_export

MODELS = [
    f"{block}_{size}"
    for size in ("nano_patch4_32", "tiny_patch16_224", "small_patch16_224", "base_patch16_224")
    for block in ("vil", "vil_mlp")
]
HALF = (0.5, 0.5, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--trained", help="an export to measure too")
    parser.add_argument("--images", required=True, help="shards on which int8 is compared with float32")
    parser.add_argument("--train", help="labelled shards, for the k-NN accuracy of --trained")
    parser.add_argument("--test")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--num-images", type=int, default=128, help="images on which int8 is compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    quantise.MAX_IMAGES = args.num_images
    rows = []
    for name in [*args.models, *([args.trained] if args.trained else [])]:
        row = measure(name, args)
        print(json.dumps(row), flush=True)
        rows.append(row)
        if args.json is not None:  # after each network, so that a later failure loses none
            facts = about(args, timm=timm.__version__, onnxruntime=onnxruntime.__version__)
            args.json.write_text(json.dumps({**facts, "batch": args.batch, "networks": rows}, indent=1) + "\n")


def measure(name: str, args: argparse.Namespace) -> dict:
    """All figures of one network."""
    parts = None
    if name == args.trained:
        backbone, shown, _ = load_export(name)
        if args.train and args.test:
            parts = open_shards(args.train), open_shards(args.test)
    else:
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=0)
        side = backbone.pretrained_cfg["input_size"][-1]
        shown = Normalisation(HALF, HALF, (side, side))
    backbone.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        graph = Graph(backbone, shown.img_size).eval()
        traced = trace(graph)
        exported_program.write(traced, folder / "model.pt2")
        onnx.write(graph, traced, folder / "model.onnx", {})
        seconds = time.monotonic() - began
        quantise.write(folder / "model.onnx", folder / "int8.onnx")
        found = {
            "network": Path(name).name,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "seconds_to_write": round(seconds, 1),
            "sizes": [graph.img_size, *graph.other_sizes()],
            "difference_pt2": require_equal(
                graph, traced.dynamic, "pt2", exported_program.outputs(folder / "model.pt2")
            ),
            "difference_onnx": require_equal(graph, traced.dynamic, "onnx", onnx.outputs(folder / "model.onnx")),
            "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            "int8": quantise.measure(
                folder / "model.onnx", folder / "int8.onnx", open_shards(args.images), shown, parts, workers=0
            ),
        }
        images = torch.randn(args.batch, shown.channels, *shown.img_size)
        runtimes: dict[str, Callable[[Tensor], object]] = {
            "torch": graph,
            "onnx": onnx.outputs(folder / "model.onnx", args.threads),
            "int8": onnx.outputs(folder / "int8.onnx", args.threads),
        }
        found["speed"] = speed(runtimes, images, args.rounds)
    return found


@torch.inference_mode()
def speed(runtimes: dict[str, Callable[[Tensor], object]], images: Tensor, rounds: int) -> dict:
    """Images per second, and the ratio to torch within each round: median and quartiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(rounds + 1):
        for name, run in runtimes.items():
            began = time.perf_counter()
            run(images)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    found: dict = {}
    for name, times in seconds.items():
        ratios = [torch_time / own for torch_time, own in zip(seconds["torch"], times)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "images_per_second": round(len(images) / statistics.median(times), 2),
            "ratio_to_torch": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return found


if __name__ == "__main__":
    main()
