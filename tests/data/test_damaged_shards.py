"""Every kind of damage of a tar is detected before training starts."""

import gzip
import os
import zlib
from pathlib import Path

import pytest
import webdataset

from selfvil.data.index import open_shards
from selfvil.errors import UserError
from tars import labelled, png, write_tar


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", labelled(5))


def test_a_truncated_tar_is_an_error(tmp_path, shard):
    """Also if it is truncated between two members, which tarfile and webdataset do not detect."""
    content = shard.read_bytes()
    end = content.rindex(png(4)) + -(-len(png(4)) // 512) * 512
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1, 256), end + 511]:
        cut.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            open_shards(cut)
        assert str(cut) in str(error.value)
        assert "byte" in str(error.value)
        assert not Path(f"{cut}.index.npz").exists()
    cut.write_bytes(content[: end + 1024])
    assert len(open_shards(cut)) == 5


def test_every_flipped_byte_of_a_header_is_an_error(tmp_path, shard):
    content = bytearray(shard.read_bytes())
    second = content.index(b"k1.png")
    broken = tmp_path / "broken.tar"
    # Except for the 8 bytes of the checksum, whose padding may vary.
    for place in [*range(0, 148, 7), *range(156, 512, 17)]:
        changed = bytearray(content)
        changed[second + place] ^= 0x04
        broken.write_bytes(changed)
        with pytest.raises(UserError, match=f"header with a wrong checksum at byte {second}"):
            open_shards(broken)
    for place in range(148, 154):
        changed = bytearray(content)
        changed[second + place] ^= 0x01
        broken.write_bytes(changed)
        with pytest.raises(UserError, match=f"header with a wrong checksum at byte {second}"):
            open_shards(broken)


def test_flipped_data_is_detected_by_the_crc(tmp_path, shard):
    changed = bytearray(shard.read_bytes())
    changed[changed.index(png(2)) + 30] ^= 1
    shard.write_bytes(changed)
    shards = open_shards(shard)  # indexed with the flipped byte, which is then the expected one
    assert zlib.crc32(shards.read(2)) != zlib.crc32(png(2))


def test_a_zeroed_header_and_joined_tars_are_errors(tmp_path, shard):
    content = bytearray(shard.read_bytes())
    second = content.index(b"k1.png")
    content[second : second + 512] = bytes(512)
    (tmp_path / "zeroed.tar").write_bytes(content)
    with pytest.raises(
        UserError, match=f"continues at byte {second + 512}, after the end-of-archive mark at byte {second}"
    ):
        open_shards(tmp_path / "zeroed.tar")
    (tmp_path / "joined.tar").write_bytes(shard.read_bytes() * 2)
    with pytest.raises(UserError, match="joined"):
        open_shards(tmp_path / "joined.tar")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello", "cut at byte 0"),
        (b"<html>" + bytes(1000), "not a tar file"),
        (gzip.compress(os.urandom(2000)), "gunzip"),
        (b"BZh9" + bytes(1000), "bunzip2"),
        (b"\xfd7zXZ" + bytes(1000), "unxz"),
        (b"\x28\xb5\x2f\xfd" + bytes(1000), "unzstd"),
        (b"PK\x03\x04" + bytes(1000), "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n".ljust(600), "git lfs pull"),
        (bytes(10240), "no samples"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, content, words):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        open_shards(path)
    assert str(path) in str(error.value)


def hostile_header(kind: bytes, size: int, name: bytes = b"a.png") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % (sum(header) + 256)
    return bytes(header)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (hostile_header(b"0", 2**80), "cut"),
        (hostile_header(b"L", 2**21) + bytes(2**21), "extension"),
        (hostile_header(b"S", 512) + bytes(512), "sparse"),
        (hostile_header(b"x", 6) + b"9 a=b\n".ljust(512, b"\0"), "malformed"),
        (hostile_header(b"x", 9) + b"0 path=a\n".ljust(512, b"\0"), "malformed"),
        (hostile_header(b"x", 600) + b"9" * 600 + bytes(424), "malformed"),
        (hostile_header(b"x", 512) + b"9" * 511 + b" ", "malformed"),
        (hostile_header(b"x", 12) + b"12 size=abc\n".ljust(512, b"\0") + hostile_header(b"0", 0), "size"),
        (hostile_header(b"x", 12) + b"12 size=-10\n".ljust(512, b"\0") + hostile_header(b"0", 0), "size"),
        (hostile_header(b"x", 22) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0"), "sparse"),
    ],
)
def test_hostile_headers(tmp_path, content, words):
    path = tmp_path / "x.tar"
    path.write_bytes(content + bytes(1024))
    with pytest.raises(UserError, match=words):
        open_shards(path)


def test_a_name_ends_at_its_first_nul(tmp_path):
    record = b"17 path=a\0b.png\n"
    pax = hostile_header(b"x", 16) + (b"16" + record[2:]).ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(
        pax + hostile_header(b"0", 0, b"x.png") + hostile_header(b"0", 0, b"y.png") + bytes(1024)
    )
    shards = open_shards(tmp_path)
    assert [shards.key(i) for i in range(len(shards))] == ["y"]


def test_shards_without_images_and_duplicates_are_errors(tmp_path):
    write_tar(tmp_path / "text.tar", [("a.txt", b"x"), ("b.left.jpg", b"x")])
    with pytest.raises(UserError, match=r"holds no image \(only a\.txt, b\.left\.jpg\)"):
        open_shards(tmp_path / "text.tar")
    write_tar(tmp_path / "twice.tar", [("a.png", png(0)), ("a.png", png(1))])
    with pytest.raises(UserError, match=r"a\.png twice"):
        open_shards(tmp_path / "twice.tar")
    write_tar(tmp_path / "apart.tar", [("a.png", png(0)), ("b.png", png(1)), ("a.png", png(2))])
    assert len(open_shards(tmp_path / "apart.tar")) == 3, "as webdataset has it: two samples of one name"


def test_all_damaged_shards_are_named_at_once(tmp_path):
    for i in range(8):
        write_tar(tmp_path / f"{i}.tar", labelled(2))
    for i in range(1, 8):
        os.truncate(tmp_path / f"{i}.tar", 1024)
    with pytest.raises(UserError) as error:
        open_shards(tmp_path)
    assert [f"{i}.tar" in str(error.value) for i in range(8)] == [False, *[True] * 5, False, False]
    assert "and 2 more" in str(error.value)


def test_shards_of_webdataset_are_read(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/w-%06d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"sample{i:04d}", "png": png(i), "cls": i % 4, "json": {"caption": "x"}})
    shards = open_shards(f"{tmp_path}/w-{{000000..000002}}.tar")
    assert [shards.read(i) for i in range(10)] == [png(i) for i in range(10)]
    assert shards.labels.tolist() == [i % 4 for i in range(10)]
    assert shards.key(9) == "sample0009"
