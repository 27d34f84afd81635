"""Studies: their files are valid, they run and continue, and their tables are right."""

import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import runs
from selfvil.build import build_objective
from selfvil.recipe import load

SCRIPT = runs.REPOSITORY / "benchmarks" / "studies.py"
STUDIES = sorted(path.stem for path in SCRIPT.with_suffix("").glob("*.yaml"))


@pytest.fixture(scope="module")
def studies():
    sys.path.insert(0, str(SCRIPT.parent))  # for its neighbour about.py
    try:
        spec = importlib.util.spec_from_file_location("studies_script", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def tiny(digit_shards, tmp_path) -> Path:
    """Two rows of 80 digits, scored by k-NN."""
    file = tmp_path / "tiny.yaml"
    common = [
        word for word in runs.overrides("mae", digit_shards, tmp_path) if not word.startswith(("run.out", "data.train"))
    ]
    file.write_text(yaml.safe_dump({
        "about": "two mask ratios", "train": "digits-*.tar", "fit": "digits-000000.tar", "test": "digits-000001.tar",
        "samples": 80, "precision": "fp32", "set": [*common, "run.checkpoint_every=1"], "baseline": "plain",
        "untrained": ["plain"], "evaluate": {"frozen": ["knn", "k=[5,20]"]},
        "rows": {"plain": {"recipe": "demo"}, "half": {"recipe": "demo", "set": ["objective.mask_ratio=0.5"]}},
    }, sort_keys=False))  # fmt: skip
    return file


def command(study: Path | str, data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "run", str(study), "--data", str(data), "--out", str(out), *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(runs.REPOSITORY / "ssl"), "OMP_NUM_THREADS": "1"}


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(list(words), capture_output=True, text=True, timeout=300, env=environment())


def in_process(studies, monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit status and output of the script, in this process; its runs are processes of their own."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    capsys.readouterr()
    try:
        studies.main()
    except SystemExit as ended:
        return ended.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.mark.parametrize("rows", [["plain"], pytest.param(["plain", "half"], marks=pytest.mark.slow)], ids=len)
def test_a_study_runs_once_and_its_figures_say_how(studies, tiny, digit_shards, tmp_path, monkeypatch, capsys, rows):
    script = [studies, monkeypatch, capsys]
    words = command(tiny, digit_shards, tmp_path / "out", "--json", str(tmp_path / "figures.json"), "--rows", *rows)[2:]
    assert in_process(*script, *words, "--pause-minutes", "0.0001")[0] == 75
    status, first = in_process(*script, *words)
    assert status == 0
    assert first.count("$ selfvil") == 2 * len(rows)
    status, table = in_process(*script, *words)
    assert "$ selfvil" not in table
    assert table in first
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {row["row"] for row in found["rows"]} == set(rows)
    assert {row["network"] for row in found["rows"]} == {"pretrained", "untrained", "raw pixels"}
    for row in found["rows"]:
        assert row["command"].startswith("selfvil pretrain demo data.train=DATA/digits-*.tar run.out=OUT/")
        assert str(tmp_path) not in json.dumps(row)
        assert {"seed", "trained_at", "processor"} <= row.keys()
        assert row["processor_seconds"] > 0.5
        assert row["whole_time"]
        assert row["network"] != "pretrained" or row["samples_seen"] == 80
    value = {row["row"]: row["value"] for row in found["rows"]
             if row["network"] == "pretrained" and row["protocol"].startswith("k-NN, k = 20")}  # fmt: skip
    lines = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert f"{value['plain']:.2f} |" in lines["| plain"]
    for row in rows[1:]:
        assert f"{value[row]:.2f} ({value[row] - value['plain']:+.2f})" in lines[f"| {row}"]
    assert in_process(*script, "table", str(tmp_path / "figures.json"))[1] == table


@pytest.mark.parametrize(
    ("more", "plain", "half"), [([], 80, 160), (["--samples", "40"], 40, 40), (["--processor-minutes", "2"], 600, 600)]
)
def test_a_row_may_have_its_own_number_of_images(studies, tiny, tmp_path, monkeypatch, more, plain, half):
    tree = yaml.safe_load(tiny.read_text())
    tree["rows"]["half"] |= {"samples": 160, "rate_of": "plain"}
    tiny.write_text(yaml.safe_dump(tree, sort_keys=False))
    found = []
    monkeypatch.setattr(studies.Runner, "run", lambda self: found.append(self))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command(tiny, tmp_path, tmp_path, *more)[2:]])
    (tmp_path / "rates.json").write_text('{"plain": 5.0}')
    with pytest.raises(SystemExit):
        studies.main()
    assert [found[0].samples(name) for name in ("plain", "half")] == [plain, half]


@pytest.mark.slow
def test_a_killed_study_continues(tiny, digit_shards, tmp_path):
    """Killed with its children while the first row trains; the result is that of an uninterrupted study."""
    long = ["--samples", "2000", "--rows", "plain"]
    words = command(tiny, digit_shards, tmp_path / "killed", *long)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=environment(), start_new_session=True, **quiet)
    checkpoints = tmp_path / "killed" / "plain" / "seed-0" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for name in ("killed", "whole"):
        done = run(*command(tiny, digit_shards, tmp_path / name, *long, "--json", str(tmp_path / f"{name}.json")))
        assert done.returncode == 0, done.stderr
    runs.assert_same_state(*(tmp_path / name / "plain" / "seed-0" for name in ("killed", "whole")))
    killed, whole = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("killed", "whole"))
    assert [row["value"] for row in killed] == [row["value"] for row in whole]
    assert not killed[0]["whole_time"], "the time of the killed piece is not known"
    assert killed[0]["pieces"] == 2


def test_rates_are_measured_once_and_shared(studies, tiny, digit_shards, tmp_path):
    tree = yaml.safe_load(tiny.read_text()) | {"samples": None, "processor_minutes": 0.5}
    tree["rows"]["half"]["rate_of"] = "plain"
    tiny.write_text(yaml.safe_dump(tree))
    done = run(*command(tiny, digit_shards, tmp_path / "out", "--rates-only"))
    assert done.returncode == 0, done.stderr
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert list(rates) == ["plain"]
    assert 10 < rates["plain"] < 100_000
    assert not (tmp_path / "out" / "plain").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_of_every_study_can_be_built(studies, name):
    study = studies.read_study(name)
    for row in study.rows.values():
        build_objective(load(row.recipe, [*study.set, *row.set]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samples": None}, "a study has one budget"),
        ({"baseline": "other"}, "other is not one of the rows: plain, half"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_studies_are_refused(studies, tiny, change, expected):
    tiny.write_text(yaml.safe_dump(yaml.safe_load(tiny.read_text()) | change, sort_keys=False))
    with pytest.raises(SystemExit) as caught:
        studies.read_study(str(tiny))
    assert expected in str(caught.value)


def test_an_unknown_study_is_refused_with_the_known_ones(studies):
    with pytest.raises(SystemExit, match="choose one of: ablations, bakeoff"):
        studies.read_study("unknown")


def figure(row: str, seed: int, value: float, protocol: str = "linear probe", network: str = "pretrained") -> dict:
    return {"row": row, "seed": seed, "value": value, "protocol": protocol, "network": network, "evaluation": "frozen",
            "samples_seen": 1000 if network == "pretrained" else 0, "processor_seconds": 60.0}  # fmt: skip


def test_the_table_has_means_deviations_differences_and_the_paired_test(studies):
    ours, theirs = [41.0, 43.5, 42.0], [40.0, 41.5, 41.0]
    rows = [figure("base", seed, value) for seed, value in enumerate(theirs)]
    rows += [figure("new", seed, value) for seed, value in enumerate(ours)]
    rows += [figure("new", 0, 30.0, "k-NN, k = 20"), figure("new", 0, 31.0, "k-NN, k = 200")]
    rows += [figure("base", 0, 35.0, network="untrained")]
    lines = studies.markdown({"rows": rows, "baseline": "base"}).splitlines()
    assert lines[0] == "| row | seeds | images | processor s | k-NN, k = 20 | linear probe |"
    table = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    differences = [a - b for a, b in zip(ours, theirs)]
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t * t)  # Student's t with two degrees of freedom, both sides
    assert table["new"].startswith("| new | 3 | 1,000 | 60 | 30.00 | 42.17 ± 1.26 (+1.33, p = ")
    assert float(table["new"].rsplit("p = ", 1)[1].split(")")[0]) == pytest.approx(p, rel=0.01)
    assert table["base"].endswith("|  | 40.83 ± 0.76 |")
    assert table["*untrained, base*"].endswith("|  | 35.00 |")
    few = [
        figure("base", 0, 20.0) | {"evaluation": "few"},
        figure("base", 0, 25.0, "fine-tuning, 2 epochs") | {"evaluation": "few"},
    ]
    lines = studies.markdown({"rows": rows + few, "baseline": "base"}).splitlines()
    assert lines[0].endswith("| k-NN, k = 20 | linear probe | linear probe (few) | fine-tuning (few) |")
    assert "| 40.83 ± 0.76 | 20.00 | 25.00 |" in lines[3] + lines[2]
    assert studies.paired_p([1.0], [2.0]) is None
    assert studies.paired_p([1.0, 2.0], [2.0, 3.0]) is None
