"""`selfvil export --int8`: dynamic quantisation of the ONNX file, and what it costs in accuracy.

The weights of linear maps are stored as 8-bit integers, one scale for each output; inputs of these maps are quantised
while the graph runs, so that no calibration is needed. All other operations, the mLSTM among them, stay in float32.
(`onnxruntime.quantization.quantize_dynamic`.)

The cost is measured on real images: cosine similarity of pooled features with those of the float32 file, and, if
labelled shards are given, the k-NN accuracy of both.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvil.data.base import Images
from selfvil.data.loader import ordered_batches
from selfvil.data.views import CenterCrop
from selfvil.errors import UserError
from selfvil.evaluate.features import labelled_rows
from selfvil.evaluate.knn import knn
from selfvil.exporting import onnx
from selfvil.exporting.graph import Outputs
from selfvil.weights import Normalisation

FILE = "model.int8.onnx"
MAX_IMAGES = 512
"""Images on which features are compared."""
K = 20
OPERATIONS = ["MatMul", "Gemm"]
BATCH = 32


def write(source: Path, file: Path) -> None:
    """Quantise the ONNX file `source` and write the result to `file`."""
    import onnx as packages
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as temporary:
        # Only weights that are stored as such are quantised: those computed from others are computed first.
        folded = Path(temporary) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        # onnxruntime multiplies integers by matrices only: the block-diagonal maps to q, k and v stay in float32.
        graph = packages.load(folded).graph
        weights = {weight.name: len(weight.dims) for weight in graph.initializer}
        linear = [node.name for node in graph.node if node.op_type in OPERATIONS and weights.get(node.input[1]) == 2]
        root.setLevel(logging.ERROR)  # onnxruntime recommends its own preprocessing, which this replaces
        try:
            quantize_dynamic(
                folded,
                file,
                op_types_to_quantize=OPERATIONS,
                nodes_to_quantize=linear,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            root.setLevel(level)


def measure(
    source: Path,
    file: Path,
    images: Images,
    normalisation: Normalisation,
    labelled: tuple[Images, Images] | None = None,
    workers: int = 2,
) -> dict[str, Any]:
    """The cost of quantisation, as plain values for config.json and card.

    Args:
        source, file: the float32 and the int8 ONNX file.
        images: whose first MAX_IMAGES are compared.
        labelled: training and test images, for k-NN accuracy.

    Raises UserError if features are not finite, or no image can be read.
    """
    both = {"float32": onnx.outputs(source), "int8": onnx.outputs(file)}
    cosines = torch.cat(
        [
            F.cosine_similarity(both["float32"](x)[0], both["int8"](x)[0])
            for x in _batches(images, normalisation, workers)
        ]
    )
    if not len(cosines) or not torch.isfinite(cosines).all():
        raise UserError(f"{FILE}: the features of {len(cosines)} images are not finite. Leave out --int8.")
    found: dict[str, Any] = {
        "bytes_of_float32": source.stat().st_size,
        "bytes": file.stat().st_size,
        "images": len(cosines),
        "cosine_mean": round(float(cosines.mean()), 5),
        "cosine_lowest": round(float(cosines.min()), 5),
    }
    if labelled is not None:
        found["knn"] = {"k": K, "train_images": len(labelled[0]), "test_images": len(labelled[1])} | {
            name: round(_accuracy(run, labelled, normalisation, workers), 2) for name, run in both.items()
        }
    return found


def _batches(images: Images, shown: Normalisation, workers: int) -> Sequence[Tensor]:
    """Batches of the first images, normalised."""
    view = CenterCrop(shown.img_size, shown.mean, shown.std)
    chosen, count = [], 0
    for batch in ordered_batches(images, view, batch_size=BATCH, workers=workers, channels=shown.channels):
        kept = batch.views[0][: MAX_IMAGES - count]
        chosen.append(kept)
        count += len(kept)
        if count >= MAX_IMAGES:
            break
    return chosen


def _accuracy(run: Outputs, labelled: tuple[Images, Images], shown: Normalisation, workers: int) -> float:
    """k-NN accuracy of pooled features in percent."""
    view = CenterCrop(shown.img_size, shown.mean, shown.std)

    def row(images: Tensor) -> Tensor:
        return run(images)[0]

    train, test = (labelled_rows(row, part, view, shown.channels, BATCH, workers, None) for part in labelled)
    assert train is not None, "one process has all rows"
    assert test is not None, "one process has all rows"
    return knn(train, test, [K])[K]
