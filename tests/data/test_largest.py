"""Memory of a data worker for the largest accepted image of each kind: at most what docs/howto/own_data.md states."""

import re
import sys

import pytest

from runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import decoding

CASES = {
    "JPEG": ["JPEG, RGB", "JPEG, RGB, rotated by EXIF"],
    "PNG with a palette": ["PNG, palette", "PNG, palette with alpha to 4 channels"],
    "PNG, 16-bit grey": ["PNG, 16-bit grey to 3 channels"],
    "PNG, 16-bit RGB": ["PNG, 16-bit RGB"],
    "TIFF with 12 or 32 channels": ["TIFF, 12 channels, uint16", "TIFF, 32 channels, uint8, LZW"],
    "NPY": ["NPY, 2 channels, uint16", "NPY, 12 channels, uint16"],
    "DICOM": ["DICOM, uint16"],
}
"""Row of the table in the documentation -> images of `benchmarks/decoding.py`."""


def stated() -> dict[str, float]:
    """Row of the table -> gigabytes."""
    text = (REPOSITORY / "docs" / "howto" / "own_data.md").read_text()
    return {name: float(number) for name, number in re.findall(r"^\| ([^|]+?) \|[^|]*\| ([\d.]+) GB \|$", text, re.M)}


def test_the_documentation_states_every_kind():
    assert stated().keys() == CASES.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("row", "image"), [(row, image) for row, images in CASES.items() for image in images])
def test_memory_is_bounded(row, image):
    if "TIFF" in image:
        pytest.importorskip("tifffile")
    if "DICOM" in image:
        pytest.importorskip("pydicom")
    measured = decoding.measure(image)["gigabytes"]
    assert 0.05 < measured <= stated()[row]
