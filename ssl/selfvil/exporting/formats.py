"""Which formats there are, what each one needs, and writing them. Each file is read again and compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selfvil.data.base import Images
from selfvil.data.images import open_images
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_classes
from selfvil.evaluate.knn import require_neighbours
from selfvil.exporting import exported_program, onnx, published, quantise
from selfvil.exporting.graph import Graph, Traced, describe_input, require_equal, trace
from selfvil.weights import Normalisation

ONNX, TORCH_EXPORT, PUBLISHED, INT8 = "onnx", "torch-export", "published", "int8"
FORMATS = (ONNX, TORCH_EXPORT, PUBLISHED, INT8)


@dataclass(frozen=True)
class Labelled:
    """Real images that measure the cost of int8. parts: training and test images, for k-NN accuracy."""

    images: Images
    parts: tuple[Images, Images] | None


def require_formats(formats: Sequence[str]) -> None:
    """Raise UserError for a format that does not exist, or whose packages are missing."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"There is no format {name!r}; choose one of: {', '.join(FORMATS)}.")
    if ONNX in formats or INT8 in formats:
        onnx.require_packages()


def open_labelled(images: str | None, train: str | None, test: str | None, pretraining: str | None) -> Labelled:
    """The images that measure int8's cost: `images`, or those of `test`, or those of pretraining.

    Raises UserError if none can be opened, only one of `train` and `test` is given, or they do not fit each other.
    """
    if (train is None) != (test is None):
        raise UserError("The k-NN accuracy of --int8 needs both --train and --test, labelled shards.")
    parts = None
    if train is not None and test is not None:
        parts = open_images(train), open_images(test)
        check_classes(*parts)
        require_neighbours(len(parts[0]), [quantise.K])
    if images is None and parts is not None:
        return Labelled(parts[1], parts)
    if images is None and pretraining is None:
        raise UserError("--int8 measures its cost in accuracy on real images: give --images SHARDS.")
    try:
        return Labelled(open_images(str(images or pretraining)), parts)
    except UserError as error:
        if images is not None:
            raise
        raise UserError(
            f"--int8 measures its cost in accuracy on real images, and those of pretraining cannot be opened: give "
            f"--images SHARDS. {error}"
        ) from None


def write_formats(
    folder: Path,
    backbone: Any,
    normalisation: Normalisation,
    formats: Sequence[str],
    labelled: Labelled | None = None,
    workers: int = 2,
) -> dict[str, dict[str, Any]]:
    """Write the files of `formats` into `folder`; return the facts of each as plain values.

    backbone: a timm network in evaluation mode on the CPU. labelled: needed for int8. int8 also writes the ONNX file.

    Raises UserError if a format cannot hold the network, or a file does not return what the network does.
    """
    files: dict[str, dict[str, Any]] = {}
    if PUBLISHED in formats:
        found = published.describe(backbone)
        published.write(backbone, folder / published.FILE)
        files[published.FILE] = found._asdict()
    if not {ONNX, INT8, TORCH_EXPORT} & {*formats}:
        return files
    graph = Graph(backbone, normalisation.img_size).eval()
    traced = trace(graph)
    if TORCH_EXPORT in formats:
        exported_program.write(traced, folder / exported_program.FILE)
        outputs = exported_program.outputs(folder / exported_program.FILE)
        files[exported_program.FILE] = _compared(graph, traced, normalisation, exported_program.FILE, outputs)
    if ONNX in formats or INT8 in formats:
        facts = describe_input(graph, traced.dynamic, normalisation)
        onnx.write(graph, traced, folder / onnx.FILE, facts)
        outputs = onnx.outputs(folder / onnx.FILE)
        files[onnx.FILE] = _compared(graph, traced, normalisation, onnx.FILE, outputs)
    if INT8 in formats:
        assert labelled is not None
        source, file = folder / onnx.FILE, folder / quantise.FILE
        quantise.write(source, file)
        files[quantise.FILE] = quantise.measure(source, file, labelled.images, normalisation, labelled.parts, workers)
    return files


def _compared(graph: Graph, traced: Traced, shown: Normalisation, file: str, outputs: Any) -> dict[str, Any]:
    difference = require_equal(graph, traced.dynamic, file, outputs)
    return describe_input(graph, traced.dynamic, shown) | {"largest_difference": difference, "note": traced.note}


def require_possible(backbone: nn.Module, formats: Sequence[str]) -> None:
    """Raise UserError for a format that cannot hold this network, before anything is written."""
    if PUBLISHED in formats:
        published.describe(backbone)
