"""Compiling the CPU kernels: once, by one process, and with torch instead whenever it fails."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfvil.errors import UserError
from selfvil.ops import mlstm
from selfvil.ops.cpu import build

REAL = next((path for name in build.COMPILERS if (path := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, no memory of earlier builds, and a compiler that does not optimise, which is faster."""
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    monkeypatch.setenv("SELFVIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build.SWITCH, raising=False)
    build.kernels.cache_clear()
    yield tmp_path / "cache" / "kernels"
    build.kernels.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """$CXX is a script that notes each call in a file and then runs the real compiler. Returns the notes."""
    notes = tmp_path / "calls"
    notes.touch()
    write_compiler(tmp_path / "compiler", f'echo "$@" >> {notes}\nexec {REAL} "$@"', monkeypatch)
    return lambda: notes.read_text().splitlines()


def write_compiler(path: Path, script: str, monkeypatch) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))


def inputs():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    i, f = torch.randn(2, 1, 2, 9)
    return q, k, v, i, f


def assert_torch_is_used(caplog, reason: str) -> None:
    """Results are torch's, and the log has the reason once."""
    tensors = inputs()
    with caplog.at_level(logging.WARNING, "selfvil"):
        for _ in range(2):
            assert torch.equal(mlstm(*tensors), mlstm(*tensors, backend="parallel"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("CPU kernels are not used, and torch computes instead, which is slower: ")
    assert reason in messages[0]


@needs_compiler
def test_built_once_with_one_line_in_the_log(compiler, cache, caplog):
    with caplog.at_level(logging.INFO, "selfvil"):
        for _ in range(3):
            build.kernels.cache_clear()  # as a new process
            torch.testing.assert_close(mlstm(*(x := inputs())), mlstm(*x, backend="reference"), rtol=1e-4, atol=1e-5)
    assert len(compiler()) == 1
    lines = [r.getMessage() for r in caplog.records if "building" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("building CPU kernels, once for this machine: ")
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]  # nothing temporary


@needs_compiler
def test_two_processes_at_once_build_once(compiler):
    code = f"from selfvil.ops.cpu import build; build.FLAGS = {build.FLAGS}; assert build.available()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert len(compiler()) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "text"])
def test_a_damaged_library_is_built_again(damage, compiler, cache):
    assert build.available()
    build.kernels.cache_clear()
    (library,) = cache.glob("*.so")
    contents = bytearray(library.read_bytes())
    contents[len(contents) // 2] ^= 255
    library.unlink()  # it remains mapped in this process
    library.write_bytes({"truncated": contents[:5000], "empty": b"", "changed": contents, "text": b"x" * 100}[damage])
    assert build.available()
    assert len(compiler()) == 2


@needs_compiler
def test_a_newer_compiler_or_other_flags_build_again(compiler, cache, tmp_path, monkeypatch):
    assert build.available()
    Path(tmp_path / "compiler").write_text((tmp_path / "compiler").read_text() + "# a new version\n")
    build.kernels.cache_clear()
    assert build.available()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-math-errno"))
    build.kernels.cache_clear()
    assert build.available()
    assert len(compiler()) == 3


@needs_compiler
@pytest.mark.parametrize("level", list(build.LEVELS))
def test_the_switch_limits_the_instruction_set(level, compiler, monkeypatch, cache):
    if not build._processor_features().issuperset(build.LEVELS[level][0]):
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv(build.SWITCH, level)
    assert build.available()
    assert [path.name.split("-")[0] for path in cache.glob("*.so")] == [level]


def test_an_unknown_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "yes")
    with pytest.raises(UserError, match="SELFVIL_NATIVE='yes' is unknown; choose one of: 0, 1, amx, avx512_bf16"):
        build.available()


@needs_compiler
def test_turned_off_compiles_nothing(compiler, cache, monkeypatch, caplog):
    monkeypatch.setenv(build.SWITCH, "0")
    with caplog.at_level(logging.WARNING, "selfvil"):
        assert torch.equal(mlstm(*(x := inputs())), mlstm(*x, backend="parallel"))
    assert not compiler()
    assert not cache.exists()
    assert not caplog.records


def test_no_compiler(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_torch_is_used(caplog, "there is no C++ compiler (c++, g++, clang++); install one, or set CXX")


def test_a_compiler_that_does_not_exist(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "c--")
    assert_torch_is_used(caplog, "the compiler of CXX='c--' does not exist")


def test_a_compiler_that_fails(monkeypatch, caplog, tmp_path):
    write_compiler(tmp_path / "compiler", "echo 'vector.h:1: error: no such vector' >&2; exit 1", monkeypatch)
    assert_torch_is_used(caplog, "compiler failed: vector.h:1: error: no such vector")
    assert not list((tmp_path / "cache").glob("**/*.so"))


@needs_compiler
def test_a_compiler_without_the_best_instruction_set(monkeypatch, cache, tmp_path):
    best, second, *_ = build._levels("")
    unknown = next(flag for flag in build.LEVELS[best][1] if flag not in build.LEVELS[second][1])
    refuse = f"case \"$*\" in *{unknown}*) echo 'error: unrecognized option' >&2; exit 1;; esac"
    write_compiler(tmp_path / "compiler", f'{refuse}\nexec {REAL} "$@"', monkeypatch)
    assert build.available()
    assert [path.name.split("-")[0] for path in cache.glob("*.so")] == [second]


@needs_compiler
def test_an_operating_system_that_forbids_the_best_instruction_set(monkeypatch, cache):
    best, second, *_ = build._levels("")
    denied = type("Library", (), {"selfvil_start": lambda self: 1})()
    opened = build._open
    monkeypatch.setattr(build, "_open", lambda path: denied if path.name.startswith(f"{best}-") else opened(path))
    assert build.available()
    assert sorted(path.name.split("-")[0] for path in cache.glob("*.so")) == sorted([best, second])


def test_a_compiler_that_never_ends(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.2)
    write_compiler(tmp_path / "compiler", "exec sleep 60", monkeypatch)
    assert_torch_is_used(caplog, "took more than 0.2 s")


def test_a_compiler_that_writes_no_library(monkeypatch, caplog, tmp_path):
    write_compiler(tmp_path / "compiler", "exit 0", monkeypatch)
    assert_torch_is_used(caplog, "was compiled but cannot be loaded")


@needs_compiler
def test_a_folder_that_cannot_be_written(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SELFVIL_CACHE", str(tmp_path / "file"))
    assert_torch_is_used(caplog, "cannot write to")


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(monkeypatch, caplog, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("SELFVIL_CACHE", str(tmp_path / "locked"))
    assert_torch_is_used(caplog, "Permission denied")


def test_no_home_folder(monkeypatch, caplog):
    monkeypatch.delenv("SELFVIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert_torch_is_used(caplog, "set SELFVIL_CACHE to a folder")


@needs_compiler
def test_no_openmp(monkeypatch, caplog):
    def missing(path):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: missing(path) if "torch" in path else ctypes.PyDLL(path))
    assert_torch_is_used(caplog, "torch's OpenMP library was not found")
