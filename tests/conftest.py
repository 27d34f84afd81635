"""Fixtures of all tests: real images if they are present, and small shards of scikit-learn's digits."""

import os
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch

import runs
import selfvil  # noqa: F401 - registers the vil_* models with timm

REPOSITORY = Path(__file__).resolve().parents[1]
# Tests change XDG_CACHE_HOME; the CPU kernels are built once, in the user's cache folder.
os.environ.setdefault("SELFVIL_CACHE", os.path.expanduser("~/.cache/selfvil"))
SHARED_DATA = Path(os.environ.get("SELFVIL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


# What starts tests in the background (nohup, a script's &) may have these ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _quiet_and_seeded(tmp_path_factory, monkeypatch):
    """Every test starts with the same seed, and does not write shard indexes into the user's cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """Folder with the real shards (cifar10, photos, camvid); the test is skipped with a message if they are absent.

    It holds links, so that indexes are written beside these, and never into the user's own folder.
    """
    if not (SHARED_DATA / "cifar10").is_dir():
        warnings.warn(f"no real images in {SHARED_DATA}: set SELFVIL_TEST_DATA to their folder", stacklevel=1)
        pytest.skip(f"real images are missing ({SHARED_DATA})")
    links = tmp_path_factory.mktemp("shared_data")
    for file in SHARED_DATA.glob("*/*"):
        if file.suffix in (".tar", ".txt"):
            (links / file.parent.name).mkdir(exist_ok=True)
            (links / file.parent.name / file.name).symlink_to(file.resolve())
    return links


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory) -> Path:
    """Folder with digits-000000.tar and digits-000001.tar: 200 real, labelled 8x8 images, packed by our packer."""
    return runs.pack_digits(tmp_path_factory.mktemp("digits"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """On CI every package is installed, so a test that is skipped for a missing one is a failure."""
    report = yield
    if os.environ.get("SELFVIL_NO_MISSING_PACKAGES") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if re.search(r"could not import|No module named|not installed", reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped for want of a package: {reason}"
    return report
