"""Runs timm's own tests on our models: tests/test_models.py of the checkout, or source archive from PyPI, in
SELFVIL_TIMM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

NOT_POSSIBLE = {
    "pretrained": "it downloads the published files",
    "torchscript": "the operator is a custom operator of torch, for which torch.export has taken TorchScript's place",
}
NAMES = timm.list_models("vil_*")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_timm_tests_pass(name, tmp_path):
    folder = os.environ.get("SELFVIL_TIMM")
    if not folder:
        pytest.skip("SELFVIL_TIMM does not name a checkout of huggingface/pytorch-image-models")
    source = (Path(folder) / "tests" / "test_models.py").read_text()
    # Add our names to timm's, and our module to those whose forward_intermediates is tested.
    source, changed = re.subn("^import timm$", "import selfvil, timm", source, flags=re.MULTILINE)
    source, listed = re.subn(r"^FEAT_INTER_FILTERS = \[", "FEAT_INTER_FILTERS = ['vil',", source, flags=re.MULTILINE)
    assert (changed, listed) == (1, 1)
    (tmp_path / "test_models.py").write_text(source)
    # A parameter's id is [batch-name] or [batch-name.tag].
    chosen = " and ".join([name, *(f"not {word}" for word in NOT_POSSIBLE)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-k", chosen, "test_models.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout)
