"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, or states why not; the drawings are right; links work.

How blocks are run, and the comments that change it: `documentation`.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import documentation
from documentation import LANGUAGES, REPOSITORY, Block, Page, Runner, find_blocks, pages
from images import dicom, tifffile_bytes
from selfvil import cli
from selfvil.data.order import Order
from selfvil.errors import UserError
from selfvil.explain import explain
from selfvil.models import VisionLSTM
from selfvil.models.blocks import TRAVERSALS
from selfvil.recipe import Recipe

PAGES = pages()


# --- what pages find in their folder ---------------------------------------------------------------------------------


def picture(seed: int, kind: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth random image (width, height); `kind` changes its colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    noise[..., kind % 3] |= 128
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write_folder(folder: Path, classes: int, each: int, first: int) -> None:
    names = ["cat", "dog", "fox"][:classes] or [""]
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            picture(first + 100 * label + index, label).save(folder / name / f"{first + index:03d}.jpg")


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> Path:
    """Everything that a page may need, made by the commands that the pages themselves show."""
    root = tmp_path_factory.mktemp("examples")
    write_folder(root / "PHOTOS", 0, 24, 0)
    write_folder(root / "labelled" / "train", 3, 10, 1000)
    write_folder(root / "labelled" / "test", 3, 6, 2000)
    for part, first in (("train", 3000), ("test", 4000)):
        (root / "scenes" / part).mkdir(parents=True)
        for index in range(8):
            image = picture(first + index)
            image.save(root / "scenes" / part / f"{index:03d}.jpg")
            grey = np.asarray(image.convert("L"))
            mask = np.digitize(grey, [90, 160]).astype(np.uint8)
            mask[:3] = 255
            Image.fromarray(mask).save(root / "scenes" / part / f"{index:03d}.mask.png")
    shutil.copytree(root / "scenes", root / "PAINTED")
    (root / "xray").mkdir()
    for index in range(12):
        values = np.random.default_rng(index).integers(0, 4096, (64, 64), dtype=np.uint16)
        Image.fromarray(values).save(root / "xray" / f"{index:03d}.png")
    for name in ("tiles", "cells", "scans"):
        (root / name).mkdir()
    for index in range(12):
        values = np.random.default_rng(index).integers(0, 4096, (48, 48, 12), dtype=np.uint16)
        (root / "tiles" / f"{index:03d}.tif").write_bytes(tifffile_bytes(values, planarconfig="contig"))
        np.save(root / "cells" / f"{index:03d}.npy", values[:, :, :5].astype(np.float32))
        (root / "scans" / f"{index:03d}.dcm").write_bytes(dicom(values[:, :, 0], RescaleIntercept=-1024))
    with pytest.MonkeyPatch.context() as patch, documentation.folder(root, patch):
        runner = Runner(patch)
        blocks = find_blocks(
            "```bash\n"
            "selfvil pack labelled/train shards/train --workers 1\n"
            "selfvil pack labelled/test shards/test --classes shards/train/classes.txt --workers 1\n"
            "selfvil pack scenes/train masks/train --workers 1\n"
            "selfvil pack scenes/test masks/test --workers 1\n"
            "selfvil pretrain photos_laptop run.out=runs/photos_laptop monitor.pictures_every=2\n"
            "selfvil export runs/photos_laptop exported\n"
            "```\n"
        )
        for block in blocks:
            runner.run(block)
    return root


NEEDS = {
    "tiles",
    "cells",
    "scans",
    "PHOTOS",
    "PAINTED",
    "labelled",
    "scenes",
    "xray",
    "shards",
    "masks",
    "runs",
    "exported",
}


def prepare(page: Page, examples: Path, folder: Path) -> None:
    for name in page.needs:
        assert name in NEEDS, f"{page.name}: a test has no {name}"
        shutil.copytree(examples / name, folder / name)


# --- the blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    for block in page.blocks:
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: language {block.language!r}; use one of {sorted(LANGUAGES)}"
        assert block.comments.get("not run", "a reason"), f"{where}: `not run` needs a reason"


@pytest.mark.parametrize("page", [page for page in PAGES if page.blocks], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, examples, tmp_path, monkeypatch):
    skipped = {"not run", "slow"}
    blocks = [each for each in page.blocks if not skipped & each.comments.keys() and each.language != "text"]
    if not blocks:
        return
    prepare(page, examples, tmp_path)
    with documentation.folder(tmp_path, monkeypatch):
        runner = Runner(monkeypatch)
        for block in blocks:
            try:
                runner.run(block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error


def slow_blocks() -> list[tuple[Page, Block]]:
    return [(page, block) for page in PAGES for block in page.blocks if "slow" in block.comments]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), slow_blocks(), ids=lambda each: getattr(each, "name", None) or each.line)
def test_a_slow_block_runs_in_a_shell(page, block, examples, tmp_path):
    prepare(page, examples, tmp_path)
    for name in ("launch", "eval", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    script = "set -e\n" + "".join(f"{line} {' '.join(block.words)}\n" for line in _lines(block.text))
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == block.status, done.stdout + done.stderr


def _lines(text: str) -> list[str]:
    lines = [re.sub(r"\s+#.*$", "", line) for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_works_on_real_photos(shared_data, examples, tmp_path, monkeypatch):
    """All of its commands with its own network, on 600 photos, with a thirtieth of its budget."""
    page = next(page for page in PAGES if page.path.name == "tutorial.md")
    photos = tmp_path / "PHOTOS"
    photos.mkdir()
    for path in sorted((shared_data / "photos").glob("*.tar")):
        subprocess.run(["tar", "xf", path, "-C", photos, "--wildcards", "*.jpg"], check=True)
    shutil.copytree(examples / "PAINTED", tmp_path / "PAINTED")
    with documentation.folder(tmp_path, monkeypatch):
        runner = Runner(monkeypatch, shrink=False)
        for block in page.blocks:
            if "not run" not in block.comments:
                if "selfvil eval" not in block.text:  # whose words are settings of an evaluation
                    block.comments["test"] = block.comments.get("test", "") + " budget.samples=640 run.threads=1"
                runner.run(block)
        assert len(list(Path("maps").glob("*.png"))) == 6
        assert Path("segmentation/segment_pretrained.png").exists()


# --- the finder and the runner themselves ----------------------------------------------------------------------------


def test_blocks_and_their_comments_are_found():
    text = (
        "text\n\n<!-- not run: it needs 8 GPUs -->\n\n```bash\na \\\n  b\n```\n\n```python title=\"x.py\"\n1\n```\n"
        "<!-- slow -->\n<!-- test: a.b=1 exit=75 -->\n  ```bash\n  c 'd e'  # f\n  ```\n"
        "<!-- slow -->\nword\n```yaml\n```\n"
    )  # fmt: skip
    first, second, third, fourth = find_blocks(text)
    assert (first.language, first.text, first.comments) == ("bash", "a \\\n  b\n", {"not run": "it needs 8 GPUs"})
    assert (second.title, second.text, second.comments) == ("x.py", "1\n", {})
    assert (third.words, third.status, "slow" in third.comments) == (["a.b=1"], 75, True)
    assert list(documentation.commands(third.text)) == [["c", "d e"]]
    assert fourth.comments == {}, "a comment above another line is not of this block"
    with pytest.raises(ValueError, match="line 1"):
        list(find_blocks("```bash\n"))


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```bash\nselfvil explain optim.base_lrr\n```\n", "status 2"),
        ("```bash\nmake coffee\n```\n", "selfvil commands only"),
        ("```python\nassert 1 == 2\n```\n", ""),
        ("```yaml\noptim: {bach_size: 3}\n```\n", "batch_size"),
    ],
)
def test_a_wrong_block_fails(block, error, monkeypatch, tmp_path):
    with documentation.folder(tmp_path, monkeypatch), pytest.raises((AssertionError, UserError), match=error):
        Runner(monkeypatch).run(next(find_blocks(block)))


# --- links, pages, drawings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_of_the_repository_exist(name):
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (REPOSITORY / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_commands_in_the_text_exist(page):
    """`section.key` in a sentence is a key of a recipe, and `selfvil NAME` a command."""
    text = re.sub(r"^ *```.*?^ *```", "", page.path.read_text(), flags=re.MULTILINE | re.DOTALL)
    other = {"summary", "folder", "metrics"}  # attributes of a Run
    other |= {"json", "py", "yaml", "safetensors", "onnx", "pt2"}  # files
    sections = "|".join(Recipe.model_fields)
    for key in re.findall(rf"`((?:{sections})\.[a-zA-Z_.]+)(?!\w)", text):
        if key.split(".")[1] not in other | {"key", "NAME"}:
            explain(key.rstrip("."))  # raises UserError for a key that does not exist
    commands = {each.name or each.callback.__name__ for each in cli.app.registered_commands}
    named = set(re.findall(r"`selfvil ([a-z]+)", text))
    assert named <= commands, f"{page.name} names commands that do not exist: {named - commands}"


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 130


def test_the_site_builds_strictly(tmp_path):
    """In a fresh process, as `make docs`; pages load nothing from the network."""
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=550,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "ssl")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    html = sorted((tmp_path / "site").rglob("*.html"))
    assert len(html) > 25
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?:[^\"\s>]+)")
    for page in html:
        text = page.read_text(encoding="utf-8")
        external = [each for each in loaded.findall(text) if "canonical" not in each]
        assert not external, f"{page.name} loads {external}"
        assert "$$" not in text, f"{page.name}: an equation is not converted"
    recipe = (tmp_path / "site" / "reference" / "recipe.html").read_text()
    assert "optim.base_lr" in recipe
    assert "eval.knn.k" in recipe
    commands = (tmp_path / "site" / "reference" / "cli.html").read_text()
    for command in (each.name or each.callback.__name__ for each in cli.app.registered_commands):
        assert f"selfvil {command}" in commands


@pytest.fixture(scope="module")
def drawings() -> ModuleType:
    spec = spec_from_file_location("drawings", REPOSITORY / "docs" / "drawings.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name, each in TRAVERSALS.items() if each.directions == 1])
def test_drawn_scans_are_those_of_whole_blocks(drawings, name):
    """Measured differently than in the drawing: by changes of a whole block's output in the order of the grid."""
    orders = drawings.scan_orders(name)
    model = VisionLSTM(img_size=(3, 4), patch_size=1, in_chans=1, num_classes=0, embed_dim=16, depth=2,
                       traversal=name, conv="none").eval().double()  # fmt: skip
    blocks = [(pair, block) for pair in model.blocks for block in (pair.first, pair.second)]
    layout = drawings.TokenLayout((3, 4))
    for (pair, block), (order,) in zip(blocks, orders, strict=True):
        pair_of_one = type(pair).forward.__get__(pair)
        pair.first, kept = block, (pair.first, pair.second)
        pair.second = None
        x = torch.randn(1, 12, 16, dtype=torch.float64)
        base = pair_of_one(x, layout)
        reached = torch.zeros(12, dtype=torch.int64)
        for token in range(12):
            other = x.clone()
            other[0, token] += torch.randn(16)  # a constant would be removed by the norm
            reached += (pair_of_one(other, layout) != base).any(dim=2)[0]
        pair.first, pair.second = kept
        assert reached.argsort().tolist() == order


def test_drawn_scans_of_several_directions(drawings):
    rows = list(range(12))
    columns = [row * 4 + column for column in range(4) for row in range(3)]
    assert drawings.scan_orders("bidirectional")[0] == [rows, rows[::-1]]
    assert drawings.scan_orders("quad_shared")[0] == [rows, rows[::-1], columns, columns[::-1]]


def test_drawn_weights_are_those_of_the_recurrence(drawings):
    """For equal queries and keys, the weight of j in i is the product of the forget gates between them, normalised."""
    weights = drawings.mlstm_weights(0.0, reverse=False, num_tokens=6)
    decay = np.array([[0.5 ** (i - j) if j <= i else 0.0 for j in range(6)] for i in range(6)])
    scores = decay * 4 / 2  # q k / sqrt(D)
    expected = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(drawings.mlstm_weights(0.0, reverse=True, num_tokens=6), weights[::-1, ::-1], rtol=1e-5)


def test_drawn_order_and_tokens(drawings):
    both = [drawings.spans(12, 4, rank, 2, 0, 3) for rank in (0, 1)]
    assert [span for pair in zip(*both, strict=True) for span in pair] == [
        (0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)
    ]  # fmt: skip
    numbers = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" [^>]*fill="#ffffff"[^>]*>(\d+)<', drawings.order())
    ids = [int(id) for _, _, id in sorted(numbers, key=lambda each: (float(each[1]), float(each[0])))]
    expected = Order(12, 0).ids(np.arange(24)).tolist()
    assert ids == expected[:12] * 2 + expected[12:] * 2
    assert drawings.pooled_tokens("bilateral_concat", 12, 0) == (set(), {0, 11}, 2)
    assert drawings.pooled_tokens("registers", 12, 4) == ({0, 1, 2, 3}, set(), 4)
