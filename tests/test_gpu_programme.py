"""`benchmarks/gpu.py`: its commands as on a GPU, the turns of its pieces, and all of it in small on a CPU."""

import argparse
import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runs import REPOSITORY
from selfvil.recipe import load

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import gpu
import gpu_pieces
import gpu_prepare
from gpu_pieces import PIECES, Options, Piece


@pytest.fixture
def folder(tmp_path, digit_shards) -> Path:
    """What gpu_prepare.py makes, with digits in place of CIFAR-10."""
    shards = sorted(digit_shards.glob("**/digits-*.tar"))
    (tmp_path / "gpu" / "cifar10").mkdir(parents=True)
    for part, shard in zip(("train", "test"), shards, strict=True):
        (tmp_path / "gpu" / "cifar10" / f"cifar10-{part}-000000.tar").symlink_to(shard)
    return tmp_path / "gpu"


class Parsed(Exception):
    """Ends a script once it has parsed its arguments."""


def parsed(words: list[str], monkeypatch) -> argparse.Namespace:
    """The arguments of a command, as its script parses them."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **how):
        raise Parsed(parse(self, *args, **how))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", words)
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    return caught.value.args[0]


@pytest.mark.parametrize("tiny", [False, True])
def test_scripts_accept_the_commands_of_all_pieces(tiny, folder, monkeypatch):
    options = Options.find(folder, folder / "out", tiny)
    for name in ("vision-lstm", "mlstm_kernels"):
        (folder / name).mkdir()
    options = Options.find(folder, folder / "out", tiny)
    scripts = set()
    for piece in PIECES:
        assert piece.missing(options) is None
        words = [*piece.command(options), "--json", "figures.json"]
        assert not [word for word in words if "{" in word], piece.name
        if words[0] == "-m":
            continue
        scripts.add(words[0])
        args = parsed(words, monkeypatch)
        assert args.json == Path("figures.json")
        if hasattr(args, "device") and words[1] not in ("device", "tests"):
            assert args.device == ("cpu" if tiny else "cuda")
        recipes = getattr(args, "recipes", []) or getattr(args, "names", [])
        for recipe in [*recipes, *([args.recipe] if hasattr(args, "recipe") else [])]:
            if not recipe.endswith(".py"):
                load(recipe, ["data.train=none", "run.out=unused", *getattr(args, "set", [])])
        for file in [each for each in recipes if each.endswith(".py")]:
            assert (REPOSITORY / file).exists()
    assert len(scripts) == 8
    assert len({piece.name for piece in PIECES}) == len(PIECES)


def stub(name: str, code: str, folder: Path, **how) -> Piece:
    """A piece that runs this code, with its JSON file as `out`."""
    script = folder / f"{name}.py"
    script.write_text(f"import json, sys, time, pathlib\nout = pathlib.Path(sys.argv[-1])\n{code}\n")
    return Piece(name, f"The piece {name}", f"-B {script}", "real", "small", gpu_pieces.facts_table, **how)


WRITE = "out.write_text(json.dumps({'argument': sys.argv[1]}))"


def test_pieces_end_in_all_ways_and_are_tried_again(folder, monkeypatch, capsys):
    once = f"mark = pathlib.Path({str(folder)!r}) / 'mark'\n"
    pieces = [
        stub("good", WRITE, folder),
        stub("broken", "raise SystemExit('no kernel image')", folder),
        stub("slow", "time.sleep(60)", folder),
        stub("long", f"{WRITE}\n{once}done = mark.exists(); mark.touch(); sys.exit(0 if done else 75)", folder),
        stub("scores", WRITE, folder, after="long"),
        stub("odd", "out.write_text('[1')", folder),
    ]
    monkeypatch.setattr(gpu, "PIECES", pieces)
    monkeypatch.setattr(gpu, "LIMIT", 1.5 / 60)
    options = Options.find(folder, folder / "out", tiny=False)
    assert gpu.run(options, gpu.State(options.out), None, None) == 1
    state = json.loads((options.out / "state.json").read_text())
    assert {name: entry["status"] for name, entry in state.items()} == {
        "good": "done", "broken": "failed", "slow": "cut off", "long": "goes on", "odd": "failed",
    }  # fmt: skip
    assert "no kernel image" in (options.out / "broken.log").read_text()
    record = json.loads((options.out / "good.json").read_text())
    assert record["result"] == {"argument": "real"}
    assert record["about"]["torch"]
    assert str(folder) not in json.dumps(record["about"])
    report = (options.out / "report.md").read_text()
    assert "| argument | real |" in report
    assert "its figures cannot be read" in report

    (folder / "broken.py").write_text((folder / "good.py").read_text())
    monkeypatch.setattr(gpu, "PIECES", [piece for piece in pieces if piece.name not in ("slow", "odd")])
    capsys.readouterr()
    assert gpu.run(options, gpu.State(options.out), None, None) == 0
    begun = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("...")]
    assert begun == ["broken", "long", "scores"]
    assert {state.of(piece)["status"] for state in [gpu.State(options.out)] for piece in gpu.PIECES} == {"done"}


def test_a_piece_that_was_killed_with_the_program_runs_again(folder, monkeypatch):
    monkeypatch.setattr(gpu, "PIECES", [stub("good", WRITE, folder, minutes=0.1)])
    options = Options.find(folder, folder / "out", tiny=True)
    state = gpu.State(options.out)
    state.set(gpu.PIECES[0], gpu.RUNNING, 0, 1)
    assert gpu.run(options, gpu.State(options.out), None, 1e-6) == gpu.UNFINISHED, "no time is left for it"
    assert gpu.run(options, gpu.State(options.out), None, 1) == 0
    assert gpu.State(options.out).of(gpu.PIECES[0])["turns"] == 2
    assert json.loads((options.out / "good.json").read_text())["result"] == {"argument": "small"}
    before = (options.out / "good.json").stat().st_mtime_ns
    assert gpu.run(options, gpu.State(options.out), None, None) == 0
    assert (options.out / "good.json").stat().st_mtime_ns == before, "it is done"
    assert gpu.run(options, gpu.State(options.out), ["good"], None) == 0
    assert (options.out / "good.json").stat().st_mtime_ns > before


def test_pieces_without_their_data_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PIECES", [piece for piece in PIECES if piece.name in ("augmentation", "loop")])
    options = Options.find(tmp_path, tmp_path / "out", tiny=False)
    assert gpu.run(options, gpu.State(options.out), None, None) == 0
    assert capsys.readouterr().out.count("shards of CIFAR-10 in FOLDER/cifar10 is missing") == 2


def test_wheels_are_followed_without_those_of_torch(tmp_path, monkeypatch):
    index = {
        "timm": ["torch>=2", "torchvision", "huggingface-hub>=0.3", "pyyaml"], "huggingface-hub": ["PyYAML>=5"],
        "pyyaml": ['nothing; extra == "dev"', "colorama; sys_platform == 'win32'", "triton", "nvidia-nccl-cu13"],
    }  # fmt: skip
    asked = []

    def pip(command, check):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        for word in command[command.index("cp") + 1 :]:
            name = re.match("[a-z-]+", word)[0]
            if name in index:
                asked.append(word)
                with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-6.0-py3-none-any.whl", "w") as wheel:
                    lines = "".join(f"Requires-Dist: {need}\n" for need in index[name])
                    wheel.writestr(f"{name}-6.0.dist-info/METADATA", f"Name: {name}\nVersion: 6.0\n{lines}")

    monkeypatch.setattr(gpu_prepare.subprocess, "run", pip)
    args = argparse.Namespace(folder=tmp_path, python="3.12", machine="x86_64", torch=False)
    gpu_prepare.download(args, ["timm>=1", "torch>=2.10"])
    assert asked == ["timm>=1", "huggingface-hub>=0.3", "pyyaml"]
    assert len(list((tmp_path / "wheels").iterdir())) == 3
    index["huggingface-hub"] = ["PyYAML<6"]
    with pytest.raises(SystemExit, match=r"(?i)pyyaml 6.0 was chosen, but PyYAML<6 is needed"):
        gpu_prepare.download(args, ["timm>=1", "torch>=2.10"])
    assert any(need.startswith("timm") for need in gpu_prepare.needs())


def test_prepared_shards_are_found(tmp_path):
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    for part, count in (("train", 3), ("test", 1)):
        for number in range(count):
            (tmp_path / "data" / "cifar10" / f"cifar10-{part}-{number:06d}.tar").write_text(part)
    (tmp_path / "gpu").mkdir()
    assert gpu_prepare.copy_shards(tmp_path / "data", tmp_path / "gpu", 0.5) == 3
    options = Options.find(tmp_path / "gpu", tmp_path / "out", tiny=False)
    assert options.train is not None
    assert options.test is not None
    with pytest.raises(SystemExit, match=r"has no cifar10-train-\*.tar"):
        gpu_prepare.copy_shards(tmp_path, tmp_path / "gpu", 0.5)


def rehearse(folder: Path, *only: str) -> dict:
    """Run pieces in small, as the command line does; the state."""
    where = ["--folder", str(folder), "--out", str(folder / "out")]
    command = [sys.executable, "benchmarks/gpu.py", "run", "--tiny", *where, *(["--only", *only] if only else [])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    logs = {path.name: path.read_text()[-2000:] for path in (folder / "out").glob("*.log")}
    state = json.loads((folder / "out" / "state.json").read_text())
    bad = {name: logs.get(f"{name}.log") for name, entry in state.items() if entry["status"] != "done"}
    assert not bad, f"{done.stdout}{done.stderr}{bad}"
    assert done.returncode == 0
    return state


def test_a_rehearsal_of_a_quick_piece(folder):
    assert set(rehearse(folder, "device")) == {"device"}
    assert "| triton |" in (folder / "out" / "report.md").read_text()
    unknown = [sys.executable, "benchmarks/gpu.py", "run", "--folder", str(folder), "--only", "devices"]
    done = subprocess.run(unknown, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no piece devices; choose from: device, guard" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_of_everything(folder):
    pytest.importorskip("triton", reason="the package triton is not installed: its kernels are not rehearsed")
    assert set(rehearse(folder)) == {piece.name for piece in PIECES}
