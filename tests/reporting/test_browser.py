"""The page in a real browser: errors, requests, charts, widths, contrast, choice of the axis, values at the pointer.

The tests need Chromium, and are skipped with a warning where there is none.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest

from selfvil.reporting.report import report

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

CONTRAST = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const shape = element.getBoundingClientRect();
    if (!own || !shape.width || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(rgb(element instanceof SVGElement ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("SELFVIL_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        warnings.warn("no Chromium: the page of `selfvil report` is not opened; apt-get install chromium", stacklevel=1)
        pytest.skip("Chromium is missing (apt-get install chromium, or set SELFVIL_CHROMIUM)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = driver.chromium.launch(executable_path=path, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module", params=[1, 3])
def page_file(request, three, tmp_path_factory) -> Path:
    return report(three[: request.param], tmp_path_factory.mktemp("page") / "page.html")


def opened(browser, file: Path, **options):
    """A new page, and a list to which what must not happen is added."""
    page = browser.new_context(viewport=PHONE, **options).new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: problems.append(f"request: {request.url[:80]}"))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    allowed = f"request: {file.as_uri()}"[:89]
    return page, [problem for problem in problems if problem != allowed and not problem.startswith("request: data:")]


def unfold(page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_the_page_is_complete(browser, page_file):
    """No error, no request; every chart has finite, visible lines; pictures, captions, headings and table heads."""
    page, problems = opened(browser, page_file)
    assert problems == []
    paths = page.eval_on_selector_all("svg.chart path", "all => all.map(each => each.getAttribute('d'))")
    assert len(paths) > 100
    for path in paths:
        assert re.fullmatch(r"(?:[MLHVh]-?[\d.]+(?: -?[\d.]+)?)+", path), path
    charts = page.eval_on_selector_all("svg.chart", """all => all.map(each => [
        each.querySelector("title").textContent, each.querySelectorAll(".line, .point, .dots").length,
        [...each.querySelectorAll("text")].map(text => text.textContent).join(" ")])""")  # fmt: skip
    assert len(charts) > 30
    for title, marks, texts in charts:
        assert len(title) > 20
        assert marks >= 1, title
        assert "nan" not in (title + texts).lower()
        assert "undefined" not in texts
    visible = page.locator("svg.chart:visible")
    boxes = [visible.nth(index).bounding_box() for index in range(visible.count())]
    assert len(boxes) > 10
    assert all(box["width"] > 300 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    lines = page.eval_on_selector_all(
        "svg.chart .line",
        """all => all.map(each => [each.getBoundingClientRect(),
        each.closest("svg.chart").getBoundingClientRect()]).filter(([line, chart]) => chart.width)
        .map(([line, chart]) => [line.width + line.height, line.left >= chart.left && line.right <= chart.right])""",
    )
    assert sum(extent > 50 for extent, _ in lines) > 10  # a block's memory is one point in a network of one block
    assert all(inside for _, inside in lines)
    images = page.eval_on_selector_all("img", "all => all.map(each => [each.naturalWidth, each.alt])")
    assert len(images) >= 4
    assert all(width > 10 and len(alt) > 8 for width, alt in images)
    figures = page.eval_on_selector_all("figure", "all => all.map(each => each.querySelector('figcaption, .note'))")
    assert figures
    assert None not in figures
    captions = page.locator("figcaption").all_text_contents()
    assert all(caption.strip() for caption in captions)
    assert page.locator("h1").count() == 1
    assert page.locator("section > h2").count() == page.locator("nav a").count() >= 10
    assert page.locator("table").count() == page.locator("table > caption").count() > 2
    assert page.locator("th:not([scope])").count() == 0


def test_nothing_is_wider_than_a_phone(browser, page_file):
    page, _ = opened(browser, page_file)
    unfold(page)
    assert overflow(page) <= 0
    for axis in ("step", "seconds", "samples"):
        page.locator(f"[for=axis-{axis}]").first.click()
        visible = "all => all.filter(each => each.offsetWidth).map(each => each.className)"
        shown = page.eval_on_selector_all(".over", visible)
        assert set(shown) == {f"over {axis}"}
        assert overflow(page) <= 0
    smallest = page.eval_on_selector_all(
        "svg.chart text",
        """all => Math.min(...all
        .filter(each => each.getBoundingClientRect().width)
        .map(each => parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getScreenCTM().a))""",
    )
    assert smallest > 10.5
    page.set_viewport_size(DESKTOP)
    assert overflow(page) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, page_file, scheme):
    """WCAG 2.2, level AA: 4.5 to 1, for every text of every element, in charts too."""
    page, _ = opened(browser, page_file, color_scheme=scheme)
    unfold(page)
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 200
    assert [found for found in ratios if found[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_values_at_the_pointer_are_those_of_the_metrics(browser, three, tmp_path):
    page, _ = opened(browser, report(three[:2], tmp_path / "page.html"))
    chart = page.locator(".over.samples svg.chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.93, box["y"] + box["height"] / 2)  # the end of the plot
    lines = page.locator("#value").text_content().splitlines()
    assert lines[0].endswith("images seen")
    for line, letter, folder in zip(lines[1:], "AB", three):
        records = [json.loads(record) for record in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if record["kind"] == "train"]
        assert line.startswith(letter)
        assert float(line.split()[1]) == pytest.approx(losses[-1], rel=5e-3)
    page.mouse.move(5, 5)
    assert not page.locator("#value").is_visible()


def test_the_page_needs_no_script_and_prints(browser, page_file):
    page, problems = opened(browser, page_file, java_script_enabled=False)
    assert problems == []
    assert page.locator(".over.samples svg.chart").first.is_visible()
    page.locator("[for=axis-step]").first.click()
    assert page.locator(".over.step svg.chart").first.is_visible()
    assert not page.locator(".over.samples svg.chart").first.is_visible()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator(".over.step svg.chart").first.is_visible()
    page.set_viewport_size({"width": 700, "height": 1000})  # about A4 without its margins
    assert overflow(page) <= 0
    assert page.pdf(format="A4")[:5] == b"%PDF-"
