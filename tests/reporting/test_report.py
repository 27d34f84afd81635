"""What the page contains: for runs in every state, with hostile names and values, against slow references."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import selfvil
from selfvil.cli import main
from selfvil.errors import UserError
from selfvil.reporting import elements
from selfvil.reporting.charts import (
    MOST_POINTS,
    Chart,
    Line,
    Mark,
    draw,
    draw_intervals,
    short,
    smoothed,
    thinned,
    window,
)
from selfvil.reporting.compare import differing_settings, findings, read_protocols, wilson
from selfvil.reporting.elements import element
from selfvil.reporting.report import report
from selfvil.reporting.runs import distinct_names, number, read_runs


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of <script> and <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._raw = "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        self.text += "" if self._raw else data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


@pytest.fixture
def copied(three, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / "copies" / run.name)) for run in three]


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


# --- the page --------------------------------------------------------------------------------------------------------


def test_three_runs_are_compared(three, tmp_path):
    page = selfvil.report(three, tmp_path / "page.html").read_text()
    parsed = Parsed(page)
    text = " ".join(parsed.text.split())
    assert "Linear probe (top-1 accuracy; 120 train, 80 test images): A mae is best with 60.0" in text
    assert "next is B with 41.0" in text
    assert "How A differs from B: optim.base_lr 0.004 instead of 0.02." in text
    assert "Loss of mae: " in text
    assert "after 240 images" in text
    assert "different numbers of images: A 240, B 240, C 60." in text
    assert "Losses of different objectives" in text
    assert "objective.mask_ratio" in text  # a key of mae alone
    assert "road" in text
    assert "Not shown: the run took no vital signs" not in text
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    links = [attributes.get(key) for _, attributes in parsed.tags for key in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links if link is not None)
    assert len(page) < 3e6
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_runs_in_every_state_are_shown(copied, tmp_path):
    """Killed with an incomplete line, without metrics, without checkpoint and run.json, with damaged lines."""
    killed, empty, bare = copied
    metrics = (killed / "metrics.jsonl").read_text().splitlines()
    damaged = [*metrics[:3], "{]", json.dumps({"step": 2, "kind": "train", "loss": "high"}), *metrics[3:]]
    (killed / "metrics.jsonl").write_text("\n".join(damaged)[:-20])
    record = json.loads((killed / "run.json").read_text())
    record["summary"] = None
    del record["launches"][0]["ended"]
    (killed / "run.json").write_text(json.dumps(record))
    (killed / "pictures" / "step-00000006.png").write_bytes(b"\x89PNG no picture")
    for name in ("metrics.jsonl", "scores.json"):
        (empty / name).unlink()
    (bare / "run.json").unlink()
    shutil.rmtree(bare / "checkpoints")
    shutil.rmtree(bare / "pictures")
    text = " ".join(Parsed(report(copied, tmp_path / "page.html").read_text()).text.split())
    for sentence in (
        "Killed, or running on another machine, at step ",
        "The last line of metrics.jsonl is incomplete, as after a kill; that record is left out.",
        "2 of 12 lines of metrics.jsonl are damaged and left out.",
        "There is no metrics.jsonl: the run has not begun, or the file was removed.",
        "run.json is missing or damaged, so device, versions and command are not known.",
        "Not shown: there is no checkpoint yet: the run saves one every 5 steps",
        "Not shown: step-00000006.png cannot be read",
        "Not shown: nothing to judge: there are no metrics",
    ):
        assert sentence in text, sentence
    for folder in copied:  # each of them alone too
        assert report(folder).read_text().startswith("<!DOCTYPE html>")
    for folder in copied:
        (folder / "metrics.jsonl").write_text("")
    assert "holds no training metrics yet" in report(copied, tmp_path / "page.html").read_text()


def test_no_text_becomes_markup(copied, tmp_path):
    attack = "<script>alert(1)<img src=x onerror=alert(2)>&lt;'\""
    run = copied[0].rename(copied[0].with_name(attack.replace("/", "")))
    record = json.loads((run / "run.json").read_text())
    record["launches"][0] |= {"device": attack, "command": f"</pre></style>{attack}", "versions": {attack: attack}}
    (run / "run.json").write_text(json.dumps(record))
    rows = [{"protocol": attack, "measure": attack, "network": attack, "value": 3, "details": {attack: attack}}]
    (run / "scores.json").write_text(json.dumps(rows))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "kind": "eval", f'{attack}" onload="alert(3)': 3.0}) + "\n")
        file.write(json.dumps({"step": 6, "kind": "train", "lr": 1, "samples": 240, "epoch": 1, attack: 2}) + "\n")
    for folders in ([run], [run, copied[1]]):
        parsed = Parsed(report(folders, tmp_path / "page.html").read_text())
        assert parsed.count("script") == parsed.count("style") == 1
        assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
        assert all(
            attributes["src"].startswith("data:image/png;base64,") for tag, attributes in parsed.tags if tag == "img"
        )
        assert parsed.text.count(attack) >= 6


def test_text_that_no_file_can_hold_is_replaced():
    """A folder's name may hold any bytes; Python reads those that are not UTF-8 as lone surrogates."""
    page = elements.page("a\udcff\x00\x1b", [], [element("section", element("h2", "x"), id="x")])
    assert "a\ufffd\ufffd\ufffd" in page
    page.encode()


def test_impossible_values_are_left_out(copied, tmp_path):
    """NaN, infinity, numbers beyond every chart, and numbers that are no numbers."""
    run = copied[0]
    with (run / "metrics.jsonl").open("a") as file:
        for value in ("NaN", "-Infinity", "1e999", "1" + "0" * 400, "1e308", "true", '"text"'):
            file.write(f'{{"step": 7, "kind": "train", "lr": {value}, "samples": 280, "epoch": 0, "loss": {value}}}\n')
            file.write(
                f'{{"step": 7, "kind": "doctor", "typical_weight": 0.0, "speed": {value}, "rank_share": {value}}}\n'
            )
            file.write(f'{{"step": 7, "kind": "eval", "knn_20": {value}}}\n')
    row = {"protocol": "p", "test_images": -3, "interval": ["low", None]}
    (run / "scores.json").write_text(json.dumps([row | {"value": value} for value in (math.nan, "x", None, 1e300, 50)]))
    text = report(run, tmp_path / "page.html").read_text()
    drawn = re.findall(r'<path d="([^"]+)"', text)
    assert len(drawn) > 50
    assert all(re.fullmatch(r"(?:[MLHVh]-?[\d.]+(?: -?[\d.]+)?)+", path) for path in drawn)


# --- what is compared ------------------------------------------------------------------------------------------------


def test_the_interval_is_wilsons():
    for hits, count in ((0, 10), (37, 80), (80, 80), (7030, 10_000)):
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(100 * hits / count, count) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)


def test_scores_of_the_same_protocol_are_compared(three):
    runs = read_runs(three)
    protocols = {protocol.name: protocol for protocol in read_protocols(runs)}
    probe = protocols["linear probe"]
    assert [(score.run.letter, score.value) for score in probe.pretrained()] == [("A", 60.0), ("B", 41.0)]
    assert probe.scores[0].computed
    assert [(score.low, score.high) for score in protocols["linear head"].scores] == [(18.5, 21.0)] * 2
    assert protocols["k-NN, k = 20"].pretrained()[0].seen == 240
    found = {finding.what: finding for finding in findings(runs, list(protocols.values()))}
    low, high = wilson(60, 80)[0], wilson(41, 80)[1]
    assert low < high
    assert "intervals overlap, so the difference may be chance" in found[probe.title].text
    assert "and B have the same score" in found["linear head (mean IoU)"].text
    assert sum("k-NN" in what for what in found) == 1


def test_settings_that_differ_are_all_found_and_no_others(three):
    runs = read_runs(three)
    assert [(each.key, each.values) for each in differing_settings(runs[:2])] == [("optim.base_lr", ["0.004", "0.02"])]
    shown = {each.key: each.values for each in differing_settings(runs)}
    assert shown["optim.batch_size"] == ["40", "40", "20"]
    assert shown["objective.name"] == ["mae", "mae", "dino"]
    assert shown["objective.mask_ratio"][2] is None
    assert "run.out" not in shown


def test_positions_on_every_axis(three):
    """Images from the records; time from the throughput of each record, as a plain sum."""
    run = read_runs(three)[0]
    records = [json.loads(line) for line in (three[0] / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert run.along("samples", [0, 3, 6]) == [0, 120, 240]
    seconds = sum(40 / record["images_per_second"] for record in train)
    assert run.along("seconds", [6]) == [pytest.approx(seconds)]
    assert run.seconds == pytest.approx(seconds)
    assert run.series("knn_20", "eval") == [(r["step"], r["knn_20"]) for r in records if r["kind"] == "eval"]


def test_names_are_distinct(tmp_path):
    folders = [Path("/a/x/run"), Path("/b/x/run"), Path("/b/y/other"), Path("/c/run")]
    assert distinct_names(folders) == ["a/x/run", "b/x/run", "other", "c/run"]


# --- charts ----------------------------------------------------------------------------------------------------------


def test_smoothing_is_a_centred_mean():
    rng = np.random.default_rng(0)
    points = [(float(i), float(value)) for i, value in enumerate(rng.normal(size=200))]
    half = window(200) // 2
    assert half == 5
    for i, (x, value) in enumerate(smoothed(points)):
        reach = min(half, i, 199 - i)
        assert x == i
        assert value == pytest.approx(np.mean([y for _, y in points[i - reach : i + reach + 1]]))
    assert smoothed(points[:59]) == points[:59]


def test_thinned_lines_keep_every_peak():
    points = [(float(i), float(np.sin(i / 50))) for i in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    points[12_345] = (12_345.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert {points[0], points[-1], points[7_777], points[12_345]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)


finite = st.floats(-1e100, 1e100, allow_subnormal=True)


@given(
    st.lists(st.tuples(st.floats(0, 1e15), finite), min_size=1, max_size=30),
    st.booleans(),
    st.lists(finite, max_size=2),
)
def test_every_finite_line_is_drawn_with_finite_coordinates(points, log, borders):
    if log:
        points, borders = [(x, abs(y) + 1e-90) for x, y in points], [abs(y) + 1e-90 for y in borders]
    chart = draw(Chart("title", "x", [Line("A", "c0", sorted(points))], log, borders))
    paths = [path.get("d") for path in chart.iter("path")]
    assert all(re.fullmatch(r"(?:[MLHVh]-?[\d.]+(?: -?[\d.]+)?)+", path) for path in paths), paths
    assert any(path.get("class", "").startswith("line") for path in chart.iter("path"))


def test_a_chart_has_its_values_in_place():
    """The axis is linear, so the drawn coordinates are a straight function of the values; log: of their logarithms."""
    values = [1.0, 10.0, 100.0]
    for log, shares in ((False, [0, 9 / 99, 1]), (True, [0, 0.5, 1])):
        chart = draw(Chart("t", "x", [Line("A", "c0", list(enumerate(values)))], log))
        line = next(path.get("d") for path in chart.iter("path") if path.get("class") == "line c0")
        y = [float(pair.split()[1]) for pair in line[1:].split("L")]
        assert [(y[0] - each) / (y[0] - y[2]) for each in y] == pytest.approx(shares, abs=1e-3)
    chart = draw_intervals(
        "t", [("p", [Mark("A", "c0", 50.0, 40.0, 60.0, "50"), Mark("B", "c1", 70.0, None, None, "70")])]
    )
    paths = {path.get("class"): path.get("d") for path in chart.iter("path")}
    start, end = (float(x) for x in re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", paths["interval c0"]).groups())
    assert float(paths["point c0"][1:].split()[0]) == pytest.approx((start + end) / 2, abs=0.1)
    assert "interval c1" not in paths


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123456, "0.001235"),
        (12.5, "12.5"),
        (4000, "4,000"),
        (20_000, "20k"),
        (1.3e6, "1.3M"),
        (2.5e-7, "2.5e-07"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_colours_differ_for_every_kind_of_sight():
    """Letters have 4.5 : 1 on the page, and any two of the first four colours differ without red or green cones."""
    source = elements._source("page.css")
    # Machado et al. (2009), severity 1, on linear RGB: no long and no middle wavelength cones.
    protan = np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    )
    deutan = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    )

    def linear(code: str) -> np.ndarray:
        code = code if len(code) == 6 else "".join(2 * digit for digit in code)
        value = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)

    def lab(rgb: np.ndarray) -> np.ndarray:
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for scheme in re.findall(r"--page: .*?\}", source, re.DOTALL):
        background = linear(re.search(r"--page: #(\w+)", scheme)[1])
        colours = [linear(code) for code in re.findall(r"--c\d: #(\w+)", scheme)]
        assert len(colours) == 8
        weights = np.array([0.2126, 0.7152, 0.0722])
        for colour in colours:
            light, dark = sorted([weights @ colour, weights @ background], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5
        for matrix in (np.eye(3), protan, deutan):
            seen = [lab(matrix @ colour) for colour in colours[:4]]
            assert min(np.linalg.norm(seen[i] - seen[j]) for i in range(4) for j in range(i)) > 12


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(three, tmp_path, capsys):
    mine = tmp_path / "thesis.html"
    mine.write_text("<html>mine")
    (tmp_path / "link").symlink_to(three[0])
    cases = [
        ([tmp_path / "nowhere"], "nowhere does not exist; give the folder of a run"),
        ([three[0], mine], "thesis.html is a file; give the folder of a run"),
        ([tmp_path], "is not the folder of a run: it holds no recipe.yaml"),
        ([three[0], three[1], three[0]], "is given twice; give each run once"),
        ([three[0], tmp_path / "link"], "link is given twice (as "),
        ([*three, "--out", tmp_path], "cannot be written: Is a directory"),
        ([*three, "--out", mine / "page.html"], "cannot be written: Not a directory"),
        ([*three, "--out", mine], "exists and is no report of selfvil, so it is kept; give another file"),
        ([*three, "--out", "/dev/null"], "is no regular file"),
        ([*three, "--curve", tmp_path / "c.png"], "--curve draws the loss curve of one run"),
    ]
    for words, expected in cases:
        assert command("report", *words) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert mine.read_text() == "<html>mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "thesis.html"]
    with pytest.raises(UserError, match="no run is given"):
        selfvil.report([], tmp_path / "page.html")
    with pytest.raises(UserError, match="25 runs are given; a page holds at most 24"):
        selfvil.report([tmp_path] * 25)


def test_a_page_is_replaced_and_one_of_several_is_put_here(three, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("report", *three[:2]) == 0
    assert command("report", *three[1:]) == 0
    assert capsys.readouterr().out.count(f"report: {tmp_path / 'report.html'}") == 2
    assert "dino" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("value", [True, None, "3", math.nan, math.inf, 10**400, 1e101, [1]])
def test_what_is_no_number(value):
    assert number(value) is None
