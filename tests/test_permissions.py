"""Every written file and folder has the permissions of the umask, so that colleagues can read them if it allows."""

import os
import stat

import numpy as np
import pytest
from PIL import Image

import runs
from selfvil import cli
from selfvil.pretrain import pretrain


def run_command(*arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code in (0, None)


@pytest.fixture(params=[0o022, 0o077], ids=["umask-022", "umask-077"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_written_file_has_the_permissions_of_the_umask(tmp_path, umask, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    shards, test, run, exported = (tmp_path / name for name in ("shards", "test", "runs/mae", "exports/mae"))
    for folder in (shards, test):
        photos = tmp_path / "photos" / folder.name
        for index in range(12):
            file = photos / str(index % 2) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (8, 8), dtype=np.uint8)).save(file)
        (photos / "0" / "broken.png").write_bytes(b"no image")
        run_command("pack", photos, folder, "--name", "digits", "--workers", 1)
    run_command("index", shards)
    more = ["budget.steps=2", "optim.batch_size=8", "monitor.tensorboard=true", "monitor.pictures_every=1",
            "monitor.doctor_every=1",
            f"eval.knn.train={shards}/digits-*.tar", f"eval.knn.test={test}/digits-*.tar"]  # fmt: skip
    assert pretrain(runs.small("mae", shards, run, *more)).finished
    run_command("report", run, "--curve", tmp_path / "curves" / "loss.png")
    run_command("export", run, exported, "--heads")
    run_command("eval", "knn", exported, "--train", shards, "--test", test, "--workers", 0, "--json",
                tmp_path / "scores" / "knn.json")  # fmt: skip

    written = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "photos")]
    assert {"model.safetensors", "heads.safetensors", "manifest.json", "objective.safetensors", "knn.json", "loss.png",
            "report.html", "metrics.jsonl", "run.json", "skipped.txt"} <= {path.name for path in written}  # fmt: skip
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in written
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong
