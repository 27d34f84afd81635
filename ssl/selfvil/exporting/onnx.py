"""`selfvil export --onnx`: the graph of `selfvil.exporting.graph` as one ONNX file, for onnxruntime and other runtimes.

The file needs neither torch nor this package. Its metadata holds, under the key "selfvil", the names and sizes of the
input and the outputs and the normalisation of the images, as JSON.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfvil.errors import UserError
from selfvil.exporting.graph import INPUT, Graph, Outputs, Traced

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_DIMENSIONS = {INPUT: ("batch", None, "height", "width"), "patches": ("batch", None, "rows", "columns")}


def require_packages() -> None:
    """Raise UserError unless what writes and runs ONNX files is installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ONNX files need {' and '.join(missing)}, which are not installed: pip install 'selfvil[onnx]'."
        )


def write(graph: Graph, traced: Traced, file: Path, facts: dict[str, Any]) -> None:
    """Write the graph to `file`, with `facts` in its metadata. Raises UserError if the exporter cannot convert it."""
    import onnx

    try:
        with _quiet():
            torch.onnx.export(
                traced.program, (), file, dynamo=True, verbose=False, external_data=False,
                input_names=[INPUT], output_names=graph.names,
            )  # fmt: skip
    except Exception as error:  # torch and onnxscript raise many classes, most of them private
        reason = " ".join(str(error).split())[-300:]
        raise UserError(f"torch.onnx {torch.__version__} cannot convert the network: ... {reason}") from error
    model = onnx.load(file)
    for node in [*model.graph.node, *model.graph.value_info, *(n for f in model.functions for n in f.node)]:
        del node.metadata_props[:]  # they hold paths of this machine
        node.doc_string = ""
    del model.graph.value_info[:]  # with names of dimensions that are replaced here; runtimes infer these shapes
    for value in [*model.graph.input, *model.graph.output]:
        names = _DIMENSIONS.get(value.name, ("batch",))
        for dimension, name in zip(value.type.tensor_type.shape.dim, names):
            if name is not None and dimension.dim_param:
                dimension.dim_param = name
    onnx.helper.set_model_props(model, {"selfvil": json.dumps(facts)})
    onnx.checker.check_model(model)
    onnx.save(model, file)


def outputs(file: Path, threads: int | None = None) -> Outputs:
    """A function that runs an ONNX file on the CPU: images (B, in_chans, height, width) to its outputs.

    threads: None takes torch's number.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {INPUT: images.numpy()})]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of the exporter that concern only its developers."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
