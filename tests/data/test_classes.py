"""Names of classes in the folders of shards: where they are read from, and conflicts between two folders."""

import pytest
from PIL import Image

from selfvil.data.classes import class_names, read_classes
from selfvil.data.index import Shards, open_shards
from selfvil.data.pack import pack
from selfvil.errors import UserError
from tars import labelled, write_tar


def folder(path, names: str | None, first: int = 0) -> Shards:
    """One shard of three classes, and a classes.txt with one-letter names if `names` is given."""
    path.mkdir()
    write_tar(path / "a.tar", labelled(6, first))
    if names is not None:
        (path / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return open_shards(path)


def test_a_list_agrees_with_a_longer_one(tmp_path):
    short, long, bare = folder(tmp_path / "a", "ab"), folder(tmp_path / "b", "abc"), folder(tmp_path / "c", None)
    for parts in ((short, long, bare), (bare, long, short)):
        classes = class_names(*parts)
        assert classes is not None
        assert classes.names == ["a", "b", "c"]
        assert classes.file == tmp_path / "b" / "classes.txt"
    assert class_names(bare) is None


def test_different_lists_are_refused_with_both_files_and_the_first_difference(tmp_path):
    one, other = folder(tmp_path / "a", "abc"), folder(tmp_path / "b", "acd")
    message = (
        rf"label 1 is 'b' by {tmp_path}/a/classes.txt and 'c' by {tmp_path}/b/classes.txt.*"
        rf"--classes {tmp_path}/a/classes.txt"
    )
    with pytest.raises(UserError, match=message):
        class_names(one, other)
    both = open_shards([tmp_path / "a", tmp_path / "b"])  # one part from two folders
    with pytest.raises(UserError, match=message):
        class_names(both)


def test_shards_that_are_links_have_the_classes_of_their_folder(tmp_path):
    folder(tmp_path / "a", "abc")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.tar").symlink_to(tmp_path / "a" / "a.tar")
    classes = class_names(open_shards(tmp_path / "links"))
    assert classes is not None
    assert classes.names == ["a", "b", "c"]


def test_lists_written_by_other_programs(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat \r\nb\r\n\r\n")
    assert read_classes(file) == ["a cat", "b"]
    file.write_bytes(b"caf\xe9\n")
    assert read_classes(file) == ["caf\\xe9"]
    with pytest.raises(UserError, match=r"none\.txt cannot be read: No such file"):
        read_classes(tmp_path / "none.txt")


def test_shards_of_folders_with_different_classes_are_not_packed_together(tmp_path):
    for name, labels in {"a": "xyz", "b": "xz"}.items():
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("RGB", (8, 8), (ord(label), ord(name), 0)).save(tmp_path / name / label / "1.png")
        pack(tmp_path / name, tmp_path / f"{name}-packed", workers=1)
    with pytest.raises(UserError, match=r"label 1 is 'y' by .* and 'z' by"):
        pack([tmp_path / "a-packed", tmp_path / "b-packed"], tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
