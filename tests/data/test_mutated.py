"""Mutated image files: no crash, every lost sample is in the ledger, and what a decoder repaired is named.

Each file of four formats is changed once: bits are flipped, bytes replaced, removed or repeated, or the file is cut.
Without a checksum made before, a change may give other pixels silently; with the CRC-32 of an index it never does.
"""

import os
import struct
import tarfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.images import encode

from selfvil.data.check import examine
from selfvil.data.images import open_images
from selfvil.data.index import open_shards
from selfvil.data.inspect import inspect
from selfvil.data.ledger import Ledger
from selfvil.data.loader import ordered_batches
from selfvil.data.pack import pack
from selfvil.data.processes import map_processes
from selfvil.data.read import MAX_PIXELS, DamagedImage, decode_image
from selfvil.data.views import CenterCrop

KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}
VIEW = CenterCrop(16, (0.5,) * 3, (0.5,) * 3)


def sound(seed: int, kind: str) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((70, 50), Image.Resampling.BICUBIC)) + rng.normal(0, 5, (50, 70, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    options = {"compression": ("tiff_lzw", "tiff_adobe_deflate", "raw")[seed % 3]} if kind == "TIFF" else {}
    return encode(image, kind, **options)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    broken, at = bytearray(data), int(rng.integers(len(data)))
    change = rng.integers(5)
    if change == 0:
        for place in rng.integers(0, len(data), 1 + rng.integers(4)):
            broken[place] ^= 1 << rng.integers(8)
    elif change == 1:
        broken[at : at + 8] = rng.bytes(8)
    elif change == 2:
        del broken[at : at + int(rng.integers(1, 60))]
    elif change == 3:
        broken[at:at] = broken[at : at + int(rng.integers(1, 60))]
    else:
        del broken[at:]
    return bytes(broken) if bytes(broken) != data else data[:-1]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("few"), 120)


def folder_of(folder: Path, count: int) -> Path:
    """`count` mutated files in FOLDER/mutated, the same files before in FOLDER/sound."""
    rng = np.random.default_rng(0)
    for name in ("sound", "mutated"):
        (folder / name).mkdir()
    for i in range(count):
        extension, kind = list(KINDS.items())[i % 4]
        data = sound(i, kind)
        (folder / "sound" / f"{i:05d}.{extension}").write_bytes(data)
        (folder / "mutated" / f"{i:05d}.{extension}").write_bytes(mutated(data, rng))
    return folder


def outcome(folder: Path, name: str) -> tuple[str, bool, bool]:
    """Whether training decodes a mutated file ("lost" or "read"), whether other pixels result, and whether damage of it
    is reported."""
    data = (folder / "mutated" / name).read_bytes()
    try:
        reported = bool(examine(data).damage)
    except DamagedImage:
        reported = True
    try:
        pixels = np.asarray(decode_image(data))
    except DamagedImage:
        return "lost", False, reported
    before = np.asarray(decode_image((folder / "sound" / name).read_bytes()))
    return "read", not np.array_equal(pixels, before), reported


def examine_all(folder: Path, record: Path) -> Counter[tuple[str, str, bool, bool]]:
    """Counts by format and outcome. Raises AssertionError where something was lost without a record."""
    names = sorted(path.name for path in (folder / "mutated").iterdir())
    # In worker processes: a crash of a decoder would break the pool.
    chunks = [range(start, min(start + 50, len(names))) for start in range(0, len(names), 50)]
    call = partial(_outcome, folder, names)
    outcomes = [each for part in map_processes(call, chunks, 1) for each in part]
    lost = {name for name, (fate, _, _) in zip(names, outcomes) if fate == "lost"}
    batches = list(ordered_batches(open_images(folder / "mutated"), VIEW, batch_size=50, skip_damaged=True))
    ledger = Ledger(record, len(names), max_bad=1)
    ledger.record([bad for batch in batches for bad in batch.bad])
    assert {bad.key for batch in batches for bad in batch.bad} == lost, "samples lost = samples in the ledger"
    assert len(ledger) == len(lost) == len(names) - sum(len(batch.ids) for batch in batches)
    packed = pack(folder / "mutated", record / "packed", workers=1)
    refused = {name for name, _ in packed.skipped}
    assert packed.samples + len(refused) == len(names)
    named = refused | {name for name, _ in packed.warnings}
    assert {name for name, (_, _, reported) in zip(names, outcomes) if reported} <= named
    report = inspect(folder / "mutated", workers=1).report
    assert {name for name, _ in report.damaged} == refused
    assert {name for name, _ in report.damaged + report.repaired} >= lost
    return Counter((Path(name).suffix[1:], *result) for name, result in zip(names, outcomes))


def _outcome(folder: Path, names: list[str], i: int) -> tuple[str, bool, bool]:
    return outcome(folder, names[i])


def require_no_silent_change(counts: Counter[tuple[str, str, bool, bool]]) -> None:
    """A PNG has checksums: each change of its pixels is reported. Others report at least what libraries notice."""
    silent = Counter({kind: sum(counts[kind, "read", True, reported] for reported in (False,)) for kind in KINDS})
    print({kind: sum(n for key, n in counts.items() if key[0] == kind) for kind in KINDS}, "silent:", dict(silent))
    assert silent["png"] == 0
    for kind in KINDS:
        assert sum(n for key, n in counts.items() if key[0] == kind and (key[1] == "lost" or key[3])) > 0


def test_mutated_files_in_a_folder(few, tmp_path):
    require_no_silent_change(examine_all(few, tmp_path))


@pytest.mark.slow
def test_2000_mutated_files_in_a_folder(tmp_path):
    require_no_silent_change(examine_all(folder_of(tmp_path, 2000), tmp_path))


def lost_in_shards(count: int, folder: Path) -> None:
    """Mutations of members after they were indexed: each is refused, and is in the ledger."""
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    for i in range(count):
        extension, kind = list(KINDS.items())[i % 4]
        (folder / "images" / f"{i:05d}.{extension}").write_bytes(sound(i, kind))
    pack(folder / "images", folder / "shards", samples_per_shard=1000, workers=1)
    changed = set()
    for shard in sorted((folder / "shards").glob("*.tar")):
        status, content = shard.stat(), bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        for member in members:
            if rng.random() < 0.8:
                at = member.offset_data + int(rng.integers(member.size))
                content[at] ^= 1 << rng.integers(8)
                changed.add(member.name.partition(".")[0])
        shard.write_bytes(content)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    batches = list(ordered_batches(open_shards(folder / "shards"), VIEW, batch_size=50, skip_damaged=True))
    ledger = Ledger(folder, count, max_bad=1)
    ledger.record([bad for batch in batches for bad in batch.bad])
    assert {bad.key for batch in batches for bad in batch.bad} == changed
    assert len(ledger) == len(changed) > count / 2


def test_mutated_members_of_indexed_shards(tmp_path):
    lost_in_shards(60, tmp_path)


@pytest.mark.slow
def test_2000_mutated_members_of_indexed_shards(tmp_path):
    lost_in_shards(2000, tmp_path)


def bomb(kind: str) -> bytes:
    """A small file whose header declares 12,000 x 12,000 pixels, more than MAX_PIXELS."""
    data, side = bytearray(sound(2, kind)), 12_000
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<II", side, side)
    elif kind == "PPM":
        return b"P6 12000 12000 255\n" + bytes(data[-100:])
    else:
        for tag in (256, 257):
            at = next(
                at
                for at in range(len(data))
                if data[at : at + 4] in (struct.pack("<HH", tag, kind_) for kind_ in (3, 4))
            )
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("kind", [*KINDS.values(), "BMP", "PPM"])
def test_bombs_of_every_format_are_refused_from_the_header(kind):
    assert MAX_PIXELS < 12_000**2
    for decode in (decode_image, examine):
        with pytest.raises(DamagedImage, match="12000 × 12000 pixels are more than the limit"):
            decode(bomb(kind))
