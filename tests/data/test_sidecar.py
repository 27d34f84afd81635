"""The saved index of a shard: detection of changes, and hostile index files."""

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from selfvil.data.index import index_shards, open_shards
from tars import labelled, png, write_tar


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", labelled(5))


def sidecar(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npz")


# --- shards that changed ------------------------------------------------------------------------------------------


def flip(shard: Path, value: int) -> None:
    """Change one byte of an image; the file keeps its size."""
    content = bytearray(shard.read_bytes())
    content[content.index(png(value)) + 30] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(0, value))


def test_images_that_changed_are_counted(shard, caplog):
    open_shards(shard)
    flip(shard, 1)
    flip(shard, 3)
    shards = open_shards(shard)
    assert shards.changed == f"{shard} changed since it was last indexed: 2 of 5 samples have other bytes"
    assert f"{shards.changed}. If this was not intended, copy the shards again" in caplog.text
    caplog.clear()
    assert open_shards(shard).changed == ""
    assert not caplog.text


def test_labels_that_changed_are_counted(shard, caplog):
    open_shards(shard)
    write_tar(shard, [(name, b"7" if name == "k2.cls" else data) for name, data in labelled(5)])
    os.utime(shard, ns=(0, 1))
    assert open_shards(shard).changed.endswith(": 1 of 5 samples have other labels")


def test_several_shards_and_another_number_of_samples(tmp_path, caplog):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", labelled(5))
    open_shards(tmp_path)
    flip(tmp_path / "1.tar", 0)
    write_tar(tmp_path / "2.tar", labelled(7))
    found = open_shards(tmp_path).changed
    assert found == (
        f"2 shards changed since they were last indexed, the first is {tmp_path / '1.tar'}: "
        "3 of 12 samples have other bytes, there are 12 samples, 10 before"
    )


@pytest.mark.parametrize("how", ["touched", "renamed members", "copied"])
def test_equal_images_are_no_change(shard, caplog, how):
    open_shards(shard)
    if how == "touched":
        os.utime(shard, ns=(0, 12345))
    elif how == "copied":
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, ns=(0, 12345))
    else:
        write_tar(shard, [(f"other-{name}", data) for name, data in labelled(5)])
    assert open_shards(shard).changed == ""
    assert not caplog.text


def test_differences_from_the_shards_of_a_run_are_described(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", labelled(4, first=4 * i))
    before = open_shards(tmp_path)
    known = len(before), before.digests
    paths = [tmp_path / f"{i}.tar" for i in (1, 0, 2)]
    assert open_shards(paths).describe_change(*known) == "the shards are the same, in another order"
    fewer = open_shards(paths[:2]).describe_change(*known)
    assert fewer == "there are 8 images, 12 before; there are 2 shards, 3 before"
    flip(tmp_path / "1.tar", 5)
    changed = open_shards(tmp_path).describe_change(*known)
    assert changed.startswith(f"1 of 3 shards hold other images or labels, the first is {tmp_path / '1.tar'}")
    assert "1 of 4 samples have other bytes" in changed
    assert open_shards(tmp_path).describe_change(12, None) == "images or labels differ"


# --- labels -------------------------------------------------------------------------------------------------------


def test_a_huge_label_is_ignored(tmp_path, caplog):
    """pack would write a table of 10^8 classes, which has 889 MB."""
    write_tar(tmp_path / "a.tar", [*labelled(5), ("z.png", png(9)), ("z.cls", b"99999999")])
    shards = open_shards(tmp_path)
    assert (shards.labels[5], shards.num_classes) == (-1, 3)
    assert "1 labels are no class numbers from 0 to 1000000 and are ignored (first: z: '99999999')" in caplog.text


def test_the_report_counts_the_labels_that_occur(tmp_path):
    files = [pair for i in range(20) for pair in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % (i % 10 + 1)))]
    report = index_shards(write_tar(tmp_path / "a.tar", files))
    assert (report.classes, report.labels, report.labelled) == (10, (1, 10), 20)
    assert "20 labelled, labels 1 to 10: 10 classes" in str(report)


# --- hostile sidecars ---------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """Replace members of a sidecar by other bytes."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (content | {f"{name}.npy": data for name, data in members.items()}).items():
            archive.writestr(name, data)


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


SHAPE = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
HOSTILE = {
    "a huge shape": {"labels": npy(SHAPE.format("<i8", "(10000000000,)"))},
    "a shape that overflows": {"labels": npy(SHAPE.format("<i8", "(4611686018427387904, 4)"))},
    "a negative shape": {"labels": npy(SHAPE.format("<i8", "(-5,)"), bytes(40))},
    "two negative sides": {"labels": npy(SHAPE.format("<i8", "(-5, -1)"), bytes(40))},
    "a nested header": {"labels": npy("(" * 117)},
    "objects": {"labels": npy(SHAPE.format("|O", "(5,)"), bytes(40))},
    "no bytes a value": {"labels": npy(SHAPE.format("|V0", "(5,)"))},
    "a matrix": {"labels": array(np.zeros((5, 1), np.int64))},
    "negative offsets": {"blocks": array(np.full(5, -1, np.int64))},
    "offsets beyond the end": {"blocks": array(np.full(5, 2**32 - 1, np.uint32))},
    "sizes beyond the end": {"sizes": array(np.full(5, 2**31 - 1, np.uint32))},
    "a huge label": {"labels": array(np.full(5, 10**8))},
    "labels below -1": {"labels": array(np.full(5, -2))},
    "fewer names": {"keys": array(np.frombuffer(b"a\0b", np.uint8))},
    "many names": {"keys": array(np.zeros(4000, np.uint8))},
    "a negative count": {"ignored": array(np.array(-1))},
    "a count that is no number": {"ignored": array(np.array(np.inf))},
    "no JSON": {"several": array(np.frombuffer(b"[[[[", np.uint8))},
    "other JSON": {"several": array(np.frombuffer(json.dumps([[[["a"]], "b"]]).encode(), np.uint8))},
    "no stamp": {"stamp": array(np.zeros(0, np.int64))},
    "a stamp that is no list": {"stamp": array(np.array(2))},
    "more members": {"more": array(np.zeros(3))},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_sidecar_is_built_again(shard, what):
    expected = open_shards(shard)
    rewrite(sidecar(shard), **HOSTILE[what])
    tracemalloc.start()
    shards = open_shards(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert shards.fingerprint == expected.fingerprint
    assert [shards.key(i) for i in range(5)] == [f"k{i}" for i in range(5)]
    assert shards.ignored == 0
    assert not shards.several
    np.testing.assert_array_equal(np.load(sidecar(shard))["labels"], [0, 1, 2, 0, 1])


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("member", ["labels", "keys", "stamp"])
def test_a_sidecar_that_expands_is_refused_unread(shard, member, stale):
    """A small file can expand to more zeros than fit into memory."""
    expected = open_shards(shard).fingerprint
    rewrite(sidecar(shard), zipfile.ZIP_DEFLATED, **{member: array(np.zeros(5_000_000, np.int64))})
    if stale:
        os.utime(shard, ns=(0, 12345))
    tracemalloc.start()
    assert open_shards(shard).fingerprint == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_a_sidecar_larger_than_its_shard_is_refused_unread(shard):
    expected = open_shards(shard).fingerprint
    rewrite(sidecar(shard), labels=array(np.zeros(5_000_000, np.int64)))
    tracemalloc.start()
    assert open_shards(shard).fingerprint == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_members_that_overlap_are_refused(shard):
    """A zip directory may list the same bytes several times."""
    expected = open_shards(shard).fingerprint
    content = bytearray(sidecar(shard).read_bytes())
    first = content.index(b"PK\1\2")
    content[first + 24 : first + 28] = (2**31 - 1).to_bytes(4, "little")
    sidecar(shard).write_bytes(content)
    assert open_shards(shard).fingerprint == expected
