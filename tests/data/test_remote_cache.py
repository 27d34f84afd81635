"""The cache of downloaded files: one download for all processes, a limit that holds, and no file removed in use."""

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from selfvil.data import index
from selfvil.data.remote.cache import Cache, Full
from selfvil.errors import UserError

FORK = multiprocessing.get_context("fork")
SIZE = 1000


def content(name: str) -> bytes:
    return name.encode() * (SIZE // len(name))


def writer(name: str, log: Path | None = None, pause: float = 0.0, half: bool = False):
    """Writes the rest of the content; with `half`, is stopped in the middle."""

    def write(file) -> None:
        have = file.seek(0, os.SEEK_END)
        if log is not None:
            with open(log, "a") as lines:
                lines.write(f"{name} {have}\n")
        data = content(name)
        middle = max(have, SIZE // 2)
        file.write(data[have:middle])
        file.flush()
        time.sleep(pause)
        if half:
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(data[middle:])

    return write


def filled(cache: Cache, name: str, **how) -> bytes:
    descriptor = cache.fill(name, SIZE, writer(name, **how))
    try:
        return os.pread(descriptor, SIZE, 0)
    finally:
        os.close(descriptor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 3 * SIZE)


def in_process(action, *args):
    process = FORK.Process(target=action, args=args)
    process.start()
    return process


def test_a_file_is_downloaded_once_and_then_opened(cache, tmp_path):
    log = tmp_path / "log"
    assert cache.open("aa", SIZE) is None
    assert filled(cache, "aa", log=log) == content("aa")
    assert filled(cache, "aa", log=log) == content("aa")
    assert log.read_text() == "aa 0\n"
    assert names(cache.folder) == [f"aa-{SIZE}.tar"]


def test_many_processes_download_each_file_once(cache, tmp_path):
    log = tmp_path / "log"

    def use(number: int) -> None:
        for name in ("aa", "bb"):
            assert filled(cache, name, log=log, pause=0.05) == content(name)

    processes = [in_process(use, number) for number in range(6)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert sorted(log.read_text().splitlines()) == ["aa 0", "bb 0"]


def test_a_download_that_ends_while_a_process_looks_for_the_file_is_not_repeated(cache, tmp_path, monkeypatch):
    log, real, missed = tmp_path / "log", Cache.open, []

    def open_late(self, name, size):
        found = real(self, name, size)
        if found is None and not missed:  # now another process downloads it
            missed.append(name)
            in_process(lambda: filled(Cache(cache.folder), "aa", log=log)).join(10)
        return found

    monkeypatch.setattr(Cache, "open", open_late)
    assert filled(cache, "aa", log=log) == content("aa")
    assert log.read_text().splitlines() == ["aa 0"]
    assert names(cache.folder) == [f"aa-{SIZE}.tar"]


def test_without_waiting_a_file_that_another_process_downloads_is_left_to_it(cache):
    started = FORK.Event()

    def slow() -> None:
        def write(file) -> None:
            started.set()
            time.sleep(1)
            writer("aa")(file)

        os.close(cache.fill("aa", SIZE, write))

    process = in_process(slow)
    assert started.wait(10)
    assert cache.fill("aa", SIZE, writer("aa"), wait=False) is None
    assert filled(cache, "aa") == content("aa")  # waits
    process.join(10)
    assert process.exitcode == 0


def test_who_waits_for_a_download_goes_on_although_others_read_the_file(cache):
    started, opened = threading.Event(), []

    def write(file) -> None:
        started.set()
        time.sleep(0.3)
        writer("aa")(file)

    download = threading.Thread(target=lambda: opened.append(cache.fill("aa", SIZE, write)))
    download.start()
    assert started.wait(5)
    waiting = [threading.Thread(target=lambda: opened.append(cache.fill("aa", SIZE, write))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for thread in (download, *waiting):
        thread.join(5)
    assert len(opened) == 4  # and the first is still open
    for descriptor in opened:
        os.close(descriptor)


def test_after_a_killed_download_the_next_process_continues(cache, tmp_path):
    log = tmp_path / "log"
    process = in_process(lambda: filled(cache, "aa", log=log, half=True))
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert names(cache.folder) == [f"aa-{SIZE}.part"]
    assert filled(cache, "aa", log=log) == content("aa")
    assert log.read_text() == f"aa 0\naa {SIZE // 2}\n"
    assert names(cache.folder) == [f"aa-{SIZE}.tar"]


def test_the_least_recently_used_file_is_removed(cache):
    for name in ("aa", "bb", "cc"):
        filled(cache, name)
        time.sleep(0.02)
    os.close(cache.open("aa", SIZE))
    filled(cache, "dd")
    assert names(cache.folder) == [f"{name}-{SIZE}.tar" for name in ("aa", "cc", "dd")]


def test_a_file_in_use_by_another_process_is_not_removed(cache):
    for name in ("aa", "bb", "cc"):
        filled(cache, name)
        time.sleep(0.02)
    opened, finish = FORK.Event(), FORK.Event()

    def read() -> None:
        descriptor = cache.open("aa", SIZE)
        opened.set()
        assert finish.wait(20)
        assert os.pread(descriptor, SIZE, 0) == content("aa")

    process = in_process(read)
    assert opened.wait(10)
    filled(cache, "dd")
    filled(cache, "ee")
    assert names(cache.folder) == [f"{name}-{SIZE}.tar" for name in ("aa", "dd", "ee")]
    finish.set()
    process.join(10)
    assert process.exitcode == 0
    filled(cache, "ff")
    assert names(cache.folder) == [f"{name}-{SIZE}.tar" for name in ("dd", "ee", "ff")]


def test_the_limit_holds_where_all_files_are_in_use(cache):
    opened = [cache.fill(name, SIZE, writer(name)) for name in ("aa", "bb", "cc")]
    with pytest.raises(Full, match="3,000"):
        cache.fill("dd", SIZE, writer("dd"))
    assert names(cache.folder) == [f"{name}-{SIZE}.tar" for name in ("aa", "bb", "cc")]
    os.close(opened.pop())
    filled(cache, "dd")
    assert len(names(cache.folder)) == 3
    for descriptor in opened:
        os.close(descriptor)


def test_a_file_larger_than_the_cache(cache):
    with pytest.raises(Full, match="whole cache"):
        cache.fill("aa", 4 * SIZE, writer("aa"))
    assert names(cache.folder) == []


def test_the_folder_stays_the_same_while_a_cache_is_used(tmp_path, monkeypatch):
    """Its threads may still download when the environment changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    cache = Cache()
    os.close(cache.fill("aa", SIZE, writer("aa")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    os.close(cache.fill("bb", SIZE, writer("bb")))
    assert not (tmp_path / "b").exists()


def test_no_part_is_made_of_a_file_larger_than_the_cache(cache, monkeypatch):
    """Another process that lists the folder at that moment would find it."""
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(str(path)), real(path, *rest))[1])
    with pytest.raises(Full):
        cache.fill("a", cache.limit + 1, writer("a"))
    assert opened
    assert not [path for path in opened if path.endswith(".part")]


def test_parts_of_dead_processes_count_and_are_removed(cache):
    in_process(lambda: filled(cache, "aa", half=True)).join(10)
    for name in ("bb", "cc"):
        filled(cache, name)
    assert len(names(cache.folder)) == 3
    filled(cache, "dd")
    assert f"aa-{SIZE}.part" not in names(cache.folder)


def test_processes_share_the_limit(cache):
    """Eight processes use nine files in a cache of three: the sum never exceeds the limit."""
    most = FORK.Value("l", 0)

    def use(number: int) -> None:
        for step in range(12):
            name = "abcdefghi"[(number + 5 * step) % 9] * 2
            with contextlib.suppress(Full):  # the others use all three
                assert filled(cache, name, pause=0.002) == content(name)
            with most.get_lock(), cache._space():
                complete = [name for name in names(cache.folder) if name.endswith(".tar")]
                most.value = max(most.value, len(complete))

    processes = [in_process(use, number) for number in range(8)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert most.value <= 3


def test_a_full_disk_leaves_nothing(cache):
    def write(file) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        cache.fill("aa", SIZE, write)
    assert names(cache.folder) == []
    assert filled(cache, "aa") == content("aa")


def test_a_failed_download_is_continued(cache, tmp_path):
    def write(file) -> None:
        file.write(content("aa")[:100])
        raise UserError("the store failed")

    with pytest.raises(UserError, match="store failed"):
        cache.fill("aa", SIZE, write)
    log = tmp_path / "log"
    assert filled(cache, "aa", log=log) == content("aa")
    assert log.read_text() == "aa 100\n"


def test_a_read_only_folder(cache):
    cache.folder.mkdir()
    cache.folder.chmod(0o555)
    with pytest.raises(PermissionError):
        cache.fill("aa", SIZE, writer("aa"))


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        Cache(tmp_path / "file", SIZE).fill("aa", SIZE, writer("aa"))


def test_links_are_not_followed_and_foreign_files_stay(cache, tmp_path):
    cache.folder.mkdir()
    target = tmp_path / "target"
    target.write_bytes(b"x" * SIZE)
    (cache.folder / f"aa-{SIZE}.part").symlink_to(target)
    (cache.folder / f"zz-{5 * SIZE}.tar").symlink_to(target)
    (cache.folder / "notes.txt").write_text("keep")
    with pytest.raises(OSError, match="symbolic"):
        cache.fill("aa", SIZE, writer("aa"))
    for name in ("bb", "cc", "dd", "ee"):
        filled(cache, name)
    assert target.read_bytes() == b"x" * SIZE
    assert (cache.folder / "notes.txt").exists()


def test_a_child_that_is_forked_during_a_download_does_not_keep_the_lock(cache):
    finish = FORK.Event()
    children = []

    def write(file) -> None:
        children.append(in_process(finish.wait, 20))
        writer("aa")(file)

    os.close(cache.fill("aa", SIZE, write))
    began = time.monotonic()
    assert filled(cache, "aa") == content("aa")
    (cache.folder / f"aa-{SIZE}.tar").unlink()
    assert filled(cache, "aa") == content("aa")
    assert time.monotonic() - began < 5
    finish.set()
    children[0].join(10)


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "selfvil" / "remote"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(UserError, match=r"data\.cache"):
        Cache().folder  # noqa: B018 - a property


def test_a_wrong_size_in_the_environment_is_refused_before_the_store_is_asked(monkeypatch):
    monkeypatch.setenv("SELFVIL_REMOTE_CACHE_GB", "lots")
    monkeypatch.setattr(index, "find_remote", lambda *_: pytest.fail("the store was asked"))
    with pytest.raises(UserError, match="SELFVIL_REMOTE_CACHE_GB is 'lots'; expected"):
        index.open_shards("https://host/a.tar")
