"""`selfvil inspect`: every finding of a folder that was made with known faults, and the same through the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.images import encode
from typer.testing import CliRunner

from selfvil.cli import app
from selfvil.data.inspect import inspect
from selfvil.data.pack import pack
from selfvil.data.sheet import inspection_sheet
from selfvil.errors import UserError


def scene(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def without_codes(data: bytes) -> bytes:
    """A JPEG with a gap in its codes: libjpeg warns, and Pillow returns pixels."""
    middle = data.index(b"\xff\xda") + (len(data) - data.index(b"\xff\xda")) // 2
    return data[:middle] + data[middle + 40 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """20 images in two classes: 14 sound and different ones, and the faults that the tests name."""
    folder = tmp_path_factory.mktemp("source") / "images"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
    for seed in range(14):
        kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[seed % 3]
        data = encode(scene(seed, 96 if seed < 10 else 40), kind)
        (folder / ("ant", "bee")[seed % 2] / f"{seed:02d}.{extension}").write_bytes(data)
    shutil.copy(folder / "ant" / "00.jpg", folder / "ant" / "equal.jpg")
    shutil.copy(folder / "bee" / "03.jpg", folder / "ant" / "conflict.jpg")
    (folder / "bee" / "near.jpg").write_bytes(encode(scene(6).resize((64, 48)), "JPEG", quality=50))
    (folder / "bee" / "gap.jpg").write_bytes(without_codes(encode(scene(52), "JPEG")))
    (folder / "bee" / "cut.png").write_bytes(encode(scene(51), "PNG")[:400])
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    (folder / "ant" / "deep.png").write_bytes(encode(deep, "PNG"))
    return folder


def test_all_findings_of_a_folder(folder):
    seen = []
    report = inspect(folder, workers=2, progress=lambda *step: seen.append(step)).report
    assert seen[-1] == (20, 20)
    assert report.images == 20
    assert report.bytes == sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert report.formats == {"JPEG": 9, "PNG": 6, "WEBP": 4}
    assert report.modes == {"RGB": 18, "1 x uint16": 1}
    assert report.depths == {8: 18, 16: 1}
    assert report.sizes["128 x 96"] == 13
    assert report.shorter_side == {"32-63": 5, "64-127": 14}
    assert report.width == (64, 128, 128)
    assert report.classes == [(0, "ant", 10), (1, "bee", 10)]
    assert [name for name, _ in report.damaged] == ["bee/cut.png"]
    assert [name for name, _ in report.repaired] == ["bee/gap.jpg"]
    assert "Corrupt JPEG data" in report.repaired[0][1]
    assert report.duplicates == [["ant/00.jpg", "ant/equal.jpg"], ["ant/conflict.jpg", "bee/03.jpg"]]
    assert report.conflicts == [["ant/conflict.jpg", "bee/03.jpg"]]
    assert report.near == [["ant/06.jpg", "bee/near.jpg"]]
    assert len(report.problems) == 4
    json.dumps(report.to_json())


def test_shards_of_a_folder_have_the_same_findings(folder, tmp_path):
    pack(folder, tmp_path / "shards", samples_per_shard=7, workers=1)
    report = inspect(tmp_path / "shards", workers=1).report
    assert report.images == 19, "the damaged image is not packed"
    assert report.formats == {"JPEG": 9, "PNG": 6, "WEBP": 4}
    assert (len(report.duplicates), len(report.conflicts), len(report.near), len(report.repaired)) == (2, 1, 1, 1)
    assert all(".tar:" in name for group in report.duplicates for name in group)


def test_a_member_that_changed_in_its_shard_is_damaged(folder, tmp_path):
    pack(folder, tmp_path / "shards", workers=1)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    before = inspect(tmp_path / "shards", workers=1).report
    status = shard.stat()
    data = bytearray(shard.read_bytes())
    data[data.index(b"\xff\xda", 600) + 200] ^= 4
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # the index still counts as valid
    after = inspect(tmp_path / "shards", workers=1).report
    assert before.damaged == []
    assert len(after.damaged) == 1
    assert "CRC-32" in after.damaged[0][1]


def test_images_shared_with_another_source(folder, tmp_path):
    other = tmp_path / "test"
    other.mkdir()
    shutil.copy(folder / "ant" / "02.webp", other / "same.webp")
    (other / "like.jpg").write_bytes(encode(scene(5), "JPEG", quality=60))
    (other / "new.jpg").write_bytes(encode(scene(99), "JPEG"))
    report = inspect(folder, against=other, workers=1).report
    assert report.shared == [("ant/02.webp", "same.webp")]
    assert report.near_shared == [("bee/05.webp", "like.jpg")]
    assert any("also in" in problem for problem in report.problems)
    assert report.images == 20


@pytest.mark.parametrize("packed", ["both", "one"])
def test_images_made_from_the_same_files(tmp_path, packed):
    """Resized by `pack` they are other files; the hash of their source is the same. Names are not compared."""
    for part, numbers in (("train", range(6)), ("test", range(4, 10))):
        (tmp_path / part).mkdir()
        for place, number in enumerate(numbers):
            (tmp_path / part / f"{place}.jpg").write_bytes(encode(scene(number), "JPEG"))
    pack(tmp_path / "train", tmp_path / "resized", size=32, workers=1)
    pack(tmp_path / "test", tmp_path / "kept", workers=1)
    names = {line.split("\t")[0]: Path(line.split("\t")[1]).name for line in
             (tmp_path / "resized" / "sources.tsv").read_text().splitlines()}  # fmt: skip
    against = tmp_path / ("kept" if packed == "both" else "test")
    report = inspect(tmp_path / "resized", against=against, workers=1).report
    assert report.shared == []
    assert sorted(names[ours] for ours, _ in report.same_source) == ["4.jpg", "5.jpg"]
    assert any("made from the same files" in problem for problem in report.problems)
    assert "from the same files as in" in str(report)
    assert inspect(tmp_path / "kept", against=tmp_path / "test", workers=1).report.same_source == []  # but equal


def test_the_sheet_shows_sound_and_damaged_images(folder, tmp_path):
    found = inspect(folder, workers=1)
    out = inspection_sheet(tmp_path / "sheet.png", found)
    with Image.open(out) as sheet:
        assert sheet.height > 6 * 128, "two rows of random images, damaged ones, two of equal and one of near ones"
    assert len(found.random) == 19


def test_the_command(folder, tmp_path):
    clean = tmp_path / "clean"
    shutil.copytree(folder, clean)
    for name in ("ant/equal.jpg", "ant/conflict.jpg", "bee/gap.jpg", "bee/cut.png"):
        (clean / name).unlink()
    run = CliRunner().invoke
    result = run(app, ["inspect", str(clean), "--workers", "1"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "no problems"), result.output
    result = run(
        app, ["inspect", str(folder), "--workers", "1", "--json", f"{tmp_path}/a.json", "--sheet", f"{tmp_path}/a.png"]
    )
    assert result.exit_code == 1, result.output
    assert "bee/gap.jpg" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["damaged"][0][0] == "bee/cut.png"
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_mistakes_are_answered_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        inspect(tmp_path / "missing")
    code = subprocess.run(
        [sys.executable, "-m", "selfvil", "inspect", str(tmp_path), "--json", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert code.returncode == 2
    assert "Traceback" not in code.stderr
