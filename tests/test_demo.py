"""The code that the demo prints works."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import timm

import runs
from selfvil.export import export
from selfvil.pretrain import pretrain
from selfvil.recipe import load


def demo():
    spec = importlib.util.spec_from_file_location("demo", runs.REPOSITORY / "launch" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lines_that_load_the_export_work_in_a_new_python(digit_shards, tmp_path):
    pretrain(runs.small("mae", digit_shards, tmp_path / "run", "budget.steps=1"))
    export(tmp_path / "run", tmp_path / "export")
    lines = demo().use(Path(tmp_path))
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert timm.is_model("vil_nano_patch4_32")


def test_the_curve_of_the_demo_has_many_points():
    recipe = load("demo")
    assert recipe.budget.total_steps(1297, recipe.optim.batch_size) / recipe.monitor.log_every > 20
