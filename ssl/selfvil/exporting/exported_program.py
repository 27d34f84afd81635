"""`selfvil export --torch-export`: the graph of `selfvil.exporting.graph` as a file of `torch.export`.

`torch.export.load(FILE).module()` runs it where this package is not installed. torch unpickles parts of such a file, so
that a file from an untrusted source can run code when it is loaded. This package loads only files that it has just
written itself.
"""

import io
import warnings
from pathlib import Path

import torch

from selfvil.exporting.graph import Outputs, Traced

FILE = "model.pt2"


def write(traced: Traced, file: Path) -> None:
    """Write the recorded program to `file`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(traced.program, buffer)
    file.write_bytes(buffer.getvalue())


def outputs(file: Path) -> Outputs:
    """The program in a file that `write` has just written, as a function of the images."""
    return torch.export.load(file).module()
