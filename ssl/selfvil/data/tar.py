"""List the members of a tar file, strictly.

`tarfile`, and every reader built on it, treats a damaged header as the end of the archive: one flipped byte loses the
rest of a shard silently. Here, each header's checksum must be correct, each member must be inside the file, and the
end-of-archive mark must be present and be the end.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax (`path` and `size` records), GNU long names, pre-POSIX v7.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from selfvil.data.remote.urls import Location
from selfvil.errors import UserError

BLOCK = 512
"""Bytes in a tar block: headers take one, data is padded to a multiple of it."""

_ZEROS = bytes(BLOCK)
_REGULAR = b"0\x007"  # regular, regular in v7, contiguous
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_LARGEST_EXTENSION = 1 << 20  # bytes of a long name or a pax header; real ones are far smaller
_FOREIGN = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it with gunzip",
    b"BZh": "it is compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "it is compressed with xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it with unzstd",
    b"PK\x03\x04": "it is a zip file; unpack it and run `selfvil pack` on the folder",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file with `git lfs pull`",
}


class Member(NamedTuple):
    """A regular file in a tar: its name, the offset of its bytes, and their number."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, path: Location) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in order. `path`, or a URL, names it in messages.

    The caller may move the file's position between two members.

    Raises:
        UserError: the file is no tar, is truncated, or has a damaged header; names the file and the offset in bytes.
    """
    length = file.seek(0, os.SEEK_END)
    if length == 0:
        raise UserError(f"{path} is empty (0 bytes), not a tar file; copy it again")
    offset, name, size = 0, None, None  # name and size: of the next member, from an extension header
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _truncated(path, offset, f"the file ends at byte {length} without the end-of-archive mark")
        if header == _ZEROS:
            return _check_end(file, path, offset)
        if not _checksum_holds(header):
            raise _no_header(path, offset, header)
        kind = header[156:157]
        stored = _number(header[124:136], path, offset) if size is None else size
        data = offset + BLOCK
        end = data if kind in _WITHOUT_DATA else data + -(-stored // BLOCK) * BLOCK
        if end > length:
            raise _truncated(path, offset, f"the member at this byte needs {end - length} bytes more than the file has")
        if kind in b"Lx":
            if stored > _LARGEST_EXTENSION:
                raise _damaged(path, offset, f"an extension header of {stored} bytes")
            extension = file.read(stored)
            if kind == b"L":
                name = _text(extension)
            else:
                records = _pax(extension, path, offset)
                name = records.get("path", name)
                size = _number(records["size"].encode(), path, offset, base=10) if "size" in records else size
        elif kind == b"S":
            raise _sparse(path, offset)
        elif kind not in b"Kg":  # long link names and global pax records do not concern regular files
            if kind in _REGULAR:
                own = _name(header)
                if not (kind == b"\0" and own.endswith("/")):  # a folder, in v7
                    yield Member(own if name is None else name, data, stored)
            name = size = None
        offset = end


def _checksum_holds(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    try:
        expected = int(field, 8)
    except ValueError:
        return False
    # The field itself counts as eight spaces. Some old writers summed signed bytes, which differs for bytes from 128.
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    if unsigned == expected:
        return True
    high = sum(byte > 127 for byte in header[:148] + header[156:])
    return high > 0 and unsigned - 256 * high == expected


def _number(field: bytes, path: Location, offset: int, base: int = 8) -> int:
    """A size: octal text (decimal in pax records), or binary after a byte 0x80 (GNU, for 8 GiB and more)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.strip(b" \0") or b"0", base)
    except ValueError:
        value = -1
    if value < 0:
        raise _damaged(path, offset, f"a header with the size {field[:20]!r}")
    return value


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name  # GNU uses this field differently


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes, path: Location, offset: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`; LENGTH includes itself."""
    records: dict[str, str] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 10 else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or length > len(data) or not value.endswith(b"\n"):
            raise _damaged(path, offset, "a pax header with a malformed record")
        if key.startswith(b"GNU.sparse"):
            raise _sparse(path, offset)
        records[_text(key)] = _text(value[:-1])
        data = data[length:]
    return records


def _check_end(file: BinaryIO, path: Location, mark: int) -> None:
    """Raise UserError unless only zeros follow the end-of-archive mark: other data would be lost silently."""
    file.seek(mark)
    offset = mark
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            first = offset + len(chunk) - len(chunk.lstrip(b"\0"))
            raise UserError(
                f"{path} continues at byte {first}, after the end-of-archive mark at byte {mark}: a block was zeroed, "
                "or tar files were joined with `cat`. Copy it again, or pack its images again with `selfvil pack`"
            )
        offset += len(chunk)


def _no_header(path: Location, offset: int, header: bytes) -> UserError:
    if offset:
        return _damaged(path, offset, "a header with a wrong checksum")
    for magic, advice in _FOREIGN.items():
        if header.startswith(magic):
            return UserError(f"{path} is not a plain tar file: {advice}")
    return UserError(f"{path} is not a tar file: no valid tar header at byte 0; expected a WebDataset shard")


def _damaged(path: Location, offset: int, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what} at byte {offset}; copy the shard again, or leave it out")


def _truncated(path: Location, offset: int, what: str) -> UserError:
    return UserError(f"{path} was cut at byte {offset}: {what}; copy the shard again, or leave it out")


def _sparse(path: Location, offset: int) -> UserError:
    return UserError(f"{path} stores a sparse member at byte {offset}; write the tar again without --sparse")
